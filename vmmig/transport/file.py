"""Files: ``file:///path``, ``file:path`` and plain paths.

A file is written under another name (``.vmmig-<16 hex digits>.part``) in the folder where it
will be, fsynced, renamed over the old one, and the folder is fsynced: after a crash at any point
the old file or the new one is there, whole. A process that is killed may leave its part file
behind, which may be deleted. (A file without a name would leave nothing, but it cannot replace
one that exists, and not every file system can make one.)
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from vmmig._native import GRAIN_BYTES, runs
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.transfer import Transfer, flat_view

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WRITE_BYTES = 8 << 20
_WRITE_BUFFERS = 1024

_ADVICE = {
    errno.EACCES: "change the permissions, or act as a user who has them",
    errno.EDQUOT: "free some of the quota, or save elsewhere",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or save to another file system",
    errno.EIO: "the device fails; use another one",
    errno.EISDIR: "name a file",
    errno.ELOOP: "the symbolic links lead nowhere; name the file itself",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENODEV: "its file system cannot map files; copy it to one that can",
    errno.ENOENT: "check the path, and that its folder exists",
    errno.ENOSPC: "free some space there, or save elsewhere",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.ENXIO: "it is a device, a pipe or a socket; name a regular file",
    errno.EPERM: "the file or its folder is protected; use another folder, or another user",
    errno.EROFS: "save elsewhere, or remount it for writing",
}


def send(chunks: Iterable[Buffer], transfer: Transfer) -> None:
    """Write ``chunks`` to a file, durably and at once: see `vmmig.transport.send`.

    The file's mode is 0600. One that is replaced must be a regular, writable file; where ``url``
    is a symbolic link, the file it leads to is replaced and the link stays; other hard links to
    the old file keep its content. The folder must be readable, for it is fsynced.

    Raises:
        MigrateSendError: The file was not written, and the old one is untouched; or the new one
            is in its place, but might not survive a power failure. The error says which.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to = Transfer(f"{folder}/vm.vmsnap", MigrateSendError, total_bytes=5)
    ...     send([b"defg"], to)
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...vm.vmsnap': 4 bytes came where 5 were announced...
    """
    path = path_of(transfer.url, MigrateSendError)
    try:
        folder_path, name = _destination(path)
        folder = os.open(folder_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _replace(folder, name, chunks, transfer)
            try:
                os.fsync(folder)
            except OSError as error:
                raise MigrateSendError(
                    f"{path!r}: saved, but might not survive a power failure, because its folder "
                    f"cannot be fsynced ({error.strerror}); save again, or on another file system"
                ) from error
        finally:
            os.close(folder)
    except OSError as error:
        raise MigrateSendError(explained(error, path)) from error


def recv(transfer: Transfer) -> memoryview:
    """The bytes of a regular file, mapped read-only; a page is read when it is first touched.

    The view outlives the file: one that is replaced or deleted meanwhile, as `send` does it,
    stays whole in the view. Only a file that is truncated or rewritten in place shows through,
    and then to touch what was cut off ends the process with SIGBUS.

    Raises:
        MigrateReceiveError: There is no such file, or it cannot be read or mapped.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     file.write(b"abc"), file.flush()
    ...     bytes(recv(Transfer(file.name, MigrateReceiveError)))
    (3, None)
    b'abc'
    """
    path = path_of(transfer.url, MigrateReceiveError)
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            _refuse_irregular(path, status, MigrateReceiveError)
            if status.st_size > transfer.max_bytes:
                raise transfer.failure(
                    f"it has {status.st_size} bytes, of {transfer.max_bytes} allowed"
                )
            transfer.total_bytes = transfer.done_bytes = status.st_size
            if not status.st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ))
        finally:
            os.close(fd)
    except OSError as error:
        raise MigrateReceiveError(explained(error, path)) from error
    except ValueError as error:
        raise MigrateReceiveError(f"{path!r}: it shrank while it was opened; try again") from error


def check_destination(url: str | os.PathLike[str]) -> None:
    """Nothing, if `send` would at present find a place there.

    So that nothing is fetched from far away which then cannot be saved.

    Raises:
        MigrateSendError: It would not, and why.

    >>> check_destination("no-such-folder/vm.vmsnap")
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...'no-such-folder/vm.vmsnap': No such file or directory; ...
    """
    path = path_of(url, MigrateSendError)
    try:
        folder, _ = _destination(path)
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise MigrateSendError(explained(error, path)) from error


def write_chunks(
    fd: int,
    chunks: Iterable[Buffer],
    advance: Callable[[int], object] = int,
    *,
    sparsely: bool = False,
) -> int:
    """Write ``chunks``, one behind the other, in large writes; many small ones take one call.

    Args:
        fd: A blocking descriptor: of a file at its start, a pipe, a socket.
        chunks: Contiguous bytes-like objects; memoryviews in C order, of a native format. What
            they show must not change before the return.
        advance: Is told how many bytes are written, batch by batch.
        sparsely: The descriptor is of a new file: leave a hole for a large chunk of zeros.

    Returns:
        How many bytes were written: all there were.

    Raises:
        OSError: They could not all be written; some may have been.

    >>> read_end, write_end = os.pipe()
    >>> write_chunks(write_end, [b"two ", b"chunks"])
    10
    >>> os.read(read_end, 100)
    b'two chunks'
    """
    written_bytes = started_bytes = 0
    for batch, is_hole in _batches(chunks, sparsely):
        batch_bytes = sum(map(len, batch))
        written_bytes += batch_bytes
        if is_hole:
            os.ftruncate(fd, written_bytes)
            os.lseek(fd, written_bytes, os.SEEK_SET)
        else:
            _write_all(fd, batch)
        advance(batch_bytes)
        behind_bytes = written_bytes - started_bytes
        if behind_bytes >= _WRITE_BYTES:
            # Starts to bring the dirty pages to the disk while more are written, so that fsync
            # has less to wait for; those that are on their way stay in the cache.
            with suppress(OSError):
                os.posix_fadvise(fd, started_bytes, behind_bytes, os.POSIX_FADV_DONTNEED)
            started_bytes = written_bytes
    return written_bytes


def path_of(url: str | os.PathLike[str], error: type[MigratableError] = MigratableError) -> str:
    """The path that a ``file:`` URL, a text or an `os.PathLike` means.

    In a URL, relative ones included, ``%`` and two hexadecimal digits stand for a byte. A plain
    path is taken as it is.

    Raises:
        error: It means no file of this machine, or cannot be a path.

    >>> path_of("file:///var/a%20b"), path_of("file:a%20b"), path_of("a%20b")
    ('/var/a b', 'a b', 'a%20b')
    """
    if isinstance(url, str) and url[:5].lower() == "file:":
        path = _path_of_url(url, error)
    else:
        try:
            path = os.fsdecode(os.fspath(url))
        except TypeError:
            raise error(f"a URL or a path is needed, not {type(url).__name__}") from None
    if not path:
        raise error(f"{url!r}: the path is empty; name a file")
    if "\0" in path:
        raise error(f"{url!r}: no path can have a NUL in it; name another file")
    _encoded(path, url, error)
    return path


def _path_of_url(url: str, error: type[MigratableError]) -> str:
    rest = url[5:]
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        rest = slash + rest
        if host.lower() not in ("", "localhost"):
            raise error(
                f"{url!r}: a file on another host ({host!r}) cannot be reached; "
                "file:///path, with three slashes, is one on this host"
            )
    if "?" in rest or "#" in rest:
        raise error(f"{url!r}: a file URL has no query or fragment; write %3F for ? and %23 for #")

    def byte(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            raise error(f"{url!r}: two hexadecimal digits must follow each %; write %25 for %")
        return bytes.fromhex(match[1].decode())

    return os.fsdecode(re.sub(rb"%([0-9A-Fa-f]{2})?", byte, _encoded(rest, url, error)))


def _encoded(path: str, url: object, error: type[MigratableError]) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError as cause:
        raise error(f"{url!r}: no path can have such characters in it: {cause}") from cause


def _destination(path: str) -> tuple[str, str]:
    """The folder and the name of the file to replace or to make."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        pass
    else:
        _refuse_irregular(path, status, MigrateSendError)
        if not os.access(path, os.W_OK, effective_ids=True):
            raise MigrateSendError(
                f"{path!r}: it is write-protected; make it writable, or save elsewhere"
            )
    # Following the link came first, by stat: so the kernel's own checks of links hold here too.
    if os.path.islink(path):
        path = os.path.realpath(path)
    folder, name = os.path.split(path)
    return folder or ".", name


def _refuse_irregular(path: str, status: os.stat_result, error: type[MigratableError]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path!r}: it is a device, a pipe or a socket; name a regular file")


def _replace(folder: int, name: str, chunks: Iterable[Buffer], transfer: Transfer) -> None:
    part = f".vmmig-{os.urandom(8).hex()}.part"

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags, 0o600, dir_fd=folder)

    try:
        with open(part, "xb", buffering=0, opener=opener) as file:
            os.fchmod(file.fileno(), 0o600)
            transfer.enter("transferring")
            views = transfer.views(chunks)
            write_chunks(file.fileno(), views, transfer.advance, sparsely=True)
            transfer.enter("confirming")
            os.fsync(file.fileno())
        transfer.check()
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException as error:
        try:
            os.unlink(part, dir_fd=folder)
        except FileNotFoundError:
            pass
        except OSError as second:
            error.add_note(f"{part!r} is left in the folder ({second.strerror}); delete it")
        raise


def _batches(chunks: Iterable[Buffer], sparsely: bool) -> Iterator[tuple[list[memoryview], bool]]:
    """The chunks in lists to be written at once; and whether, instead, a hole is to be left."""
    batch: list[memoryview] = []
    room_bytes = _WRITE_BYTES
    for chunk in chunks:
        view = flat_view(chunk)
        for start, end, is_zero in runs(view) if sparsely else [(0, len(view), False)]:
            run = view[start:end]
            if is_zero and len(run) >= GRAIN_BYTES:
                if batch:
                    yield batch, False
                yield [run], True
                batch, room_bytes = [], _WRITE_BYTES
                continue
            while len(run) >= room_bytes:
                yield [*batch, run[:room_bytes]], False
                run = run[room_bytes:]
                batch, room_bytes = [], _WRITE_BYTES
            if run:
                batch.append(run)
                room_bytes -= len(run)
                if len(batch) == _WRITE_BUFFERS:
                    yield batch, False
                    batch, room_bytes = [], _WRITE_BYTES
    if batch:
        yield batch, False


def _write_all(fd: int, batch: list[memoryview]) -> None:
    first = 0
    while first < len(batch):
        written_bytes = os.writev(fd, batch[first:])
        while first < len(batch) and written_bytes >= len(batch[first]):
            written_bytes -= len(batch[first])
            first += 1
        if written_bytes:
            batch[first] = batch[first][written_bytes:]


def explained(error: OSError, path: str) -> str:
    """What went wrong with the file at ``path``, and what to do.

    >>> explained(FileNotFoundError(errno.ENOENT, "No such file"), "vm.vmsnap")
    "'vm.vmsnap': No such file; check the path, and that its folder exists"
    """
    what = error.strerror or repr(error)
    advice = _ADVICE.get(error.errno or 0, "save elsewhere")
    return "; ".join([f"{path!r}: {what}", advice, *getattr(error, "__notes__", ())])
