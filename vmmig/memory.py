"""Ranges of guest-physical memory, as the dirty log and the wire protocol speak of them."""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import add, sub
from typing import TYPE_CHECKING, Any

import attrs

from vmmig.errors import MigratableError

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE_BYTES = 4096
"""The granularity of dirty logs and of the container's alignment."""

_END = 1 << 64
_SHOWN = 8


@attrs.frozen(order=True)
class MemoryRange:
    """``length`` bytes of guest memory from guest-physical address ``gpa`` on.

    Raises:
        MigratableError: The range is negative, ends beyond 64 bits, or its address or length
            is not a number of 64 bits, as the wire has it.

    >>> MemoryRange(0x1000, 0x2000).end
    12288
    """

    gpa: int
    length: int

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.gpa < _END and 0 <= self.length < _END and self.end <= _END):
            raise MigratableError(
                f"memory range of {self.length} bytes at {self.gpa:#x} is not within 64 bits"
            )

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.gpa + self.length


class MemoryRangeTable:
    """An ordered table of memory ranges: a dirty log's answer, a migration's unit of work.

    A table may name bytes more than once and in any order, as the wire protocol allows. The set
    operations ``|``, ``&`` and ``-`` and `merge` see it as the set of the bytes that it covers:
    their result is sorted, without overlap, and its ranges do not touch. What a table lacks
    within a range is ``MemoryRangeTable([within]) - table``. Each takes n log n of time, and
    n where the ranges are sorted already.

    It is a value. A range takes 16 bytes; `MemoryRange` objects are made when they are asked for.

    >>> table = MemoryRangeTable.from_bitmap(0b1101, start=0x10000)
    >>> [(hex(r.gpa), r.length) for r in table]
    [('0x10000', 4096), ('0x12000', 8192)]
    >>> table.total_bytes
    12288
    >>> MemoryRangeTable([MemoryRange(0x10000, 0x4000)]) - table
    MemoryRangeTable(ranges=(MemoryRange(gpa=69632, length=4096),))
    """

    __slots__ = ("_words",)

    def __init__(self, ranges: Iterable[MemoryRange] = ()) -> None:
        self._words = array("Q", chain.from_iterable((r.gpa, r.length) for r in ranges))

    @classmethod
    def from_bitmap(
        cls, bitmap: int | Buffer, *, start: int = 0, page_bytes: int = PAGE_BYTES
    ) -> MemoryRangeTable:
        """The ranges of a bitmap's set bits; bit ``i`` is the page at ``start + i * page_bytes``.

        Neighbouring pages become one range.

        Args:
            bitmap: A number; or an array of unsigned words, the first with the lowest pages in
                its lowest bits (as KVM's and Cloud Hypervisor's dirty bitmaps, whose words are of
                64 bits); bytes are words of 8 bits.

        Raises:
            MigratableError: The bitmap is negative or no bitmap, or a range is not within 64 bits.

        >>> MemoryRangeTable.from_bitmap(array("Q", [0, 1 << 63]), page_bytes=1)
        MemoryRangeTable(ranges=(MemoryRange(gpa=127, length=1),))
        """
        _check_page(page_bytes)
        if not isinstance(bitmap, int):
            bitmap = _number_of(bitmap)
        if bitmap < 0:
            raise MigratableError("a bitmap of pages cannot be negative")
        starts: list[int] = []
        ends: list[int] = []
        for run in re.finditer("1+", f"{bitmap:b}"[::-1]):
            first, end = run.span()
            starts.append(start + first * page_bytes)
            ends.append(start + end * page_bytes)
        return cls.from_spans(starts, ends)

    def to_bitmap(self, *, start: int = 0, page_bytes: int = PAGE_BYTES) -> int:
        """The bitmap of the pages that the table touches: the reverse of `from_bitmap`.

        A page that is only partly covered counts. It takes a bit for each page from ``start`` to
        the last. ``to_bitmap().to_bytes(8 * words, "little")`` are words of 64 bits.

        Raises:
            MigratableError: A range begins before ``start``, or there is no memory for the bitmap.

        >>> bin(MemoryRangeTable([MemoryRange(0x3800, 0x1000)]).to_bitmap())
        '0b11000'
        """
        _check_page(page_bytes)
        starts, ends = self._spans()
        if not starts:
            return 0
        if starts[0] < start:
            raise MigratableError(
                f"the table begins at {starts[0]:#x}, before the bitmap's start {start:#x}"
            )
        try:
            digits = bytearray(b"0") * -((start - ends[-1]) // page_bytes)
        except (MemoryError, OverflowError):
            raise MigratableError(
                f"there is no memory for a bitmap of {start:#x} to {ends[-1]:#x}; begin it nearer "
                f"to the table's end, or make one for each region"
            ) from None
        for first, end in zip(starts, ends, strict=True):
            low, high = (first - start) // page_bytes, -((start - end) // page_bytes)
            digits[low:high] = b"1" * (high - low)
        digits.reverse()
        return int(digits, 2)

    @classmethod
    def from_spans(cls, starts: Sequence[int], ends: Sequence[int]) -> MemoryRangeTable:
        """The ranges from each start to the end of the same index, as they are.

        Raises:
            MigratableError: There are not as many ends as starts, or they make no range.

        >>> MemoryRangeTable.from_spans([0x1000], [0x3000])
        MemoryRangeTable(ranges=(MemoryRange(gpa=4096, length=8192),))
        """
        if len(starts) != len(ends) or max(ends, default=0) > _END:
            raise MigratableError("memory ranges have a start and an end each, within 64 bits")
        words = array("Q", bytes(16 * len(starts)))
        try:
            words[0::2] = array("Q", starts)
            words[1::2] = array("Q", map(sub, ends, starts))
        except OverflowError:
            raise MigratableError("a memory range is negative, or all of 64 bits") from None
        return cls._from_words(words)

    @classmethod
    def from_bytes(cls, data: Buffer) -> MemoryRangeTable:
        """The table of its form on the wire: for each range two little-endian u64, gpa and length.

        Raises:
            MigratableError: It is not made of such pairs, or a range ends beyond 64 bits.

        >>> MemoryRangeTable.from_bytes(bytes.fromhex("0040000000000000 0010000000000000"))
        MemoryRangeTable(ranges=(MemoryRange(gpa=16384, length=4096),))
        """
        view = memoryview(data)
        if view.nbytes % 16:
            raise MigratableError(
                f"a table of memory ranges has 16 bytes for each, not {view.nbytes} bytes in all"
            )
        words = array("Q", view.tobytes())
        if sys.byteorder == "big":
            words.byteswap()
        if max(map(add, words[0::2], words[1::2]), default=0) > _END:
            raise MigratableError("a memory range of the table ends beyond 64 bits")
        return cls._from_words(words)

    def to_bytes(self) -> bytes:
        """The table's form on the wire: see `from_bytes`.

        >>> MemoryRangeTable([MemoryRange(0x4000, 0x1000)]).to_bytes().hex(" ", 8)
        '0040000000000000 0010000000000000'
        """
        words = self._words
        if sys.byteorder == "big":
            words = words[:]
            words.byteswap()
        return words.tobytes()

    @classmethod
    def merge(cls, tables: Iterable[MemoryRangeTable]) -> MemoryRangeTable:
        """One table of all that ``tables`` cover: sorted, without overlap, without empty ranges.

        Raises:
            MigratableError: They cover all the 2**64 bytes there are, which no range can name.

        >>> a = MemoryRangeTable([MemoryRange(0, 10), MemoryRange(40, 5)])
        >>> b = MemoryRangeTable([MemoryRange(5, 10)])
        >>> MemoryRangeTable.merge([a, b])
        MemoryRangeTable(ranges=(MemoryRange(gpa=0, length=15), MemoryRange(gpa=40, length=5)))
        """
        words = array("Q")
        for table in tables:
            words.extend(table._words)
        return cls.from_spans(*cls._from_words(words)._spans())

    def __or__(self, other: MemoryRangeTable) -> MemoryRangeTable:
        return self.merge([self, other])

    def __sub__(self, other: MemoryRangeTable) -> MemoryRangeTable:
        holes, hole_ends = other._spans()
        starts: list[int] = []
        ends: list[int] = []
        i, n = 0, len(holes)
        for start, end in zip(*self._spans(), strict=True):
            while i < n and holes[i] < end:
                if start < holes[i]:
                    starts.append(start)
                    ends.append(holes[i])
                start = max(start, hole_ends[i])
                if hole_ends[i] > end:
                    break
                i += 1
            if start < end:
                starts.append(start)
                ends.append(end)
        return self.from_spans(starts, ends)

    def __and__(self, other: MemoryRangeTable) -> MemoryRangeTable:
        return self - (self - other)

    def aligned(self, page_bytes: int = PAGE_BYTES) -> MemoryRangeTable:
        """All pages that the table touches, whole: sorted, without overlap.

        Raises:
            MigratableError: The last page ends beyond 64 bits.

        >>> MemoryRangeTable([MemoryRange(0x3800, 0x1000)]).aligned()
        MemoryRangeTable(ranges=(MemoryRange(gpa=12288, length=8192),))
        """
        _check_page(page_bytes)
        starts, ends = self._spans()
        whole = self.from_spans(
            [start // page_bytes * page_bytes for start in starts],
            [-(-end // page_bytes) * page_bytes for end in ends],
        )
        return self.merge([whole])

    def partition(self, max_bytes: int) -> list[MemoryRangeTable]:
        """The table in parts of ``max_bytes`` each, the last one perhaps less; in its order.

        A range that does not fit into the rest of a part goes on in the next. To cut between
        pages only, let ``max_bytes`` be a multiple of the page.

        Raises:
            MigratableError: ``max_bytes`` is less than 1.

        >>> parts = MemoryRangeTable([MemoryRange(0, 10), MemoryRange(90, 2)]).partition(8)
        >>> [[(r.gpa, r.length) for r in part] for part in parts]
        [[(0, 8)], [(8, 2), (90, 2)]]
        """
        if max_bytes < 1:
            raise MigratableError(f"a part of a table has at least one byte, not {max_bytes}")
        parts: list[array[int]] = []
        room = 0
        for gpa, length in self.pairs():
            while length:
                if not room:
                    parts.append(array("Q"))
                    room = max_bytes
                piece = min(length, room)
                parts[-1].extend((gpa, piece))
                gpa, length, room = gpa + piece, length - piece, room - piece
        return [*map(self._from_words, parts)]

    @property
    def ranges(self) -> tuple[MemoryRange, ...]:
        """The ranges, in their order."""
        return tuple(self)

    @property
    def total_bytes(self) -> int:
        """The sum of the lengths; what overlaps counts as often as it is named."""
        return sum(self._words[1::2])

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Each range as (gpa, length): much faster than to iterate over `MemoryRange` objects.

        >>> [*MemoryRangeTable([MemoryRange(0x4000, 0x1000)]).pairs()]
        [(16384, 4096)]
        """
        return zip(self._words[0::2], self._words[1::2], strict=True)

    def __iter__(self) -> Iterator[MemoryRange]:
        return (MemoryRange(gpa, length) for gpa, length in self.pairs())

    def __len__(self) -> int:
        return len(self._words) // 2

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MemoryRangeTable):
            return NotImplemented
        return self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words.tobytes())

    def __repr__(self) -> str:
        shown = [repr(MemoryRange(*pair)) for pair in islice(self.pairs(), _SHOWN)]
        more = len(self) - len(shown)
        tail = f", ... {more} more" if more else "," * (len(shown) == 1)
        return f"MemoryRangeTable(ranges=({', '.join(shown)}{tail}))"

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryRangeTable.from_bytes, (self.to_bytes(),)

    @classmethod
    def _from_words(cls, words: array[int]) -> MemoryRangeTable:
        table = cls()
        table._words = words
        return table

    def _spans(self) -> tuple[list[int], list[int]]:
        """Where the covered bytes begin and end: sorted, apart from one another."""
        starts: list[int] = []
        ends: list[int] = []
        last = -1
        for gpa, length in sorted(self.pairs()):
            end = gpa + length
            if not length or end <= last:
                continue
            if gpa <= last:
                ends[-1] = end
            else:
                starts.append(gpa)
                ends.append(end)
            last = end
        return starts, ends


def _number_of(bitmap: Buffer) -> int:
    try:
        view = memoryview(bitmap)
        if view.itemsize > 1:
            return _number_of(b"".join(w.to_bytes(view.itemsize, "little") for w in view))
        return int.from_bytes(view, "little")
    except (TypeError, ValueError, AttributeError, OverflowError, NotImplementedError) as error:
        raise MigratableError(
            f"a bitmap is a number, bytes, or an array of unsigned words, not "
            f"{type(bitmap).__name__}: {error}"
        ) from error


def _check_page(page_bytes: int) -> None:
    if page_bytes < 1:
        raise MigratableError(f"a page has at least one byte, not {page_bytes}")
