from __future__ import annotations

import pickle
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmig.errors import MigratableError
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.testing import strategies

RANGES = st.builds(MemoryRange, st.integers(0, 200), st.integers(0, 60))
TABLES = st.lists(RANGES, max_size=8).map(MemoryRangeTable)
EVERY_OTHER_PAGE_OF_8_GIB = MemoryRangeTable.from_bitmap(int("01" * (1 << 20), 2))


def pages(table: MemoryRangeTable) -> set[int]:
    return {at for r in table for at in range(r.gpa, r.end)}


def is_a_set(table: MemoryRangeTable) -> bool:
    ranges = table.ranges
    return all(ranges[i].end < ranges[i + 1].gpa for i in range(len(ranges) - 1)) and all(
        r.length for r in ranges
    )


@given(st.integers(0, 1 << 200))
def test_a_bitmap_becomes_its_pages_and_they_become_the_bitmap(bitmap: int) -> None:
    table = MemoryRangeTable.from_bitmap(bitmap, start=7, page_bytes=1)
    assert pages(table) == {7 + i for i in range(bitmap.bit_length()) if bitmap >> i & 1}
    assert is_a_set(table)
    assert table.to_bitmap(start=7, page_bytes=1) == bitmap


@pytest.mark.parametrize("code", ["B", "H", "I", "Q"])
@given(data=st.data())
def test_a_bitmap_may_be_words_of_any_width(code: str, data: st.DataObject) -> None:
    bits = 8 * array(code).itemsize
    words = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=5))
    number = sum(word << i * bits for i, word in enumerate(words))
    expected = MemoryRangeTable.from_bitmap(number, start=0x1000)
    assert MemoryRangeTable.from_bitmap(array(code, words), start=0x1000) == expected
    if code == "B":
        assert MemoryRangeTable.from_bitmap(bytes(words), start=0x1000) == expected


@given(TABLES, st.integers(0, 9), st.integers(1, 17))
def test_a_page_that_is_touched_is_in_the_bitmap(
    table: MemoryRangeTable, start: int, page_bytes: int
) -> None:
    touched = {at // page_bytes for at in pages(table)}
    assert table.to_bitmap(page_bytes=page_bytes) == sum(1 << page for page in touched)
    if min(pages(table), default=start) >= start:
        touched = {(at - start) // page_bytes for at in pages(table)}
        bitmap = table.to_bitmap(start=start, page_bytes=page_bytes)
        assert bitmap == sum(1 << page for page in touched)
    else:
        with pytest.raises(MigratableError, match="before"):
            table.to_bitmap(start=start)


@given(st.lists(TABLES, max_size=4))
def test_merging_keeps_what_is_covered(tables: list[MemoryRangeTable]) -> None:
    merged = MemoryRangeTable.merge(tables)
    assert pages(merged) == set().union(*map(pages, tables))
    assert merged.total_bytes == len(pages(merged))
    assert is_a_set(merged)


@given(TABLES, TABLES)
def test_tables_are_sets_of_bytes(a: MemoryRangeTable, b: MemoryRangeTable) -> None:
    for table, expected in [
        (a | b, pages(a) | pages(b)),
        (a & b, pages(a) & pages(b)),
        (a - b, pages(a) - pages(b)),
        (MemoryRangeTable([MemoryRange(20, 100)]) - a, {*range(20, 120)} - pages(a)),
    ]:
        assert pages(table) == expected
        assert is_a_set(table)


@given(TABLES, st.integers(1, 17))
def test_pages_that_are_touched_become_whole(table: MemoryRangeTable, page_bytes: int) -> None:
    aligned = table.aligned(page_bytes)
    touched = {at // page_bytes for at in pages(table)}
    assert pages(aligned) == {p * page_bytes + i for p in touched for i in range(page_bytes)}
    assert is_a_set(aligned)


@given(TABLES, st.integers(1, 100))
def test_parts_have_the_same_bytes_in_the_same_order(table: MemoryRangeTable, most: int) -> None:
    def in_order(table: MemoryRangeTable) -> list[int]:
        return [at for r in table for at in range(r.gpa, r.end)]

    parts = table.partition(most)
    assert [at for part in parts for at in in_order(part)] == in_order(table)
    assert all(part.total_bytes == most for part in parts[:-1])
    assert all(0 < part.total_bytes <= most for part in parts[-1:])


@given(strategies.memory_range_tables(max_gpa=(1 << 64) - 1, page_bytes=1))
def test_a_table_is_a_value(table: MemoryRangeTable) -> None:
    again = MemoryRangeTable(table)
    assert again == table == MemoryRangeTable.from_bytes(table.to_bytes())
    assert hash(again) == hash(table)
    assert pickle.loads(pickle.dumps(table)) == table
    assert [*table.pairs()] == [(r.gpa, r.length) for r in table.ranges]
    assert eval(repr(table)) == table
    assert table.to_bytes() == b"".join(
        number.to_bytes(8, "little") for pair in table.pairs() for number in pair
    )
    assert table != table.pairs()


def test_a_long_table_is_shown_in_short() -> None:
    shown = repr(EVERY_OTHER_PAGE_OF_8_GIB)
    assert len(shown) < 500
    assert "1048568 more" in shown


def test_a_million_ranges() -> None:
    table = EVERY_OTHER_PAGE_OF_8_GIB
    assert (len(table), table.total_bytes) == (1 << 20, 4 << 30)
    assert table.to_bitmap() == int("01" * (1 << 20), 2)
    rest = MemoryRangeTable([MemoryRange(0, 8 << 30)]) - table
    assert rest.total_bytes == 4 << 30
    assert len(table & rest) == 0
    assert [*(table | rest).pairs()] == [(0, 8 << 30)]
    assert len(table.partition(64 << 20)) == 64


def test_the_last_bytes_of_64_bits() -> None:
    last = MemoryRangeTable([MemoryRange((1 << 64) - 4096, 4096)])
    assert last.aligned() == last | last == last & last == last
    assert last.partition(4096) == [last]
    assert MemoryRangeTable.from_bitmap(1, start=(1 << 64) - 4096) == last
    everything = MemoryRangeTable([MemoryRange(0, 1 << 63), MemoryRange(1 << 63, 1 << 63)])
    assert everything - last == MemoryRangeTable([MemoryRange(0, (1 << 64) - 4096)])
    with pytest.raises(MigratableError, match="all of 64 bits"):
        MemoryRangeTable.merge([everything])


@pytest.mark.parametrize(
    "bitmap", [-1, "11", b"\1" * 9, array("q", [-1]), array("d", [1.0]), None, [1]]
)
def test_what_is_no_bitmap_is_refused(bitmap: object) -> None:
    with pytest.raises(MigratableError, match=r"bitmap|64 bits"):
        MemoryRangeTable.from_bitmap(bitmap, start=(1 << 64) - 4096)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpa", "length"), [(-1, 1), (0, -1), (1 << 64, 1), (1, 1 << 64), (1 << 64, 0), (0, 1 << 64)]
)
def test_a_range_stays_within_64_bits(gpa: int, length: int) -> None:
    with pytest.raises(MigratableError, match="64 bits"):
        MemoryRange(gpa, length)


@pytest.mark.parametrize("data", [b"\0" * 15, b"\0" * 17, b"\xff" * 16])
def test_bytes_that_are_no_table_are_refused(data: bytes) -> None:
    with pytest.raises(MigratableError, match=r"16 bytes|64 bits"):
        MemoryRangeTable.from_bytes(data)


def test_sizes_that_make_no_sense_are_refused() -> None:
    table = MemoryRangeTable([MemoryRange(0, 1)])
    for act in (
        lambda: table.partition(0),
        lambda: table.aligned(0),
        lambda: table.to_bitmap(page_bytes=0),
        lambda: MemoryRangeTable.from_bitmap(1, page_bytes=-1),
    ):
        with pytest.raises(MigratableError, match="at least one byte"):
            act()


def test_a_bitmap_that_no_memory_could_hold_is_refused() -> None:
    with pytest.raises(MigratableError, match="no memory"):
        MemoryRangeTable([MemoryRange((1 << 64) - 1, 1)]).to_bitmap(page_bytes=1)
