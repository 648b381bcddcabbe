"""Initial loads out of plain dictionaries, into the fake ledger's log."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from pipelines.delivery.loading import CannotLoad, Load, Loader, LoadProgress
from pipelines_tests.fakes.ledger import FakeLedger


class FakeLoader(Loader):
    """Appends the rows of *tables* (by stream: payloads by key), one row a chunk."""

    def __init__(self, ledger: FakeLedger, tables: Mapping[str, Mapping[str, bytes]] | None = None) -> None:
        self._ledger = ledger
        self._tables = tables or {}
        self._rows: dict[tuple[str, str], int] = {}

    def begin(self, target: str, streams: Collection[str], *, again: bool = False) -> Sequence[str]:
        begun = [
            stream
            for stream in streams
            if (target, stream) not in self._rows or (again and (target, stream) not in self._ledger.running_loads)
        ]
        for stream in begun:
            self._rows[(target, stream)] = 0
            self._ledger.running_loads.add((target, stream))
        return begun

    def loads(self, targets: Collection[str]) -> Sequence[Load]:
        running = self._ledger.running_loads
        known = {one: self._rows.setdefault(one, 0) for one in {*running, *self._rows} if one[0] in targets}
        return [
            Load(target=target, stream=stream, rows=rows, done=(target, stream) not in running)
            for (target, stream), rows in sorted(known.items())
        ]

    def run(self, target: str, stream: str, *, run_id: str) -> Iterator[LoadProgress]:
        if stream not in self._tables:
            raise CannotLoad(f"source.yaml: there is no table {stream}, so there are no rows to load; add it.")
        rows = list(self._tables[stream].items())
        while (target, stream) in self._ledger.running_loads:
            done = self._rows[(target, stream)]
            for key, payload in rows[done : done + 1]:
                self._ledger.append(stream, key, operation="snapshot", payload=payload, target=target)
                self._rows[(target, stream)] += 1
            if self._rows[(target, stream)] == len(rows):
                self._ledger.running_loads.discard((target, stream))
            yield LoadProgress(
                rows=self._rows[(target, stream)],
                of_about=len(rows),
                done=(target, stream) not in self._ledger.running_loads,
                chunk=done + 1,
            )
