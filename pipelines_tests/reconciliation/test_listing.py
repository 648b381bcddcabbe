"""Each style of paging is followed to its end; what is not a whole page is never taken for one."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from pipelines.delivery.judging import JudgingRules
from pipelines.delivery.rate_limit import TokenBucket
from pipelines.delivery.reading import ReadConfig
from pipelines.delivery.sending import RetryPolicy
from pipelines.delivery.target import Answer
from pipelines.reconciliation.listing import (
    Circles,
    ListingFailed,
    Page,
    PositionLost,
    Reader,
    first_path,
    match_key,
    read_page,
)
from pipelines_tests.fakes.clock import FakeClock
from pipelines_tests.fakes.target import ScriptedTarget, Step, answer, no_answer

BASE = "https://api.test/v2"


def read(**fields: Any) -> ReadConfig:
    return ReadConfig.model_validate({"path": "/x", "key": "id", **fields})


def page(document: Any, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Page:
    """Read one answer to the first request."""
    config = read(**fields)
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return read_page(config, answer(200, body, headers=headers), path=first_path(config), base_url=BASE)


def failure(document: Any, **fields: Any) -> str:
    with pytest.raises(ListingFailed) as caught:
        page(document, **fields)
    return str(caught.value)


# Where pages are -----------------------------------------------------------------------------------------------------

CURSOR = {"style": "cursor", "parameter": "after", "next": "$.next"}
NEXT = {"style": "next_url", "next": "$.next"}


@pytest.mark.parametrize(
    ("paging", "first"),
    [
        (None, "/x"),
        (CURSOR, "/x"),
        (CURSOR | {"size": 50, "size_parameter": "limit"}, "/x?limit=50"),
        ({"style": "offset", "parameter": "skip"}, "/x?skip=0"),
        ({"style": "page", "parameter": "page"}, "/x?page=1"),
        ({"style": "page", "parameter": "page", "first": 0, "size": 5, "size_parameter": "n"}, "/x?n=5&page=0"),
        ({"style": "link", "size": 5, "size_parameter": "n"}, "/x?n=5"),
    ],
)
def test_the_first_page_is_asked_for(paging: Any, first: str) -> None:
    assert first_path(read(page=paging) if paging else read()) == first


def test_a_query_of_the_path_stays() -> None:
    assert first_path(read(path="/x?a=1", page={"style": "page", "parameter": "p"})) == "/x?a=1&p=1"


ITEMS = [{"id": 1}]


@pytest.mark.parametrize(
    ("paging", "document", "headers", "following"),
    [
        (CURSOR, {"next": "a b&c"}, {}, "/x?after=a%20b%26c"),
        (CURSOR, {"next": 17}, {}, "/x?after=17"),
        (CURSOR, {"next": None}, {}, None),
        (CURSOR, {"next": ""}, {}, None),
        (CURSOR, {}, {}, None),
        ({"style": "offset", "parameter": "skip"}, {}, {}, "/x?skip=1"),
        ({"style": "page", "parameter": "p"}, {}, {}, "/x?p=2"),
        (NEXT, {"next": "https://api.test/v2/x?c=1"}, {}, "/x?c=1"),
        (NEXT, {"next": "https://api.test:443/v2/y"}, {}, "/y"),
        (NEXT, {"next": "/v2/x?c=1"}, {}, "/x?c=1"),
        (NEXT, {"next": "?c=1"}, {}, "/x?c=1"),
        (NEXT, {"next": None}, {}, None),
        ({"style": "link"}, {}, {"link": '<https://api.test/v2/x?c=1>; rel="next"'}, "/x?c=1"),
        ({"style": "link"}, {}, {"link": '<a>; rel="prev", <?c=2>; title="x, y"; rel="last next"'}, "/x?c=2"),
        ({"style": "link"}, {}, {"link": "<?c=3>; rel=next"}, "/x?c=3"),
        ({"style": "link"}, {}, {"link": '<?c=3>; rel="nextish"'}, None),
        ({"style": "link"}, {}, {}, None),
        ({"style": "link", "header": "Next-Page"}, {}, {"next-page": "https://api.test/v2/x?c=1"}, "/x?c=1"),
        ({"style": "link", "header": "Next-Page"}, {}, {}, None),
    ],
)
def test_the_next_page_is_where_the_answer_says(paging: Any, document: Any, headers: Any, following: Any) -> None:
    assert page(document | {"items": ITEMS}, headers=headers, page=paging, items="$.items").next == following


@pytest.mark.parametrize("style", ["offset", "page"])
def test_counted_pages_end_with_one_that_has_no_records_and_not_with_a_short_one(style: str) -> None:
    paging = {"style": style, "parameter": "p", "size": 100, "size_parameter": "n"}

    assert page(ITEMS, page=paging).next is not None
    assert page([], page=paging).next is None


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.test/v2/x?c=1",
        "http://api.test/v2/x",
        "https://api.test:8443/v2/x",
        "//evil.test/v2/x",
        "https://api.test@evil.test/v2/x",
        "https://user:pw@api.test/v2/x",
        "https://api.test/v1/x",
        "https://api.test/v20/x",
        "https://api.test/",
        "https://[bad/v2/x",
    ],
)
def test_no_url_leads_to_another_host_or_out_of_the_base_url(url: str) -> None:
    for paging, headers in ((NEXT, {}), ({"style": "link", "header": "Next-Page"}, {"next-page": url})):
        with pytest.raises(ListingFailed, match=r"not followed|cannot be read"):
            page({"next": url, "items": ITEMS}, headers=headers, page=paging, items="$.items")


def test_dot_segments_do_not_lead_out_of_the_base_url() -> None:
    with pytest.raises(ListingFailed, match="not followed"):
        page({"next": "https://api.test/v2/../secret", "items": ITEMS}, page=NEXT, items="$.items")


# What a page says ----------------------------------------------------------------------------------------------------


def test_records_are_found_by_their_keys() -> None:
    found = page(
        {"data": [{"attributes": {"ext": 7, "name": "x"}}, {"attributes": {"ext": "8"}}]},
        items="$.data",
        key="attributes.ext",
        item="attributes",
    )

    assert {key: json.loads(record) for key, record in found.records.items()} == {
        "7": {"ext": 7, "name": "x"},
        "8": {"ext": "8"},
    }


def test_numbers_keep_their_digits() -> None:
    body = b'[{"id": 12345678901234567890, "n": 1.10, "m": 123456789.123456789123}]'

    (record,) = page(body).records.values()

    assert record == b'{"id":12345678901234567890,"n":1.10,"m":123456789.123456789123}'


def test_a_key_that_is_a_number_is_matched_by_its_value_however_it_is_written() -> None:
    body = b'[{"id": 17.0}, {"id": 1e3}, {"id": -0.0}, {"id": 12345678901234567890123456789.50}, {"id": 1e999999999}]'

    assert list(page(body).records) == ["17", "1000", "0", "12345678901234567890123456789.5", "1E+999999999"]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([17], "17"),
        (["a b"], "a b"),
        ([True], "true"),
        ([2013, "UA", 'é"\\'], '["2013", "UA", "é\\"\\\\"]'),
    ],
)
def test_a_key_is_matched_as_text(values: list[Any], match: str) -> None:
    assert match_key(values) == match


def test_a_mark_of_the_byte_order_is_no_part_of_a_page() -> None:
    assert list(page(b"\xef\xbb\xbf" + b'[{"id": 1}]').records) == ["1"]


def test_half_a_character_costs_that_character_and_not_the_list() -> None:
    """A target that cuts texts to a length, counted in UTF-16, may keep half of the last one."""
    cut = [rb"\ud83d", rb"\uDE00", rb"a\ud83d\n", rb"\ud83d\ud83d\ude00", rb"\\ud83d", rb"\\\ud83d"]
    body = b'[{"id": 1, "v": ["' + b'", "'.join(cut) + b'"]}]'

    found = json.loads(page(body).records["1"])["v"]

    assert found == ["\ufffd", "\ufffd", "a\ufffd\n", "\ufffd\U0001f600", "\\ud83d", "\\\ufffd"]


def test_records_without_a_key_of_ours_are_counted_and_left_alone() -> None:
    found = page([{"id": 1}, {"id": None}, {}, {"id": {"a": 1}}, "x", {"id": "a\x00b"}])

    assert list(found.records) == ["1"]
    assert found.unkeyed == 5


@pytest.mark.parametrize(
    ("document", "fields", "said"),
    [
        (b"<html>down for maintenance</html>", {}, "is not JSON: <html>down"),
        (b"", {}, "is not JSON: it is empty"),
        (b'[{"id": 1}', {}, "is not JSON"),
        ({"error": "oops"}, {"items": "$.items"}, "has no list at $.items"),
        ({"items": None}, {"items": "$.items"}, "is not a list"),
        ({"items": {"id": 1}}, {"items": "$.items"}, "is not a list"),
        ([{"no": 1}, {"no": 2}], {}, "none of the 2 records of the first page has a key at id"),
        ({"items": ITEMS, "next": {"a": 1}}, {"items": "$.items", "page": CURSOR}, "is no cursor"),
        ({"items": ITEMS, "next": True}, {"items": "$.items", "page": CURSOR}, "is no cursor"),
        ({"items": ITEMS, "next": [1]}, {"items": "$.items", "page": NEXT}, "is no URL"),
        ({"items": ITEMS}, {"items": "$.items", "total": "$.total"}, "says no total at $.total"),
        ({"items": ITEMS, "total": "many"}, {"items": "$.items", "total": "$.total"}, "says no total"),
        ({"items": ITEMS}, {"items": "$.items", "total_header": "X-Total"}, "says no total at X-Total"),
    ],
)
def test_what_is_not_a_page_is_a_failure_and_never_an_empty_one(document: Any, fields: Any, said: str) -> None:
    assert said in failure(document, **fields)


def test_a_page_that_was_cut_is_a_failure_though_it_may_look_whole() -> None:
    config = read()
    with pytest.raises(ListingFailed, match="cut short"):
        read_page(config, Answer(status=200, body=b"[]", truncated=True), path="/x", base_url=BASE)


def test_a_total_is_read_from_the_body_or_a_header() -> None:
    assert page({"items": ITEMS, "n": 5}, items="$.items", total="$.n").total == 5
    assert page(ITEMS, total_header="X-Total", headers={"x-total": "6"}).total == 6
    assert page(ITEMS).total is None


def look(circles: Circles, at: int, following: int, *, records: Mapping[str, bytes] | None = None) -> None:
    """Have *circles* look at a page without news."""
    page = Page(records=records or {}, unkeyed=0, next=f"/x?after={following}", total=None)
    circles.look(page, path=f"/x?after={at}", news=0)


def test_a_page_that_names_itself_is_a_circle() -> None:
    with pytest.raises(ListingFailed, match="names itself"):
        look(Circles(), 2, 2)


@pytest.mark.parametrize("known", [0, 50])
def test_pages_that_bring_nothing_new_again_and_again_are_a_circle(known: int) -> None:
    """Those that were read before may."""
    circles = Circles(known=known)

    for number in range(known + 9):
        look(circles, number, number + 1, records={"1": b"{}"})
    with pytest.raises(ListingFailed, match=f"{known + 10} pages in a row had only records of earlier pages"):
        look(circles, known + 9, known + 10, records={"1": b"{}"})


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_pages_without_records_that_lead_back_are_a_circle_however_long(length: int) -> None:
    circles = Circles()

    def walk() -> None:
        for number in range(10 * length):
            look(circles, number % length, (number + 1) % length)

    with pytest.raises(ListingFailed, match="in circles"):
        walk()


def test_many_pages_without_records_are_no_circle_if_each_is_another() -> None:
    circles = Circles()

    for number in range(1000):
        look(circles, number, number + 1)


# Asking --------------------------------------------------------------------------------------------------------------


def reader(script: Iterable[Step], clock: FakeClock, **more: Any) -> tuple[Reader, ScriptedTarget]:
    target = ScriptedTarget(script)
    policy = RetryPolicy(initial_backoff=1, max_backoff=4, max_elapsed=30)
    return Reader(client=target.connect(), clock=clock, retry=policy, rules=JudgingRules(), **more), target


def test_a_record_is_there_or_not_or_that_cannot_be_told() -> None:
    asking, target = reader([200, 404, 410, 503, 200, 400, 403], FakeClock())

    assert [asking.has(f"/x/{number}") for number in range(4)] == [True, False, False, True]
    for said in ("read.one: answered 400", "read.one: answered 403"):
        with pytest.raises(ListingFailed, match=said):
            asking.has("/x/5")
    assert len(target.sent) == 7


def test_a_target_that_is_unwell_is_asked_again() -> None:
    clock = FakeClock()
    asking, target = reader([no_answer(), 503, 429, answer(200, b"[]")], clock)

    assert asking.get("/x?p=1").status == 200
    assert [(one.request.method, one.path) for one in target.sent] == [("GET", "/x?p=1")] * 4
    assert asking.requests == 4


def test_it_is_left_alone_for_as_long_as_it_asks() -> None:
    clock = FakeClock()
    asking, _ = reader([answer(503, headers={"retry-after": "7"}), answer(200, b"[]")], clock)

    asking.get("/x")

    assert sum(clock.naps) >= 7


def test_it_is_given_up_on_after_a_while() -> None:
    clock = FakeClock()
    asking, target = reader([503] * 1000, clock)

    with pytest.raises(ListingFailed, match="the target is unwell: answered 503"):
        asking.get("/x")
    assert sum(clock.naps) <= 30
    assert len(target.sent) > 3


def test_a_longer_rest_than_the_run_bears_ends_it_at_once() -> None:
    clock = FakeClock()
    asking, target = reader([answer(429, headers={"retry-after": "3000"})], clock)

    with pytest.raises(ListingFailed, match="left alone for 3000 s"):
        asking.get("/x")
    assert (len(target.sent), clock.naps) == (1, ())


@pytest.mark.parametrize(
    ("status", "said", "lost"),
    [
        (301, "a redirect", False),
        (401, "credentials", False),
        (403, "credentials", False),
        (404, "mend read.path", True),
        (410, "mend read.path", True),
        (400, "mend read.path", True),
        (405, "mend read.path", False),
    ],
)
def test_a_refusal_is_not_tried_again(status: int, said: str, lost: bool) -> None:
    asking, target = reader([status], FakeClock())

    with pytest.raises(ListingFailed, match=said) as caught:
        asking.get("/x")
    assert len(target.sent) == 1
    assert isinstance(caught.value, PositionLost) is lost


def test_the_rate_limit_is_kept() -> None:
    clock = FakeClock()
    bucket = TokenBucket.full(requests_per_second=2, burst=1, now=clock.monotonic())
    asking, _ = reader([answer(200, b"[]")] * 5, clock, bucket=bucket)

    for _ in range(5):
        asking.get("/x")

    assert sum(clock.naps) == pytest.approx(2.0)
