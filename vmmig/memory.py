"""Ranges of guest-physical memory, as the dirty log and the wire protocol speak of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import attrs

from vmmig.errors import MigratableError

PAGE_BYTES = 4096
"""The granularity of dirty logs and of the container's alignment."""


@attrs.frozen(order=True)
class MemoryRange:
    """``length`` bytes of guest memory from guest-physical address ``gpa`` on.

    Raises:
        MigratableError: The range is negative, or ends beyond 64 bits.

    >>> MemoryRange(0x1000, 0x2000).end
    12288
    """

    gpa: int
    length: int

    def __attrs_post_init__(self) -> None:
        if self.gpa < 0 or self.length < 0 or self.end > 1 << 64:
            raise MigratableError(
                f"memory range of {self.length} bytes at {self.gpa:#x} is not within 64 bits"
            )

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.gpa + self.length


def _ranges(ranges: Iterable[MemoryRange]) -> tuple[MemoryRange, ...]:
    return tuple(ranges)


@attrs.frozen
class MemoryRangeTable:
    """An ordered table of memory ranges: a dirty log's answer, a migration's unit of work.

    >>> table = MemoryRangeTable.from_bitmap(0b1101, start=0x10000)
    >>> [(hex(r.gpa), r.length) for r in table]
    [('0x10000', 4096), ('0x12000', 8192)]
    >>> table.total_bytes
    12288
    """

    ranges: tuple[MemoryRange, ...] = attrs.field(default=(), converter=_ranges)

    @classmethod
    def from_bitmap(
        cls, bitmap: int, *, start: int = 0, page_bytes: int = PAGE_BYTES
    ) -> MemoryRangeTable:
        """The ranges of a bitmap's set bits; bit ``i`` is the page at ``start + i * page_bytes``.

        Neighbouring pages become one range.

        Raises:
            MigratableError: The bitmap is negative, or a range ends beyond 64 bits.
        """
        if bitmap < 0:
            raise MigratableError("a bitmap of pages cannot be negative")
        return cls(
            MemoryRange(start + run.start() * page_bytes, len(run[0]) * page_bytes)
            for run in re.finditer("1+", f"{bitmap:b}"[::-1])
        )

    @classmethod
    def merge(cls, tables: Iterable[MemoryRangeTable]) -> MemoryRangeTable:
        """One table of all that ``tables`` cover: sorted, without overlap, without empty ranges.

        >>> a = MemoryRangeTable([MemoryRange(0, 10), MemoryRange(40, 5)])
        >>> b = MemoryRangeTable([MemoryRange(5, 10)])
        >>> MemoryRangeTable.merge([a, b])
        MemoryRangeTable(ranges=(MemoryRange(gpa=0, length=15), MemoryRange(gpa=40, length=5)))
        """
        merged: list[MemoryRange] = []
        for part in sorted(r for table in tables for r in table.ranges if r.length):
            if merged and part.gpa <= merged[-1].end:
                last = merged.pop()
                part = MemoryRange(last.gpa, max(last.end, part.end) - last.gpa)
            merged.append(part)
        return cls(merged)

    @property
    def total_bytes(self) -> int:
        """The sum of the lengths; what overlaps counts as often as it is named."""
        return sum(r.length for r in self.ranges)

    def __iter__(self) -> Iterator[MemoryRange]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)
