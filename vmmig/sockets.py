"""Temporary: replaced by the stream transport's module."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterable
from typing import Any


def _address(url: str) -> tuple[int, Any]:
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        return socket.AF_UNIX, rest.removeprefix("//")
    host, _, port = rest.removeprefix("//").rpartition(":")
    return socket.AF_INET, (host, int(port))


def connect(url: str, timeout_s: float) -> socket.socket:
    family, address = _address(url)
    end = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


class Listener:
    def __init__(self, url: str) -> None:
        self.family, address = _address(url)
        self.sock = socket.socket(self.family, socket.SOCK_STREAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind(address)
        self.sock.listen(256)
        name = self.sock.getsockname()
        self.url = (
            f"unix:{address}" if self.family == socket.AF_UNIX else f"tcp:{name[0]}:{name[1]}"
        )
        self._path = address if self.family == socket.AF_UNIX else None

    def fileno(self) -> int:
        return self.sock.fileno()

    def accept(self, timeout_s: float) -> socket.socket:
        self.sock.settimeout(timeout_s)
        sock, _ = self.sock.accept()
        if self.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def shut_down(self) -> None:
        import contextlib

        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()
        if self._path:
            os.unlink(self._path)


def send_all(sock: socket.socket, views: Iterable[Any], timeout_s: float) -> None:
    sock.settimeout(timeout_s)
    for view in views:
        sock.sendall(view)


def recv_exactly_into(sock: socket.socket, view: memoryview, timeout_s: float) -> None:
    sock.settimeout(timeout_s)
    while len(view):
        n = sock.recv_into(view)
        if not n:
            raise ConnectionError("the peer ended the stream")
        view = view[n:]


def recv_some(sock: socket.socket, count: int, timeout_s: float) -> bytes:
    sock.settimeout(timeout_s)
    return sock.recv(count)


def send_fds(sock: socket.socket, data: bytes, fds: list[int], timeout_s: float) -> None:
    sock.settimeout(timeout_s)
    socket.send_fds(sock, [data], fds)


def recv_fds(sock: socket.socket, count: int, fds: list[int], timeout_s: float) -> bytes:
    sock.settimeout(timeout_s)
    data, got, _, _ = socket.recv_fds(sock, count, 4)
    fds += got
    return data


def readable(*things: Any, timeout_s: float) -> list[Any]:
    return select.select(things, [], [], timeout_s)[0]
