"""HTTP and HTTPS: ``PUT`` sends, ``GET`` receives, and ranges are read where the server has them.

It is built on `http.client`: other clients keep a copy of the body, wait where they cannot be
cancelled, or write URLs with signatures in them to the log.

- Nothing is decoded: ``Accept-Encoding: identity`` is sent, and another coding is refused.
- A request is repeated after 429, 502, 503, 504 and lost connections, with growing pauses, as
  long as the chunks can be iterated again; a ``GET`` goes on where it broke (RFC 9110, 14.2).
- Redirects are followed within one scheme, host and port only, 5 at most; a ``PUT`` follows 307
  and 308. So credentials never go elsewhere.
- What was sent is checked: a server that answers ``Repr-Digest: xxh3-64=:...:`` (RFC 9530, with
  XXH3 in big-endian order, which is not registered), as ``vmmig serve`` does, says what it has
  stored; any other is asked by ``HEAD`` how many bytes it has, if it will tell. What is received
  must be as long as announced, and match a ``Repr-Digest`` of sha-256, sha-512 or xxh3-64.
- ``tls`` names a folder with ``ca-cert.pem`` and, for a client certificate, ``client-cert.pem``
  and ``client-key.pem``; without it, the system's certificate authorities are trusted.

A cancellation ends every wait but the one for the look-up of a host's name.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import mmap
import os
import random
import re
import select
import socket
import ssl
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

import xxhash

from vmmig.errors import MigratableError
from vmmig.transfer import Transfer, shown_url

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vmmig.codec import RangeReader

OPTIONS = frozenset({"timeout_s", "tls", "token"})

_PIECE_BYTES = 1 << 20
_JOINED_BYTES = 1 << 16
_FIRST_PART_BYTES = 1 << 16
_HEAD_BYTES = 1 << 20
_TEXT_BYTES = 1 << 10
_MAX_REDIRECTS = 5
_MAX_TRIES = 10
_LONGEST_PAUSE_S = 10.0
_TRY_AGAIN = frozenset({429, 502, 503, 504})

_ADVICE = {
    401: "give the option token, or user:password@ before the host",
    403: "use credentials that may do this",
    404: "check the path",
    405: "name a URL that takes this method",
    411: "use a server that takes a Content-Length",
    412: "what is there was made or changed meanwhile",
    413: "raise the server's limit on sizes",
    507: "free some space there, or send elsewhere",
}


class _TryAgainError(Exception):
    """The server asked to come again, perhaps after so many seconds."""

    def __init__(self, text: str, after_s: float = 0.0) -> None:
        super().__init__(text)
        self.after_s = after_s


class _AnsweredError(ConnectionError):
    """The answer is there before the whole request is."""


_TEMPORARY = (_TryAgainError, ConnectionError, http.client.IncompleteRead, ssl.SSLEOFError)


def send(chunks: Iterable[Buffer], transfer: Transfer) -> None:
    """Store ``chunks`` by ``PUT``: see `vmmig.transport.send`.

    Whether what was there before stays until all is through is the server's affair: those of
    ``vmmig serve``, of nginx and of object stores replace it at once, in the end.

    Raises:
        MigrateSendError: The server did not confirm it; see the error for what it said.
    """
    with _Pool(transfer) as pool, _failures(transfer):
        repeatable = iter(chunks) is not chunks
        tries = _Tries(transfer)
        body = _Body(chunks, transfer)
        while True:
            try:
                return _put(pool, body)
            except _TEMPORARY as error:
                if body.begun and not repeatable:
                    raise transfer.failure(
                        f"{_explained(error)}; not repeated, since the chunks can be iterated "
                        f"only once{body.what_is_left}"
                    ) from error
                tries.pause(error, body.what_is_left)
            except OSError as error:
                raise transfer.failure(f"{_explained(error)}{body.what_is_left}") from error
            except MigratableError as error:
                if body.what_is_left and transfer.cancel.cancelled:
                    raise transfer.failure(f"cancelled{body.what_is_left}") from error
                raise


def recv(transfer: Transfer) -> memoryview | RangeReader:
    """The bytes that ``GET`` answers; they are in memory that is taken as they come.

    If ``transfer.lazily``, and the server has ranges and a strong ``ETag``, what reads ranges;
    it may be used by many threads at once, keeps its connections, and raises MigrateReceiveError
    once what is there has changed.

    Raises:
        MigrateReceiveError: It could not be had whole; see the error for what the server said.
    """
    pool = _Pool(transfer)
    with pool, _failures(transfer):
        return (transfer.lazily and _opened(pool)) or _whole(pool)


# Connections


class _Bounded(io.RawIOBase):
    """What comes through a socket, where the head of an answer is limited in size and time."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, timeout_s: float) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline_s: float | None = time.monotonic() + timeout_s
        self._left_bytes = _HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        if self._deadline_s is None:
            return cast("int | None", self._raw.readinto(buffer))
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left_s)
        count = cast("int | None", self._raw.readinto(buffer))
        self._left_bytes -= count or 0
        if self._left_bytes < 0:
            raise http.client.HTTPException(f"its header has more than {_HEAD_BYTES} bytes")
        return count

    def head_is_through(self) -> None:
        self._deadline_s = None
        self._sock.settimeout(self._timeout_s)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Lines(io.BufferedReader):
    """Whose lines, of headers and of chunks' sizes, are whole; http.client takes cut ones too."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and len(line) != size:
            raise http.client.RemoteDisconnected("the connection ended within the answer")
        return line


class _Response(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, debuglevel: int = 0, method: Any = None, url: Any = None
    ) -> None:
        super().__init__(sock, debuglevel, method, url)
        timeout_s = sock.gettimeout()
        assert timeout_s is not None
        self._bounded = _Bounded(self.fp.detach(), sock, timeout_s)
        self.fp = _Lines(self._bounded, 1 << 16)

    def begin(self) -> None:
        super().begin()
        self._bounded.head_is_through()


class _Connection(http.client.HTTPConnection):
    """A connection that can be shut down by another thread, whatever it is doing."""

    response_class = _Response

    def __init__(self, pool: _Pool) -> None:
        super().__init__(pool.host, pool.port)
        self._pool = pool
        self._handle: socket.socket | None = None
        self.response: http.client.HTTPResponse | None = None

    def connect(self) -> None:
        transfer = self._pool.transfer
        failure: OSError = ConnectionRefusedError("the host has no address")
        try:
            found = socket.getaddrinfo(self._pool.host, self._pool.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"the host's name is no name: {error}") from error
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                self._handle = sock.dup()
                transfer.check()
                sock.settimeout(transfer.timeout_s)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._pool.context is not None:
                    sock = self._pool.context.wrap_socket(sock, server_hostname=self._pool.host)
            except BaseException as error:
                sock.close()
                self.end()
                if not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
                    raise
                failure = error
            else:
                self.sock = sock
                return
        raise failure

    def send(self, data: Any) -> None:
        """Each write has the time limit for itself; that of sendall is for all it sends."""
        if self.sock is None:
            self.connect()
        sock: socket.socket = cast(Any, self.sock)
        view = memoryview(data)
        while view:
            try:
                view = view[sock.send(view) :]
            except TimeoutError:
                if self.is_answered():
                    raise _AnsweredError from None
                raise

    def is_answered(self) -> bool:
        """Whether a final answer begins to come; unknown under TLS, whose records hide it."""
        if self._pool.context is not None:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(0):
            return False
        begin: bytes = self.sock.recv(10, socket.MSG_PEEK)
        return not re.match(rb"HTTP/1\.\d( 1|$)|HTTP/?1?\.?$", begin)

    def shut_down(self) -> None:
        handle = self._handle
        if handle is not None:
            with suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        if self.response is not None:
            self.response.close()
        self.close()
        if self._handle is not None:
            self._handle.close()


class _Pool:
    """Where a URL leads, and connections to there."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        try:
            parts = urlsplit(str(transfer.url))
            self.host = parts.hostname or ""
            port = parts.port
        except ValueError as error:
            raise transfer.failure(f"it is no URL: {error}") from None
        if not self.host or "%" in self.host:
            raise transfer.failure("it names no host; write http://host:port/path")
        if re.search(r"[\0-\x20\x7f]", str(transfer.url)):
            raise transfer.failure("no URL has blanks or control characters in it; write %20")
        self.scheme = parts.scheme.lower()
        secure = self.scheme == "https"
        self.port = (443 if secure else 80) if port is None else port
        self.origin = (self.scheme, self.host, self.port)
        self.context = _context(transfer) if secure else None
        self.target = _target(parts.path, parts.query)
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "vmmig"}
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self._headers["Host"] = shown if port is None else f"{shown}:{self.port}"
        authorization = _authorization(parts.netloc.rpartition("@")[0], transfer)
        if authorization:
            self._headers["Authorization"] = authorization
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self.kept = False

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            self.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.end()

    @contextmanager
    def answer(
        self,
        method: str,
        headers: Mapping[str, str],
        body: Callable[[_Connection], None] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer, after redirects. The connection is kept if it was read to its end."""
        for _ in range(_MAX_REDIRECTS + 1):
            connection, response = self._asked(method, {**self._headers, **headers}, body)
            with self._used(connection):
                target = self._redirect(method, response)
                if target is None:
                    yield response
                    return
            if target == self.target:
                raise self.transfer.failure("it redirects to itself")
            self.target = target
        raise self.transfer.failure(f"it redirects more than {_MAX_REDIRECTS} times")

    @contextmanager
    def _used(self, connection: _Connection) -> Iterator[None]:
        with self.transfer.cancel.calling(connection.shut_down):
            try:
                yield
                response = connection.response
                reusable = response is not None and response.isclosed() and connection.sock
            except BaseException:
                connection.end()
                raise
        if reusable and not self.transfer.cancel.cancelled:
            with self._lock:
                self._idle.append(connection)
        else:
            connection.end()

    def _asked(
        self,
        method: str,
        headers: Mapping[str, str],
        body: Callable[[_Connection], None] | None,
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        while body is None:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                break
            # The server may have closed it since.
            with suppress(ConnectionError):
                return connection, self._ask(connection, method, headers, None)
        connection = _Connection(self)
        return connection, self._ask(connection, method, headers, body)

    def _ask(
        self,
        connection: _Connection,
        method: str,
        headers: Mapping[str, str],
        body: Callable[[_Connection], None] | None,
    ) -> http.client.HTTPResponse:
        with self.transfer.cancel.calling(connection.shut_down):
            try:
                self.transfer.check()
                connection.putrequest(
                    method, self.target, skip_host=True, skip_accept_encoding=True
                )
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
                if body is not None:
                    try:
                        body(connection)
                    except ConnectionError as error:
                        return self._early_answer(connection, error)
                connection.response = connection.getresponse()
                return connection.response
            except BaseException:
                connection.end()
                raise

    def _early_answer(self, connection: _Connection, error: Exception) -> http.client.HTTPResponse:
        """What the server said before it stopped to listen."""
        try:
            response = connection.response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            raise error from None
        if response.status < 300:
            raise ConnectionAbortedError("the server answered before all was sent")
        return response

    def _redirect(self, method: str, response: http.client.HTTPResponse) -> str | None:
        if response.status not in (301, 302, 303, 307, 308):
            return None
        where = response.headers.get("Location", "")
        target, origin = "", None
        try:
            base = f"{self.scheme}://{self._headers['Host']}{self.target}"
            parts = urlsplit(urljoin(base, where))
            scheme = parts.scheme.lower()
            port = parts.port or (443 if scheme == "https" else 80)
            origin = (scheme, parts.hostname or "", port)
            target = _target(parts.path, parts.query)
        except ValueError:
            pass
        said = f"{response.status} redirects to {_escaped(shown_url(where))!r}"
        if origin is None or not where:
            raise self.transfer.failure(f"{said}, which is no URL")
        if origin != self.origin:
            raise self.transfer.failure(f"{said}, elsewhere; name that URL if it is to be trusted")
        if method == "PUT" and response.status not in (307, 308):
            raise self.transfer.failure(f"{said}, not for a PUT; name that URL")
        _drain(response)
        return target


class _Tries:
    """How often something is tried, and the pauses between."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._count = 0
        self._moved_bytes = 0
        self._deadline_s = time.monotonic() + transfer.timeout_s

    def moved(self, count_bytes: int) -> None:
        self._moved_bytes += count_bytes
        if self._moved_bytes >= _PIECE_BYTES:
            self._count = self._moved_bytes = 0
        self._deadline_s = time.monotonic() + self._transfer.timeout_s

    def pause(self, error: Exception, addition: str = "") -> None:
        self._count += 1
        pause_s = min(0.1 * 2**self._count, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
        pause_s = max(pause_s, getattr(error, "after_s", 0.0))
        self._check(addition)
        if self._count == _MAX_TRIES or time.monotonic() + pause_s > self._deadline_s:
            raise self._transfer.failure(
                f"{_explained(error)}; tried {self._count} times{addition}"
            ) from error
        wake = threading.Event()
        with self._transfer.cancel.calling(wake.set):
            wake.wait(pause_s)
        self._check(addition)

    def _check(self, addition: str) -> None:
        if self._transfer.cancel.cancelled:
            raise self._transfer.failure(f"cancelled{addition}")


# Sending


class _Body:
    """The chunks, as often as they are sent."""

    def __init__(self, chunks: Iterable[Buffer], transfer: Transfer) -> None:
        self._chunks = chunks
        self._transfer = transfer
        self.begun = False
        self.what_is_left = ""
        self.digest = b""

    def __call__(self, connection: _Connection) -> None:
        transfer = self._transfer
        transfer.done_bytes = 0
        transfer.enter("transferring")
        self.begun = True
        digest = xxhash.xxh3_64()
        for view in _joined(transfer.views(self._chunks)):
            for start in range(0, len(view), _PIECE_BYTES):
                if connection.is_answered():
                    raise _AnsweredError
                piece = view[start : start + _PIECE_BYTES]
                connection.send(piece)
                digest.update(piece)
                transfer.advance(len(piece))
        self.digest = digest.digest()
        self.what_is_left = "; all of it was sent, so it may be there nevertheless"
        transfer.enter("confirming")


def _put(pool: _Pool, body: _Body) -> None:
    transfer = pool.transfer
    headers = {
        "Content-Length": str(transfer.total_bytes),
        "Content-Type": "application/octet-stream",
    }
    body.what_is_left = ""
    with pool.answer("PUT", headers, body) as response:
        if response.status not in (200, 201, 204):
            body.what_is_left = ""
            raise _refusal(transfer, "PUT", response)
        stored = _digests(response).get("xxh3-64")
        _drain(response)
    if stored is None:
        stored_bytes = _length_there(pool)
        if stored_bytes not in (None, transfer.total_bytes):
            raise transfer.failure(
                f"it was sent, but the server has {stored_bytes} bytes instead of "
                f"{transfer.total_bytes}; what is there is damaged, send it again"
            )
    elif stored != body.digest:
        raise _TryAgainError("what the server has stored differs from what was sent")


def _length_there(pool: _Pool) -> int | None:
    try:
        with pool.answer("HEAD", {}) as response:
            if response.status != 200 or _is_encoded(response):
                return None
            return _length_bytes(response)
    except (MigratableError, OSError, http.client.HTTPException):
        # It was confirmed; only this question was not answered.
        return None


def _joined(views: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes, with small views put together."""
    small = bytearray()
    for view in views:
        if len(view) < _JOINED_BYTES:
            small += view
            if len(small) < _JOINED_BYTES:
                continue
        if small:
            yield memoryview(small)
            small = bytearray()
        if len(view) >= _JOINED_BYTES:
            yield view
    if small:
        yield memoryview(small)


# Receiving


class _Memory:
    """Bytes as they come, in anonymous memory, which the kernel gives when it is touched."""

    def __init__(self, transfer: Transfer, total_bytes: int | None) -> None:
        self._transfer = transfer
        self._total_bytes = total_bytes
        self.came_bytes = 0
        self._map = self._mapped(_PIECE_BYTES if total_bytes is None else total_bytes)

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        if size_bytes > self._transfer.max_bytes and self._total_bytes is not None:
            raise self._transfer.failure(
                f"it has {size_bytes} bytes, of {self._transfer.max_bytes} allowed"
            )
        try:
            if sys.platform != "linux":
                return mmap.mmap(-1, max(size_bytes, 1))
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            mapped = mmap.mmap(-1, max(size_bytes, 1), flags=flags)
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            return mapped
        except (OSError, OverflowError, ValueError) as error:
            raise self._transfer.failure(
                f"it has {size_bytes} bytes, which do not fit into memory"
            ) from error

    def take(self, response: http.client.HTTPResponse) -> int:
        """Read one piece; 0 bytes once all are there."""
        if self._total_bytes is None and self.came_bytes == len(self._map):
            larger = self._mapped(2 * len(self._map))
            larger[: len(self._map)] = self._map
            self._map = larger
        end = len(self._map) if self._total_bytes is None else self._total_bytes
        with memoryview(self._map)[
            self.came_bytes : min(end, self.came_bytes + _PIECE_BYTES)
        ] as room:
            count = _read(response, room) if room else 0
        self.came_bytes += count
        if self.came_bytes > self._transfer.max_bytes:
            raise self._transfer.failure(
                f"it has more than the {self._transfer.max_bytes} bytes allowed"
            )
        return count

    @property
    def is_whole(self) -> bool:
        return self.came_bytes == self._total_bytes

    def whole(self) -> memoryview:
        return memoryview(self._map)[: self.came_bytes].toreadonly()


def _whole(pool: _Pool) -> memoryview:
    transfer = pool.transfer
    tries = _Tries(transfer)
    memory: _Memory | None = None
    etag: str | None = None
    total_bytes: int | None = None
    digests: dict[str, bytes] = {}
    while True:
        try:
            resumed = memory is not None and memory.came_bytes and etag and total_bytes
            headers = {}
            if resumed and memory is not None and etag is not None:
                headers = {"Range": f"bytes={memory.came_bytes}-", "If-Range": etag}
            with pool.answer("GET", headers) as response:
                if resumed and memory is not None and response.status == 206:
                    _check_part(transfer, response, memory.came_bytes, total_bytes, etag)
                elif response.status == 200:
                    _refuse_encoded(transfer, response)
                    total_bytes, etag = _length_bytes(response), _strong_etag(response)
                    if total_bytes is None and not response.chunked:
                        raise transfer.failure(
                            "the answer has no length, so that a part cannot be told from all"
                        )
                    transfer.total_bytes, transfer.done_bytes = total_bytes, 0
                    digests = _digests(response)
                    memory = _Memory(transfer, total_bytes)
                    transfer.enter("transferring")
                else:
                    raise _refusal(transfer, "GET", response)
                while count := memory.take(response):
                    tries.moved(count)
                    transfer.advance(count)
                if total_bytes is not None and not memory.is_whole:
                    raise ConnectionAbortedError(
                        f"the connection ended after {memory.came_bytes} of {total_bytes} bytes"
                    )
                _drain(response)
            break
        except _TEMPORARY as error:
            tries.pause(error)
    transfer.enter("confirming")
    data = memory.whole()
    for name, digest in digests.items():
        if _ALGORITHMS[name](data).digest() != digest:
            raise transfer.failure(f"its {name} is not what the server says; receive it again")
    return data


class _Ranges:
    """Parts of what is at a URL, for any number of threads."""

    def __init__(self, pool: _Pool, etag: str, total_bytes: int, first: bytes) -> None:
        self.total_bytes = total_bytes
        self._pool = pool
        self._etag = etag
        self._first = first
        pool.kept = True
        weakref.finalize(self, pool.close)

    def read_into(self, start: int, view: memoryview, /) -> None:
        transfer = self._pool.transfer
        view = view.cast("B")
        end = start + len(view)
        if not 0 <= start <= end <= self.total_bytes:
            raise transfer.failure(f"bytes {start} to {end} are not among {self.total_bytes}")
        transfer.check()
        count = max(0, min(end, len(self._first)) - start)
        view[:count] = self._first[start : start + count]
        if count == len(view):
            return
        with _failures(transfer):
            self._fill(start + count, view[count:])

    def _fill(self, start: int, view: memoryview) -> None:
        transfer = self._pool.transfer
        tries = _Tries(transfer)
        done_bytes = 0
        while done_bytes < len(view):
            first, last = start + done_bytes, start + len(view) - 1
            headers = {"Range": f"bytes={first}-{last}", "If-Range": self._etag}
            try:
                with self._pool.answer("GET", headers) as response:
                    if response.status in (200, 412, 416):
                        raise transfer.failure("it has changed since it was opened; open it again")
                    if response.status != 206:
                        raise _refusal(transfer, "GET", response)
                    _check_part(transfer, response, first, self.total_bytes, self._etag, last=last)
                    while done_bytes < len(view):
                        count = _read(response, view[done_bytes : done_bytes + _PIECE_BYTES])
                        if not count:
                            raise ConnectionAbortedError("the connection ended within a range")
                        done_bytes += count
                        tries.moved(count)
                        transfer.check()
                    _drain(response)
            except _TEMPORARY as error:
                tries.pause(error)


def _opened(pool: _Pool) -> RangeReader | None:
    """What reads ranges, if the server has what that needs; its first part is there already."""
    transfer = pool.transfer
    tries = _Tries(transfer)
    while True:
        try:
            with pool.answer("GET", {"Range": f"bytes=0-{_FIRST_PART_BYTES - 1}"}) as response:
                etag = _strong_etag(response)
                if response.status in (200, 416) or etag is None:
                    return None
                if response.status != 206:
                    raise _refusal(transfer, "GET", response)
                match = re.fullmatch(
                    r"bytes 0-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "")
                )
                if match is None:
                    return None
                total_bytes = int(match[2])
                if total_bytes > transfer.max_bytes:
                    raise transfer.failure(
                        f"it has {total_bytes} bytes, of {transfer.max_bytes} allowed"
                    )
                part = bytearray(min(_FIRST_PART_BYTES, total_bytes))
                _check_part(transfer, response, 0, total_bytes, etag, last=len(part) - 1)
                came_bytes = 0
                while came_bytes < len(part):
                    with memoryview(part)[came_bytes:] as room:
                        count = _read(response, room)
                    if not count:
                        raise ConnectionAbortedError("the connection ended within a range")
                    came_bytes += count
                    transfer.advance(count)
                _drain(response)
            transfer.total_bytes = total_bytes
            return _Ranges(pool, etag, total_bytes, bytes(part))
        except _TEMPORARY as error:
            transfer.done_bytes = 0
            tries.pause(error)


def _check_part(
    transfer: Transfer,
    response: http.client.HTTPResponse,
    first: int,
    total_bytes: int | None,
    etag: str | None,
    *,
    last: int | None = None,
) -> None:
    """The answer is the part that was asked for, of what was there when it began."""
    _refuse_encoded(transfer, response)
    if last is None and total_bytes is not None:
        last = total_bytes - 1
    wanted = f"bytes {first}-{last}/{total_bytes}"
    there = response.headers.get("Content-Range", "nothing")
    if there != wanted:
        raise transfer.failure(f"the server answers {_escaped(there)!r} where {wanted!r} was asked")
    length_bytes = _length_bytes(response)
    if last is not None and length_bytes not in (None, last - first + 1):
        raise transfer.failure(f"the server answers {wanted!r} with {length_bytes} bytes")
    if _strong_etag(response) != etag:
        raise transfer.failure("it has changed since it was opened; open it again")


# What answers say


_ALGORITHMS: dict[str, Callable[[Any], Any]] = {
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
    "xxh3-64": xxhash.xxh3_64,
}


def _digests(response: http.client.HTTPResponse) -> dict[str, bytes]:
    """The digests in ``Repr-Digest`` (RFC 9530) that can be checked."""
    found = {}
    for value in response.headers.get_all("Repr-Digest") or ():
        for name, digest in re.findall(r"([a-z0-9-]+)=:([A-Za-z0-9+/=]*):", value):
            if name in _ALGORITHMS:
                with suppress(ValueError):
                    found[name] = base64.b64decode(digest)
    return found


def _length_bytes(response: http.client.HTTPResponse) -> int | None:
    values = set(response.headers.get_all("Content-Length") or ())
    if not values or response.chunked:
        return None
    value = values.pop()
    if values or not re.fullmatch(r"[0-9]{1,19}", value):
        raise http.client.HTTPException("its Content-Length is no number")
    return int(value)


def _strong_etag(response: http.client.HTTPResponse) -> str | None:
    etag = response.headers.get("ETag", "")
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,1000}"', etag) else None


def _is_encoded(response: http.client.HTTPResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity").strip().lower() != "identity"


def _refuse_encoded(transfer: Transfer, response: http.client.HTTPResponse) -> None:
    if _is_encoded(response):
        coding = response.headers.get("Content-Encoding", "")[:40]
        raise transfer.failure(
            f"it came with the coding {_escaped(coding)!r}, though none was asked for; "
            "let the server send it as it is"
        )


def _read(response: http.client.HTTPResponse, room: memoryview) -> int:
    count = response.readinto(room)
    if not 0 <= count <= len(room):
        raise http.client.HTTPException("its chunks are malformed")
    return count


def _drain(response: http.client.HTTPResponse) -> None:
    """Read what little may be left, so that the connection can be used again."""
    response.read(_TEXT_BYTES)


def _refusal(transfer: Transfer, method: str, response: http.client.HTTPResponse) -> Exception:
    status = response.status
    text = f"{method} was answered with {status} {_escaped(response.reason)}".rstrip()
    kind = response.headers.get("Content-Type", "").lower()
    line = b""
    if method != "HEAD" and "html" not in kind and not _is_encoded(response):
        with suppress(OSError, http.client.HTTPException, ValueError):
            line = response.read(_TEXT_BYTES).strip().partition(b"\n")[0].strip()
    if line:
        text += f": {_escaped(line.decode('utf-8', 'replace'))}"
    if status in _TRY_AGAIN:
        return _TryAgainError(text, _retry_after_s(response.headers.get("Retry-After", "")))
    advice = _ADVICE.get(status, "see what the server has logged")
    return transfer.failure(f"{text}; {advice}")


def _retry_after_s(text: str) -> float:
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return 0.0


def _escaped(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text[:300]
    )


# What is asked


def _target(path: str, query: str) -> str:
    """The path and the query as they are sent: what is not ASCII is escaped."""
    safe = "/%:@!$&'()*+,;=~"
    target = quote(path, safe=safe) or "/"
    if not target.startswith("/"):
        target = f"/{target}"
    return f"{target}?{quote(query, safe=safe + '?[]')}" if query else target


def _authorization(userinfo: str, transfer: Transfer) -> str:
    token = transfer.options.get("token")
    if token is not None and userinfo:
        raise transfer.failure("give either a token or user:password@, not both")
    if token is not None:
        if not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
            raise transfer.failure("the token has characters that no bearer token has")
        return f"Bearer {token}"
    if not userinfo:
        return ""
    user, _, password = map(unquote, userinfo.partition(":"))
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    transfer.hide(password, f"{user}:{password}", encoded)
    return f"Basic {encoded}"


def _context(transfer: Transfer) -> ssl.SSLContext:
    folder = transfer.options.get("tls")
    if folder is None:
        context = ssl.create_default_context()
    else:
        authority, certificate, key = (
            os.path.join(os.fspath(folder), name)
            for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem")
        )
        try:
            context = ssl.create_default_context(cafile=authority)
            if os.path.exists(certificate) or os.path.exists(key):
                if stat.S_IMODE(os.stat(key).st_mode) & 0o077:
                    raise transfer.failure(f"others may read {key!r}; chmod 600 it")
                context.load_cert_chain(certificate, key)
        except OSError as error:
            raise transfer.failure(
                f"{os.fspath(folder)!r} has no usable ca-cert.pem, client-cert.pem and "
                f"client-key.pem: {error}"
            ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@contextmanager
def _failures(transfer: Transfer) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, MigratableError):
            raise
        raise transfer.failure(_explained(error)) from error


def _explained(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate is not accepted: {error.verify_message}; "
            "give the option tls with the authority's ca-cert.pem, or correct the host's name"
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}; see whether both sides' certificates fit"
    if isinstance(error, socket.gaierror):
        return f"the host's name cannot be looked up ({error.strerror}); check it"
    if isinstance(error, TimeoutError):
        return "the server does not move; see whether it works, or raise timeout_s"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused; see whether the server runs"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended within the answer"
    if isinstance(error, _TryAgainError):
        return str(error)
    if isinstance(error, OSError):
        return f"the connection failed: {_escaped(error.strerror or str(error))}"
    return f"the server does not speak HTTP: {_escaped(str(error) or type(error).__name__)}"
