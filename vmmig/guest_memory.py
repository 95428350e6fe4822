"""A guest's RAM: memory of this process at guest-physical addresses, with a dirty log."""

from __future__ import annotations

import errno
import mmap
import os
import re
from bisect import bisect
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from threading import RLock
from typing import TYPE_CHECKING, Literal

import attrs

from vmmig._native import (
    F_ADD_SEALS,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    FileMapping,
    address_of,
    data_of,
    libc,
    madvise,
)
from vmmig.dirty_log import DirtyLog, PagemapDirtyLog, ShadowDirtyLog
from vmmig.errors import MigratableError
from vmmig.memory import PAGE_BYTES, MemoryRange, MemoryRangeTable

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer

_MADV_REMOVE, _MADV_POPULATE_WRITE = 9, 23
_PIECE_BYTES = 64 << 20
_ZEROS = bytes(PAGE_BYTES)


@attrs.frozen(eq=False, repr=False)
class MemoryRegion:
    """One mapping of a `GuestMemory`; it keeps its memory alive.

    Attributes:
        gpa: The guest-physical address of its first byte.
        length: Its size in bytes.
        address: Where it is mapped in this process: for native engines. It is valid as long as
            the region, or a view of it, is held.
        fd: The descriptor of the memfd, open as long as the mapping and not to be closed; None
            where there are no memfds.

    >>> (region,) = GuestMemory([MemoryRange(0x1000, 0x2000)]).regions
    >>> region
    MemoryRegion(gpa=0x1000, length=0x2000)
    """

    gpa: int
    length: int
    address: int
    fd: int | None
    _mapping: mmap.mmap

    @property
    def range(self) -> MemoryRange:
        """Its guest-physical range."""
        return MemoryRange(self.gpa, self.length)

    @property
    def memory(self) -> memoryview:
        """Its bytes, to read and to write."""
        return memoryview(self._mapping)

    def allocated(self) -> MemoryRangeTable:
        """The pages that take memory; all others are zero, and have never been touched.

        It costs a system call for each run of pages. Where there is no descriptor, all pages.

        >>> memory = GuestMemory([MemoryRange(0, 1 << 20)])
        >>> memory.write(0x5000, b"code")
        >>> memory.regions[0].allocated()
        MemoryRangeTable(ranges=(MemoryRange(gpa=20480, length=4096),))
        """
        if self.fd is None:
            return MemoryRangeTable([self.range])
        try:
            spans = [*data_of(self.fd, 0, self.length)]
        except OSError as error:
            raise MigratableError(f"{self!r} cannot say what is allocated: {error}") from error
        return MemoryRangeTable.from_spans(
            [self.gpa + start for start, _ in spans], [self.gpa + end for _, end in spans]
        )

    def nonzero(self) -> MemoryRangeTable:
        """The pages that are not zero; those that take no memory are not touched.

        >>> memory = GuestMemory([MemoryRange(0, 1 << 20)])
        >>> memory.write(0x5000, bytes(0x1000) + b"code")
        >>> memory.regions[0].nonzero()
        MemoryRangeTable(ranges=(MemoryRange(gpa=24576, length=4096),))
        """
        return _nonzero(self._mapping, self.gpa, self.allocated())

    def __repr__(self) -> str:
        return f"MemoryRegion(gpa={self.gpa:#x}, length={self.length:#x})"


class GuestMemory:
    """RAM at one or several guest-physical ranges, zero-filled; each is a mapping of its own.

    On Linux each region is a memfd, sealed against changes of its size, which another process
    can be given. Memory is used as it is touched.

    Args:
        ranges: Where RAM is: whole pages that do not overlap (say, below and above a PCI hole).
        dirty_log_backend: Who records writes. ``pagemap`` is `PagemapDirtyLog`, ``shadow`` is
            `ShadowDirtyLog`, ``auto`` the first that works here, tried anew at each start. Or
            an object with the three methods, where the emulator itself knows what it writes.

    Raises:
        MigratableError: A range is not made of whole pages, two overlap, or there is no room.

    >>> memory = GuestMemory([MemoryRange(0, 1 << 16), MemoryRange(1 << 32, 1 << 16)])
    >>> memory.write(1 << 32, b"code")
    >>> memory.read(1 << 32, 4)
    b'code'
    >>> memory.start_dirty_log()
    >>> memory.write(0x2FFE, b"code")
    >>> memory.dirty_log()
    MemoryRangeTable(ranges=(MemoryRange(gpa=8192, length=8192),))
    >>> memory.close()
    """

    def __init__(
        self,
        ranges: Iterable[MemoryRange],
        *,
        dirty_log_backend: Literal["auto", "pagemap", "shadow"] | DirtyLog = "auto",
    ) -> None:
        layout = _checked(ranges)
        try:
            regions = [_new_region(each) for each in layout]
        except (OSError, OverflowError, ValueError) as error:
            raise MigratableError(
                f"there is no room for {sum(r.length for r in layout)} bytes of RAM: {error}"
            ) from error
        self._take(regions, dirty_log_backend)

    @classmethod
    def from_fds(
        cls,
        parts: Iterable[tuple[MemoryRange, int]],
        *,
        dirty_log_backend: Literal["auto", "pagemap", "shadow"] | DirtyLog = "auto",
    ) -> Self:
        """The RAM that another process has in memfds, shared with it without a copy.

        A memfd is sealed against shrinking where it can be. One that cannot (it was made without
        ``MFD_ALLOW_SEALING``) must not be truncated by its owner: to touch what was cut off ends
        this process with SIGBUS.

        Args:
            parts: Each range with the descriptor of exactly its bytes. The descriptors stay the
                caller's, who may close them at once.

        Raises:
            MigratableError: A descriptor has another size than its range or cannot be mapped, or
                the ranges are not what they should be.

        >>> source = GuestMemory([MemoryRange(0, 1 << 16)])
        >>> destination = GuestMemory.from_fds([(r.range, r.fd) for r in source.regions])
        >>> source.write(0, b"code")
        >>> destination.read(0, 4)
        b'code'
        """
        pairs = sorted(parts)
        _checked(each for each, _ in pairs)
        memory = cls.__new__(cls)
        memory._take([_received_region(each, fd) for each, fd in pairs], dirty_log_backend)
        return memory

    def _take(
        self,
        regions: list[MemoryRegion],
        backend: Literal["auto", "pagemap", "shadow"] | DirtyLog,
    ) -> None:
        if isinstance(backend, str) and backend not in ("auto", "pagemap", "shadow"):
            raise MigratableError(
                f"a dirty log is 'auto', 'pagemap', 'shadow' or an object, not {backend!r}"
            )
        self._regions = tuple(regions)
        self._starts = [region.gpa for region in regions]
        self._lock = RLock()
        self._wanted = backend
        self._log: DirtyLog | None = None

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The regions, in the order of their addresses.

        Raises:
            MigratableError: The memory is closed.
        """
        if not self._regions:
            raise MigratableError("the guest's memory is closed")
        return self._regions

    @property
    def ranges(self) -> MemoryRangeTable:
        """Where RAM is."""
        return MemoryRangeTable(region.range for region in self.regions)

    @property
    def total_bytes(self) -> int:
        """How much RAM there is."""
        return sum(region.length for region in self.regions)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``gpa`` on.

        Raises:
            MigratableError: Not all of them are RAM.
        """
        return b"".join(self.views([MemoryRange(gpa, length)]))

    def write(self, gpa: int, data: Buffer) -> None:
        """Store ``data`` from ``gpa`` on.

        Raises:
            MigratableError: Not all of that is RAM; nothing was stored.
        """
        source = memoryview(data).cast("B")
        for view in self.views([MemoryRange(gpa, source.nbytes)]):
            view[:] = source[: view.nbytes]
            source = source[view.nbytes :]

    def views(self, ranges: MemoryRangeTable | Iterable[MemoryRange]) -> list[memoryview]:
        """The bytes of the ranges, in their order, to read and to write: no copy.

        There is one view for each range, two for one that goes on in a region that follows
        without a gap, and so on.

        Raises:
            MigratableError: A range is not all in RAM.

        >>> memory = GuestMemory([MemoryRange(0, 1 << 16)])
        >>> [view.nbytes for view in memory.views([MemoryRange(0xFFFF, 1), MemoryRange(0, 2)])]
        [1, 2]
        """
        return self._slices(ranges, [region.memory for region in self.regions])

    def views_to_send(self, ranges: MemoryRangeTable | Iterable[MemoryRange]) -> list[memoryview]:
        """As `views`, to read only, and what a live migration must send.

        With the dirty log ``shadow`` they show its copy: the bytes as they were when it last
        looked (`ShadowDirtyLog` says why); they are valid until it looks again. Else RAM itself.
        """
        with self._lock:
            if isinstance(self._log, ShadowDirtyLog):
                copies = [memoryview(copy).toreadonly() for copy, _ in self._log.copies()]
                return self._slices(ranges, copies)
        return self._slices(ranges, [region.memory.toreadonly() for region in self.regions])

    def allocated(self) -> MemoryRangeTable:
        """The pages that take memory: see `MemoryRegion.allocated`."""
        return MemoryRangeTable.merge(region.allocated() for region in self.regions)

    def nonzero(self) -> MemoryRangeTable:
        """The pages that are not zero: the first, sparse pass of a migration.

        The guest may run meanwhile: what it writes is in the dirty log, if that was started
        before. As in `views_to_send`, with the dirty log ``shadow`` it is the copy that counts.
        """
        with self._lock:
            if isinstance(self._log, ShadowDirtyLog):
                return MemoryRangeTable.merge(
                    _nonzero(copy, region.gpa, within)
                    for region, (copy, within) in zip(self.regions, self._log.copies(), strict=True)
                )
        return MemoryRangeTable.merge(region.nonzero() for region in self.regions)

    def prefault(self) -> None:
        """Allocate and map all pages now, so that nobody waits for it later; no byte changes.

        Raises:
            MigratableError: There is not that much memory.
        """
        for region in self.regions:
            try:
                _prefault(region)
            except OSError as error:
                raise MigratableError(
                    f"{region!r} could not be allocated ({error}); the host has too little memory"
                ) from error

    def zero(self) -> None:
        """Make all bytes zero. Without a dirty log the memory is given back to the host."""
        with self._lock:
            for region in self.regions:
                if self._log is None and region.fd is not None:
                    with suppress(OSError):
                        madvise(region.address, region.length, _MADV_REMOVE)
                        continue
                libc().memset(region.address, 0, region.length)

    @property
    def dirty_log_backend(self) -> Literal["pagemap", "shadow"] | DirtyLog | None:
        """Who records writes now; None when nobody does."""
        if isinstance(self._log, PagemapDirtyLog):
            return "pagemap"
        return "shadow" if isinstance(self._log, ShadowDirtyLog) else self._log

    def start_dirty_log(self) -> None:
        """Start to record which pages are written to; what was recorded before is forgotten.

        Raises:
            MigratableError: It cannot be done here; nothing is recorded.
        """
        with self._lock:
            regions = self.regions
            self.stop_dirty_log()
            logs: dict[str, list[DirtyLog]] = {
                "pagemap": [PagemapDirtyLog(regions)],
                "shadow": [ShadowDirtyLog(regions)],
            }
            logs["auto"] = logs["pagemap"] + logs["shadow"]
            tried = logs[self._wanted] if isinstance(self._wanted, str) else [self._wanted]
            for log in tried:
                try:
                    log.start_dirty_log()
                except MigratableError:
                    if log is tried[-1]:
                        raise
                else:
                    self._log = log
                    return

    def dirty_log(self) -> MemoryRangeTable:
        """The pages written to since the last call, or since `start_dirty_log`: whole pages.

        Raises:
            MigratableError: The log was not started, or failed.
        """
        with self._lock:
            if self._log is None:
                raise MigratableError("there is no dirty log; call start_dirty_log() first")
            return self._log.dirty_log()

    def stop_dirty_log(self) -> None:
        """Stop recording; nothing happens if nothing is recorded."""
        with self._lock:
            log, self._log = self._log, None
            if log is not None:
                log.stop_dirty_log()

    def close(self) -> None:
        """Let go of the memory. Views and regions that are held keep theirs, and its address."""
        with self._lock:
            self.stop_dirty_log()
            self._regions = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slices(
        self, ranges: MemoryRangeTable | Iterable[MemoryRange], memories: list[memoryview]
    ) -> list[memoryview]:
        table = ranges if isinstance(ranges, MemoryRangeTable) else MemoryRangeTable(ranges)
        views: list[memoryview] = []
        start = end = 0
        memory = memories[0]
        for gpa, length in table.pairs():
            while length:
                if not start <= gpa < end:
                    i = bisect(self._starts, gpa) - 1
                    region = self._regions[i]
                    start, end, memory = region.gpa, region.gpa + region.length, memories[i]
                    if i < 0 or gpa >= end:
                        raise MigratableError(
                            f"there is no RAM at {gpa:#x}, of which {length} bytes are wanted; "
                            f"there is at {_shown(self.ranges)}"
                        )
                piece = min(length, end - gpa)
                views.append(memory[gpa - start : gpa - start + piece])
                gpa, length = gpa + piece, length - piece
        return views


def _checked(ranges: Iterable[MemoryRange]) -> list[MemoryRange]:
    layout = sorted(ranges)
    if not layout:
        raise MigratableError("a guest's memory has at least one range")
    for each in layout:
        if not each.length or each.length % PAGE_BYTES or each.gpa % PAGE_BYTES:
            raise MigratableError(
                f"RAM of {each.length} bytes at {each.gpa:#x} is not made of whole pages of "
                f"{PAGE_BYTES} bytes"
            )
    for a, b in pairwise(layout):
        if b.gpa < a.end:
            raise MigratableError(f"RAM at {a.gpa:#x} and at {b.gpa:#x} overlap")
    return layout


def _new_region(where: MemoryRange) -> MemoryRegion:
    if not hasattr(os, "memfd_create"):
        mapping = mmap.mmap(-1, where.length)
        return MemoryRegion(where.gpa, where.length, address_of(mapping), None, mapping)
    fd = os.memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, where.length)
        _seal(fd, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
        return _mapped(where, fd)
    finally:
        os.close(fd)


def _received_region(where: MemoryRange, fd: int) -> MemoryRegion:
    try:
        with suppress(OSError):
            _seal(fd, F_SEAL_SHRINK)
        size = os.fstat(fd).st_size
        if size != where.length:
            raise MigratableError(
                f"the descriptor for RAM at {where.gpa:#x} has {size} bytes, not {where.length}"
            )
        return _mapped(where, fd)
    except (OSError, OverflowError, ValueError) as error:
        raise MigratableError(
            f"the descriptor for RAM at {where.gpa:#x} cannot be mapped: {error}"
        ) from error


def _seal(fd: int, seals: int) -> None:
    import fcntl

    fcntl.fcntl(fd, F_ADD_SEALS, seals)


def _mapped(where: MemoryRange, fd: int) -> MemoryRegion:
    mapping = FileMapping(fd, where.length)
    return MemoryRegion(where.gpa, where.length, address_of(mapping), mapping.fileno(), mapping)


def _nonzero(mapping: mmap.mmap, gpa: int, within: MemoryRangeTable) -> MemoryRangeTable:
    """The pages that are not zero, of those ``within`` a mapping that begins at ``gpa``."""
    words = memoryview(mapping).cast("Q")
    starts: list[int] = []
    ends: list[int] = []
    for part in within.partition(_PIECE_BYTES):
        for first, length in part.pairs():
            start = first - gpa
            # A page is not zero if its first word is not: most pages are done with here.
            first_words = words[start // 8 : (start + length) // 8 : PAGE_BYTES // 8]
            flags = bytearray(map(bool, first_words.tolist()))
            page = flags.find(0)
            while page >= 0:
                at = start + page * PAGE_BYTES
                if mapping[at : at + PAGE_BYTES] != _ZEROS:
                    flags[page] = 1
                page = flags.find(0, page + 1)
            for run in re.finditer(b"\1+", flags):
                starts.append(first + run.start() * PAGE_BYTES)
                ends.append(first + run.end() * PAGE_BYTES)
    return MemoryRangeTable.merge([MemoryRangeTable.from_spans(starts, ends)])


def _prefault(region: MemoryRegion) -> None:
    for start in range(0, region.length, _PIECE_BYTES):
        size = min(_PIECE_BYTES, region.length - start)
        while True:
            try:
                madvise(region.address + start, size, _MADV_POPULATE_WRITE)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Before Linux 5.14: allocate by the descriptor, then touch to map.
                if region.fd is not None:
                    os.posix_fallocate(region.fd, start, size)
                _ = region.memory[start : start + size : PAGE_BYTES].tolist()
            break


def _shown(table: MemoryRangeTable) -> str:
    return ", ".join(f"{gpa:#x} to {gpa + length - 1:#x}" for gpa, length in table.pairs())
