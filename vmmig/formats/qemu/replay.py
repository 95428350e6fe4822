"""A snapshot's RAM into the records that it came in."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import attrs

from vmmig._native import address_of, libc, zeroed
from vmmig.errors import DecodeError, SnapshotError
from vmmig.formats.qemu import pages
from vmmig.formats.qemu.wire import CONTINUE, END_OF_SECTION, MEM_SIZE, PAGE, ZERO
from vmmig.sealed import data_spans
from vmmig.snapshot import Snapshot

_RUNS = "$.snapshot_data['stream-runs']"
_BATCH_PAGES = 256


@attrs.define(eq=False)
class _Block:
    name: str
    length: int
    extra: int | None
    view: memoryview | None = None
    check: Callable[[int, int], None] = attrs.field(default=lambda start, end: None)
    address: int = 0
    data: list[tuple[int, int]] = attrs.field(factory=list)
    sent: Any = None
    again: bool = False
    last_run: Any = None


class RamWriter:
    """Makes the records of a snapshot's RAM.

    A page that was zero when it came and is not now, for somebody changed it since, becomes a
    plain one.

    Args:
        ram: The node with a section for each block.
        part: The part of the stream that begins RAM: ``blocks`` and ``page_bytes``.
        runs: See `vmmig.formats.qemu.ram.RamReader`.
        earlier: Also.

    Attributes:
        sections: The names of those blocks that have sections.

    Raises:
        MigratableError: These do not belong together.
    """

    def __init__(
        self, ram: Snapshot, part: dict[str, Any], runs: memoryview, earlier: memoryview
    ) -> None:
        self._earlier = earlier
        self._next_run = 0
        self._replaced: dict[int, dict[int, int]] = defaultdict(dict)
        try:
            self._page_bytes: int = part["page_bytes"]
            if self._page_bytes not in (1 << bits for bits in range(10, 17)):
                raise ValueError(f"pages cannot have {self._page_bytes} bytes")
            self._blocks = [_Block(*block) for block in part["blocks"]]
            self._runs = array("Q", bytes(runs))
            if sys.byteorder == "big":
                self._runs.byteswap()
            if len(self._runs) % 2:
                raise ValueError("half a run")
            for run in range(len(self._runs) // 2):
                self._check(ram, run)
            if any(block.again for block in self._blocks):
                self._find_replaced()
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, OSError) as error:
            raise DecodeError(f"the runs of pages are damaged: {error!r}", where=_RUNS) from error
        replaced = sum(map(len, self._replaced.values()))
        if replaced * self._page_bytes != len(earlier):
            raise DecodeError(
                f"{replaced} pages came again, and {len(earlier)} bytes of earlier ones are there",
                where=_RUNS,
            )
        self.sections = [block.name for block in self._blocks if block.view is not None]
        for block in self._blocks:
            self._check_unsent(block)

    def blocks_list(self) -> bytes:
        """What RAM begins with."""
        total_bytes = sum(block.length for block in self._blocks)
        parts = [(total_bytes | MEM_SIZE).to_bytes(8, "big")]
        for block in self._blocks:
            parts += [_counted(block.name), block.length.to_bytes(8, "big")]
            if block.extra is not None:
                parts.append(block.extra.to_bytes(8, "big"))
        return b"".join(parts)

    def records(self, count: int) -> Iterator[bytes | memoryview | pages.PlainRecords]:
        """The next ``count`` runs, and the end of the section."""
        for run in range(self._next_run, self._next_run + count):
            yield from self._run(run)
        self._next_run += count
        yield END_OF_SECTION.to_bytes(8, "big")

    def check_all_written(self) -> None:
        """Raise if runs are left."""
        if 2 * self._next_run != len(self._runs):
            raise DecodeError("there are more runs of pages than the layout has", where=_RUNS)

    def _numbers(self, run: int) -> tuple[_Block, int, int, int, int]:
        """A run's block, kind, first page, page behind its last, and first header."""
        header, word = self._runs[2 * run], self._runs[2 * run + 1]
        page = header // self._page_bytes
        kind = header & (self._page_bytes - 1) & ~CONTINUE
        return self._blocks[word >> 32], kind, page, page + (word & 0xFFFFFFFF), header

    def _check(self, ram: Snapshot, run: int) -> None:
        block, kind, page, end, _ = self._numbers(run)
        if block.view is None:
            block.view, block.check = ram.section(block.name).in_pieces()
            if len(block.view) != block.length:
                raise SnapshotError(
                    f"RAM block {block.name!r} has {len(block.view)} bytes in the snapshot, and "
                    f"{block.length} in its stream; these must be as many"
                )
            block.address = address_of(block.view)
            block.data = [*data_spans(block.view)]
            block.sent = zeroed(block.length // self._page_bytes)
        if kind not in (ZERO, PAGE) or not page < end <= len(block.sent):
            raise ValueError(f"run {run} is not possible")
        block.again = block.again or block.sent.find(b"\x01", page, end) >= 0
        block.sent[page:end] = b"\x01" * (end - page)

    def _find_replaced(self) -> None:
        """Which plain pages of which runs are among the earlier versions, and where."""
        for block in self._blocks:
            if block.again:
                block.last_run = memoryview(zeroed(4 * len(block.sent))).cast("I")
        place = 0
        for run in range(len(self._runs) // 2):
            block, _, page, end, _ = self._numbers(run)
            if not block.again:
                continue
            before = block.last_run[page:end].tolist()
            if any(before):
                for each, last in enumerate(before, page):
                    if last and self._runs[2 * last - 2] & PAGE:
                        self._replaced[last - 1][each] = place
                        place += self._page_bytes
            block.last_run[page:end] = memoryview(array("I", [run + 1]) * (end - page))

    def _check_unsent(self, block: _Block) -> None:
        if block.view is None:
            return
        start = block.sent.find(b"\0")
        while start >= 0:
            end = block.sent.find(b"\1", start)
            end = len(block.sent) if end < 0 else end
            if not self._is_zero(block, start, end):
                raise SnapshotError(
                    f"in RAM block {block.name!r}, a page from {start} to {end - 1} is not zero, "
                    "but its stream has no place for it"
                )
            start = block.sent.find(b"\0", end)

    def _run(self, run: int) -> Iterator[bytes | memoryview | pages.PlainRecords]:
        block, kind, page, end, header = self._numbers(run)
        named = not header & CONTINUE
        for count, data in self._sources(block, kind, run, page, end):
            flags = ZERO if data is None else PAGE
            first = page
            page += count
            if named:
                named = False
                yield (first * self._page_bytes | flags).to_bytes(8, "big") + _counted(block.name)
                if data is None:
                    yield b"\0"
                else:
                    yield data[: self._page_bytes]
                    data = data[self._page_bytes :]
                first += 1
            yield from self._continued(first, page, data)

    def _continued(
        self, page: int, end: int, data: memoryview | None
    ) -> Iterator[bytes | memoryview | pages.PlainRecords]:
        """Records of consecutive pages that name no block; without data, of zero pages."""
        size = self._page_bytes
        flags = CONTINUE | (ZERO if data is None else PAGE)
        for first in range(page, end, _BATCH_PAGES):
            count = min(_BATCH_PAGES, end - first)
            header = first * size | flags
            if data is None:
                yield pages.zero_records(header, count, size)
            else:
                start = (first - page) * size
                yield pages.PlainRecords(header, data[start : start + count * size], size)

    def _sources(
        self, block: _Block, kind: int, run: int, page: int, end: int
    ) -> Iterator[tuple[int, memoryview | None]]:
        """The bytes of a run's pages: how many, and from where; None for zeros."""
        view, size = block.view, self._page_bytes
        assert view is not None
        last = block.last_run[page:end].tolist() if block.again else []
        newest = last.count(run + 1) == len(last)
        if newest and kind == PAGE:
            for first in range(page, end, _BATCH_PAGES):
                stop = min(first + _BATCH_PAGES, end)
                block.check(first * size, stop * size)
                yield stop - first, view[first * size : stop * size]
        elif newest and self._is_zero(block, page, end):
            yield end - page, None
        else:
            for each in range(page, end):
                if newest or last[each - page] == run + 1:
                    block.check(each * size, (each + 1) * size)
                    zero = kind == ZERO and self._is_zero(block, each, each + 1)
                    yield 1, None if zero else view[each * size : (each + 1) * size]
                elif kind == ZERO:
                    yield 1, None
                else:
                    place = self._replaced[run][each]
                    yield 1, self._earlier[place : place + size]

    def _is_zero(self, block: _Block, page: int, end: int) -> bool:
        view, begin, stop = block.view, page * self._page_bytes, end * self._page_bytes
        assert view is not None
        i = bisect_right(block.data, begin, key=itemgetter(1))
        while i < len(block.data) and block.data[i][0] < stop:
            start, data_end = max(block.data[i][0], begin), min(block.data[i][1], stop)
            i += 1
            block.check(start, data_end)
            where = block.address + start
            if view[start] or libc().memcmp(where, where + 1, data_end - start - 1):
                return False
        return True


def _counted(name: str) -> bytes:
    text = name.encode("ascii")
    return bytes((len(text),)) + text
