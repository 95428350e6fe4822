"""What somebody else sends, and every receiver of it: any input must end in a result or an error.

Each of `RECEIVERS` takes one input and checks what must hold whatever it is; anything it raises is
a bug. Both `test_fuzz` and ``fuzz/fuzz_receivers.py`` call them, beginning with `SEEDS`.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from vmmig import (
    Limits,
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    Snapshot,
    dumps,
    load,
    loads,
    protocol,
    recv,
    send,
)
from vmmig import SnapshotDataSection as Section
from vmmig.codec import HEADER_BYTES, encode, open_ranges, read_header
from vmmig.codec.layout import Layout, decode_index
from vmmig.transfer import Progress

LIMITS = Limits(max_nodes=1000, max_bytes=1 << 22, max_id_bytes=1 << 12)

# Less than the shortest pause before a request is repeated.
_NO_REPETITION_S = 0.09


# Containers


class _Far:
    """A container that is read by ranges."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.total_bytes = len(data)

    def read_into(self, start: int, view: memoryview, /) -> None:
        view[:] = self._data[start : start + len(view)]


def container(data: bytes) -> None:
    """All ways to read a container agree, on the bytes and on them with right checksums."""
    for given in {data, _with_right_checksums(data)}:
        whole = _read(lambda given=given: loads(given, limits=LIMITS))
        lazily = _read(lambda given=given: loads(given, lazily=True, limits=LIMITS))
        stream = io.BytesIO(given)
        streamed = _read(lambda stream=stream: load(stream, limits=LIMITS))
        far = _read(lambda given=given: open_ranges(_Far(given), limits=LIMITS))
        assert lazily == whole
        if whole is None:
            assert streamed is None or stream.tell() < len(given)
        else:
            assert streamed == far == whole == dumps(loads(whole))


def _read(get: Callable[[], Snapshot]) -> bytes | None:
    """All of the snapshot, or None where it is refused."""
    try:
        return dumps(get())
    except MigratableError:
        return None


def _with_right_checksums(data: bytes) -> bytes:
    """The container as far as it can be told where its checksums are."""
    sealed = bytearray(data)
    if len(sealed) < HEADER_BYTES:
        return data
    (index_bytes,) = struct.unpack_from("<Q", sealed, 16)
    index = sealed[HEADER_BYTES : HEADER_BYTES + min(index_bytes, len(sealed))]
    struct.pack_into("<QQ", sealed, 24, len(sealed), xxh3_64_intdigest(index))
    struct.pack_into("<Q", sealed, 88, xxh3_64_intdigest(sealed[:88]))
    try:
        layout = decode_index(read_header(sealed), memoryview(bytes(index)), LIMITS)
    except Exception:
        return bytes(sealed)
    table = struct.pack(f"<{layout.sums}Q", *_sums(layout, sealed)) if layout.sums < 1000 else b""
    table += struct.pack("<Q", xxh3_64_intdigest(table))
    return bytes(sealed[: max(0, len(sealed) - len(table))]) + table


def _sums(layout: Layout, data: bytearray) -> list[int]:
    at, sums = layout.small_start, []
    for length in layout.small_lengths:
        sums.append(xxh3_64_intdigest(data[at : at + length]))
        at += length
    for part in layout.large:
        for start in range(part.start, part.end, 1 << 20):
            sums.append(xxh3_64_intdigest(data[start : min(start + (1 << 20), part.end)]))
    return (sums + [0] * layout.sums)[: layout.sums]


# Streams: the peers of tcp: and unix:

HONEST = Snapshot("honest", {}, {"ram": Section("ram", b"kept")})


def framed(data: bytes) -> bytes:
    """What a sender of these bytes sends over tcp: and unix:."""
    hello = struct.pack("<8sHHIQ", b"\x89VMMIG\r\n", 1, 0, 0, len(data))
    return hello + _sum(hello) + data + _sum(data)


def _sum(data: bytes) -> bytes:
    return struct.pack("<Q", xxh3_64_intdigest(data))


def _with_right_sums(data: bytes) -> bytes:
    """The sender's stream with the checksums of its hello and of all its bytes right."""
    hello, body = data[:24], data[32:]
    if len(hello) < 24:
        return data
    (total_bytes,) = struct.unpack_from("<Q", hello, 16)
    body = body[: min(total_bytes, len(body))]
    return hello + _sum(hello) + body + _sum(body)


def stream(data: bytes) -> None:
    """A wrong hello keeps nobody else out, and who sent is told what came of it."""
    for given in {data, _with_right_sums(data)}:
        _stream(given)


def _stream(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = f"{folder}/s"
        peers: list[socket.socket] = []

        def connect(progress: Progress) -> None:
            if progress.stage == "connecting" and os.path.exists(path):
                for sent in (data, framed(dumps(HONEST))):
                    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                    sock.connect(path)
                    sock.setblocking(False)
                    if sent:
                        sock.send(sent)
                    sock.shutdown(socket.SHUT_WR)
                    peers.append(sock)

        received: Snapshot | None = None
        with suppress(MigrateReceiveError):
            received = recv(f"unix:{path}", limits=LIMITS, progress=connect, timeout_s=20)
        assert os.listdir(folder) == []
        took = [said(2) in _all_of(sock) for sock in peers]
        is_right = data[24:32] == _sum(data[:24]) and data[:12] == framed(b"")[:12]
        if is_right:
            assert took == [received is not None, False]
        else:
            assert (received, took) == (HONEST, [False, True])


def _all_of(sock: socket.socket) -> bytes:
    came = b""
    with suppress(OSError):
        while piece := sock.recv(1 << 16):
            came += piece
    return came


# Answers: of who receives, to who sends; of an HTTP server


class _Answering:
    """Says the same to everybody who connects, and then hears them out."""

    def __init__(self) -> None:
        self.said = b""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            with sock, suppress(OSError):
                sock.sendall(self.said)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass


@cache
def _answering() -> _Answering:
    return _Answering()


def stream_answer(data: bytes) -> None:
    """Who sends believes only an answer that says that all was received."""
    answering = _answering()
    answering.said = data
    try:
        send(HONEST, f"tcp:127.0.0.1:{answering.port}", timeout_s=20)
    except MigrateSendError:
        pass
    else:
        assert data.startswith(said(1) + said(2))


def said(kind: int, reason: bytes = b"") -> bytes:
    """The answer of a receiver over tcp: and unix:."""
    head = struct.pack("<4sBBH", b"VMA\n", kind, 0, len(reason)) + reason
    return head + _sum(head)


def http_answer(data: bytes) -> None:
    """What a server says to GET, to GET of a range, and to PUT."""
    answering = _answering()
    answering.said = data
    url = f"http://127.0.0.1:{answering.port}/vm"
    with suppress(MigrateReceiveError):
        recv(url, limits=LIMITS, timeout_s=_NO_REPETITION_S)
    _read(lambda: recv(url, lazily=True, limits=LIMITS, timeout_s=_NO_REPETITION_S))
    with suppress(MigrateSendError):
        send(HONEST, url, timeout_s=_NO_REPETITION_S)


# Requests: to `vmmig serve`


class _Served:
    """``vmmig serve`` in this process, with what it logs."""

    def __init__(self) -> None:
        from vmmig.http_server import Folder, server

        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name, "served")
        self.path.mkdir()
        self.logged: list[str] = []
        self._server: Any = server(Folder(self.path, max_bytes=1 << 16), "127.0.0.1", 0)
        self._server.error_log = self._log
        self._server.prepare()
        self.address: tuple[str, int] = self._server.bind_addr
        threading.Thread(target=self._server.serve, daemon=True).start()

    def stop(self) -> None:
        """End its workers, which would keep the process from ending."""
        self._server.stop()
        self._folder.cleanup()

    def _log(self, msg: str = "", level: int = 20, traceback: bool = False) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            self.logged.append(f"{msg}: {sys.exc_info()!r}")


@cache
def _served() -> _Served:
    return _Served()


def stop() -> None:
    """End the server, if `request` has started it."""
    if _served.cache_info().currsize:
        _served().stop()
        _served.cache_clear()


def request(data: bytes) -> None:
    """Every request is answered by a status that is no fault of the server, or not at all."""
    served = _served()
    old = served.path / "old"
    old.write_bytes(b"old bytes")
    with socket.create_connection(served.address, 20) as sock:
        with suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        answers = _all_of(sock)
    assert not answers or answers.startswith(b"HTTP/1.")
    assert not answers.startswith((b"HTTP/1.1 500", b"HTTP/1.0 500")), answers
    assert not served.logged, served.logged
    assert [*served.path.parent.iterdir()] == [served.path]
    for file in served.path.iterdir():
        assert file.is_file()
        assert not file.name.startswith(".")
        assert file.stat().st_size <= 1 << 16
        file.unlink()


# Messages: of a live migration


def messages(data: bytes) -> None:
    """What a peer of a live migration sends, as one piece and byte by byte, is the same."""
    assert _events(data, len(data) or 1) == _events(data, 1)


def _events(data: bytes, piece_bytes: int) -> list[str]:
    limits = protocol.MessageLimits(1 << 16, 1 << 16, 1000)
    connection = protocol.Connection(protocol.Role.RECEIVER, limits=limits)
    events, memory = [], b""
    pieces = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)]
    try:
        for piece in [*pieces, b""]:
            connection.receive_data(piece)
            while not isinstance(event := connection.next_event(), protocol.Wait):
                if isinstance(event, protocol.MemoryData):
                    memory += bytes(event.data)
                else:
                    events.append(repr(event))
                is_memory = isinstance(event, protocol.Memory | protocol.MemoryData)
                if connection.request is not None and not is_memory:
                    outcome = None
                    if isinstance(event, protocol.SessionStatus):
                        outcome = protocol.SessionOutcome.PENDING
                    connection.send(protocol.Ok(outcome=outcome))
    except MigratableError as error:
        events.append(type(error).__name__)
    return [*events, repr(memory)]


RECEIVERS: dict[str, Callable[[bytes], None]] = {
    "container": container,
    "stream": stream,
    "stream_answer": stream_answer,
    "http_answer": http_answer,
    "request": request,
    "messages": messages,
}


# What is right, to begin with


def _containers() -> list[bytes]:
    tree = Snapshot("vm")
    for name in ("cpu", "ram"):
        tree.add_snapshot(Snapshot(name))
        tree.snapshots[name].add_data_section(Section("regs", name.encode() * 20))
    large = Snapshot("vm", {}, {"ram": Section("ram", bytes(1 << 16)), "a": Section("a", b"b")})
    small = dumps(tree)
    made = [dumps(HONEST), small, dumps(Snapshot("")), dumps(large)]
    with suppress(MigratableError):
        made.append(b"".join(encode(large, compression="zstd")))
    return made


def _answers() -> list[bytes]:
    data = dumps(HONEST)
    length = len(data)

    def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
        return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body

    digest = "Repr-Digest: xxh3-64=:AAAAAAAAAAA=:"
    chunks = b"%x;a=b\r\n%s\r\n0\r\nA: b\r\n\r\n" % (length, data)
    part = (f"Content-Range: bytes 0-{length - 1}/{length}", 'ETag: "1"')
    return [
        answer("200 OK", f"Content-Length: {length}", 'ETag: "1"', body=data),
        answer("200 OK", f"Content-Length: {length}", digest, body=data),
        answer("200 OK", "Transfer-Encoding: chunked", body=chunks),
        answer("206 Partial Content", f"Content-Length: {length}", *part, body=data),
        answer("201 Created", "Content-Length: 0", digest),
        answer("204 No Content", digest),
        answer("100 Continue") + answer("302 Found", "Location: /elsewhere", "Content-Length: 0"),
        answer("307 Temporary Redirect", "Location: //127.0.0.1:1/x?y=z", "Content-Length: 0"),
        answer("503 Unavailable", "Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"),
        answer("404 Not Found", "Content-Type: text/plain", "Content-Length: 3", body=b"no\n"),
    ]


def _requests() -> list[bytes]:
    def ask(line: str, *headers: str, body: bytes = b"") -> bytes:
        return "\r\n".join([f"{line} HTTP/1.1", "Host: x", *headers, "", ""]).encode() + body

    close = "Connection: close"
    return [
        ask("GET /old", "Range: bytes=1-3", 'If-Range: "a"', close),
        ask("GET /old", "If-None-Match: *") + ask("HEAD /old", 'If-Match: "a", "b"', close),
        ask("PUT /new", "Content-Length: 3", "Expect: 100-continue", close, body=b"abc"),
        ask("PUT /new", "Transfer-Encoding: chunked", body=b"3;a=b\r\nabc\r\n0\r\nA: b\r\n\r\n"),
        ask("PUT /old", "Content-Length: 3", "If-None-Match: *", body=b"abc"),
        ask("PUT /%2e%2e/x", "Content-Length: 1", "Authorization: Bearer x", body=b"a"),
        ask("PUT /d", "Content-Length: 1", "Repr-Digest: sha-256=:AAAA:", close, body=b"a"),
        b"GET /old HTTP/1.1\r\n\tHost: x\r\n\r\n",
        ask("OPTIONS *", close) + ask("GET http://x/old?a=b"),
    ]


def _messages() -> list[bytes]:
    def message(command: int, payload: bytes = b"", headers: bytes = b"") -> bytes:
        return struct.pack("<H6sQ", command, headers, len(payload)) + payload

    memory = message(4, struct.pack("<QQ", 0x4000, 8)) + bytes(8)
    start = message(1)
    features = message(1, headers=b"\0\0VM\7\0") + message(0x7600, bytes(32))
    return [
        start + message(2, b"{}") + memory + message(3, b"{}") + message(5),
        features + message(2, b"{}") + memory + bytes(8) + message(3, b"{}") + message(8),
        start + message(0x7601, bytes(32)) + message(6),
        start + message(7, bytes(4)) + message(2, b"{}") + message(6),
    ]


SEEDS: dict[str, list[bytes]] = {
    "container": _containers(),
    "stream": [framed(data) for data in _containers()[:3]],
    "stream_answer": [said(1) + said(2), said(1) + said(3, b"no room"), said(3, b"no")],
    "http_answer": _answers(),
    "request": _requests(),
    "messages": _messages(),
}
