"""Object stores and whatever else fsspec has a file system for: ``s3://``, ``gs://``, ``sftp://``.

How an object appears at once, and what a failure or a cancellation leaves:

S3
    Up to one part of bytes goes by one PUT, more by a multipart upload, several parts at a time;
    either shows the new object when it is complete, and the old one until then. A failed upload
    is aborted, which deletes its parts; if that is not possible, the error names the upload.
every other
    The bytes go to ``.vmmig-<16 hex digits>.part`` in the same folder, which is then renamed
    where the file system has a rename (``sftp://``, ``smb://``, ``local://``), and else copied by
    the store itself and deleted (``memory://``, ``gs://``, ``abfs://``). A process that is killed
    leaves the part file behind. Where a rename does not replace (some FTP and HDFS servers), to
    send to what exists fails and leaves it.

An object that changes between two reads is an error. S3 is asked for the ETag that was seen first;
elsewhere size, time and version are compared again after the bytes have come.

The clients of S3, Google and Azure run in fsspec's own event loop, where they are stopped whenever
that is asked for; other file systems only between two blocks, and their own timeouts apply.
Retries are the client's own; only an S3 answer that is cut off is asked for again from there on.
"""

from __future__ import annotations

import asyncio
import io
import mmap
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from vmmig.errors import MigratableError
from vmmig.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vmmig.codec import RangeReader

OPTIONS = frozenset({"timeout_s", "storage_options"})

_PART_BYTES = 16 << 20
_RANGE_BYTES = 8 << 20
_BLOCK_BYTES = 1 << 20
_MAX_PARTS = 10_000
_IN_FLIGHT = 4
_CLEANING_S = 2.0

# What fsspec's file systems call what changes when the object does; not the time it was read.
_VERSION_KEYS = (
    *("size", "ETag", "etag", "generation", "VersionId", "version_id", "md5Hash", "content_md5"),
    *("mtime", "modified", "LastModified", "last_modified", "modificationTime", "updated", "ino"),
    *("created", "last_write_time", "modify"),
)


def send(chunks: Iterable[Buffer], transfer: Transfer) -> None:
    """Write ``chunks`` to an object, which appears at once: see `vmmig.transport.send`.

    In memory are at most four parts of 16 MiB, or of what it takes to send ``total_bytes`` in
    10,000 of them. To stop a multipart upload takes one more request, at most 2 s, to abort it.

    Raises:
        MigrateSendError: The object is not there, and the old one, if any, still is; or that is
            not known, because the store did not answer to the last request. The error says so,
            and names what is left behind.

    >>> from vmmig.errors import MigrateSendError
    >>> send([b"abc"], Transfer("memory://vms/vm.vmsnap", MigrateSendError, total_bytes=3))
    """
    with _explained(transfer), _opened(transfer) as (fs, path):
        if _is_s3(fs):
            _send_to_s3(fs, path, chunks, transfer)
        else:
            _send_to_file(fs, path, chunks, transfer)


def recv(transfer: Transfer) -> memoryview | RangeReader:
    """The bytes of an object, read in several ranges at a time; or what reads ranges of it.

    Raises:
        MigrateReceiveError: There is no such object, it cannot be read, or it has changed.

    >>> from vmmig.errors import MigrateReceiveError, MigrateSendError
    >>> send([b"abc"], Transfer("memory://vms/vm.vmsnap", MigrateSendError, total_bytes=3))
    >>> bytes(recv(Transfer("memory://vms/vm.vmsnap", MigrateReceiveError)))
    b'abc'
    """
    with _explained(transfer):
        if transfer.lazily:
            return _reader(*_made(transfer), transfer)
        with _opened(transfer) as (fs, path):
            reader = _reader(fs, path, transfer)
            transfer.total_bytes = reader.total_bytes
            transfer.enter("transferring")
            if not reader.total_bytes:
                return memoryview(b"")
            view = memoryview(mmap.mmap(-1, reader.total_bytes))
            reader.fill(0, view, transfer.advance)
            return view.toreadonly()


def _made(transfer: Transfer) -> tuple[Any, str]:
    """The file system of the URL, and the path there."""
    from fsspec.core import url_to_fs

    options = dict(transfer.options.get("storage_options", {}))
    try:
        # An instance of its own, for fsspec would keep a shared one, with its credentials and
        # connections, until the process ends.
        fs, path = url_to_fs(transfer.url, **{**options, "skip_instance_cache": True})
    except ImportError as error:
        text = f"a package is missing: {error}"
        if str(transfer.url).lower().startswith(("s3:", "s3a:")):
            text += "; pip install 'vmmig[s3]'"
        raise transfer.failure(text) from error
    return fs, path


@contextmanager
def _opened(transfer: Transfer) -> Iterator[tuple[Any, str]]:
    fs, path = _made(transfer)
    try:
        yield fs, path
    finally:
        if _is_s3(fs):
            with suppress(Exception):
                _Flow(fs.loop, transfer).last(_closed(fs))


async def _closed(fs: Any) -> None:
    client = await fs.set_session()
    await client.close()


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "_call_s3")


def _reader(fs: Any, path: str, transfer: Transfer) -> _Reader:
    reader = (_S3Object if _is_s3(fs) else _StoredFile)(fs, path, transfer)
    if reader.total_bytes > transfer.max_bytes:
        raise transfer.failure(
            f"it has {reader.total_bytes} bytes, of {transfer.max_bytes} allowed"
        )
    return reader


@contextmanager
def _explained(transfer: Transfer) -> Iterator[None]:
    """What a client raises becomes the error of the transfer."""
    try:
        yield
    except MigratableError:
        raise
    except (Exception, asyncio.CancelledError, CancelledError) as error:
        failed = transfer.failure(_text(error))
        failed.__cause__ = transfer.failure(error).__cause__
    else:
        return
    raise failed


def _text(error: BaseException) -> str:
    said = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"there is no such object, folder or bucket: {said}; check the URL"
    if isinstance(error, PermissionError):
        return f"the store refuses it: {said}; check the credentials and what they allow"
    return f"{said} ({type(error).__name__})" if said != type(error).__name__ else said


# --- writing --------------------------------------------------------------------------------------


def _send_to_s3(fs: Any, path: str, chunks: Iterable[Buffer], transfer: Transfer) -> None:
    bucket, key, _ = fs.split_path(path)
    if not key or key.endswith("/"):
        raise transfer.failure("it names no object; s3://bucket/key does")
    target = {"Bucket": bucket, "Key": key}
    size_bytes = None
    # s3fs would try again with a body that has been read, and so replace the object by an empty
    # one; botocore, below it, tries again from the body's start.
    fs.retries = 1
    with _Flow(fs.loop, transfer) as flow:
        transfer.enter("transferring")
        total_bytes, part_bytes = transfer.total_bytes, _part_bytes(transfer.total_bytes)
        if total_bytes is None or total_bytes > part_bytes:
            answer = _upload(fs, target, chunks, flow, transfer)
        else:
            data = b"".join(transfer.views(chunks))
            transfer.check()
            with _in_doubt(transfer):
                answer = flow.run(fs._call_s3("put_object", **target, Body=_Body(data, flow)))
            transfer.done_bytes = len(data)
        # It is there, so a cancellation comes too late; and who may write may not always read.
        with suppress(Exception):
            found = flow.last(fs._call_s3("head_object", **target))
            if found["ETag"] == answer["ETag"]:
                size_bytes = found["ContentLength"]
    if size_bytes is not None and size_bytes != transfer.done_bytes:
        raise _missized(size_bytes, transfer)


def _upload(
    fs: Any, target: dict[str, str], chunks: Iterable[Buffer], flow: _Flow, transfer: Transfer
) -> Any:
    """A multipart upload, which is aborted if it cannot be completed."""
    parts = _joined(transfer.views(chunks), _part_bytes(transfer.total_bytes))
    upload = {**target, "UploadId": flow.run(_begun(fs, target))}

    async def one(number: int, part: bytes) -> dict[str, object]:
        answer = await fs._call_s3(
            "upload_part", **upload, PartNumber=number, Body=_Body(part, flow)
        )
        flow.moved(len(part))
        checksums = {name: answer[name] for name in answer if name.startswith("Checksum")}
        checksums.pop("ChecksumType", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    try:
        sent = flow.run_each(one(number, part) for number, part in enumerate(parts, 1))
        transfer.enter("confirming")
        done = {"Parts": sent}
        return flow.run(fs._call_s3("complete_multipart_upload", **upload, MultipartUpload=done))
    except BaseException as error:
        flow.stop()
        left = f"the multipart upload {upload['UploadId']!r} of {target['Key']!r}"
        try:
            flow.last(fs._call_s3("abort_multipart_upload", **upload))
        except FileNotFoundError:
            text = "the store says that the upload has ended; it may have been completed"
        except (Exception, CancelledError) as second:
            text = f"{left} may be left there, for {_text(second)}; abort it"
        else:
            raise
        failed = _with(error, text, transfer)
    raise failed


async def _begun(fs: Any, target: dict[str, str]) -> str:
    """The id of a new multipart upload; none is left if this is cancelled."""
    asked = asyncio.ensure_future(fs._call_s3("create_multipart_upload", **target))
    try:
        return str((await asyncio.shield(asked))["UploadId"])
    except asyncio.CancelledError:
        upload_id = (await asked)["UploadId"]
        await fs._call_s3("abort_multipart_upload", **target, UploadId=upload_id)
        raise


@contextmanager
def _in_doubt(transfer: Transfer) -> Iterator[None]:
    """Says what a request may have done that changes the store, if no answer came."""
    try:
        yield
    except BaseException as error:
        from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError

        answered = getattr(error.__cause__, "response", None) is not None
        if answered or isinstance(error, (ConnectTimeoutError, EndpointConnectionError)):
            raise
        failed = _with(error, "no answer came; the new object may be there", transfer)
    else:
        return
    raise failed


def _with(error: BaseException, text: str, transfer: Transfer) -> BaseException:
    """The error with more to say."""
    if not isinstance(error, (Exception, CancelledError)):
        error.add_note(transfer.hidden(text))
        return error
    if isinstance(error, MigratableError):
        failed = transfer.error(f"{error.cause}; {transfer.hidden(text)}")
        failed.__cause__ = error.__cause__
        return failed
    failed = transfer.error(f"{transfer.shown_url!r}: {transfer.hidden(f'{_text(error)}; {text}')}")
    failed.__cause__ = transfer.failure(error).__cause__
    return failed


def _missized(size_bytes: int, transfer: Transfer) -> MigratableError:
    return transfer.failure(
        f"the store has {size_bytes} bytes of {transfer.done_bytes}; send it again"
    )


def _send_to_file(fs: Any, path: str, chunks: Iterable[Buffer], transfer: Transfer) -> None:
    from fsspec import AbstractFileSystem

    folder, slash, name = path.rpartition("/")
    if not name:
        raise transfer.failure("it names no object")
    part = f"{folder}{slash}.vmmig-{os.urandom(8).hex()}.part"
    try:
        with fs.open(part, "wb") as file:
            transfer.enter("transferring")
            for view in transfer.views(chunks):
                for start in range(0, len(view), _BLOCK_BYTES):
                    block = view[start : start + _BLOCK_BYTES]
                    file.write(block)
                    transfer.advance(len(block))
            transfer.enter("confirming")
        _check_size(fs, part, transfer)
        transfer.check()
        renames = type(fs).mv is not AbstractFileSystem.mv
        (fs.mv if renames else fs.cp_file)(part, path)
    except BaseException as error:
        try:
            fs.rm_file(part)
        except FileNotFoundError:
            raise error from error.__cause__
        except Exception as second:
            raise _with(error, f"{part!r} may be left ({second}); delete it", transfer) from second
        raise
    if not renames:
        try:
            fs.rm_file(part)
        except Exception as error:
            raise _with(error, f"it is saved, but {part!r} is left; delete it", transfer) from error
    _check_size(fs, path, transfer)


def _check_size(fs: Any, path: str, transfer: Transfer) -> None:
    size_bytes = _info(fs, path)["size"]
    if size_bytes != transfer.done_bytes:
        raise _missized(size_bytes, transfer)


def _part_bytes(total_bytes: int | None) -> int:
    """The size of a part, so that S3's 10,000 are enough.

    >>> _part_bytes(None) >> 20, _part_bytes(1 << 40) >> 20
    (64, 105)
    """
    if total_bytes is None:
        return 4 * _PART_BYTES
    needed_bytes = -(-total_bytes // _MAX_PARTS)
    return max(_PART_BYTES, -(-needed_bytes >> 20) << 20)


def _joined(views: Iterable[memoryview], part_bytes: int) -> Iterator[bytes]:
    """The bytes of ``views`` in parts of ``part_bytes``; the last one may be smaller."""
    pieces: list[memoryview] = []
    room_bytes = part_bytes
    for view in views:
        while len(view) >= room_bytes:
            yield b"".join([*pieces, view[:room_bytes]])
            view = view[room_bytes:]
            pieces, room_bytes = [], part_bytes
        if view:
            pieces.append(view)
            room_bytes -= len(view)
    if pieces:
        yield b"".join(pieces)


class _Body(io.BytesIO):
    """Bytes whose way to the client is seen, so that a slow upload is not taken for a stall."""

    def __init__(self, data: bytes, flow: _Flow) -> None:
        super().__init__(data)
        self._flow = flow

    def read(self, size: int | None = -1, /) -> bytes:
        self._flow.moved(0)
        return super().read(size)


# --- reading --------------------------------------------------------------------------------------


class _Reader:
    """Ranges of an object that does not change; see `vmmig.codec.RangeReader`."""

    total_bytes: int

    def __init__(self, fs: Any, transfer: Transfer) -> None:
        self._fs = fs
        self._transfer = transfer

    def read_into(self, start: int, view: memoryview, /) -> None:
        if not 0 <= start <= self.total_bytes - len(view):
            raise self._transfer.failure(
                f"there are no {len(view)} bytes at {start}, only {self.total_bytes} in all"
            )
        with _explained(self._transfer):
            self._transfer.check()
            self.fill(start, view, lambda _: self._transfer.check())

    def fill(self, start: int, view: memoryview, advance: Callable[[int], object]) -> None:
        raise NotImplementedError

    def _changed(self) -> MigratableError:
        return self._transfer.failure("it changed while it was read; read it again")


class _S3Object(_Reader):
    def __init__(self, fs: Any, path: str, transfer: Transfer) -> None:
        super().__init__(fs, transfer)
        bucket, key, version = fs.split_path(path)
        if not key:
            raise transfer.failure("it names no object; s3://bucket/key does")
        self._which = {"Bucket": bucket, "Key": key}
        if version:
            self._which["VersionId"] = version
        with _Flow(fs.loop, transfer) as flow:
            found = flow.run(self._found())
        self.total_bytes = found["ContentLength"]
        self._which["IfMatch"] = found["ETag"]

    async def _found(self) -> Any:
        try:
            return await self._fs._call_s3("head_object", **self._which)
        except FileNotFoundError:
            # The answer to HEAD has no text, and no bucket gives 404 just as no object does.
            await self._fs._call_s3("list_objects_v2", Bucket=self._which["Bucket"], MaxKeys=1)
            raise FileNotFoundError(f"no object {self._which['Key']!r} in the bucket") from None

    def fill(self, start: int, view: memoryview, advance: Callable[[int], object]) -> None:
        with _Flow(self._fs.loop, self._transfer, advance) as flow:
            flow.run_each(
                self._fetch(start + at, view[at : at + _RANGE_BYTES], flow)
                for at in range(0, len(view), _RANGE_BYTES)
            )

    async def _fetch(self, start: int, view: memoryview, flow: _Flow) -> None:
        from s3fs.core import S3_RETRYABLE_ERRORS

        end = start + len(view)
        while view:
            answer = await self._answer(f"bytes={start}-{end - 1}")
            body = answer["Body"]
            came_bytes = 0
            try:
                while piece := await body.read(_BLOCK_BYTES):
                    if len(piece) > len(view) - came_bytes:
                        raise self._transfer.failure("the store sends more than it was asked for")
                    view[came_bytes : came_bytes + len(piece)] = piece
                    came_bytes += len(piece)
                    flow.moved(len(piece))
            except S3_RETRYABLE_ERRORS:
                if not came_bytes:
                    raise
            finally:
                body.close()
            if not came_bytes:
                raise self._transfer.failure("the store sends less than it was asked for")
            start, view = start + came_bytes, view[came_bytes:]

    async def _answer(self, byte_range: str) -> Any:
        try:
            answer = await self._fs._call_s3("get_object", **self._which, Range=byte_range)
        except OSError as error:
            response = getattr(error.__cause__, "response", {})
            if response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
                raise self._changed() from error
            raise
        # Not every server that speaks S3 minds If-Match.
        if answer["ETag"] != self._which["IfMatch"]:
            answer["Body"].close()
            raise self._changed()
        return answer


class _StoredFile(_Reader):
    def __init__(self, fs: Any, path: str, transfer: Transfer) -> None:
        super().__init__(fs, transfer)
        self._path = path
        info = _info(fs, path)
        if info["type"] == "directory":
            raise transfer.failure("it is a folder; name an object in it")
        if info["size"] is None:
            raise transfer.failure("the store does not say how large it is")
        self.total_bytes = info["size"]
        self._version = _version(info)

    def fill(self, start: int, view: memoryview, advance: Callable[[int], object]) -> None:
        starts = range(0, len(view), _RANGE_BYTES)
        if self._fs.async_impl:
            with _Flow(self._fs.loop, self._transfer, advance) as flow:
                flow.run_each(self._fetch(start, view, at, flow) for at in starts)
        else:
            for at in starts:
                size_bytes = min(_RANGE_BYTES, len(view) - at)
                data = self._fs.cat_file(self._path, start + at, start + at + size_bytes)
                self._put(view, at, size_bytes, data)
                advance(size_bytes)
        try:
            version = _version(_info(self._fs, self._path))
        except FileNotFoundError as error:
            raise self._changed() from error
        if version != self._version:
            raise self._changed()

    async def _fetch(self, start: int, view: memoryview, at: int, flow: _Flow) -> None:
        size_bytes = min(_RANGE_BYTES, len(view) - at)
        first = start + at
        data = await self._fs._cat_file(self._path, start=first, end=first + size_bytes)
        self._put(view, at, size_bytes, data)
        flow.moved(size_bytes)

    def _put(self, view: memoryview, at: int, size_bytes: int, data: bytes) -> None:
        if len(data) != size_bytes:
            raise self._changed()
        view[at : at + size_bytes] = data


def _info(fs: Any, path: str) -> Any:
    fs.invalidate_cache(path)
    return fs.info(path)


def _version(info: Any) -> dict[str, object]:
    return {key: info[key] for key in _VERSION_KEYS if key in info}


# --- waiting --------------------------------------------------------------------------------------


class _Flow:
    """Coroutines in fsspec's event loop, for which the caller's thread waits.

    They end when the transfer is cancelled, when nothing has moved for ``timeout_s``, and when
    the context is left by an exception.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transfer: Transfer,
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self._loop = loop
        self._transfer = transfer
        self._advance = advance or transfer.advance
        self._wake = threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running: list[Future[Any]] = []
        self._moved_s = time.monotonic()
        self._came_bytes = self._told_bytes = 0

    def __enter__(self) -> _Flow:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.stop()

    def moved(self, count_bytes: int) -> None:
        """So many bytes are through; or none, but it goes on. Called in the event loop."""
        self._came_bytes += count_bytes
        self._moved_s = time.monotonic()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What it returns or raises."""
        return self.run_each(iter([coroutine]))[0]

    def run_each(self, coroutines: Iterator[Coroutine[Any, Any, Any]]) -> list[Any]:
        """What they return, in order; some run at a time, and the first failure is raised."""
        futures = []
        for coroutine in coroutines:
            futures.append(self._start(coroutine))
            self._wait(fewer_than=_IN_FLIGHT)
        self._wait(fewer_than=1)
        return [future.result() for future in futures]

    def stop(self) -> None:
        """Cancel what runs, and wait a moment until it has ended."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])
        deadline_s = time.monotonic() + _CLEANING_S
        for future in self._running:
            with suppress(Exception, CancelledError):
                future.result(deadline_s - time.monotonic())
        self._running = []

    def last(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What it returns or raises, even if the transfer is cancelled; but it must be soon."""
        future = self._start(coroutine)
        try:
            return future.result(_CLEANING_S)
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._tasks])
            raise

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def begin() -> None:
            task = self._loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, future))

        self._running.append(future)
        self._moved_s = time.monotonic()
        self._loop.call_soon_threadsafe(begin)
        return future

    def _ended(self, future: Future[Any], task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._moved_s = time.monotonic()
        if task.cancelled():
            future.set_exception(CancelledError())
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())
        self._wake.set()

    def _wait(self, fewer_than: int) -> None:
        timeout_s = self._transfer.timeout_s
        with self._transfer.cancel.calling(self._wake.set):
            while True:
                for future in self._running:
                    if future.done():
                        future.result()
                self._running = [future for future in self._running if not future.done()]
                if count_bytes := self._came_bytes - self._told_bytes:
                    self._told_bytes += count_bytes
                    self._advance(count_bytes)
                if len(self._running) < fewer_than:
                    return
                self._transfer.check()
                if time.monotonic() - self._moved_s > timeout_s:
                    raise self._transfer.failure(
                        f"nothing moved for {timeout_s:g} s; check the network and the store"
                    )
                self._wake.wait(min(0.05, timeout_s))
                self._wake.clear()
