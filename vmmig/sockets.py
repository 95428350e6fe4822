"""TCP and unix sockets as migration needs them: connected, bounded in time, and cancelled at once.

Addresses are Cloud Hypervisor's, ``tcp:host:port`` and ``unix:/path``, or URLs. A connected
socket is an ordinary `socket.socket` in blocking mode whose waits the kernel ends after
``timeout_s`` (``SO_RCVTIMEO`` and ``SO_SNDTIMEO``), so that moving bytes costs no system call
more than `socket.socket.sendall` does; one that speaks TLS is an `ssl.SSLSocket` with a timeout.
Whoever waits in a call is woken by `shut_down`, from any thread or signal handler.

Whatever fails between here and the other side is an `OSError` that says what happened and what
to do, without the address; what is wrong with an address or a certificate's file is a
`MigratableError`.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from vmmig.errors import MigratableError
from vmmig.transfer import CancelToken

if TYPE_CHECKING:
    import ssl
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 60, 15, 4
TCP_USER_TIMEOUT_S = 120

MAX_DESCRIPTORS = 253
"""How many descriptors one message can carry: the kernel's ``SCM_MAX_FD``."""

_BATCH_BYTES, _BATCH_BUFFERS = 1 << 20, 512
_FOREVER_S = 1e8
_RETRY_FIRST_S, _RETRY_MOST_S = 0.01, 0.25
_PATH_BYTES = 107
_BACKLOG = 128
_PEERS = 64
_LEAVING_BYTES = 1 << 16
_MAY_COME_YET = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENOENT,
    errno.ETIMEDOUT,
}


@attrs.frozen
class Address:
    """Where to listen or to connect: a TCP host and port, or the path of a unix socket.

    Attributes:
        path: The unix socket's; empty for TCP.

    >>> Address.parse("tcp://[::1]:4000")
    Address(host='::1', port=4000, path='')
    >>> str(Address.parse("unix:///run/vm.sock"))
    'unix:/run/vm.sock'
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, url: object) -> Address:
        """The address that a URL means. A unix path is taken as it is, relative ones included.

        Raises:
            MigratableError: It is none.
        """
        text = url if isinstance(url, str) else ""
        scheme, _, rest = text.partition(":")
        if scheme.lower() == "unix":
            return cls(path=_path(rest))
        if scheme.lower() == "tcp":
            return cls(*_host_and_port(rest.removeprefix("//")))
        raise MigratableError("an address is tcp:host:port or unix:/path")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


def _path(rest: str) -> str:
    path = rest
    if rest.startswith("//"):
        path = rest[2:]
        if not path.startswith("/"):
            raise MigratableError(
                "a unix socket is on this host: write unix:///path, with three slashes, "
                "or unix:path for a relative one"
            )
    if not path or path.endswith("/") or "\0" in path:
        raise MigratableError("there is no path of a socket in it; write unix:/path")
    try:
        size_bytes = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise MigratableError(f"no path can have such characters in it: {error}") from error
    if size_bytes > _PATH_BYTES:
        raise MigratableError(
            f"the path has {size_bytes} bytes, and that of a socket {_PATH_BYTES} at most; "
            "use a shorter one, or a relative one"
        )
    return path


def _host_and_port(rest: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^\[\]]*?))(?::([^:\[\]]*))?", rest)
    if match is None:
        raise MigratableError("an IPv6 address is written in brackets, as in tcp:[::1]:port")
    bracketed, plain, port = match.groups()
    host = plain if bracketed is None else bracketed
    if bracketed is None and ":" in host:
        raise MigratableError("an IPv6 address is written in brackets, as in tcp:[::1]:port")
    if port is None:
        raise MigratableError("the port is missing; write tcp:host:port")
    if not host:
        raise MigratableError(
            "the host is missing; write tcp:host:port, and 0.0.0.0 or [::] to listen everywhere"
        )
    if re.search(r"[\s/?#@\0]", host + port):
        raise MigratableError("a TCP address has a host and a port, and nothing else")
    if not re.fullmatch("[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise MigratableError(f"the port is {port!r}; it must be a number from 0 to 65535")
    return host, int(port)


# Connecting


def connect(
    url: str,
    *,
    timeout_s: float = 60.0,
    tls: str | os.PathLike[str] | None = None,
    cancel: CancelToken | None = None,
) -> socket.socket:
    """A socket connected to ``url``; where nobody listens yet, wait until somebody does.

    With TLS 1.3 the other side may still refuse this side's certificate: what is received
    first then fails, and says why.

    Args:
        url: See `Address`.
        timeout_s: How long to try, in seconds; and later the socket's `set_timeout`.
        tls: A folder for `vmmig.tls.client_context`; TCP only.
        cancel: Ends the wait. For what follows, give `CancelToken.calling` a `shut_down`.

    Raises:
        MigratableError: The address or the TLS folder is wrong.
        OSError: Nobody could be reached, or the TLS handshake failed.

    >>> connect("unix:/nobody/is/here", timeout_s=0)
    Traceback (most recent call last):
    ConnectionError: nobody listened there within 0 s (No such file or directory); ...
    """
    address = Address.parse(url)
    context = _context(address, tls, is_server=False)
    if not address.path and not address.port:
        raise MigratableError("nobody can be reached at port 0; name the port of who listens")
    end_s = time.monotonic() + timeout_s
    pause_s = _RETRY_FIRST_S
    with _Waker(cancel) as waker:
        while True:
            try:
                sock = _connected(address, end_s, waker)
                break
            except OSError as error:
                _raise_unless_it_may_come(address, error)
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise ConnectionError(
                        f"nobody listened there within {timeout_s:g} s ({_why(error)}); "
                        "start the receiving side, or check the address"
                    ) from error
            waker.wait(min(pause_s, left_s))
            pause_s = min(1.5 * pause_s, _RETRY_MOST_S)
        try:
            _tune(sock)
            if context is not None:
                sock = _client_tls(sock, context, address, end_s, waker)
            set_timeout(sock, timeout_s)
        except BaseException:
            sock.close()
            raise
    return sock


def _raise_unless_it_may_come(address: Address, error: OSError) -> None:
    if isinstance(error, socket.gaierror):
        if error.errno != socket.EAI_AGAIN:
            raise ConnectionError(
                f"the host is not known ({error.strerror}); check its name"
            ) from error
    elif error.errno not in _MAY_COME_YET:
        raise error
    elif address.path and not _may_be_socket(address.path):
        raise ConnectionError("what is there is no socket; check the path") from error


def _may_be_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True


def _connected(address: Address, end_s: float, waker: _Waker) -> socket.socket:
    """A connected socket, in non-blocking mode, to the first place that takes it."""
    failure: OSError | None = None
    places = _places(address, socket.AI_ADDRCONFIG)
    for number, (family, place) in enumerate(places):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(place)
            if code == errno.EINPROGRESS:
                share_s = (end_s - time.monotonic()) / (len(places) - number)
                arrived = waker.wait(share_s, (sock, select.POLLOUT))
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                code = code if arrived or code else errno.ETIMEDOUT
            if code:
                raise OSError(code, os.strerror(code))
            if family != socket.AF_UNIX and sock.getsockname() == sock.getpeername():
                # A port from which connections are made can be its own other side.
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            return sock
        except OSError as error:
            sock.close()
            failure = error
            if waker.woken:
                break
        except BaseException:
            sock.close()
            raise
    assert failure is not None
    raise failure


def _places(address: Address, flags: int) -> list[tuple[int, Any]]:
    if address.path:
        return [(socket.AF_UNIX, address.path)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except UnicodeError as error:
        raise ConnectionError(f"the host's name cannot be one: {error}") from error
    return [(family, place) for family, _, _, _, place in found]


def _client_tls(
    sock: socket.socket, context: ssl.SSLContext, address: Address, end_s: float, waker: _Waker
) -> ssl.SSLSocket:
    import ssl

    try:
        secured = context.wrap_socket(
            sock, server_hostname=address.host, do_handshake_on_connect=False
        )
    except ValueError as error:
        raise ConnectionError(f"no certificate can be for this host: {error}") from error
    except OSError as error:
        raise _explained(error) from error
    try:
        while True:
            try:
                secured.do_handshake()
                return secured
            except ssl.SSLWantReadError:
                awaited = select.POLLIN
            except ssl.SSLWantWriteError:
                awaited = select.POLLOUT
            except OSError as error:
                raise _explained(error) from error
            if not waker.wait(end_s - time.monotonic(), (secured, awaited)):
                raise TimeoutError(
                    "the other side did not finish the TLS handshake; check that it speaks TLS"
                )
    except BaseException:
        secured.close()
        raise


# Listening


class Listener:
    """A socket that listens, until `close` or the end of a ``with``.

    A unix socket has mode 0600 before anybody can connect. The socket file of a listener that
    is dead is replaced; whatever else is there is left alone and refused. On closing, the file
    is removed if it is still this listener's.

    Args:
        url: See `Address`; TCP port 0 means any free one.
        tls: A folder for `vmmig.tls.server_context`; TCP only.

    Attributes:
        url: Where it listens, with the real port.
        refusal: Why the last peer that came was not accepted; None if there was none.

    Raises:
        MigratableError: The address or the TLS folder is wrong.
        OSError: It cannot listen there.

    >>> with Listener("tcp:127.0.0.1:0") as listener:
    ...     there = connect(listener.url)
    ...     here = listener.accept()
    ...     send_all(there, [b"some ", b"bytes"])
    ...     recv_exactly(here, 10)
    ...     here.close(), there.close()
    b'some bytes'
    (None, None)
    """

    def __init__(self, url: str, *, tls: str | os.PathLike[str] | None = None) -> None:
        address = Address.parse(url)
        self._context = _context(address, tls, is_server=True)
        self._peers: list[_Peer] = []
        self._file: tuple[str, int, int] | None = None
        self._is_shut_down = False
        self.refusal: str | None = None
        family, place = _places_to_listen(address)
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            if address.path:
                self._file = _listen_on_path(self._sock, os.path.abspath(address.path))
                self.url = str(address)
            else:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._sock.bind(place)
                self._sock.listen(_BACKLOG)
                host, port, *_ = self._sock.getsockname()
                self.url = str(Address(host, port))
            self._sock.setblocking(False)
        except OSError as error:
            self.close()
            raise OSError(
                error.errno,
                f"cannot listen there: {_why(error)}; use another address, or end who uses it",
            ) from error
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The listening socket's descriptor; it is readable when somebody comes."""
        return self._sock.fileno()

    def accept(
        self, *, timeout_s: float = 60.0, cancel: CancelToken | None = None
    ) -> socket.socket:
        """The first peer that comes, and whose TLS handshake succeeds; see `accept_greeted`."""
        return self.accept_greeted(0, timeout_s=timeout_s, cancel=cancel)[0]

    def accept_greeted(
        self,
        greeting_bytes: int,
        check: Callable[[bytes], object] = bytes,
        *,
        answer: Callable[[str], bytes] | None = None,
        timeout_s: float = 60.0,
        cancel: CancelToken | None = None,
    ) -> tuple[socket.socket, bytes]:
        """The first peer that sends a right greeting, and its greeting.

        Peers are read side by side: one that sends nothing, or something else, or fails the TLS
        handshake, does not keep another from being accepted.

        Args:
            greeting_bytes: How long the greeting is.
            check: Raises a `MigratableError` if the greeting is wrong.
            answer: Makes what a peer is sent whose greeting is wrong, out of the error's text.
            timeout_s: How long to wait, in seconds; and later the socket's `set_timeout`.
            cancel: Ends the wait.

        Raises:
            OSError: Nobody came who was right, or the listener was closed.
        """
        end_s = time.monotonic() + timeout_s
        with _Waker(cancel) as waker:
            while True:
                for peer in [*self._peers]:
                    try:
                        arrived = peer.advance(greeting_bytes)
                        if arrived:
                            check(bytes(peer.data))
                    except (MigratableError, OSError) as error:
                        self._refuse(peer, error, answer)
                        continue
                    if peer.is_gone:
                        self._peers.remove(peer)
                    elif arrived:
                        self._peers.remove(peer)
                        return self._handed_out(peer, timeout_s)
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    last = f"; the last one was refused: {self.refusal}" if self.refusal else ""
                    raise TimeoutError(f"nobody who was accepted came within {timeout_s:g} s{last}")
                waits = [(peer.sock, peer.awaited) for peer in self._peers]
                if waker.wait(left_s, (self._sock, select.POLLIN), *waits):
                    self._let_in()
                if self._is_shut_down:
                    raise ConnectionAbortedError("the listener was shut down")

    def _let_in(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            if self._is_shut_down:
                return
            raise
        try:
            sock.setblocking(False)
            _tune(sock)
            if self._context is not None:
                sock = self._context.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
        except OSError as error:
            self.refusal = str(_explained(error))
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        self._peers.append(_Peer(sock, is_shaking_hands=self._context is not None))
        if len(self._peers) > _PEERS:
            oldest = self._peers.pop(0)
            oldest.sock.close()

    def _refuse(self, peer: _Peer, error: Exception, answer: Callable[[str], bytes] | None) -> None:
        self.refusal = str(_explained(error) if isinstance(error, OSError) else error)
        with suppress(OSError):
            if answer is not None and isinstance(error, MigratableError):
                peer.sock.send(answer(self.refusal))
        # To close at once would reset the connection, and the peer might never read why.
        shut_down(peer.sock, socket.SHUT_WR)
        peer.is_leaving = True

    def _handed_out(self, peer: _Peer, timeout_s: float) -> tuple[socket.socket, bytes]:
        try:
            set_timeout(peer.sock, timeout_s)
        except BaseException:
            peer.sock.close()
            raise
        return peer.sock, bytes(peer.data)

    def shut_down(self) -> None:
        """Wake who waits in an accept, from any thread; it fails."""
        self._is_shut_down = True
        shut_down(self._sock)

    def close(self) -> None:
        """Listen no more, part with those who were not accepted, and remove the socket's file."""
        for peer in self._peers:
            peer.sock.close()
        self._peers.clear()
        file, self._file = self._file, None
        if file is not None:
            path, device, inode = file
            with suppress(OSError):
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == (device, inode):
                    os.unlink(path)
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Peer:
    """One who came, and has not been accepted or refused yet; or was, and is to go."""

    def __init__(self, sock: socket.socket, *, is_shaking_hands: bool) -> None:
        self.sock = sock
        self.is_shaking_hands = is_shaking_hands
        self.is_leaving = self.is_gone = False
        self.awaited = select.POLLIN
        self.data = bytearray()
        self._left_bytes = 0

    def advance(self, greeting_bytes: int) -> bool:
        """Do what can be done without waiting; whether the greeting is there."""
        if self.is_leaving:
            self._leave()
            return False
        try:
            if self.is_shaking_hands:
                self.sock.do_handshake()  # type: ignore[attr-defined]
                self.is_shaking_hands = False
            self.awaited = select.POLLIN
            while len(self.data) < greeting_bytes:
                part = self.sock.recv(greeting_bytes - len(self.data))
                if not part:
                    raise ConnectionError(
                        f"it ended the connection after {len(self.data)} bytes of a greeting"
                    )
                self.data += part
            return True
        except OSError as error:
            if not _would_wait(error):
                raise
            self.awaited = select.POLLOUT if _wants_to_write(error) else select.POLLIN
            return False

    def _leave(self) -> None:
        """Read on until the peer has read why, so that the connection is not reset before."""
        self.awaited = select.POLLIN
        try:
            while self._left_bytes < _LEAVING_BYTES:
                part = socket.socket.recv(self.sock, 4096)
                if not part:
                    break
                self._left_bytes += len(part)
        except BlockingIOError:
            return
        except OSError:
            pass
        self.sock.close()
        self.is_gone = True


def _places_to_listen(address: Address) -> tuple[int, Any]:
    return _places(address, socket.AI_PASSIVE)[0]


def _listen_on_path(sock: socket.socket, path: str) -> tuple[str, int, int]:
    """Listen at a path; the path, and the file's device and inode.

    The socket listens under another name before it gets its own: so one that refuses to be
    connected to is dead, and not one that is just about to listen.
    """
    folder_path, name = os.path.split(path)
    part = f".vmmig-{os.urandom(8).hex()}.part"
    folder = os.open(folder_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{folder}"
        place = os.path.join(short if os.path.isdir(short) else folder_path, part)
        # Linux gives the file the mode that the socket has.
        with suppress(OSError):
            os.fchmod(sock.fileno(), 0o600)
        sock.bind(place)
        try:
            os.chmod(part, 0o600, dir_fd=folder)
            sock.listen(_BACKLOG)
            try:
                os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                _replace_dead(folder, part, path)
            status = os.stat(part, dir_fd=folder, follow_symlinks=False)
        finally:
            os.unlink(part, dir_fd=folder)
    finally:
        os.close(folder)
    return path, status.st_dev, status.st_ino


def _replace_dead(folder: int, part: str, path: str) -> None:
    """Put the socket in the place of a dead one; only one process does so in a folder at once."""
    import fcntl

    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "what is there is no socket")
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OSError(errno.EADDRINUSE, "another process is about to listen") from None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code != errno.ECONNREFUSED:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    name = os.path.basename(path)
    os.unlink(name, dir_fd=folder)
    os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)


# Bytes


def set_timeout(sock: socket.socket, timeout_s: float) -> None:
    """Let each wait in this module's functions end after so many seconds without progress.

    >>> here, there = socket.socketpair()
    >>> set_timeout(here, 0.01)
    >>> recv_exactly(here, 1)
    Traceback (most recent call last):
    TimeoutError: the other side sent nothing within the time limit
    >>> here.close(), there.close()
    (None, None)
    """
    timeout_s = min(max(timeout_s, 0.001), _FOREVER_S)
    if _is_tls(sock):
        sock.settimeout(timeout_s)
    else:
        sock.settimeout(None)
        micros = round(timeout_s * 1e6)
        timeval = struct.pack("@ll", *divmod(micros, 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def shut_down(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Wake who waits for the socket, from any thread or signal handler; it does not raise.

    >>> here, there = socket.socketpair()
    >>> shut_down(here)
    >>> recv_exactly(here, 1)
    Traceback (most recent call last):
    ConnectionError: the other side ended the connection
    >>> here.close(), there.close()
    (None, None)
    """
    with suppress(OSError):
        # That of an SSLSocket makes it a plain one, under whoever uses it.
        socket.socket.shutdown(sock, how)


def send_all(sock: socket.socket, views: Iterable[Buffer]) -> None:
    """Send bytes, one behind the other; many small ones take one call.

    Args:
        sock: One that has a `set_timeout`, as what `connect` and `Listener` give.
        views: Contiguous bytes.

    Raises:
        OSError: They are not all with the kernel; some may have been sent.
    """
    is_tls = _is_tls(sock)
    for batch in _batches(views):
        try:
            if len(batch) == 1:
                _send_view(sock, batch[0])
            elif is_tls:
                _send_view(sock, memoryview(b"".join(batch)))
            else:
                _send_batch(sock, batch)
        except OSError as error:
            raise _explained_by_peer(sock, error, "took") from error


def recv_exactly_into(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view`` with what comes.

    Raises:
        OSError: The connection failed or ended before; the view is filled in part.
    """
    flags = 0 if _is_tls(sock) else socket.MSG_WAITALL
    filled_bytes = 0
    try:
        while filled_bytes < len(view):
            # Released at once, for a traceback would keep it.
            with view[filled_bytes:] as rest:
                count_bytes = sock.recv_into(rest, 0, flags)
            if not count_bytes:
                raise ConnectionError("the other side ended the connection")
            filled_bytes += count_bytes
    except OSError as error:
        raise _explained(error, "sent") from error


def recv_exactly(sock: socket.socket, count_bytes: int) -> bytes:
    """The next ``count_bytes`` bytes; see `recv_exactly_into`."""
    data = bytearray(count_bytes)
    recv_exactly_into(sock, memoryview(data))
    return bytes(data)


def recv_some(sock: socket.socket, most_bytes: int) -> bytes:
    """What comes next, at least one byte; b"" if the other side ended the connection.

    Raises:
        OSError: The connection failed.
    """
    try:
        return sock.recv(most_bytes)
    except OSError as error:
        raise _explained(error, "sent") from error


def send_fds(sock: socket.socket, data: Buffer, fds: Sequence[int]) -> None:
    """Send bytes over a unix socket, and with the first of them descriptors.

    Args:
        sock: A unix socket.
        data: At least one byte.
        fds: At most `MAX_DESCRIPTORS`; they stay the caller's.

    Raises:
        OSError: They could not be sent.

    >>> here, there = socket.socketpair()
    >>> send_fds(there, b"one", [0])
    >>> data, fds = recv_fds(here, 3, 1)
    >>> data, [os.fstat(fd) == os.fstat(0) for fd in fds]
    (b'one', [True])
    >>> for fd in fds: os.close(fd)
    >>> here.close(), there.close()
    (None, None)
    """
    rights = struct.pack(f"{len(fds)}i", *fds)
    view = memoryview(data).cast("B")
    try:
        sent_bytes = sock.sendmsg([view], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        _send_view(sock, view[sent_bytes:])
    except OSError as error:
        raise _explained(error, "took") from error


def recv_fds(sock: socket.socket, count_bytes: int, most_fds: int) -> tuple[bytes, list[int]]:
    """The next ``count_bytes`` bytes from a unix socket, and the descriptors beside them.

    The descriptors are the caller's to close, and closed in what this process executes.

    Raises:
        OSError: The connection failed or ended before, or more descriptors came than
            ``most_fds`` or than this process may open; those that came are closed.
    """
    data = b""
    fds: list[int] = []
    room_bytes = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
    try:
        while len(data) < count_bytes:
            part, messages, flags, _ = sock.recvmsg(
                count_bytes - len(data), room_bytes, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
            )
            for level, kind, content in messages:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    whole = content[: len(content) // 4 * 4]
                    fds += struct.unpack(f"{len(whole) // 4}i", whole)
            if flags & socket.MSG_CTRUNC:
                raise ConnectionError(
                    "not all descriptors that were sent could be received; "
                    "raise the limit on open files (ulimit -n)"
                )
            if len(fds) > most_fds:
                raise ConnectionError(f"{len(fds)} descriptors came where {most_fds} were expected")
            if not part:
                raise ConnectionError("the other side ended the connection")
            data += part
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise _explained(error, "sent") from error
        raise
    return data, fds


def _batches(views: Iterable[Buffer]) -> Iterator[list[memoryview]]:
    """The views, the small ones together in lists of up to 1 MiB."""
    batch: list[memoryview] = []
    batch_bytes = 0
    for chunk in views:
        view = memoryview(chunk).cast("B")
        if batch and (batch_bytes + len(view) > _BATCH_BYTES or len(batch) == _BATCH_BUFFERS):
            yield batch
            batch, batch_bytes = [], 0
        if view:
            batch.append(view)
            batch_bytes += len(view)
    if batch:
        yield batch


def _send_view(sock: socket.socket, view: memoryview) -> None:
    while view:
        view = view[sock.send(view) :]


def _send_batch(sock: socket.socket, batch: list[memoryview]) -> None:
    first = 0
    while first < len(batch):
        sent_bytes = sock.sendmsg(batch[first:])
        while first < len(batch) and sent_bytes >= len(batch[first]):
            sent_bytes -= len(batch[first])
            first += 1
        if sent_bytes:
            batch[first] = batch[first][sent_bytes:]


# What both sides need


class _Waker:
    """Waits for sockets, and for a cancellation."""

    def __init__(self, cancel: CancelToken | None) -> None:
        self._cancel = cancel
        self._stack = _waking(cancel)

    def __enter__(self) -> Self:
        self._end = self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def woken(self) -> bool:
        """Whether it was cancelled."""
        return self._cancel is not None and self._cancel.cancelled

    def wait(self, timeout_s: float, *waits: tuple[socket.socket, int]) -> bool:
        """Wait until one of the sockets is ready for what is awaited of it, or time is up.

        Returns:
            Whether the first socket is ready.

        Raises:
            ConnectionAbortedError: It was cancelled.
        """
        poll = select.poll()
        if self._end is not None:
            poll.register(self._end, select.POLLIN)
        for sock, awaited in waits:
            poll.register(sock, awaited)
        millis = min(max(timeout_s, 0), _FOREVER_S / 100) * 1000
        ready = poll.poll(millis)
        if self.woken:
            raise ConnectionAbortedError("cancelled")
        return any(waits and fd == waits[0][0].fileno() for fd, _ in ready)


@contextmanager
def _waking(cancel: CancelToken | None) -> Iterator[socket.socket | None]:
    """A socket that is readable once it is cancelled."""
    if cancel is None:
        yield None
        return
    here, there = socket.socketpair()
    with here, there, cancel.calling(partial(shut_down, there)):
        yield here


def _context(
    address: Address, folder: str | os.PathLike[str] | None, *, is_server: bool
) -> ssl.SSLContext | None:
    if folder is None:
        return None
    if address.path:
        raise MigratableError(
            "TLS is for tcp: only; a unix socket stays on this host, and is its owner's alone"
        )
    from vmmig import tls

    return tls.server_context(folder) if is_server else tls.client_context(folder)


def _tune(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", TCP_USER_TIMEOUT_S * 1000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_tls(sock: socket.socket) -> bool:
    return hasattr(sock, "do_handshake")


def _is_of_ssl(error: OSError) -> bool:
    return hasattr(error, "reason") and hasattr(error, "library")


def _would_wait(error: OSError) -> bool:
    return isinstance(error, BlockingIOError) or type(error).__name__ in (
        "SSLWantReadError",
        "SSLWantWriteError",
    )


def _wants_to_write(error: OSError) -> bool:
    return type(error).__name__ == "SSLWantWriteError"


def _why(error: OSError) -> str:
    return error.strerror or str(error)


def _explained(error: OSError, verb: str = "sent") -> OSError:
    """The same in words that tell who reads them what happened."""
    if _is_of_ssl(error):
        from vmmig import tls

        return ConnectionError(tls.explained(error))
    if error.errno == errno.ETIMEDOUT:
        return TimeoutError("the other side does not answer any more; check its host and the way")
    if isinstance(error, (BlockingIOError, TimeoutError)):
        return TimeoutError(f"the other side {verb} nothing within the time limit")
    if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN, errno.ENOTCONN):
        return ConnectionError("the other side ended the connection")
    return error


def _explained_by_peer(sock: socket.socket, error: OSError, verb: str) -> OSError:
    """As `_explained`; over TLS the peer may have said why before it ended the connection."""
    if _is_tls(sock) and not isinstance(error, TimeoutError):
        try:
            sock.settimeout(0)
            sock.recv(1)
        except OSError as said:
            if _is_of_ssl(said) and not _would_wait(said):
                return _explained(said)
    return _explained(error, verb)
