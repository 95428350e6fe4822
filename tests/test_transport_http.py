"""The HTTP client, against servers that follow a script, and against nginx."""

from __future__ import annotations

import base64
import gc
import gzip
import hashlib
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http_peers import Scripted, answer, certificates, hang, nginx, read_request
from vmmig import transport
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    SnapshotError,
)
from vmmig.transfer import CancelToken, Progress

MIB = 1 << 20
DATA = b"these are the bytes"
TAG = '"one"'
STORED = answer("201 Created", content_length="0")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    fds, threads = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(fds)


def put(url: str, chunks: Any = (DATA,), **options: Any) -> None:
    options.setdefault("total_bytes", len(DATA))
    transport.send(chunks, url, **options)


def refused_put(url: str, chunks: Any = (DATA,), **options: Any) -> str:
    with pytest.raises(MigrateSendError) as caught:
        put(url, chunks, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def refused_get(url: str, **options: Any) -> str:
    with pytest.raises(MigrateReceiveError) as caught:
        transport.recv(url, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def in_threads(act: Callable[[int], object], count: int) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(act, range(count)))


def ranged(data: bytes, tag: str = TAG) -> Callable[[socket.socket], None]:
    """Answers any number of requests on one connection, ranges included."""

    def act(sock: socket.socket) -> None:
        while head := read_request(sock):
            match = re.search(rb"Range: bytes=(\d+)-(\d*)", head)
            condition = re.search(rb"If-Range: (.*?)\r?\n", head + b"\n")
            if match and (not condition or condition[1].strip() == tag.encode()):
                first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
                part = data[first : last + 1]
                where = f"bytes {first}-{last}/{len(data)}"
                sock.sendall(answer("206 Partial", part, etag=tag, content_range=where))
            else:
                sock.sendall(answer("200 OK", data, etag=tag))

    return act


# nginx


def test_nginx_stores_and_gives_back(tmp_path: Path) -> None:
    events: list[Progress] = []
    data = os.urandom(5 * MIB + 3)
    with nginx(tmp_path) as (url, root):
        pieces = [data[:10], bytearray(data[10:100]), memoryview(data)[100:]]
        put(f"{url}a%20b", pieces, total_bytes=len(data), progress=events.append)
        assert (root / "a b").read_bytes() == data
        assert events[-1].done_bytes == len(data)
        assert [event.stage for event in events][-2:] == ["confirming", "done"]
        view = transport.recv(f"{url}a%20b")
        assert view.readonly
        assert view == data
        reader: Any = transport.recv(f"{url}a%20b", lazily=True)
        assert reader.total_bytes == len(data)

        def check(reader: Any, number: int) -> None:
            start = number * 170_000
            part = bytearray(170_000)
            reader.read_into(start, memoryview(part)[: len(data) - start])
            assert part[: len(data) - start] == data[start : start + 170_000]

        in_threads(partial(check, reader), 31)
        put(f"{url}a%20b", [b"new"], total_bytes=3)
        with pytest.raises(MigrateReceiveError, match="it has changed since it was opened"):
            reader.read_into(MIB, memoryview(bytearray(10)))
        assert os.listdir(root) == ["a b"]
        assert "404 Not Found; check the path" in refused_get(f"{url}none")
        assert "413 Request Entity Too Large; raise the server" in refused_put(f"{url}small/x")
        put(f"{url}empty", [], total_bytes=0)
        assert transport.recv(f"{url}empty") == b""
        assert transport.recv(f"{url}empty", lazily=True) == b""
        del reader


def test_a_failed_put_leaves_nothing_with_nginx(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield bytes(3 * MIB)
        raise SnapshotError("gone")

    with nginx(tmp_path) as (url, root):
        put(f"{url}vm")
        with pytest.raises(SnapshotError, match="gone"):
            put(f"{url}vm", parts(), total_bytes=4 * MIB)
        assert "announced" in refused_put(f"{url}vm", [b"x"], total_bytes=4)
        assert (root / "vm").read_bytes() == DATA
        assert os.listdir(root) == ["vm"]


# Faults


def test_an_answer_that_is_cut_after_any_byte() -> None:
    whole = answer("200 OK", DATA, etag=TAG)

    def cut(count: int) -> None:
        with Scripted(whole[:count]) as server:
            refused_get(server.url, timeout_s=0.05)
        with Scripted(whole[:count], ranged(DATA)) as server:
            assert transport.recv(server.url) == DATA

    in_threads(cut, len(whole))


def test_a_request_that_is_cut_after_any_byte() -> None:
    def cut(count: int) -> None:
        def act(sock: socket.socket) -> None:
            left = count
            while left and (piece := sock.recv(left)):
                left -= len(piece)

        with Scripted(act) as server:
            refused_put(server.url, timeout_s=0.05)
        with Scripted(act, STORED) as server:
            put(server.url)

    with Scripted(STORED) as server:
        put(server.url)
        total = len(server.heads[0]) + 4 + len(DATA)
    in_threads(cut, total + 1)


def test_a_confirmation_that_is_cut_after_any_byte() -> None:
    whole = answer("201 Created")

    def cut(count: int) -> None:
        with Scripted(whole[:count]) as server:
            message = refused_put(server.url, timeout_s=0.05)
            assert "so it may be there nevertheless" in message or "not move" in message
        with Scripted(whole[:count], STORED) as server:
            put(server.url)

    in_threads(cut, len(whole))


@pytest.mark.parametrize("sends", [True, False])
def test_a_server_that_stalls_after_any_byte(sends: bool) -> None:
    whole = answer("200 OK", DATA)

    def stall(count: int) -> None:
        def act(sock: socket.socket) -> None:
            read_request(sock)
            sock.sendall(whole[:count])
            hang(sock)

        with Scripted(act) as server:
            if sends and count < whole.index(b"\r\n\r\n") + 4:
                assert "does not move" in refused_put(server.url, timeout_s=0.1)
            elif not sends:
                assert "does not move" in refused_get(server.url, timeout_s=0.1)

    in_threads(stall, len(whole))


def test_a_server_that_reads_nothing() -> None:
    done = threading.Event()
    chunks = [bytes(64 * MIB)]
    with Scripted(lambda _: done.wait(60) and None) as server:
        message = refused_put(server.url, chunks, total_bytes=64 * MIB, timeout_s=0.1)
        done.set()
    assert "does not move" in message


def test_one_byte_at_a_time() -> None:
    def act(sock: socket.socket) -> None:
        read_request(sock)
        for byte in answer("200 OK", DATA):
            sock.sendall(bytes([byte]))

    with Scripted(act) as server:
        assert transport.recv(server.url) == DATA


def test_interim_answers_are_bounded() -> None:
    def act(sock: socket.socket) -> None:
        read_request(sock)
        while True:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    with Scripted(act) as server:
        assert "its header has more than" in refused_get(server.url)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (str(len(DATA) + 1), "ended after 19 of 20 bytes"),
        (str(2**63 - 1), "do not fit into memory"),
        (str(2**63), "allowed"),
        ("-1", "no number"),
        ("1_9", "no number"),
        ("+19", "no number"),
        ("19\r\nContent-Length: 18", "no number"),
        ("99999999999999999999999", "no number"),
    ],
)
def test_lengths_that_lie(length: str, message: str) -> None:
    with Scripted(answer("200 OK", DATA, content_length=length)) as server:
        assert message in refused_get(server.url, timeout_s=0.05)


def test_what_is_larger_than_allowed() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 9
    chunked += b"0\r\n\r\n"
    with Scripted(answer("200 OK", DATA), chunked) as server:
        assert "it has 19 bytes, of 18 allowed" in refused_get(server.url, max_bytes=18)
        assert "more than the 18 bytes" in refused_get(server.url, max_bytes=18, timeout_s=0.05)
    with Scripted(ranged(DATA)) as server:
        assert "of 18 allowed" in refused_get(server.url, max_bytes=18, lazily=True)


def test_chunked_answers() -> None:
    data = os.urandom(3 * MIB)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (data[:5], data[5:2000], data[2000:]))
    with Scripted(head + chunks + b"0\r\n\r\n") as server:
        assert transport.recv(server.url) == data
    for broken in (chunks, chunks + b"0", b"zz\r\n", b"-5\r\nhello\r\n0\r\n\r\n"):
        with Scripted(head + broken) as server:
            refused_get(server.url, timeout_s=0.05)
    with Scripted(b"HTTP/1.0 200 OK\r\n\r\n" + data) as server:
        assert "has no length" in refused_get(server.url)


def test_nothing_is_decoded() -> None:
    bomb = gzip.compress(bytes(10 * MIB))
    with Scripted(answer("200 OK", bomb, content_encoding="gzip")) as server:
        assert "the coding 'gzip'" in refused_get(server.url)
        assert b"Accept-Encoding: identity" in server.heads[0]


@pytest.mark.parametrize(
    "part",
    [
        answer("206 P", DATA[5:], etag=TAG, content_range="bytes 4-18/19"),
        answer("206 P", DATA[5:], etag=TAG, content_range="bytes 5-18/20"),
        answer("206 P", DATA[5:], etag=TAG),
        answer("206 P", DATA[5:], etag=TAG, content_range="garbage"),
        answer("206 P", DATA[5:], etag='"two"', content_range="bytes 5-18/19"),
        answer("206 P", DATA[5:], content_range="bytes 5-18/19"),
        answer("206 P", DATA[5:-1], etag=TAG, content_range="bytes 5-18/19"),
        answer("412 P"),
    ],
)
def test_another_part_than_was_asked_for(part: bytes) -> None:
    whole = answer("200 OK", DATA, etag=TAG)
    with Scripted(whole[: -len(DATA) + 5], part) as server:
        refused_get(server.url)
        assert b"Range: bytes=5-" in server.heads[1]
        assert f"If-Range: {TAG}".encode() in server.heads[1]


def test_what_changed_meanwhile_is_had_anew_and_not_mixed() -> None:
    whole = answer("200 OK", DATA, etag=TAG)
    with Scripted(whole[: -len(DATA) + 5], ranged(b"other bytes", '"two"')) as server:
        assert transport.recv(server.url) == b"other bytes"


@pytest.mark.parametrize("tag", ["", 'W/"weak"', "none", '"a"b"'])
def test_ranges_need_a_strong_etag(tag: str) -> None:
    with Scripted(ranged(DATA, tag)) as server:
        assert transport.recv(server.url, lazily=True) == DATA


def test_ranges_are_read_in_one_connection_and_again_when_it_drops() -> None:
    data = os.urandom(200_000)
    serve = ranged(data)

    def once(sock: socket.socket) -> None:
        """One answer, then a part of one."""
        head = read_request(sock)
        match = re.search(rb"bytes=(\d+)-(\d+)", head)
        assert match is not None
        first, last = int(match[1]), int(match[2])
        where = f"bytes {first}-{last}/{len(data)}"
        whole = answer("206 P", data[first : last + 1], etag=TAG, content_range=where)
        sock.sendall(whole)
        read_request(sock)
        sock.sendall(whole[:5])

    with Scripted(once, serve) as server:
        reader: Any = transport.recv(server.url, lazily=True)
        for start in (0, 60_000, 150_000, 199_990, 200_000):
            part = bytearray(min(len(data) - start, 50_000))
            reader.read_into(start, memoryview(part))
            assert part == data[start : start + len(part)]
        for start, count in ((-1, 1), (199_999, 2), (200_001, 0)):
            with pytest.raises(MigrateReceiveError, match="are not among"):
                reader.read_into(start, memoryview(bytearray(count)))
        del reader


@settings(max_examples=150)
@given(
    st.binary(max_size=300)
    | st.builds(
        lambda status, headers, body: (
            b"HTTP/1.1 " + status + b"\r\n" + b"".join(headers) + b"\r\n" + body
        ),
        st.sampled_from([b"200 OK", b"206 P", b"302 X", b"503 X", b"404 X", b"100 C", b"2", b""])
        | st.binary(max_size=10),
        st.lists(
            st.sampled_from(
                [
                    b"Content-Length: 5\r\n",
                    b"Content-Length: 99999999999\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"Content-Range: bytes 0-4/5\r\n",
                    b'ETag: "x"\r\n',
                    b"Location: //[::1\r\n",
                    b"Location: /vm\r\n",
                    b"Retry-After: 99999999999999999999\r\n",
                    b"Retry-After: Mon, 99 Foo 99999 99:99:99 GMT\r\n",
                    b"Repr-Digest: sha-256=:AAA:\r\n",
                    b"Content-Encoding: gzip\r\n",
                    b": x\r\n",
                    b"\xff\x00: \x80\r\n",
                    b" folded\r\n",
                ]
            )
            | st.binary(max_size=30),
            max_size=5,
        ),
        st.sampled_from([b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffff\r\nhello"])
        | st.binary(max_size=50),
    ),
    st.booleans(),
)
def test_any_answer_is_bytes_or_a_clear_error(raw: bytes, lazily: bool) -> None:
    messages = []
    with Scripted(raw) as server:
        try:
            got: Any = transport.recv(server.url, lazily=lazily, max_bytes=1000, timeout_s=0.02)
        except MigrateReceiveError as error:
            messages.append(str(error))
        else:
            assert getattr(got, "total_bytes", 0) <= 1000
            assert isinstance(got, memoryview) or lazily
        try:
            put(server.url, timeout_s=0.02)
        except MigrateSendError as error:
            messages.append(str(error))
    assert all(map(str.isprintable, messages))


# Trying again


@pytest.mark.parametrize("status", ["429 X", "502 X", "503 X", "504 X"])
def test_a_server_that_is_busy_is_asked_again(status: str) -> None:
    busy = answer(status, b"busy", retry_after="0")
    with Scripted(busy, busy, STORED) as server:
        put(server.url)
    with Scripted(busy, answer("200 OK", DATA)) as server:
        assert transport.recv(server.url) == DATA
    with Scripted(busy) as server:
        assert f"{status}: busy; tried 1 times" in refused_put(server.url, timeout_s=0.05)


def test_a_pause_longer_than_the_deadline_is_not_made() -> None:
    with Scripted(answer("503 X", retry_after="3600")) as server:
        assert "tried 1 times" in refused_get(server.url)
    later = "Fri, 31 Dec 9999 23:59:59 GMT"
    with Scripted(answer("503 X", retry_after=later)) as server:
        assert "tried 1 times" in refused_get(server.url)


def test_chunks_that_come_only_once_are_sent_only_once() -> None:
    with Scripted(answer("503 X", b"busy"), STORED) as server:
        message = refused_put(server.url, iter([DATA]))
    assert "busy; not repeated, since the chunks can be iterated only once" in message


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/vm"
    assert "the connection was refused; see whether" in refused_put(url, timeout_s=0.05)
    assert "tried" in refused_get(url, timeout_s=0.05)
    assert "cannot be looked up" in refused_get("http://no-such-host.invalid/vm")


def test_a_refusal_before_all_is_sent() -> None:
    def act(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(answer("413 Too Large", b"\x1b[31mno\nmore"))
        hang(sock)

    chunks = iter([bytes(MIB)] * 64)
    with Scripted(act) as server:
        message = refused_put(server.url, chunks, total_bytes=64 * MIB)
    assert r"413 Too Large: \x1b[31mno; raise the server's limit on sizes" in message
    assert next(chunks, None) is not None


# Digests


def test_a_digest_of_what_was_received() -> None:
    right = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
    with Scripted(answer("200 OK", DATA, repr_digest=f"sha-256=:{right}:")) as server:
        assert transport.recv(server.url) == DATA
    with Scripted(answer("200 OK", DATA[::-1], repr_digest=f"sha-256=:{right}:")) as server:
        assert "its sha-256 is not what the server says" in refused_get(server.url)


def test_a_digest_of_what_was_stored() -> None:
    wrong = answer("201 Created", repr_digest="xxh3-64=:AAAAAAAAAAA=:")
    with Scripted(wrong) as server:
        message = refused_put(server.url, timeout_s=0.05)
    assert "what the server has stored differs from what was sent" in message
    with Scripted(wrong, STORED) as server:
        put(server.url)


def test_a_server_that_has_less_than_was_sent() -> None:
    with Scripted(STORED, answer("200 OK", content_length="18")) as server:
        assert "has 18 bytes instead of 19; what is there" in refused_put(server.url)
    for other in (answer("405 Not Allowed"), answer("404 Not Found"), b"garbage", b""):
        with Scripted(STORED, other) as server:
            put(server.url)


# Credentials, redirects


@pytest.mark.parametrize("userinfo", ["me:pa%3Ass%40", "me", ":x"])
def test_basic_authentication(userinfo: str) -> None:
    with Scripted(answer("200 OK", DATA)) as server:
        transport.recv(server.url.replace("//", f"//{userinfo}@"))
        match = re.search(rb"Authorization: Basic (\S+)", server.heads[0])
    assert match is not None
    wanted = {"me:pa%3Ass%40": b"me:pa:ss@", "me": b"me:", ":x": b":x"}[userinfo]
    assert base64.b64decode(match[1]) == wanted


def test_a_bearer_token() -> None:
    with Scripted(STORED) as server:
        put(server.url, token="abc.def")
        assert b"Authorization: Bearer abc.def" in server.heads[0]
        assert "no bearer token has" in refused_put(server.url, token="a\r\nX: y")
        both = server.url.replace("//", "//me:x@")
        assert "not both" in refused_put(both, token="abcdef")


def test_credentials_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = base64.b64encode(b"me:se/cret").decode()
    body = f"me:se%2Fcret me:se/cret {shown} sig=abcdef".encode()
    with Scripted(answer("403 Forbidden", body)) as server:
        url = server.url.replace("//", "//me:se%2Fcret@") + "?sig=abcdef"
        messages = [refused_get(url), refused_put(url)]
    for text in (*messages, caplog.text):
        for secret in ("cret", "abcdef", shown):
            assert secret not in text
    assert "403 Forbidden" in messages[0]
    with Scripted(answer("401 Unauthorized", b"not topsecret")) as server:
        assert "secret" not in refused_get(server.url, token="topsecret")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_within_the_host(status: int) -> None:
    to = answer(f"{status} X", location="/other?a=b%20c")
    with Scripted(to, answer("200 OK", DATA)) as server:
        assert transport.recv(server.url, token="abcdef") == DATA
        assert server.heads[1].startswith(b"GET /other?a=b%20c HTTP/1.1")
        assert b"Bearer abcdef" in server.heads[1]
    with Scripted(to, STORED) as server:
        if status < 307:
            assert "not for a PUT" in refused_put(server.url)
        else:
            put(server.url)


def test_redirects_that_lead_nowhere_good() -> None:
    with Scripted(answer("200 OK", b"loot")) as thief:
        for where in (
            thief.url,
            f"http://localhost:{thief.port}/vm",
            f"https://127.0.0.1:{thief.port}/vm",
            f"//127.0.0.1:{thief.port}/vm",
            f"http://me:hidden@127.0.0.1:{thief.port}/",
            "file:///etc/passwd",
        ):
            with Scripted(answer("307 X", location=where)) as server:
                message = refused_get(server.url, token="abcdef")
                assert "elsewhere; name that URL" in message
                assert "hidden" not in message
                assert "elsewhere" in refused_put(server.url, token="abcdef")
        assert not thief.heads
    for where in ("", "http://[::1", "http://h:99999/"):
        with Scripted(answer("302 X", location=where)) as server:
            assert "which is no URL" in refused_get(server.url)
    with Scripted(answer("302 X", location="/vm")) as server:
        assert "redirects to itself" in refused_get(server.url)
    to_and_fro = [answer("302 X", location=where) for where in ("a", "b") * 4]
    with Scripted(*to_and_fro) as server:
        assert "redirects more than 5 times" in refused_get(server.url)
        assert len(server.heads) == 6


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:", "names no host"),
        ("http:///vm", "names no host"),
        ("http://h:x/", "it is no URL"),
        ("http://h:99999/", "it is no URL"),
        ("http://[::1/", "it is no URL"),
        ("http://h/a b", "no URL has blanks"),
        ("http://h/a\r\nb", "no URL has blanks"),
        ("http://" + "a" * 300 + "/", "host's name is no name"),
    ],
)
def test_what_is_no_url(url: str, message: str) -> None:
    assert message in refused_get(url)
    assert message in refused_put(url)


# Cancelling


def cancelled(begin: Callable[[CancelToken], object], ready: threading.Event) -> MigratableError:
    """What ``begin`` raises when it is cancelled once ``ready`` is set."""
    token = CancelToken()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(begin, token)
        assert ready.wait(30)
        token.cancel()
        error = future.exception(30)
    assert isinstance(error, MigratableError)
    return error


@pytest.mark.parametrize("when", ["head", "body", "pause", "unread", "confirming"])
def test_a_transfer_is_cancelled_wherever_it_waits(when: str) -> None:
    ready = threading.Event()

    def act(sock: socket.socket) -> None:
        if when == "unread":
            sock.recv(100)
            ready.set()
            ended.wait(60)
            return
        read_request(sock)
        sock.sendall(
            {
                "body": answer("200 OK", DATA)[:-1],
                "pause": answer("503 X", retry_after="50"),
            }.get(when, b"HTTP/1.1 ")
        )
        ready.set()
        hang(sock)

    ended = threading.Event()
    with Scripted(act) as server:
        if when in ("unread", "confirming"):
            size = 64 * MIB if when == "unread" else 10
            begin: Any = lambda token: put(  # noqa: E731
                server.url, [bytes(size)], total_bytes=size, cancel=token
            )
        else:
            begin = lambda token: transport.recv(server.url, cancel=token)  # noqa: E731
        error = cancelled(begin, ready)
        ended.set()
    assert "cancelled" in str(error)


def test_connecting_is_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        ready = threading.Event()
        error = cancelled(
            lambda token: transport.recv(
                f"http://127.0.0.1:{address[1]}/",
                cancel=token,
                progress=lambda event: ready.set(),
            ),
            ready,
        )
        for filler in fillers:
            filler.close()
    assert "cancelled" in str(error)


def test_a_reader_of_ranges_is_cancelled() -> None:
    ready = threading.Event()

    def act(sock: socket.socket) -> None:
        read_request(sock)
        part = bytes(1 << 16)
        sock.sendall(answer("206 P", part, etag=TAG, content_range="bytes 0-65535/99999"))
        read_request(sock)
        ready.set()
        hang(sock)

    with Scripted(act) as server:

        def begin(token: CancelToken) -> None:
            reader: Any = transport.recv(server.url, lazily=True, cancel=token)
            reader.read_into(70_000, memoryview(bytearray(10)))

        assert "cancelled" in str(cancelled(begin, ready))


# TLS


def test_certificates_are_checked(tmp_path: Path) -> None:
    import ssl

    folder = certificates(tmp_path / "tls")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")

    def act(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            read_request(wrapped)
            wrapped.sendall(answer("200 OK", DATA))

    with Scripted(act) as server:
        url = f"https://127.0.0.1:{server.port}/vm"
        assert transport.recv(url, tls=folder) == DATA
        assert "certificate is not accepted" in refused_get(url)
        assert "certificate is not accepted" in refused_get(
            f"https://localhost:{server.port}/vm", tls=folder
        )
    (folder / "client-key.pem").chmod(0o644)
    assert "others may read" in refused_get("https://127.0.0.1/", tls=folder)
    assert "has no usable ca-cert.pem" in refused_get("https://127.0.0.1/", tls=tmp_path)
    with Scripted(lambda sock: sock.sendall(answer("200 OK", DATA))) as server:
        url = f"https://127.0.0.1:{server.port}/vm"
        assert "TLS failed" in refused_get(url, timeout_s=0.5)
