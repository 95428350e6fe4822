"""Runs of page records, as the stream has them: consecutive pages of one block and one kind.

A plain page is a number of 8 bytes - the page's offset in its block, and flags in the bits below
the page's size -, then the page; a zero page is such a number and one byte. A record without
`CONTINUE` has its block's name behind the number. A run is found, and made again, by as few steps
of the interpreter as possible: a stream of 2 GiB has half a million of them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

import attrs

from vmmig._native import address_of, write_records

_FIRST_STEP = 8
_LAST_STEP = 4096


def headers(first: int, count: int, page_bytes: int) -> bytes:
    """The headers of ``count`` records: ``first``, and each next one page further.

    >>> headers(0x28, 2, 4096).hex(" ", 8)
    '0000000000000028 0000000000001028'
    """
    numbers = array("Q", range(first, first + count * page_bytes, page_bytes))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def zero_records(first: int, count: int, page_bytes: int) -> bytes:
    """As many records of zero pages.

    >>> zero_records(0x22, 2, 4096).hex(" ", 9)
    '000000000000002200 000000000000102200'
    """
    numbers = headers(first, count, page_bytes)
    records = bytearray(9 * count)
    for i in range(8):
        records[i::9] = numbers[i::8]
    return bytes(records)


def plain_records(first: int, pages: memoryview, page_bytes: int) -> bytes:
    """The records of consecutive plain pages, whose bytes are ``pages``.

    >>> plain_records(0x28, memoryview(b"ab"), 1).hex(" ", 9)
    '000000000000002861 000000000000002962'
    """
    count = len(pages) // page_bytes
    numbers = headers(first, count, page_bytes)
    parts: list[bytes | memoryview] = [b""] * (2 * count)
    parts[0::2] = [numbers[i : i + 8] for i in range(0, 8 * count, 8)]
    parts[1::2] = [pages[i : i + page_bytes] for i in range(0, len(pages), page_bytes)]
    return b"".join(parts)


@attrs.frozen(eq=False)
class PlainRecords:
    """The records of consecutive plain pages, not put together yet.

    Attributes:
        first: The first one's header.
        pages: The pages.
        page_bytes: The size of each.

    >>> PlainRecords(0x28, memoryview(b"ab"), 1).joined().hex(" ", 9)
    '000000000000002861 000000000000002962'
    """

    first: int
    pages: memoryview
    page_bytes: int

    def joined(self) -> bytes:
        """Their bytes."""
        return plain_records(self.first, self.pages, self.page_bytes)

    def write(self, fd: int) -> None:
        """Write them to a descriptor that blocks, without a copy of the pages.

        Raises:
            OSError: They could not all be written.
        """
        count = len(self.pages) // self.page_bytes
        write_records(
            fd,
            headers(self.first, count, self.page_bytes),
            address_of(self.pages),
            count=count,
            piece_bytes=self.page_bytes,
        )


def count_zero_records(view: memoryview, at: int, first: int, most: int, page_bytes: int) -> int:
    """How many records of zero pages stand at ``at``, the first of them with header ``first``.

    >>> count_zero_records(memoryview(zero_records(0x22, 5, 4096)), 0, 0x22, 9, 4096)
    5
    """
    total = 0
    for count in _steps(min(most, (len(view) - at) // 9)):
        found = bytes(view[at : at + 9 * count])
        expected = zero_records(first, count, page_bytes)
        same = _same(found, expected) // 9
        total += same
        if same < count:
            break
        at += 9 * count
        first += count * page_bytes
    return total


def count_plain_records(view: memoryview, at: int, first: int, most: int, page_bytes: int) -> int:
    """How many records of plain pages stand at ``at``, the first of them with header ``first``.

    >>> records = plain_records(0x28, memoryview(bytes(5 * 4096)), 4096)
    >>> count_plain_records(memoryview(records), 0, 0x28, 9, 4096)
    5
    """
    total, stride = 0, page_bytes + 8
    for count in _steps(min(most, (len(view) - at) // stride)):
        words = view[at : at + count * stride].cast("Q")
        found = words[:: stride // 8].tobytes()
        same = _same(found, headers(first, count, page_bytes)) // 8
        total += same
        if same < count:
            break
        at += count * stride
        first += count * page_bytes
    return total


def _steps(most: int) -> Iterator[int]:
    step = _FIRST_STEP
    while most > 0:
        count = min(step, most)
        yield count
        most -= count
        step = min(4 * step, _LAST_STEP)


def _same(found: bytes, expected: bytes) -> int:
    """How many bytes they have in common from the start on."""
    if found == expected:
        return len(found)
    low, high = 0, len(found)
    while high - low > 1:
        middle = (low + high) // 2
        if found[low:middle] == expected[low:middle]:
            low = middle
        else:
            high = middle
    return low
