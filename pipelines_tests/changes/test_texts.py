"""Joined texts are a sequence like any other."""

from itertools import pairwise
from random import Random

import pytest

from pipelines.changes.texts import SEPARATOR, JoinedTexts, in_pieces, joined, total_bytes

TEXTS = [b'{"id": %d, "note": "%s"}' % (number, b"n" * (number % 7)) for number in range(250)]


def kept_in(texts: list[bytes], *ends: int) -> JoinedTexts:
    """Return *texts* in pieces that end there."""
    bounds = [0, *ends, len(texts)]
    pieces = [texts[begin:end] for begin, end in pairwise(bounds)]
    return JoinedTexts([SEPARATOR.join(piece) for piece in pieces], [len(piece) for piece in pieces])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_asked_of_them_they_answer_as_a_list_does(seed: int) -> None:
    """Again and again of the same, and of what was cut out of it, for each cut leaves it in more pieces."""
    random = Random(seed)
    texts, kept = TEXTS, kept_in(TEXTS, *sorted(random.sample(range(1, 250), random.randrange(5))))
    for _ in range(200):
        begin, end, place = (random.randrange(-260, 260) for _ in range(3))
        step = random.choice([None, None, None, None, 1, -1, 3])
        piece = kept[begin:end:step]

        assert list(piece) == texts[begin:end:step]
        assert len(piece) == len(texts[begin:end:step])
        assert joined(piece, b",") == b",".join(texts[begin:end:step])
        assert total_bytes(piece) == sum(map(len, texts[begin:end:step]))
        assert piece[:1] == texts[begin:end:step][:1]
        assert not piece or (piece[0], piece[-1]) == (texts[begin:end:step][0], texts[begin:end:step][-1])
        assert kept == texts
        if -len(texts) <= place < len(texts) and random.random() < 0.02:
            assert kept[place] == texts[place]
        if isinstance(piece, JoinedTexts) and len(piece) > 100 and random.random() < 0.1:
            texts, kept = texts[begin:end:step], piece


def test_a_long_slice_stays_joined_wherever_it_is_cut() -> None:
    """That is what it is for. Of a short one, taking all apart costs less than cutting each out."""
    kept = kept_in(TEXTS, 100, 200)

    assert isinstance(kept[100:200], JoinedTexts)
    assert isinstance(kept[3:103], JoinedTexts)
    assert isinstance(kept[0:3], JoinedTexts)  # cut there by now
    assert isinstance(kept[10:13], list)


def test_what_comes_in_crumbs_is_not_kept_joined() -> None:
    """Of a log in which few changes are the target's, a part may be a single one."""
    two_each = [SEPARATOR.join(TEXTS[place : place + 2]) for place in range(0, 250, 2)]

    crumbs = in_pieces(two_each, [2] * 125)

    assert isinstance(crumbs, list)
    assert crumbs == TEXTS
    assert in_pieces([], []) == []
    assert isinstance(in_pieces([SEPARATOR.join(TEXTS)], [250]), JoinedTexts)


def test_what_is_no_text_is_not_among_them() -> None:
    kept = kept_in(TEXTS, 100)

    assert None not in kept
    assert TEXTS[120] in kept
    assert b"" not in kept
