"""Folders of a snapshot's files: mapped when they are read, written all or not at all."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping

from vmmig._native import FileMapping, address_of, data_of
from vmmig.errors import DecodeError, MigrateReceiveError, MigrateSendError
from vmmig.memory import PAGE_BYTES
from vmmig.snapshot import Buffer
from vmmig.transport.file import explained, path_of, write_chunks

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
_ZERO_PAGE = bytes(PAGE_BYTES)


def map_folder(
    path: str | os.PathLike[str], known: Callable[[str], object], required: Iterable[str] = ()
) -> dict[str, memoryview]:
    """The files of a folder by their names, each mapped read-only.

    Hidden files, whose names begin with a dot, are passed over.

    Args:
        path: The folder.
        known: Whether a file may be there; one that may not would be lost, so it is refused.
        required: The names of those that must be there.

    Raises:
        DecodeError: There is a file that is not known, or one is missing.
        MigrateReceiveError: The folder, or a file in it, cannot be read.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "config.json").write_bytes(b"{}")
    ...     bytes(map_folder(folder, {"config.json"}.__contains__)["config.json"])
    b'{}'
    """
    path = path_of(path, MigrateReceiveError)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
            for name in names:
                if not known(name):
                    raise DecodeError(
                        f"{path!r}: a snapshot's folder has no {name!r}, which would be lost; "
                        "move it elsewhere"
                    )
            for name in required:
                if name not in names:
                    raise DecodeError(f"{path!r}: {name!r} is missing")
            return {name: _mapped(folder, name, os.path.join(path, name)) for name in names}
        finally:
            os.close(folder)
    except OSError as error:
        raise MigrateReceiveError(explained(error, path)) from error


def map_file(path: str | os.PathLike[str]) -> memoryview:
    """A file's bytes, mapped read-only.

    Raises:
        MigrateReceiveError: It cannot be read.
    """
    path = path_of(path, MigrateReceiveError)
    return _mapped(None, path, path)


def _mapped(folder: int | None, name: str, path: str) -> memoryview:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder)
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise MigrateReceiveError(f"{path!r}: it is not a regular file")
            if not status.st_size:
                return memoryview(b"")
            return memoryview(FileMapping(fd, status.st_size, prot=mmap.PROT_READ))
        finally:
            os.close(fd)
    except OSError as error:
        raise MigrateReceiveError(explained(error, path)) from error
    except ValueError as error:
        raise MigrateReceiveError(f"{path!r}: it shrank while it was opened; try again") from error


def bytes_at(view: memoryview, start: int, end: int) -> bytes:
    """The bytes of a view from ``start`` to ``end``, read by the descriptor if it is of a file.

    So its pages take no memory here, and a file that was cut short does not end the process.

    Raises:
        MigrateReceiveError: They could not be read.

    >>> bytes_at(memoryview(b"value"), 1, 4)
    b'alu'
    """
    mapping = view.obj
    if not isinstance(mapping, FileMapping):
        return bytes(view[start:end])
    base = address_of(view) - address_of(mapping)
    try:
        data = os.pread(mapping.fileno(), end - start, base + start)
        while len(data) < end - start:
            more = os.pread(mapping.fileno(), end - start - len(data), base + start + len(data))
            if not more:
                raise MigrateReceiveError("the file was cut short while it was read; try again")
            data += more
    except OSError as error:
        raise MigrateReceiveError(error) from error
    return data


def write_folder(
    path: str | os.PathLike[str], files: Mapping[str, Callable[[int], object]]
) -> None:
    """Make a folder of these files, durably: after a crash it is there whole, or not at all.

    It is written under another name (``.vmmig-<16 hex digits>.part``) beside ``path``, fsynced
    and renamed. The folder's mode is 0700, a file's 0600.

    Args:
        path: The folder: nothing, or an empty folder, may be there.
        files: For each file's name what writes it to a descriptor.

    Raises:
        MigrateSendError: It was not written; or it was, but might not survive a power failure.
            The error says which. What a writer raises comes through as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(f"{folder}/vm", {"config.json": text_writer([b"{", b"}"])})
    ...     os.listdir(f"{folder}/vm")
    ['config.json']
    """
    shown = path_of(path, MigrateSendError)
    try:
        real = os.path.realpath(shown)
        if os.path.lexists(real) and (not os.path.isdir(real) or os.listdir(real)):
            raise MigrateSendError(
                f"{shown!r}: it is there already, and is not an empty folder; "
                "remove it, or name another one"
            )
        parent_path, name = os.path.split(real)
        parent = os.open(parent_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _make(parent, name, files)
            try:
                os.fsync(parent)
            except OSError as error:
                raise MigrateSendError(
                    f"{shown!r}: written, but might not survive a power failure, because the "
                    f"folder it is in cannot be fsynced ({error.strerror}); write it again, or "
                    "on another file system"
                ) from error
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise MigrateSendError(
                f"{shown!r}: something else was put there meanwhile; name another folder"
            ) from error
        raise MigrateSendError(explained(error, shown)) from error


def text_writer(chunks: Iterable[Buffer]) -> Callable[[int], object]:
    """What writes ``chunks``, one behind the other."""
    return lambda fd: write_chunks(fd, chunks)


def memory_writer(views: Iterable[memoryview]) -> Callable[[int], object]:
    """What writes ``views``, one behind the other, and leaves holes for their zeros."""

    def write(fd: int) -> None:
        offset = 0
        for view in views:
            for start, end in _data_extents(view):
                for first, data in _nonzero(view, start, end):
                    _write_at(fd, data, offset + first)
            offset += len(view)
        os.ftruncate(fd, offset)

    return write


def _make(parent: int, name: str, files: Mapping[str, Callable[[int], object]]) -> None:
    part = f".vmmig-{os.urandom(8).hex()}.part"
    os.mkdir(part, 0o700, dir_fd=parent)
    folder = -1
    try:
        folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
        for file, write in files.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(file, flags, 0o600, dir_fd=folder)
            try:
                write(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
        os.fsync(folder)
        os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException as error:
        try:
            if folder >= 0:
                for file in os.listdir(folder):
                    os.unlink(file, dir_fd=folder)
            os.rmdir(part, dir_fd=parent)
        except OSError as second:
            error.add_note(f"{part!r} is left beside it ({second.strerror}); delete it")
        raise
    finally:
        if folder >= 0:
            os.close(folder)


def _data_extents(view: memoryview) -> Iterator[tuple[int, int]]:
    """Where ``view`` may not be zero: what its file has no hole for, if it is of a file."""
    mapping = view.obj
    if not len(view):
        return
    if isinstance(mapping, FileMapping):
        base = address_of(view) - address_of(mapping)
        try:
            for start, end in data_of(mapping.fileno(), base, base + len(view)):
                yield start - base, end - base
            return
        except OSError:
            pass  # Its file system does not say: all of it, then.
    yield 0, len(view)


def _nonzero(view: memoryview, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The runs of pages that are not zero, as their place and their bytes."""
    for at in range(start, end, _BLOCK_BYTES):
        block = bytes_at(view, at, min(at + _BLOCK_BYTES, end))
        if block == _ZEROS:
            continue
        first = None
        for page in range(0, len(block), PAGE_BYTES):
            piece = block[page : page + PAGE_BYTES]
            if piece == _ZERO_PAGE[: len(piece)]:
                if first is not None:
                    yield at + first, block[first:page]
                    first = None
            elif first is None:
                first = page
        if first is not None:
            yield at + first, block[first:]


def _write_at(fd: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest, offset = rest[written:], offset + written
