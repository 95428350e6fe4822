"""What memory needs of C: addresses, libc, and mappings of descriptors."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from array import array
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer

MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 1, 2, 4, 8

_MAX_PIECES = 1024


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``, part of Python's stable ABI since 3.11."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


def address_of(buffer: Buffer) -> int:
    """Where a contiguous buffer, perhaps a read-only one, lies in this process's memory.

    Raises:
        BufferError: It is not contiguous.

    >>> data = bytearray(b"abc")
    >>> address_of(memoryview(data)[1:]) - address_of(data)
    1
    """
    held = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(held), 0)
    try:
        return held.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))


@cache
def libc() -> Any:
    """The C library; its functions run without the interpreter's lock.

    >>> libc().memcmp(b"a", b"a", 1)
    0
    """
    library: Any = ctypes.CDLL(None if os.name == "posix" else "msvcrt", use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.memcmp.argtypes = pointer, pointer, size
    library.memmove.argtypes = pointer, pointer, size
    library.memset.argtypes = pointer, ctypes.c_int, size
    library.memmove.restype = library.memset.restype = pointer
    if os.name == "posix":
        library.madvise.argtypes = pointer, size, ctypes.c_int
        library.syscall.restype = ctypes.c_long
    if hasattr(os, "pwritev"):
        library.pwritev.argtypes = ctypes.c_int, pointer, ctypes.c_int, ctypes.c_int64
        library.pwritev.restype = ctypes.c_ssize_t
        library.writev.argtypes = ctypes.c_int, pointer, ctypes.c_int
        library.writev.restype = ctypes.c_ssize_t
    return library


def madvise(address: int, length: int, advice: int) -> None:
    """As C's, without the interpreter's lock.

    Raises:
        OSError: The kernel refuses it.

    >>> page = mmap.mmap(-1, mmap.PAGESIZE)
    >>> madvise(address_of(page), len(page), 0)
    """
    if libc().madvise(address, length, advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def data_of(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of what is no hole in a file's bytes from ``start`` to ``end``.

    Raises:
        OSError: The file system does not say.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     file.write(b"abc"), file.flush(), [*data_of(file.fileno(), 1, 2)]
    (3, None, [(1, 2)])
    """
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        hole = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        if start < hole:
            yield start, hole
        start = hole


def zeroed(length: int) -> mmap.mmap:
    """As many zero bytes; what is not written to takes no memory, even if it is read.

    Raises:
        OSError: There cannot be as many.

    >>> zeroed(3)[:]
    b'\\x00\\x00\\x00'
    """
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, length)


def pwrite_pieces(
    fd: int, address: int, *, count: int, piece_bytes: int, stride_bytes: int, offset: int
) -> None:
    """Write ``count`` pieces of memory, ``stride_bytes`` apart, one behind the other to a file.

    Where memory cannot be read, for instance because the file that is mapped there shrank, it
    raises and does not crash.

    Raises:
        OSError: They could not all be written.

    >>> data = memoryview(b"-abc-def-")
    >>> fd = os.memfd_create("example")
    >>> where = address_of(data) + 1
    >>> pwrite_pieces(fd, where, count=2, piece_bytes=3, stride_bytes=4, offset=1)
    >>> os.pread(fd, 10, 0), os.close(fd)
    (b'\\x00abcdef', None)
    """
    vector = array("Q", bytes(16 * min(count, _MAX_PIECES)))
    vector[1::2] = array("Q", [piece_bytes]) * (len(vector) // 2)
    where = vector.buffer_info()[0]
    while count:
        wanted = min(count, _MAX_PIECES)
        end = address + wanted * stride_bytes
        vector[: 2 * wanted : 2] = array("Q", range(address, end, stride_bytes))
        written_bytes = libc().pwritev(fd, where, wanted, offset)
        if written_bytes <= 0:
            code = ctypes.get_errno() if written_bytes else errno.ENOSPC
            if code == errno.EINTR:
                continue
            raise OSError(code, os.strerror(code))
        # A piece that was cut is written again.
        written = written_bytes // piece_bytes
        count -= written
        address += written * stride_bytes
        offset += written * piece_bytes


GRAIN_BYTES = 1 << 16
_ZEROS = bytes(GRAIN_BYTES)


def runs(view: memoryview) -> Iterator[tuple[int, int, bool]]:
    """A view of bytes in runs of zeros, by 64 KiB, and of other bytes: (start, end, zeros).

    >>> [*runs(memoryview(bytes(GRAIN_BYTES) + b"code" + bytes(GRAIN_BYTES)))]
    [(0, 65536, True), (65536, 131072, False), (131072, 131076, True)]
    """
    if not view:
        return
    memcmp, address, zeros = libc().memcmp, address_of(view), address_of(_ZEROS)
    start, was_zero = 0, None
    for at in range(0, len(view), GRAIN_BYTES):
        size = min(GRAIN_BYTES, len(view) - at)
        is_zero = not view[at] and not memcmp(address + at, zeros, size)
        if was_zero not in (None, is_zero):
            yield start, at, not is_zero
            start = at
        was_zero = is_zero
    yield start, len(view), bool(was_zero)


def write_records(fd: int, headers: bytes, address: int, *, count: int, piece_bytes: int) -> None:
    """Write ``count`` pieces of memory, one behind the other, each behind a header of its own.

    Nothing is copied on the way to the kernel. The descriptor must block.

    Raises:
        OSError: They could not all be written.

    >>> data = memoryview(b"abcdef")
    >>> fd = os.memfd_create("example")
    >>> write_records(fd, b"1-2-3-", address_of(data), count=3, piece_bytes=2)
    >>> os.pread(fd, 20, 0), os.close(fd)
    (b'1-ab2-cd3-ef', None)
    """
    header_bytes = len(headers) // count
    record_bytes = header_bytes + piece_bytes
    begin = address_of(headers)
    vector = array("Q", bytes(32 * count))
    vector[0::4] = array("Q", range(begin, begin + count * header_bytes, header_bytes))
    vector[1::4] = array("Q", [header_bytes]) * count
    vector[2::4] = array("Q", range(address, address + count * piece_bytes, piece_bytes))
    vector[3::4] = array("Q", [piece_bytes]) * count
    done_bytes, total_bytes = 0, count * record_bytes
    while done_bytes < total_bytes:
        record, offset = divmod(done_bytes, record_bytes)
        first = 2 * record + (offset >= header_bytes)
        offset -= header_bytes * (offset >= header_bytes)
        rest = vector[2 * first : 2 * (first + _MAX_PIECES)]
        rest[0] += offset
        rest[1] -= offset
        written_bytes = libc().writev(fd, rest.buffer_info()[0], len(rest) // 2)
        if written_bytes < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            raise OSError(code, os.strerror(code))
        done_bytes += written_bytes


class FileMapping(mmap.mmap):
    """A mapping with the descriptor of what it maps, which lives as long as the mapping.

    >>> with open(__file__, "rb") as file:
    ...     mapping = FileMapping(file.fileno(), 100, prot=mmap.PROT_READ)
    >>> os.fstat(mapping.fileno()).st_size > 100
    True
    """

    _fd = -1

    def __new__(cls, fd: int, length: int, **options: Any) -> Self:
        if sys.version_info >= (3, 13):
            options["trackfd"] = False
        mapping = super().__new__(cls, fd, length, **options)
        mapping._fd = os.dup(fd)
        return mapping

    def fileno(self) -> int:
        """The descriptor: a borrowed one, not to be closed."""
        return self._fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
