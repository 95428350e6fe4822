"""Memory that another process owns, and may write to or cut short while it is read here.

It is mapped, so that it is a buffer like any other; but who goes through it once, piece by piece,
as the container's encoder does, reads it by its descriptor. To read the mapping would allocate
the holes in it, and end this process with SIGBUS where the owner has cut it short.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator

from vmmig._native import FileMapping, address_of
from vmmig.errors import MigratableError

_ZEROS = memoryview(bytes(1 << 20))


class _ForeignMapping(FileMapping):
    """What `pieces` knows by its class."""

    check: Callable[[], object] = bool


def map_foreign(
    fd: int, offset: int, length: int, *, check: Callable[[], object] = bool
) -> memoryview:
    """The bytes of a descriptor from ``offset`` on, read-only and without a copy.

    Args:
        fd: Of a memfd or a file; it stays the caller's, who may close it at once.
        offset: Where they begin, in bytes.
        length: How many there are.
        check: Is called before each piece is read by `pieces`, and may raise.

    Raises:
        MigratableError: It does not have that many bytes, or cannot be mapped.

    >>> fd = os.memfd_create("ram")
    >>> os.pwrite(fd, b"code", 4096)
    4
    >>> bytes(map_foreign(fd, 4096, 4))
    b'code'
    >>> map_foreign(fd, 4096, 5)
    Traceback (most recent call last):
    vmmig.errors.MigratableError: the descriptor has 4100 bytes, of which 5 from 4096 on are wanted
    >>> os.close(fd)
    """
    try:
        size = os.fstat(fd).st_size
        if not 0 <= offset <= offset + length <= size:
            raise MigratableError(
                f"the descriptor has {size} bytes, of which {length} from {offset} on are wanted"
            )
        if not length:
            return memoryview(b"")
        # All of it: a part of huge pages could be mapped, but not unmapped again.
        mapping = _ForeignMapping(fd, size, prot=mmap.PROT_READ)
    except (OSError, OverflowError, ValueError) as error:
        raise MigratableError(f"the descriptor cannot be mapped: {error}") from error
    mapping.check = check
    return memoryview(mapping)[offset : offset + length]


def piece(view: memoryview, start: int, end: int) -> memoryview:
    """The bytes of a view from ``start`` to ``end``: a copy, if it is of `map_foreign`.

    Raises:
        MigratableError: The memory was cut short, or could not be read.

    >>> bytes(piece(memoryview(b"value"), 1, 4))
    b'alu'
    """
    mapping = view.obj
    if not isinstance(mapping, _ForeignMapping):
        return view[start:end]
    mapping.check()
    offset = address_of(view) - address_of(mapping)
    return _read(mapping.fileno(), offset + start, min(end, view.nbytes) - start)


def pieces(view: memoryview, piece_bytes: int) -> Iterator[memoryview]:
    """A view's bytes in pieces; see `piece`.

    >>> [bytes(each) for each in pieces(memoryview(b"value"), 2)]
    [b'va', b'lu', b'e']
    """
    for start in range(0, view.nbytes, piece_bytes):
        yield piece(view, start, min(start + piece_bytes, view.nbytes))


def _read(fd: int, start: int, count: int) -> memoryview:
    try:
        if count <= len(_ZEROS) and _is_hole(fd, start, start + count):
            return _ZEROS[:count]
        data = os.pread(fd, count, start)
        while len(data) < count:
            more = os.pread(fd, count - len(data), start + len(data))
            if not more:
                raise MigratableError(
                    f"the memory ends at byte {start + len(data)} now: its owner has cut it short"
                )
            data += more
    except OSError as error:
        raise MigratableError(f"the memory cannot be read: {error}") from error
    return memoryview(data)


def _is_hole(fd: int, start: int, end: int) -> bool:
    """Whether these bytes are zero, and take no memory; not where the file ends before."""
    try:
        if os.lseek(fd, start, os.SEEK_DATA) < end:
            return False
    except OSError as error:
        if error.errno != errno.ENXIO:
            return False
    return os.fstat(fd).st_size >= end
