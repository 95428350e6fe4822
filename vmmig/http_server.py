"""A folder behind HTTP: files are stored by ``PUT`` and read by ``GET``, with ranges.

`Folder` is the application, for any WSGI server that says where the body ends. `server` runs it
on cheroot, with what that lacks: chunked bodies of any size in little memory, limits on how
slowly a body may come, refusals without reading the body, TLS handshakes outside the thread that
accepts, and ``sendfile``.

Names are those of files right in the folder: no subfolder, no symbolic link, no hidden file.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import xxhash

from vmmig.errors import MigratableError, MigrateSendError, MissingExtraError
from vmmig.transfer import CancelToken, Transfer
from vmmig.transport import file

try:
    from cheroot import wsgi
    from cheroot.makefile import MakeFile
    from cheroot.server import HeaderReader, HTTPConnection, HTTPRequest
    from cheroot.ssl import Adapter
except ImportError as missing:
    raise MissingExtraError("the HTTP server", extra="http") from missing

_PIECE_BYTES = 1 << 20
_LINE_BYTES = 1 << 12
_THREADS = 32
_TIMEOUT_S = 30.0
_LINGER_S = 2.0
_SLOWEST_BYTES_PER_S = 1 << 10

_REASONS = {
    200: "OK",
    201: "Created",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    412: "Precondition Failed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    507: "Insufficient Storage",
}
_STATUS_OF_ERRNO = {
    errno.EACCES: 403,
    errno.EDQUOT: 507,
    errno.EFBIG: 413,
    errno.ELOOP: 403,
    errno.ENAMETOOLONG: 400,
    errno.ENOSPC: 507,
    errno.EPERM: 403,
    errno.EROFS: 403,
}
_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "sha-256": hashlib.sha256,
    "sha-512": hashlib.sha512,
    "xxh3-64": xxhash.xxh3_64,
}


class _RefusedError(MigratableError):
    """A request is answered with a status and a line of text."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


class Folder:
    """The WSGI application.

    A ``PUT`` is written beside the file it replaces, made durable, and then put in its place at
    once; a body that is cut off, too long or too short leaves nothing. ``If-None-Match: *`` makes
    it fail, with 412, if there is a file already. A ``Repr-Digest`` (RFC 9530) of sha-256,
    sha-512 or xxh3-64 is compared before, and the answer has that of what was stored.

    Args:
        path: The folder.
        token: If given, every request must bear it.
        max_bytes: Larger bodies are refused with 413.

    Raises:
        MigratableError: It is no folder that can be written to.

    >>> import io, tempfile
    >>> with tempfile.TemporaryDirectory() as path:
    ...     request = {"REQUEST_METHOD": "PUT", "PATH_INFO": "/vm", "CONTENT_LENGTH": "3"}
    ...     request["wsgi.input"] = io.BytesIO(b"abc")
    ...     _ = Folder(path)(request, lambda status, headers: print(status))
    ...     os.listdir(path)
    201 Created
    ['vm']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        token: str | None = None,
        max_bytes: int = (1 << 63) - 1,
    ) -> None:
        self._path = os.path.abspath(path)
        self._token = token
        self._max_bytes = max_bytes
        self._stop = CancelToken()
        if not os.path.isdir(self._path):
            raise MigratableError(f"{self._path!r} is no folder; make it first")
        if not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
            raise MigratableError(f"{self._path!r} cannot be read and written; change its mode")

    def stop(self) -> None:
        """End every ``PUT`` under way, so that it leaves nothing."""
        self._stop.cancel()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer one request, as PEP 3333 has it."""
        try:
            self._authorize(environ)
            method = environ["REQUEST_METHOD"]
            if method == "PUT":
                status, headers = self._put(environ, _name(environ))
                body: Iterable[bytes] = ()
            elif method in ("GET", "HEAD"):
                status, headers, body = self._get(environ, _name(environ), method == "HEAD")
            else:
                raise _RefusedError(405, "only GET, HEAD and PUT", {"Allow": "GET, HEAD, PUT"})
        except _RefusedError as error:
            status = error.status
            text = f"{error.cause}\n".encode()
            headers = {"Content-Type": "text/plain; charset=utf-8", **error.headers}
            headers["Content-Length"] = str(len(text))
            body = () if environ["REQUEST_METHOD"] == "HEAD" else (text,)
        start_response(f"{status} {_REASONS[status]}", list(headers.items()))
        return body

    def _authorize(self, environ: Mapping[str, Any]) -> None:
        if self._token is None:
            return
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not matches:
            raise _RefusedError(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def _put(self, environ: Mapping[str, Any], name: str) -> tuple[int, dict[str, str]]:
        for header in ("HTTP_CONTENT_RANGE", "HTTP_IF_MATCH"):
            if header in environ:
                shown = header[5:].replace("_", "-").title()
                raise _RefusedError(501, f"{shown} is not supported in a PUT")
        if environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
            raise _RefusedError(415, "send it without a coding")
        only_new = "HTTP_IF_NONE_MATCH" in environ
        if only_new and environ["HTTP_IF_NONE_MATCH"].strip() != "*":
            raise _RefusedError(501, "of If-None-Match, only * is supported in a PUT")
        total_bytes = _length_bytes(environ)
        if total_bytes is not None and total_bytes > self._max_bytes:
            raise _RefusedError(413, f"no more than {self._max_bytes} bytes are taken")
        path = os.path.join(self._path, name)
        exists = os.path.lexists(path)
        if exists and not stat.S_ISREG(os.lstat(path).st_mode):
            raise _RefusedError(403, "there is something that is no regular file")
        if exists and only_new:
            raise _RefusedError(412, "there is a file already")
        digest = xxhash.xxh3_64()
        chunks = self._checked(environ, total_bytes, digest)
        target = path
        if only_new:
            target = os.path.join(self._path, f".vmmig-{os.urandom(8).hex()}.new")
        try:
            transfer = Transfer(
                target, MigrateSendError, total_bytes=total_bytes, cancel=self._stop
            )
            file.send(chunks, transfer)
            if only_new:
                self._link(target, path)
        except MigrateSendError as error:
            raise self._failed(error) from error
        finally:
            if only_new:
                with suppress(FileNotFoundError):
                    os.unlink(target)
        value = base64.b64encode(digest.digest()).decode()
        headers = {"Repr-Digest": f"xxh3-64=:{value}:", "Content-Length": "0"}
        if exists:
            del headers["Content-Length"]
        return (204 if exists else 201), headers

    def _link(self, target: str, path: str) -> None:
        try:
            os.link(target, path)
            folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError:
            raise _RefusedError(412, "there is a file already") from None
        except OSError as error:
            raise MigrateSendError(error) from error

    def _checked(
        self, environ: Mapping[str, Any], total_bytes: int | None, digest: Any
    ) -> Iterator[bytes]:
        """The body, which is as long and has the digests that were announced."""
        body = environ["wsgi.input"]
        announced = _digests(environ.get("HTTP_REPR_DIGEST", ""))
        sums = {name: _ALGORITHMS[name]() for name in announced}
        came_bytes = 0
        while total_bytes is None or came_bytes < total_bytes:
            size = _PIECE_BYTES
            if total_bytes is not None:
                size = min(size, total_bytes - came_bytes)
            try:
                chunk: bytes = body.read(size)
            except TimeoutError:
                raise _RefusedError(408, "the body comes too slowly") from None
            except (OSError, ValueError) as error:
                raise _RefusedError(400, f"the body is malformed: {error}") from None
            if not chunk:
                break
            came_bytes += len(chunk)
            if came_bytes > self._max_bytes:
                raise _RefusedError(413, f"no more than {self._max_bytes} bytes are taken")
            for one in (digest, *sums.values()):
                one.update(chunk)
            yield chunk
        if total_bytes is not None and came_bytes != total_bytes:
            raise _RefusedError(400, f"the body ended after {came_bytes} of {total_bytes} bytes")
        for name, value in announced.items():
            if sums[name].digest() != value:
                raise _RefusedError(400, f"the body's {name} is not the one announced")

    def _failed(self, error: MigrateSendError) -> _RefusedError:
        """What the client is told; the path is not its business."""
        if self._stop.cancelled:
            return _RefusedError(503, "the server is stopped")
        cause = error.__cause__
        if isinstance(cause, OSError):
            status = _STATUS_OF_ERRNO.get(cause.errno or 0, 500)
            return _RefusedError(status, cause.strerror or "it could not be written")
        return _RefusedError(403, "it could not be written; is it write-protected?")

    def _get(
        self, environ: Mapping[str, Any], name: str, only_head: bool
    ) -> tuple[int, dict[str, str], Iterable[bytes]]:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(os.path.join(self._path, name), flags)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise _RefusedError(403, "it may not be read") from None
            raise _RefusedError(404, "there is no such file") from None
        part = FilePart(fd, 0, 0)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _RefusedError(404, "there is no such file")
            size = status.st_size
            etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{size:x}"'
            headers = {"ETag": etag, "Accept-Ranges": "bytes"}
            if _matches(environ.get("HTTP_IF_MATCH"), etag) is False:
                raise _RefusedError(412, "it has changed", headers)
            if _matches(environ.get("HTTP_IF_NONE_MATCH"), etag):
                part.close()
                return 304, headers, ()
            code, part.count = 200, size
            wanted = None
            if not only_head and environ.get("HTTP_IF_RANGE", etag) == etag:
                wanted = _range(environ.get("HTTP_RANGE", ""), size)
            if wanted is not None:
                code, (part.start, part.count) = 206, wanted
                end = part.start + part.count - 1
                headers["Content-Range"] = f"bytes {part.start}-{end}/{size}"
            headers["Content-Length"] = str(part.count)
            headers["Content-Type"] = "application/octet-stream"
            if only_head:
                part.close()
                return code, headers, ()
            return code, headers, part
        except BaseException:
            part.close()
            raise


class FilePart:
    """Bytes of an open file, as the body of an answer; a server may send them by itself."""

    def __init__(self, fd: int, start: int, count: int) -> None:
        self.fd = fd
        self.start = start
        self.count = count

    def __iter__(self) -> Iterator[bytes]:
        start, end = self.start, self.start + self.count
        while start < end:
            piece = os.pread(self.fd, min(_PIECE_BYTES, end - start), start)
            if not piece:
                raise OSError(errno.EIO, "the file shrank")
            start += len(piece)
            yield piece

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _name(environ: Mapping[str, Any]) -> str:
    """The file's name; the path came decoded, as Latin-1."""
    name = os.fsdecode(environ.get("PATH_INFO", "").encode("latin-1"))[1:]
    if not re.fullmatch(r"(?!\.)[^/\\\0-\x1f\x7f]+", name) or "%2f" in name.lower():
        raise _RefusedError(404, "a file's name is needed, without folders")
    if len(os.fsencode(name)) > 255:
        raise _RefusedError(400, "the name is too long")
    return name


def _length_bytes(environ: Mapping[str, Any]) -> int | None:
    """How long the body is; None if its end shows when it comes."""
    text = environ.get("CONTENT_LENGTH") or ""
    if environ.get("wsgi.input_terminated") and "HTTP_TRANSFER_ENCODING" in environ:
        if text:
            raise _RefusedError(400, "a chunked body has no Content-Length")
        return None
    if not text:
        raise _RefusedError(411, "a Content-Length is needed")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise _RefusedError(400, "the Content-Length is no number")
    return int(text)


def _digests(value: str) -> dict[str, bytes]:
    found = {}
    for name, digest in re.findall(r"([a-z0-9-]+)=:([A-Za-z0-9+/=]*):", value):
        if name in _ALGORITHMS:
            try:
                found[name] = base64.b64decode(digest)
            except ValueError:
                raise _RefusedError(400, f"the {name} announced is no base64") from None
    return found


def _matches(condition: str | None, etag: str) -> bool | None:
    """Whether the condition names the ETag; None if there is no condition."""
    if condition is None:
        return None
    return condition.strip() == "*" or etag in [part.strip() for part in condition.split(",")]


def _range(text: str, size: int) -> tuple[int, int] | None:
    """Start and count of the one range that was asked for; None means all."""
    match = re.fullmatch(r"bytes=\s*(\d{1,18}|)-(\d{1,18}|)\s*", text, re.ASCII)
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or size), size - 1) + 1
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, end = max(0, size - int(match[2])), size
    if start >= end:
        headers = {"Content-Range": f"bytes */{size}"}
        raise _RefusedError(416, f"it has {size} bytes", headers)
    return start, end - start


# On cheroot


class _Input:
    """The body of a request, straight from the socket."""

    def __init__(self, request: Any) -> None:
        self._rfile = request.conn.rfile
        self._socket = request.conn.socket
        self._chunked = bool(request.chunked_read)
        length = request.inheaders.get(b"Content-Length", b"0")
        self._left_bytes = int(length) if length.isdigit() and not self._chunked else 0
        self._first = True
        self.at_end = not self._chunked and not self._left_bytes
        self._began_s = time.monotonic()
        self._came_bytes = 0

    def read(self, size: int) -> bytes:
        """What is there, at most ``size`` bytes; none at the end."""
        if self._chunked and not self._left_bytes and not self.at_end:
            self._begin_chunk()
        if self.at_end:
            return b""
        piece = self._some(min(size, self._left_bytes))
        self._left_bytes -= len(piece)
        if not piece:
            raise ConnectionAbortedError("it is cut off")
        if not self._left_bytes and not self._chunked:
            self.at_end = True
        return piece

    def _some(self, size: int) -> bytes:
        if self._rfile.has_data():
            piece: bytes = self._rfile.read(min(size, len(self._rfile.peek(1))))
        else:
            piece = self._socket.recv(size)
        self._came_bytes += len(piece)
        spent_s = time.monotonic() - self._began_s - _TIMEOUT_S
        if spent_s > 0 and self._came_bytes < spent_s * _SLOWEST_BYTES_PER_S:
            raise TimeoutError("too slow")
        return piece

    def _line(self) -> bytes:
        line: bytes = self._rfile.readline(_LINE_BYTES)
        if not line.endswith(b"\r\n"):
            raise ValueError("a line of the chunks is cut off or too long")
        return line[:-2]

    def _begin_chunk(self) -> None:
        if not self._first and self._line():
            raise ValueError("a chunk is longer than it says")
        self._first = False
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;.*)?", self._line())
        if match is None:
            raise ValueError("a chunk's size is no number")
        self._left_bytes = int(match[1], 16)
        if not self._left_bytes:
            for _ in range(100):
                if not self._line():
                    self.at_end = True
                    return
            raise ValueError("there are too many trailers")


class _Gateway(wsgi.Gateway_10):
    def __init__(self, req: Any) -> None:
        req.rfile = _Input(req)
        super().__init__(req)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        write = super().start_response(status, headers, exc_info)
        if not self.req.rfile.at_end:
            self.req.close_connection = True
        return write

    def respond(self) -> None:
        self._respond()
        if not self.req.rfile.at_end:
            _linger(self.req.conn.socket)

    def _respond(self) -> None:
        request = self.req
        body = request.server.wsgi_app(self.env, self.start_response)
        if not isinstance(body, FilePart) or isinstance(request.conn.socket, ssl.SSLSocket):
            try:
                for piece in body:
                    request.ensure_headers_sent()
                    _send_all(request.conn.socket, piece)
            except OSError:
                request.close_connection = True
                raise
            finally:
                request.ensure_headers_sent()
                if isinstance(body, FilePart):
                    body.close()
            return
        try:
            request.ensure_headers_sent()
            with os.fdopen(body.fd, "rb", closefd=False) as opened:
                if (
                    body.count
                    and request.conn.socket.sendfile(opened, body.start, body.count) < body.count
                ):
                    request.close_connection = True
        except OSError:
            request.close_connection = True
            raise
        finally:
            body.close()


def _linger(sock: Any) -> None:
    """Drop what still comes, for a while: a reset would drop the answer (RFC 9112, 9.6)."""
    end_s = time.monotonic() + _LINGER_S
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while (left_s := end_s - time.monotonic()) > 0:
            sock.settimeout(left_s)
            if not sock.recv(_PIECE_BYTES):
                break


def _send_all(sock: Any, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[sock.send(view) :]


class _Tls(Adapter):
    """TLS with client certificates. The handshake is made by the thread that reads first."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def bind(self, sock: Any) -> Any:
        return sock

    def wrap(self, sock: Any) -> tuple[Any, dict[str, str]]:
        wrapped = self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return wrapped, {}

    def get_environ(self) -> dict[str, str]:
        return {"wsgi.url_scheme": "https", "HTTPS": "on"}

    def makefile(self, sock: Any, mode: str = "r", bufsize: int = -1) -> Any:
        return MakeFile(sock, mode, bufsize)


class _HeaderReader(HeaderReader):
    def __call__(self, rfile: Any, hdict: Any = None) -> Any:
        try:
            return super().__call__(rfile, hdict)
        except UnboundLocalError:
            raise ValueError("the first header continues none") from None


class _Request(HTTPRequest):
    header_reader = _HeaderReader()


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request


class _Server(wsgi.Server):
    ConnectionClass = _Connection
    log: Callable[[str], object] | None = None

    def error_log(self, msg: str = "", level: int = 20, traceback: bool = False) -> None:
        """One line for each failed connection; the traceback says nothing more to a user."""
        if self.log is not None:
            self.log(msg)


def server(
    app: Folder,
    host: str,
    port: int,
    *,
    tls: str | os.PathLike[str] | None = None,
    log: Callable[[str], object] | None = None,
) -> wsgi.Server:
    """A cheroot server for the application; call ``prepare``, ``serve`` and at last ``stop``.

    Args:
        app: What answers.
        host: The address to listen at.
        port: The port there; 0 means any that is free.
        tls: A folder with ``ca-cert.pem``, ``server-cert.pem`` and ``server-key.pem``; clients
            need a certificate of that authority then.
        log: Is told in one line of each connection that fails; else nobody is.

    Raises:
        MigratableError: The folder does not have what is needed.

    >>> import tempfile
    >>> made = server(Folder(tempfile.gettempdir()), "127.0.0.1", 0)
    >>> made.prepare()
    >>> made.bind_addr[1] > 0
    True
    >>> made.stop()
    """
    made = _Server(
        (host, port),
        app,
        numthreads=_THREADS,
        max=_THREADS,
        server_name="vmmig",
        request_queue_size=256,
        timeout=int(_TIMEOUT_S),
        shutdown_timeout=1,
    )
    made.log = log
    made.gateway = _Gateway
    made.max_request_header_size = 1 << 16
    if tls is not None:
        made.ssl_adapter = _Tls(_context(os.fspath(tls)))
    return made


def _context(folder: str) -> ssl.SSLContext:
    authority, certificate, key = (
        os.path.join(folder, name) for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem")
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        if stat.S_IMODE(os.stat(key).st_mode) & 0o077:
            raise MigratableError(f"others may read {key!r}; chmod 600 it")
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise MigratableError(
            f"{folder!r} has no usable ca-cert.pem, server-cert.pem and server-key.pem: {error}"
        ) from error
    return context
