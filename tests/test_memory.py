from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmig.errors import MigratableError
from vmmig.memory import MemoryRange, MemoryRangeTable

RANGES = st.builds(MemoryRange, st.integers(0, 200), st.integers(0, 60))


def pages(table: MemoryRangeTable) -> set[int]:
    return {at for r in table for at in range(r.gpa, r.end)}


@given(st.integers(0, 1 << 200))
def test_a_bitmap_becomes_its_pages(bitmap: int) -> None:
    table = MemoryRangeTable.from_bitmap(bitmap, start=7, page_bytes=1)
    assert pages(table) == {7 + i for i in range(bitmap.bit_length()) if bitmap >> i & 1}
    assert all(a.end < b.gpa for a, b in zip(table.ranges, table.ranges[1:], strict=False))


@given(st.lists(st.lists(RANGES, max_size=5).map(MemoryRangeTable), max_size=4))
def test_merging_keeps_what_is_covered(tables: list[MemoryRangeTable]) -> None:
    merged = MemoryRangeTable.merge(tables)
    assert pages(merged) == set().union(*map(pages, tables))
    assert merged.total_bytes == len(pages(merged))
    assert all(a.end < b.gpa for a, b in zip(merged.ranges, merged.ranges[1:], strict=False))
    assert all(r.length for r in merged)


def test_a_bitmap_of_every_other_page_of_8_gib() -> None:
    table = MemoryRangeTable.from_bitmap(int("01" * (1 << 20), 2))
    assert (len(table), table.total_bytes) == (1 << 20, 4 << 30)


def test_a_bitmap_is_not_negative() -> None:
    with pytest.raises(MigratableError, match="negative"):
        MemoryRangeTable.from_bitmap(-1)


@pytest.mark.parametrize(("gpa", "length"), [(-1, 1), (0, -1), (1 << 64, 1), (1, 1 << 64)])
def test_a_range_stays_within_64_bits(gpa: int, length: int) -> None:
    with pytest.raises(MigratableError, match="64 bits"):
        MemoryRange(gpa, length)
