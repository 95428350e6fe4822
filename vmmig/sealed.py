"""Bytes that can be handed to another process without a copy, because nobody can change them.

They lie in a memfd that is sealed: the kernel refuses, to whoever has the descriptor, to write to
it, to change its size and to lift the seals (``man 2 memfd_create``). So the receiver may trust
what it maps as it trusts `bytes`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmmig._native import (
    F_ADD_SEALS,
    F_GET_SEALS,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    FileMapping,
    address_of,
    data_of,
)
from vmmig.errors import MigratableError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
_PIECE_BYTES = 1 << 20
_HUGE_BYTES = 16 << 20
_ZEROS = bytes(_PIECE_BYTES)


class _SealedMapping(FileMapping):
    """Sealed bytes; `descriptor_of` knows them by their class."""


def sealed_copy(buffer: Buffer) -> memoryview:
    """A read-only copy of the bytes, where there are memfds in one that is sealed.

    The memfd lives as long as a view of it. What is zero for 1 MiB takes no memory until it is
    read, and holes of a `GuestMemory` are not touched. Where there are no memfds, or no bytes,
    the copy is a plain one. It is about three times as fast where the kernel may use huge pages
    for memfds (``advise`` in ``/sys/kernel/mm/transparent_hugepage/shmem_enabled``).

    Raises:
        MigratableError: There is no memory or no descriptor for the copy, or the buffer is not
            contiguous.

    >>> data = bytearray(b"value")
    >>> copy = sealed_copy(data)
    >>> data[0] = 0
    >>> bytes(copy), copy.readonly
    (b'value', True)
    """
    try:
        view = memoryview(buffer).cast("B")
    except TypeError as error:
        raise MigratableError(f"only contiguous bytes can be copied: {error}") from error
    if not hasattr(os, "memfd_create") or not view.nbytes:
        return memoryview(view.tobytes())
    try:
        fd = create_unsealed(view.nbytes)
        try:
            _fill(fd, view)
            return seal(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise MigratableError(
            f"there is no room for a copy of {view.nbytes} bytes: {error}"
        ) from error


def create_unsealed(length: int) -> int:
    """The descriptor of a new memfd of ``length`` zero bytes, to be written to, then `seal`.

    It is the caller's to close. Until something is written there, it takes no memory.

    Raises:
        OSError: There is no descriptor for it, or no file can be as long.

    >>> fd = create_unsealed(5)
    >>> os.pwrite(fd, b"value", 0), bytes(seal(fd)), os.close(fd)
    (5, b'value', None)
    """
    fd = os.memfd_create("vmmig-sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seal(fd: int) -> memoryview:
    """Seal a memfd that `create_unsealed` made, and map it, read-only.

    Its descriptor may be closed then. Nobody may have it mapped for writing.

    Raises:
        OSError: It cannot be sealed or mapped.

    >>> fd = create_unsealed(4096)
    >>> descriptor_of(seal(fd)) is not None, os.close(fd)
    (True, None)
    """
    import fcntl

    fcntl.fcntl(fd, F_ADD_SEALS, _SEALS)
    length = os.fstat(fd).st_size
    return _mapped(fd, length) if length else memoryview(b"")


def descriptor_of(view: memoryview) -> tuple[int, int, int] | None:
    """Where a view's bytes lie, if in a sealed memfd: (descriptor, offset, length) in bytes.

    The descriptor is borrowed: it is open as long as the view, and not to be closed.

    >>> copy = sealed_copy(b"value")
    >>> fd, offset, length = descriptor_of(copy[1:4])
    >>> os.pread(fd, length, offset)
    b'alu'
    >>> descriptor_of(memoryview(b"value")) is None
    True
    """
    mapping = view.obj
    if not isinstance(mapping, _SealedMapping) or not view.c_contiguous:
        return None
    return mapping.fileno(), address_of(view) - address_of(mapping), view.nbytes


def map_sealed(fd: int, length: int) -> memoryview:
    """The bytes of a sealed memfd that another process gave, read-only and without a copy.

    Args:
        fd: The descriptor; it stays the caller's, who may close it at once.
        length: The size that it must have in bytes.

    Raises:
        MigratableError: It is no memfd, not sealed against all changes, or of another size.

    >>> fd, _, length = descriptor_of(source := sealed_copy(b"value"))
    >>> bytes(map_sealed(fd, length))
    b'value'
    """
    try:
        import fcntl

        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except (ImportError, OSError, ValueError) as error:
        raise MigratableError(
            f"the descriptor is not of sealed memory ({error}); the sender must give a memfd"
        ) from error
    missing = [
        name
        for name, seal in (
            ("F_SEAL_WRITE", F_SEAL_WRITE),
            ("F_SEAL_GROW", F_SEAL_GROW),
            ("F_SEAL_SHRINK", F_SEAL_SHRINK),
            ("F_SEAL_SEAL", F_SEAL_SEAL),
        )
        if not seals & seal
    ]
    if missing:
        raise MigratableError(
            f"the memory is not sealed with {', '.join(missing)}: its sender could change it; "
            f"the sender must seal it first"
        )
    try:
        size = os.fstat(fd).st_size
        if size != length:
            raise MigratableError(
                f"the sealed memory has {size} bytes where {length} were announced"
            )
        return _mapped(fd, length) if length else memoryview(b"")
    except OSError as error:
        raise MigratableError(f"{length} bytes of sealed memory cannot be mapped: {error}") from (
            error
        )


def _mapped(fd: int, length: int) -> memoryview:
    # Private: before Linux 6.7 a shared mapping of what is sealed against writing is refused.
    return memoryview(_SealedMapping(fd, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))


def _fill(fd: int, view: memoryview) -> None:
    # Into huge pages a copy takes a third of the time of a write, into others twice as long.
    huge = view.nbytes >= _HUGE_BYTES and _huge_pages_are_allowed()
    mapping = mmap.mmap(fd, view.nbytes) if huge else None
    if mapping is not None:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    for start, end in data_spans(view):
        for at in range(start, end, _PIECE_BYTES):
            piece = view[at : min(at + _PIECE_BYTES, end)]
            if piece[0] or piece[-1] or bytes(piece) != _ZEROS[: piece.nbytes]:
                if mapping is None:
                    _write(fd, piece, at)
                else:
                    mapping[at : at + piece.nbytes] = piece
    if mapping is not None:
        mapping.close()


def data_spans(view: memoryview) -> Iterator[tuple[int, int]]:
    """The (start, end) of what is no hole in a view: to read a memfd's hole would allocate it.

    Raises:
        OSError: The file system does not say.

    >>> fd = create_unsealed(8192)
    >>> [*data_spans(seal(fd))], os.close(fd)
    ([], None)
    """
    if isinstance(view.obj, FileMapping):
        offset = address_of(view) - address_of(view.obj)
        for start, end in data_of(view.obj.fileno(), offset, offset + view.nbytes):
            yield start - offset, end - offset
    else:
        yield 0, view.nbytes


def _huge_pages_are_allowed() -> bool:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as file:
            return "[never]" not in (setting := file.read()) and "[deny]" not in setting
    except OSError:
        return False


def _write(fd: int, piece: memoryview, offset: int) -> None:
    while piece:
        written_bytes = os.pwrite(fd, piece, offset)
        piece = piece[written_bytes:]
        offset += written_bytes
