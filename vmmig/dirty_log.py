"""Dirty logs of this process's own memory: which pages were written to since the last look.

`PagemapDirtyLog` asks the kernel, `ShadowDirtyLog` compares with a copy. `GuestMemory` chooses.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import eq
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, Protocol

from vmmig._native import MFD_CLOEXEC, address_of, libc
from vmmig.errors import MigratableError
from vmmig.memory import PAGE_BYTES, MemoryRangeTable

if TYPE_CHECKING:
    from vmmig.guest_memory import MemoryRegion


class DirtyLog(Protocol):
    """What records writes to memory: the three methods of `LiveMigratable` that are about it.

    >>> class FromTheEmulator:
    ...     def start_dirty_log(self): self.dirty = []
    ...     def dirty_log(self):
    ...         ranges, self.dirty = self.dirty, []
    ...         return MemoryRangeTable(ranges)
    ...     def stop_dirty_log(self): pass
    >>> log: DirtyLog = FromTheEmulator()
    """

    def start_dirty_log(self) -> None:
        """Start to record; what was recorded before is forgotten."""

    def dirty_log(self) -> MemoryRangeTable:
        """What was written to since the last call, or since `start_dirty_log`."""
        ...

    def stop_dirty_log(self) -> None:
        """Stop recording."""


# From the kernel's include/uapi/linux/userfaultfd.h and fs.h.
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "loongarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_UFFD_API = 0xAA
_UFFD_WP_HUGETLBFS_SHMEM, _UFFD_WP_UNPOPULATED, _UFFD_WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
_USERFAULTFD_IOC_NEW = 0xAA00
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER, _UFFDIO_REGISTER_MODE_WP = 0xC020AA00, 2
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_WRITEPROTECT, _UFFDIO_WRITEPROTECT_MODE_WP = 0xC018AA06, 1
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_WP_MATCHING = 1
_PAGE_IS_WRITTEN = 2
_SCAN = Struct("=12Q")
_WALK_END = Struct("=32xQ")
_RANGES_A_CALL = 1 << 14


class PagemapDirtyLog:
    """Writes as the kernel sees them: ``ioctl(PAGEMAP_SCAN)``, Linux 6.7 and newer.

    The pages are write-protected by a userfaultfd in asynchronous mode: the first write to one
    lifts its protection, and nobody is stopped. A look reports the pages without protection and
    protects them again, in one step, so a write that races it is in this table or in the next.
    No privilege is needed. A first write to a protected page takes about a microsecond more.

    It sees each store through this process's mapping, by Python, native code or the kernel
    (``recv_into``). It does not see what reaches the memory on another way: ``pwrite`` to the
    descriptor, another mapping of it, another process (a forked child too), and holes punched.
    Pages are of 4 KiB; a huge page is split when the log starts, so that it stays exact.

    Raises:
        MigratableError: From `start_dirty_log`: this system cannot do it, or does it wrong,
            which is tried on other memory first.

    >>> from vmmig.guest_memory import GuestMemory
    >>> from vmmig.memory import MemoryRange
    >>> memory = GuestMemory([MemoryRange(0, 1 << 16)])
    >>> PagemapDirtyLog(memory.regions).dirty_log()
    Traceback (most recent call last):
    vmmig.errors.MigratableError: there is no dirty log; call start_dirty_log() first
    """

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        self._regions = regions
        self._lock = Lock()
        self._protection: _Protection | None = None
        self._failed = False

    def start_dirty_log(self) -> None:
        """Protect all pages."""
        with self._lock:
            self._stop()
            try:
                _try_kernel()
                self._protection = _Protection([(r.address, r.length) for r in self._regions])
            except (OSError, ImportError, KeyError) as error:
                raise MigratableError(
                    f"the kernel cannot log writes to this memory ({error}); Linux 6.7 or newer "
                    f"can for memfds; the dirty log 'shadow' needs no help from it"
                ) from error
            self._failed = False

    def dirty_log(self) -> MemoryRangeTable:
        """The pages written to since the last look; after one that failed, all pages."""
        with self._lock:
            if self._protection is None:
                raise MigratableError("there is no dirty log; call start_dirty_log() first")
            if self._protection.pid != os.getpid():
                raise MigratableError(
                    "the dirty log is that of the process which started it, not of this fork of "
                    "it; call start_dirty_log() here to log what this process writes"
                )
            starts, ends = array("Q"), array("Q")
            failed, self._failed = self._failed, True
            for region in self._regions:
                offset = region.gpa - region.address
                try:
                    for words in self._protection.written(region.address, region.length):
                        starts += _moved(words[0::3], offset)
                        ends += _moved(words[1::3], offset)
                except OSError as error:
                    raise MigratableError(
                        f"the kernel could not be asked what was written ({error}); ask again: "
                        f"the next answer will be all of the memory"
                    ) from error
            self._failed = False
            if failed:
                return MemoryRangeTable.merge(
                    MemoryRangeTable([region.range]) for region in self._regions
                )
            return _joined(starts, ends)

    def stop_dirty_log(self) -> None:
        """Lift the protection."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._protection is not None:
            self._protection.lift()
            self._protection = None


class ShadowDirtyLog:
    """Writes found by comparing with a copy; it takes as much memory again, and works anywhere.

    What a look finds changed it copies, so the copy is what a destination has that was sent the
    *copy's* bytes: see `views`. RAM itself must not be sent while it is written to: a page that
    changes before it is read, and back before the next look, would be the destination's for ever.

    A write that changes nothing is not reported.

    >>> from vmmig.guest_memory import GuestMemory
    >>> from vmmig.memory import MemoryRange
    >>> memory = GuestMemory([MemoryRange(0, 1 << 16)])
    >>> log = ShadowDirtyLog(memory.regions)
    >>> log.start_dirty_log()
    >>> memory.write(0x3000, b"new")
    >>> log.dirty_log()
    MemoryRangeTable(ranges=(MemoryRange(gpa=12288, length=4096),))
    """

    _COMPARED_BYTES = 1 << 20

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        self._regions = regions
        self._lock = Lock()
        self._copies: list[mmap.mmap] | None = None
        self._seen = MemoryRangeTable()

    def start_dirty_log(self) -> None:
        """Copy all that is allocated."""
        with self._lock:
            try:
                copies = [_private(region.length) for region in self._regions]
            except OSError as error:
                raise MigratableError(
                    f"there is no memory for the copy with which to compare: {error}"
                ) from error
            self._copies, self._seen = copies, MemoryRangeTable()
            for _, memory, copy, length in self._parts(copies):
                libc().memmove(copy, memory, length)

    def dirty_log(self) -> MemoryRangeTable:
        """The pages that differ from what they were at the last look."""
        with self._lock:
            starts = [
                gpa + page
                for gpa, memory, copy, length in self._parts(self._started())
                for page in _differing(memory, copy, length)
            ]
            return _joined(starts, [start + PAGE_BYTES for start in starts])

    def stop_dirty_log(self) -> None:
        """Forget the copy."""
        with self._lock:
            self._copies, self._seen = None, MemoryRangeTable()

    def copies(self) -> list[tuple[mmap.mmap, MemoryRangeTable]]:
        """For each region all bytes as they were at the last look, and where they may not be 0.

        Not to be written to.
        """
        with self._lock:
            copies = self._started()
            within = [self._seen & MemoryRangeTable([region.range]) for region in self._regions]
            return [*zip(copies, within, strict=True)]

    def _started(self) -> list[mmap.mmap]:
        if self._copies is None:
            raise MigratableError("there is no dirty log; call start_dirty_log() first")
        return self._copies

    def _parts(self, copies: list[mmap.mmap]) -> Iterator[tuple[int, int, int, int]]:
        """What may differ: gpa, address in memory, address in the copy, length."""
        # What is allocated no more reads as zeros, which may be a change.
        self._seen |= MemoryRangeTable.merge(region.allocated() for region in self._regions)
        for region, copy in zip(self._regions, copies, strict=True):
            start = address_of(copy)
            for gpa, length in (self._seen & MemoryRangeTable([region.range])).pairs():
                at = gpa - region.gpa
                yield gpa, region.address + at, start + at, length


def _private(length: int) -> mmap.mmap:
    if os.name == "nt":
        return mmap.mmap(-1, length)
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _differing(memory: int, copy: int, length: int) -> Iterator[int]:
    """The offsets of the pages that differ; each is copied before it is given."""
    memcmp, memmove, step = libc().memcmp, libc().memmove, ShadowDirtyLog._COMPARED_BYTES
    for start in range(0, length, step):
        size = min(step, length - start)
        if memcmp(memory + start, copy + start, size):
            for at in range(start, start + size, PAGE_BYTES):
                if memcmp(memory + at, copy + at, PAGE_BYTES):
                    memmove(copy + at, memory + at, PAGE_BYTES)
                    yield at


class _Protection:
    """Spans of this process's memory under write protection, until it is lifted."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.pid = os.getpid()
        self._spans = [*spans]
        self._vector = array("Q", bytes(24 * _RANGES_A_CALL))
        self._uffd = self._pagemap = -1
        self._uffd = _userfaultfd()
        features = _UFFD_WP_ASYNC | _UFFD_WP_UNPOPULATED | _UFFD_WP_HUGETLBFS_SHMEM
        _ioctl(self._uffd, _UFFDIO_API, _UFFD_API, features, 0)
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for address, length in self._spans:
                _ioctl(self._uffd, _UFFDIO_REGISTER, address, length, _UFFDIO_REGISTER_MODE_WP, 0)
                _ioctl(
                    self._uffd,
                    _UFFDIO_WRITEPROTECT,
                    address,
                    length,
                    _UFFDIO_WRITEPROTECT_MODE_WP,
                )
        except BaseException:
            self.lift()
            raise

    def written(self, address: int, length: int) -> Iterator[array[int]]:
        """What was written to, protected again: as (start, end, flags), flattened."""
        import fcntl

        end = address + length
        vector, _ = self._vector.buffer_info()
        while address < end:
            written = _PAGE_IS_WRITTEN
            request = bytearray(
                _SCAN.pack(
                    _SCAN.size,
                    _PM_SCAN_WP_MATCHING,
                    address,
                    end,
                    0,
                    vector,
                    _RANGES_A_CALL,
                    0,
                    0,
                    written,
                    0,
                    written,
                )
            )
            count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, request)
            (address,) = _WALK_END.unpack_from(request)
            yield self._vector[: 3 * count]

    def lift(self) -> None:
        """End the protection; in a forked child, which has none, only its descriptors."""
        if self._uffd >= 0 and self.pid == os.getpid():
            for address, length in self._spans:
                try:
                    _ioctl(self._uffd, _UFFDIO_UNREGISTER, address, length)
                except OSError:
                    break
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1

    def __del__(self) -> None:
        # Not lifted: the memory may be another's by now. The kernel lifts it with the last
        # descriptor.
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)


def _userfaultfd() -> int:
    import ctypes
    import fcntl

    if PAGE_BYTES != mmap.PAGESIZE:
        raise OSError(f"its pages have {mmap.PAGESIZE} bytes, not {PAGE_BYTES}")
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    number = _SYS_USERFAULTFD[os.uname().machine]
    fd = libc().syscall(ctypes.c_long(number), ctypes.c_long(flags | _UFFD_USER_MODE_ONLY))
    if fd >= 0:
        return int(fd)
    refused = OSError(ctypes.get_errno(), "userfaultfd: " + os.strerror(ctypes.get_errno()))
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise refused from None
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def _ioctl(fd: int, request: int, *words: int) -> None:
    import fcntl

    while True:
        try:
            fcntl.ioctl(fd, request, bytearray(array("Q", words).tobytes()))
            return
        except (BlockingIOError, InterruptedError):
            continue


def _try_kernel() -> None:
    """Raise unless a few writes to a scratch memfd are reported, and nothing else is."""
    fd = os.memfd_create("vmmig-dirty-log-trial", MFD_CLOEXEC)
    try:
        size = 8 * PAGE_BYTES
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    memory[PAGE_BYTES] = 1
    address = address_of(memory)
    protection = _Protection([(address, size)])

    def look() -> list[int]:
        found: list[int] = []
        for words in protection.written(address, size):
            for start, end in zip(words[0::3], words[1::3], strict=True):
                found += range((start - address) // PAGE_BYTES, (end - address) // PAGE_BYTES)
        return found

    try:
        looks = [look()]
        for pages in ([1], [1, 4], []):
            for page in pages:
                memory[page * PAGE_BYTES] = 2
            looks.append(look())
        reading, writing = os.pipe()
        try:
            os.write(writing, b"from the kernel")
            os.readv(reading, [memoryview(memory)[6 * PAGE_BYTES :]])
        finally:
            os.close(reading)
            os.close(writing)
        looks.append(look())
    finally:
        protection.lift()
    if looks != [[], [1], [1, 4], [], [6]]:
        raise OSError(f"on trial it reported {looks} for [[], [1], [1, 4], [], [6]]")


def _moved(words: array[int], by: int) -> array[int]:
    """Each word plus ``by``; added as one long number, several times faster than one by one."""
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * len(words), "little")
    moved = int.from_bytes(words.tobytes(), "little") + by * ones
    return array("Q", moved.to_bytes(8 * len(words), "little"))


def _joined(starts: Sequence[int], ends: Sequence[int]) -> MemoryRangeTable:
    table = MemoryRangeTable.from_spans(starts, ends)
    if any(map(eq, islice(starts, 1, None), ends)):
        return MemoryRangeTable.merge([table])
    return table
