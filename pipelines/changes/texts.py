"""Many texts in few pieces, as Postgres sends a column of them; so a body takes them up without touching each."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import overload

SEPARATOR = b"\x01"
"""No JSON text holds it (RFC 8259: no blank by §2, escaped by §7)."""

_WORTH_JOINING, _WORTH_CUTTING = 8, 32


class JoinedTexts(Sequence[bytes]):
    """Texts without `SEPARATOR` in them, joined by it in pieces. They are taken apart where single ones are asked for.

    A slice is joined too, unless it is short. Where it begins or ends within a piece, that piece is cut for good: what
    begins where it ends finds it cut.
    """

    __slots__ = ("_held", "_single")

    def __init__(self, pieces: Sequence[bytes], numbers: Iterable[int]) -> None:
        """Keep *pieces*, each of so many texts, of one at least."""
        self._held = list(pieces), list(accumulate(numbers, initial=0))
        self._single: list[bytes] | None = None

    def __len__(self) -> int:
        return self._held[1][-1]

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if not isinstance(index, slice):
            if index == 0 and len(self):  # every request asks what its first record is
                piece: bytes = self._held[0][0]
                return piece[: piece.find(SEPARATOR)] if self._held[1][1] > 1 else piece
            return self.single()[index]
        start, stop, step = index.indices(len(self))
        stop = max(start, stop)
        pieces, starts = self._held
        first, last = bisect_left(starts, start), bisect_left(starts, stop)
        if step != 1 or starts[first] != start or starts[last] != stop:  # else whole pieces, as of a batch it often is
            if step != 1 or stop - start < _WORTH_CUTTING:
                return self.single()[index]
            self._cut(start)
            self._cut(stop)
            pieces, starts = self._held
            first, last = bisect_left(starts, start), bisect_left(starts, stop)
        found = JoinedTexts.__new__(JoinedTexts)
        found._held = pieces[first:last], [place - start for place in starts[first : last + 1]]
        found._single = None
        return found

    def __iter__(self) -> Iterator[bytes]:
        if self._single is not None:
            return iter(self._single)
        return chain.from_iterable(piece.split(SEPARATOR) for piece in self._held[0])

    def __contains__(self, text: object) -> bool:
        return isinstance(text, bytes) and any(text == one for one in self)

    def __eq__(self, other: object) -> bool:
        """Say whether *other* is a sequence of the same texts, kept however."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of any sequence that is compared by what is in it

    def __repr__(self) -> str:
        return f"in_pieces({self._held[0]!r}, …)"

    def joined(self, separator: bytes) -> bytes:
        """Return all of them in one, with *separator* between any two."""
        return separator.join([piece.replace(SEPARATOR, separator) for piece in self._held[0]])

    def total_bytes(self) -> int:
        """Return how many bytes all of them have together."""
        pieces = self._held[0]
        return sum(map(len, pieces)) - (len(self) - len(pieces))

    def single(self) -> Sequence[bytes]:
        """Return them one by one; they are taken apart once."""
        if self._single is None:
            self._single = list(self)
        return self._single

    def _cut(self, place: int) -> None:
        """Let a piece end before *place*."""
        pieces, starts = self._held
        after = bisect_right(starts, place)
        begin = starts[after - 1]
        if begin == place:
            return
        whole, head, tail = pieces[after - 1], place - begin, starts[after] - place
        # Counted from the nearer end: of a long row of ids with a gap here and there, that is near.
        if head <= tail:
            right = whole.split(SEPARATOR, head)[-1]
            left = whole[: -len(right) - 1]
        else:
            left = whole.rsplit(SEPARATOR, tail)[0]
            right = whole[len(left) + 1 :]
        # In one step: another thread sees it cut or not.
        self._held = (
            [*pieces[: after - 1], left, right, *pieces[after:]],
            [*starts[:after], place, *starts[after:]],
        )


def in_pieces(pieces: Sequence[bytes], numbers: Sequence[int]) -> Sequence[bytes]:
    """Return the texts of *pieces*, each of so many, of one at least: joined, unless they are too few for that."""
    if sum(numbers) < _WORTH_JOINING * len(numbers):
        return list(chain.from_iterable(piece.split(SEPARATOR) for piece in pieces))
    return JoinedTexts(pieces, numbers)


# Asked for each request. That a list is none of these takes an abstract class longer to say than its type.
def joined(texts: Sequence[bytes], separator: bytes) -> bytes:
    """Return *texts* in one, with *separator* between any two."""
    return texts.joined(separator) if type(texts) is JoinedTexts else separator.join(texts)


def total_bytes(texts: Sequence[bytes]) -> int:
    """Return how many bytes all of *texts* have together."""
    return texts.total_bytes() if type(texts) is JoinedTexts else sum(map(len, texts))
