"""The stream's RAM: its records into memory, and what it takes to make the same records again."""

from __future__ import annotations

import mmap
import os
import sys
from array import array
from typing import Any

import attrs

from vmmig._native import pwrite_pieces, zeroed
from vmmig.errors import DecodeError
from vmmig.formats.qemu import pages
from vmmig.formats.qemu.wire import (
    COMPRESSED,
    CONTINUE,
    DELTA,
    END_OF_SECTION,
    HOOK,
    MEM_SIZE,
    MULTIFD_FLUSH,
    PAGE,
    ZERO,
    Window,
    damaged,
)
from vmmig.sealed import create_unsealed, seal
from vmmig.snapshot import Buffer

RAM_VERSION = 4

_UNSEEN, _ZERO, _PLAIN = 0, 1, 2
_MAX_BLOCKS = 1 << 12
_MAX_BLOCK_BYTES = 1 << 44
_SPARSE_FROM_BYTES = 1 << 16
_SHARED_FROM_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
_REFUSED = {
    DELTA: "pages are sent as differences; switch the capability 'xbzrle' off",
    HOOK: "it is sent by RDMA; migrate by another way",
    COMPRESSED: "pages are compressed; switch the capability 'compress' off",
    MULTIFD_FLUSH: "its pages are sent by other connections; switch the capability 'multifd' off",
}


class _Store:
    """Bytes that begin as zeros and are written by pieces: shared memory, or private if small."""

    def __init__(self, length: int, *, shared: bool) -> None:
        # A small stream must not take much memory by naming much of it.
        shared = shared and hasattr(os, "memfd_create") and sys.maxsize > 1 << 32
        self._fd = create_unsealed(length) if shared else -1
        self._private: bytearray | mmap.mmap = bytearray()
        if not shared:
            sparse = length >= _SPARSE_FROM_BYTES
            self._private = zeroed(length) if sparse else bytearray(length)

    def put(self, window: Window, at: int, count: int, piece_bytes: int, offset: int) -> None:
        """``count`` pieces, 8 bytes apart, of the window's bytes from ``at`` on."""
        stride = piece_bytes + 8
        if self._fd >= 0:
            pwrite_pieces(
                self._fd,
                window.address + at,
                count=count,
                piece_bytes=piece_bytes,
                stride_bytes=stride,
                offset=offset,
            )
            return
        for start in range(at, at + count * stride, stride):
            self._private[offset : offset + piece_bytes] = window.view[start : start + piece_bytes]
            offset += piece_bytes

    def get(self, offset: int, length: int) -> bytes:
        if self._fd >= 0:
            return os.pread(self._fd, length, offset)
        return bytes(self._private[offset : offset + length])

    def set(self, offset: int, data: bytes) -> None:
        if self._fd >= 0:
            view = memoryview(data)
            while view:
                written_bytes = os.pwrite(self._fd, view, offset)
                offset += written_bytes
                view = view[written_bytes:]
        else:
            self._private[offset : offset + len(data)] = data

    def finish(self) -> memoryview | bytes:
        """The bytes, which do not change any more."""
        if self._fd >= 0:
            return seal(self._fd)
        if isinstance(self._private, mmap.mmap):
            return memoryview(self._private).toreadonly()
        return bytes(self._private)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@attrs.define(eq=False)
class Block:
    """A block of RAM while its pages come.

    Attributes:
        extra: With ``x-ignore-shared``, the block's guest-physical address.
    """

    name: str
    length: int
    extra: int | None = None
    store: _Store | None = None
    state: Any = None

    def finish(self) -> Buffer | None:
        """What it holds in the end; None if no page of it came."""
        if self.store is not None:
            return self.store.finish()
        return None if self.state is None else memoryview(zeroed(self.length)).toreadonly()


class RamReader:
    """Puts the records of a stream's RAM sections into memory, and keeps how they came.

    Attributes:
        blocks: In the stream's order.
        total_bytes: What the stream says they have in all.
        runs: Two numbers for each run: its first record's header; and how many records there
            are, with the block's index in the upper 32 bits.
        earlier: Versions of plain pages that came again, in the order in which those that
            replaced them came.

    """

    def __init__(self, window: Window, page_bytes: int, with_address: bool) -> None:
        self._window = window
        self._page_bytes = page_bytes
        self._with_address = with_address
        self._block: Block | None = None
        self._index = 0
        self._indexes: dict[str, int] = {}
        self.blocks: list[Block] = []
        self.total_bytes = 0
        self.runs = array("Q")
        self.earlier: _Store | None = None
        self.earlier_bytes = 0
        self._runs_before = 0
        self._may_join = False

    def setup(self) -> None:
        """The section that begins RAM: the list of blocks."""
        window = self._window
        begin = window.offset
        header = window.u64("RAM's list of blocks")
        self.total_bytes = header & -self._page_bytes
        if header & (self._page_bytes - 1) != MEM_SIZE:
            raise damaged(begin, f"RAM begins with {header:#x}, and not with a list of blocks")
        left = self.total_bytes
        while left > 0:
            begin = window.offset
            name = window.text("a RAM block's name")
            length = window.u64("a RAM block's length")
            if name in self._indexes:
                raise damaged(begin, f"RAM block {name!r} is there twice")
            if length % self._page_bytes or not 0 < length <= min(left, _MAX_BLOCK_BYTES):
                raise damaged(begin, f"RAM block {name!r} cannot have {length} bytes")
            if len(self.blocks) == _MAX_BLOCKS:
                raise damaged(begin, f"there are more than {_MAX_BLOCKS} RAM blocks")
            extra = window.u64("a RAM block's address") if self._with_address else None
            self._indexes[name] = len(self.blocks)
            self.blocks.append(Block(name, length, extra))
            left -= length
        self.records()

    def records(self) -> None:
        """All page records up to the end of a section."""
        window, page_bytes = self._window, self._page_bytes
        largest = 8 + 256 + page_bytes
        while True:
            window.fill(largest)
            begin = window.offset
            header = window.u64("a page's header")
            flags = header & (page_bytes - 1)
            if flags == END_OF_SECTION and header == END_OF_SECTION:
                return
            kind = flags & ~CONTINUE
            if kind not in (ZERO, PAGE):
                raise damaged(begin, _why_not(kind))
            if not flags & CONTINUE:
                name = window.text("a RAM block's name")
                if name not in self._indexes:
                    raise damaged(begin, f"there is no RAM block {name!r}")
                self._index = self._indexes[name]
                self._block = self.blocks[self._index]
            block = self._block
            if block is None:
                raise damaged(begin, "the first page names no RAM block")
            page = header // page_bytes
            if page >= block.length // page_bytes:
                raise damaged(begin, f"page {page} is beyond the end of RAM block {block.name!r}")
            try:
                self._run(block, kind, header, page)
            except (OSError, MemoryError, ValueError, OverflowError) as error:
                raise DecodeError(
                    f"there is no room for RAM block {block.name!r} of {block.length} bytes: "
                    f"{error}",
                    where=f"byte {begin}",
                ) from error

    def _run(self, block: Block, kind: int, header: int, page: int) -> None:
        window, page_bytes = self._window, self._page_bytes
        if block.state is None:
            block.state = zeroed(block.length // page_bytes)
        following = (header | CONTINUE) + page_bytes
        most = block.length // page_bytes - page - 1
        if kind == ZERO:
            fill = window.number(1, "a zero page")
            if fill:
                raise damaged(window.offset - 1, f"a page is filled with {fill:#x}, not zero")
            count = 1 + pages.count_zero_records(
                window.view, window.at, following, most, page_bytes
            )
            self._replace(block, page, count, _ZERO)
            window.at += 9 * (count - 1)
        else:
            window.need(page_bytes, "a page")
            begin = window.at
            window.at += page_bytes
            count = 1 + pages.count_plain_records(
                window.view, window.at, following, most, page_bytes
            )
            self._replace(block, page, count, _PLAIN)
            if block.store is None:
                block.store = _Store(block.length, shared=block.length >= _SHARED_FROM_BYTES)
            block.store.put(window, begin, count, page_bytes, page * page_bytes)
            window.at += (page_bytes + 8) * (count - 1)
        self._note(header, count)

    def _note(self, header: int, count: int) -> None:
        """One more run, or the last one goes on: the same whatever the window's size."""
        runs = self.runs
        if len(runs) and header & CONTINUE and self._may_join:
            last, counted = runs[-2], runs[-1]
            if (last | CONTINUE) + (counted & 0xFFFFFFFF) * self._page_bytes == header:
                runs[-1] = counted + count
                return
        runs.append(header)
        runs.append(self._index << 32 | count)
        self._may_join = True

    def end_section(self) -> int:
        """The next record begins a run of its own; how many runs the section had."""
        self._may_join = False
        count = len(self.runs) // 2 - self._runs_before
        self._runs_before += count
        return count

    def _replace(self, block: Block, page: int, count: int, kind: int) -> None:
        """Note what these pages are now; keep those that they were."""
        state, page_bytes, end = block.state, self._page_bytes, page + count
        at = state.find(b"\x02", page, end)
        while at >= 0:
            part = state[at : min(end, at + _COPY_BYTES // page_bytes)]
            stop = at + len(part) - len(part.lstrip(b"\x02"))
            assert block.store is not None
            data = block.store.get(at * page_bytes, (stop - at) * page_bytes)
            if self.earlier is None:
                self.earlier = _Store(0, shared=True)
            self.earlier.set(self.earlier_bytes, data)
            self.earlier_bytes += len(data)
            if kind == _ZERO:
                block.store.set(at * page_bytes, bytes(len(data)))
            at = state.find(b"\x02", stop, end)
        state[page:end] = bytes((kind,)) * count

    def close(self) -> None:
        """Let go of the descriptors; what `finish` gave stays."""
        for block in self.blocks:
            if block.store is not None:
                block.store.close()
        if self.earlier is not None:
            self.earlier.close()


def _why_not(kind: int) -> str:
    for flag, why in _REFUSED.items():
        if kind & flag:
            return f"this stream cannot be read: {why}"
    return f"a page cannot have the flags {kind:#x}"
