"""Whose fault is it? Read an answer and say what it means: the fault table as code.

An outage, a 401 or a wrong URL is never a record's fault; a 400 on one record is never the target's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from pipelines.changes.record import ChangeRecord
from pipelines.delivery.outcome import Accepted, Fallback, Items, Pause, Rejected, Split, TargetFault, Verdict
from pipelines.delivery.retrying import retry_after_seconds
from pipelines.delivery.routing import ResultsRules, RouteOperation
from pipelines.delivery.target import Answer, NoAnswer

_EXCERPT_CHARACTERS = 500
# 420, 423 and 430 are how some APIs say 429 or "locked"; 421 is another server's request (RFC 9110 §15.5.20).
_RETRYABLE = frozenset({408, 420, 421, 423, 425, 429, 430, 500, 502, 503, 504})
# 419, 440 and 498: sessions and tokens that have ended, unofficially.
# These speak of the target's load or of the connection; no record can bring them about again and again.
_NEVER_THE_RECORDS = frozenset({408, 420, 421, 423, 425, 429, 430, 503})
_CREDENTIALS = frozenset({401, 403, 407, 419, 440, 498})
# Nothing that a record holds can bring these about: method, URL, representation or contract are wrong.
_CONFIGURATION = frozenset({402, 405, 406, 411, 415, 426, 428, 505})


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingRules:
    """What a target's file says about its answers."""

    success_on: frozenset[int] = frozenset()
    retryable_status_codes: frozenset[int] = frozenset()
    drop_on: frozenset[int] = frozenset()
    max_retry_after: float = 3600.0


def judge(
    answer: Answer | NoAnswer,
    *,
    operation: RouteOperation,
    changes: Sequence[ChangeRecord],
    rules: JudgingRules,
    now: datetime,
) -> Verdict:
    """Return what *answer* means for the request that carried *changes*; *now* reads a dated `Retry-After`."""
    if isinstance(answer, NoAnswer):
        unknown = answer.may_have_arrived
        return TargetFault(reason=answer.reason, outcome_unknown=unknown, may_be_the_records=unknown)
    status, alone = answer.status, len(changes) == 1
    if status in rules.drop_on:
        return _refused(answer, alone=alone)
    if status in rules.success_on or 200 <= status < 300:
        return _read_success(answer, operation=operation, changes=changes, rules=rules)
    if status in rules.retryable_status_codes or status in _RETRYABLE:
        return _fault(answer, rules=rules, now=now)
    if status in _CREDENTIALS:
        return Pause(cause="credentials", reason=f"answered {_say(answer)}: credentials refused", status=status)
    if 300 <= status < 400:
        location = answer.headers.get("location", "nowhere")
        reason = f"answered {status}, a redirect to {location[:200]}; redirects are never followed: set base_url"
        return Pause(cause="configuration", reason=reason, status=status)
    if status in (404, 410):
        return _read_absence(answer, operation=operation, alone=alone)
    if status in _CONFIGURATION:
        return Pause(cause="configuration", reason=f"answered {_say(answer)}: method, path or format", status=status)
    if status == 409 and operation.on_conflict is not None and alone:
        return Fallback(kind=operation.on_conflict)
    if 400 <= status < 500:
        return _refused(answer, alone=alone)
    return _fault(answer, rules=rules, now=now)


def excerpt(body: bytes) -> str:
    """Return the beginning of an answer's body, printable: enough to see why, too little to keep a person's data."""
    text = body[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text)[:_EXCERPT_CHARACTERS].strip()


def _say(answer: Answer) -> str:
    said = excerpt(answer.body)
    return f"{answer.status} ({said[:200]})" if said else str(answer.status)


def _fault(answer: Answer, *, rules: JudgingRules, now: datetime) -> TargetFault:
    asked = retry_after_seconds(answer.headers.get("retry-after"), now=now, longest=rules.max_retry_after)
    # A gateway's 502 or 504 says nothing of what the application behind it did; a plain 429 or 503 was refused.
    return TargetFault(
        reason=f"answered {_say(answer)}",
        status=answer.status,
        retry_after=asked,
        outcome_unknown=answer.status not in (425, 429, 503),
        may_be_the_records=answer.status not in _NEVER_THE_RECORDS,
    )


def _refused(answer: Answer, *, alone: bool) -> Rejected | Split:
    if alone:
        return Rejected(reason=f"answered {answer.status}", status=answer.status, response=excerpt(answer.body))
    return Split(reason=f"answered {_say(answer)}", status=answer.status, too_large=answer.status == 413)


def _read_absence(answer: Answer, *, operation: RouteOperation, alone: bool) -> Verdict:
    """404 and 410: of one record if the path names one, else of the collection, and then the target's."""
    if operation.path_names_record and alone:
        if operation.kind == "delete":
            return Accepted()  # already gone
        if operation.kind == "update":
            if operation.on_missing is not None:
                return Fallback(kind=operation.on_missing)
            return _refused(answer, alone=True)
    reason = f"answered {_say(answer)}: there is nothing at the route's path"
    if answer.status == 410 and not operation.path_names_record:
        return Pause(cause="gone", reason=reason, status=410)
    return Pause(cause="configuration", reason=reason, status=answer.status)


def _read_success(
    answer: Answer, *, operation: RouteOperation, changes: Sequence[ChangeRecord], rules: JudgingRules
) -> Verdict:
    results = operation.results
    if results is None:
        if answer.status == 207:
            reason = "answered 207: each record has a result of its own, but the route does not say where ('results')"
            return Pause(cause="configuration", reason=reason, status=207)
        return Accepted()
    try:
        if answer.truncated:
            raise ValueError("it was cut at max_response_bytes")
        listed = results.find(msgspec.json.decode(answer.body))
        items = _ItemReader(operation, results, changes, rules).read(listed)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        # The request was taken, but how it went for each record is not known: the same key may ask again.
        reason = f"answered {answer.status}, but its results cannot be read: {error}"
        return TargetFault(reason=reason, status=answer.status, outcome_unknown=True, may_be_the_records=True)
    if len(items.rejected) == len(changes) and {one.status for one in items.rejected.values()} <= _CREDENTIALS:
        status = next(iter(items.rejected.values())).status
        reason = f"answered {status} for every record of the batch: credentials refused"
        return Pause(cause="credentials", reason=reason, status=status)
    return items


class _ItemReader:
    """Reads what an answer says of each record."""

    def __init__(
        self, operation: RouteOperation, results: ResultsRules, changes: Sequence[ChangeRecord], rules: JudgingRules
    ) -> None:
        self._operation, self._results, self._rules = operation, results, rules
        self._count = len(changes)
        self._position_of: dict[str, int] = {}
        if results.by_id:
            self._position_of = {identity: i for i, identity in enumerate(operation.identities(changes))}

    def read(self, listed: Sequence[Any]) -> Items:
        accepted: list[int] = []
        rejected: dict[int, Rejected] = {}
        retry: list[int] = []
        fallback: list[int] = []
        heard: set[int] = set()
        for order, item in enumerate(listed):
            position = self._position(order, item)
            if position in heard:
                raise ValueError(f"position {position} is answered twice")
            heard.add(position)
            status = self._results.status_of(item)
            if self._took(status):
                accepted.append(position)
            elif status in self._retryable:
                retry.append(position)
            elif self._wants_fallback(status):
                fallback.append(position)
            else:
                said = self._results.message_of(item)
                rejected[position] = Rejected(
                    reason="refused within the batch" if status is None else f"answered {status} within the batch",
                    status=status if isinstance(status, int) and not isinstance(status, bool) else None,
                    response=excerpt(said),
                )
        silent = [position for position in range(self._count) if position not in heard]
        if self._results.lists_all:
            retry += silent  # no word of it: not a success
        else:
            accepted += silent  # only refusals are listed
        return Items(
            accepted=sorted(accepted),
            rejected=rejected,
            retry=sorted(retry),
            fallback=sorted(fallback),
            retry_reason="answered for the batch, but not (or not yet) for each record",
        )

    @property
    def _retryable(self) -> frozenset[object]:
        if self._results.retryable:
            return frozenset(self._results.retryable)
        return (_RETRYABLE | self._rules.retryable_status_codes) - self._rules.drop_on

    def _position(self, order: int, item: Any) -> int:
        if self._results.by_id:
            identity = self._results.identity_of(item)
            if identity not in self._position_of:
                raise ValueError(f"it names the record {identity[:80]!r}, which was not sent")
            return self._position_of[identity]
        position = self._results.index_of(item, order)
        if not 0 <= position < self._count:
            raise ValueError(f"it names position {position} of {self._count} records")
        return position

    def _took(self, status: Any) -> bool:
        if status is None:
            return self._results.lists_all and not self._results.judged
        if isinstance(status, bool):
            return status
        if not isinstance(status, int):
            raise ValueError(f"the item's status {str(status)[:40]!r} is neither a number nor true or false")  # noqa: TRY004
        if status in self._rules.drop_on:
            return False
        if status in self._rules.success_on or 200 <= status < 300:
            return True
        return self._operation.kind == "delete" and status in (404, 410)

    def _wants_fallback(self, status: Any) -> bool:
        if status in self._rules.drop_on:
            return False
        return (status == 409 and self._operation.on_conflict is not None) or (
            status == 404 and self._operation.on_missing is not None
        )
