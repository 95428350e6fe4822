"""Snapshots over tcp and unix sockets: every cut, stall and lie ends in an error."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from vmmig import sockets, transport
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.sealed import sealed_copy
from vmmig.transfer import CancelToken, Progress

WAIT_S = 20.0
DATA = b"a small snapshot"


def summed(data: bytes) -> bytes:
    return data + struct.pack("<Q", xxh3_64_intdigest(data))


def hello(total_bytes: int, *, descriptors: int = 0, version: int = 1) -> bytes:
    """By the letter of the protocol's description, not by the code under test."""
    return summed(b"\x89VMMIG\r\n" + struct.pack("<HHIQ", version, 0, descriptors, total_bytes))


def answer(kind: int, reason: bytes = b"") -> bytes:
    return summed(b"VMA\n" + struct.pack("<BBH", kind, 0, len(reason)) + reason)


SENT = hello(len(DATA)) + summed(DATA)
ANSWERED = answer(1) + answer(2)


@pytest.fixture(params=["tcp", "unix"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    gc.collect()
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == fds
    assert not os.listdir(tmp_path)


class Background:
    """A call in a thread; what it returned, or the MigratableError it raised."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act = act
        self.result: Any = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._act()
        except MigratableError as error:
            self.result = error

    def join(self) -> Any:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.result


class Receiver(Background):
    """`transport.recv`, listening once this is made."""

    def __init__(self, url: str, *, timeout_s: float = WAIT_S, **options: Any) -> None:
        listening = threading.Event()
        self.url = ""
        watch = options.pop("progress", lambda event: None)

        def progress(event: Progress) -> None:
            self.url = event.url
            if not event.url.endswith(":0") and (
                event.url.startswith("tcp") or os.path.exists(event.url[5:])
            ):
                listening.set()
            watch(event)

        super().__init__(
            lambda: bytes(transport.recv(url, progress=progress, timeout_s=timeout_s, **options))
        )
        while not listening.wait(0.01) and self.thread.is_alive():
            pass


def send(url: str, *, timeout_s: float = WAIT_S, **options: Any) -> None:
    transport.send([DATA], url, total_bytes=len(DATA), timeout_s=timeout_s, **options)


def scripted_receiver(
    url: str, script: Callable[[socket.socket], object]
) -> tuple[str, Background]:
    """One who listens, and does with the first sender's connection as it likes."""
    listener = sockets.Listener(url)

    def act() -> None:
        with listener, listener.accept(timeout_s=WAIT_S) as sock:
            script(sock)

    return listener.url, Background(act)


# What is right


def test_bytes_come_whole(url: str) -> None:
    chunks = [b"", b"abc", os.urandom(3 << 20), *[bytes([n]) for n in range(200)]]
    whole = b"".join(chunks)
    receiver = Receiver(url)
    transport.send(iter(chunks), receiver.url, total_bytes=len(whole))
    assert receiver.join() == whole


def test_nothing_is_sent_as_well(url: str) -> None:
    receiver = Receiver(url)
    transport.send([], receiver.url, total_bytes=0)
    assert receiver.join() == b""


def test_the_bytes_on_the_wire_are_as_described(url: str) -> None:
    seen: list[bytes] = []

    def script(sock: socket.socket) -> None:
        seen.append(sockets.recv_exactly(sock, 32))
        sockets.send_all(sock, [answer(1)])
        seen.append(sockets.recv_exactly(sock, len(DATA) + 8))
        sockets.send_all(sock, [answer(2)])

    where, receiver = scripted_receiver(url, script)
    send(where)
    receiver.join()
    assert b"".join(seen) == SENT

    receiver = Receiver(url)
    with sockets.connect(receiver.url) as sock:
        sockets.send_all(sock, [SENT[:32]])
        assert sockets.recv_exactly(sock, 16) == ANSWERED[:16]
        sockets.send_all(sock, [SENT[32:]])
        assert sockets.recv_exactly(sock, 16) == ANSWERED[16:]
    assert receiver.join() == DATA


def test_the_result_is_read_only_and_the_stages_are_told(url: str) -> None:
    stages: list[str] = []
    receiver = Receiver(url, progress=lambda event: stages.append(event.stage))
    told: list[Progress] = []
    send(receiver.url, progress=told.append)
    assert receiver.join() == DATA
    for seen in (stages, [event.stage for event in told]):
        assert list(dict.fromkeys(seen)) == ["connecting", "transferring", "confirming", "done"]
    assert (told[-1].done_bytes, told[-1].total_bytes) == (len(DATA), len(DATA))


def test_a_peer_that_sends_one_byte_at_a_time_is_as_good_as_another(url: str) -> None:
    receiver = Receiver(url)
    with sockets.connect(receiver.url, timeout_s=WAIT_S) as sock:
        for byte in SENT:
            sockets.send_all(sock, [bytes([byte])])
        assert sockets.recv_exactly(sock, 32) == ANSWERED
    assert receiver.join() == DATA

    def script(sock: socket.socket) -> None:
        sockets.recv_exactly(sock, 32)
        for byte in ANSWERED:
            sockets.send_all(sock, [bytes([byte])])
        sockets.recv_exactly(sock, len(SENT) - 32)

    where, background = scripted_receiver(url, script)
    send(where)
    background.join()


def test_200_transfers_at_once(tmp_path: Path) -> None:
    receivers = [
        Receiver("tcp:127.0.0.1:0" if n % 2 else f"unix:{tmp_path}/{n}") for n in range(200)
    ]
    senders = [
        Background(
            lambda r=receiver, n=n: transport.send([b"%d" % n], r.url, total_bytes=len(b"%d" % n))
        )
        for n, receiver in enumerate(receivers)
    ]
    assert [sender.join() for sender in senders] == [None] * 200
    assert [receiver.join() for receiver in receivers] == [b"%d" % n for n in range(200)]


# Cuts and stalls


def test_a_sender_that_is_cut_after_every_byte(url: str) -> None:
    for cut in range(len(SENT)):
        receiver = Receiver(url, timeout_s=WAIT_S if cut >= 32 else 0.05)
        with sockets.connect(receiver.url) as sock:
            sockets.send_all(sock, [SENT[:cut]])
            sockets.shut_down(sock, socket.SHUT_WR)
            error = receiver.join()
        assert isinstance(error, MigrateReceiveError), cut
        if cut < 32:
            assert f"after {cut} bytes of a greeting" in str(error)
        else:
            assert "the other side ended the connection" in str(error)


def test_a_receiver_that_is_cut_after_every_byte(url: str) -> None:
    for cut in range(len(ANSWERED)):

        def script(sock: socket.socket, cut: int = cut) -> None:
            sockets.recv_exactly(sock, 32)
            sockets.send_all(sock, [ANSWERED[: min(cut, 16)]])
            if cut >= 16:
                sockets.recv_exactly(sock, len(SENT) - 32)
                sockets.send_all(sock, [ANSWERED[16:cut]])

        where, receiver = scripted_receiver(url, script)
        with pytest.raises(MigrateSendError, match="the other side ended") as caught:
            send(where)
        assert ("it may have it or not" in str(caught.value)) == (cut >= 16)
        receiver.join()


def test_a_receiver_that_goes_while_bytes_are_sent(url: str) -> None:
    def script(sock: socket.socket) -> None:
        sockets.recv_exactly(sock, 32)
        sockets.send_all(sock, [answer(1)])
        sockets.recv_exactly(sock, 1000)

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError, match=r"the other side ended the connection$"):
        transport.send([bytes(64 << 20)], where, total_bytes=64 << 20)
    receiver.join()


@pytest.mark.parametrize("stall", [0, 1, 31, 32, 33, 47, 48, 55])
def test_a_sender_that_stalls(url: str, stall: int) -> None:
    receiver = Receiver(url, timeout_s=0.05)
    with sockets.connect(receiver.url) as sock:
        sockets.send_all(sock, [SENT[:stall]])
        error = receiver.join()
    assert isinstance(error, MigrateReceiveError)
    assert "within" in str(error)


@pytest.mark.parametrize("stall", [0, 1, 15, 16, 17, 31])
def test_a_receiver_that_stalls(url: str, stall: int) -> None:
    ended = threading.Event()

    def script(sock: socket.socket) -> None:
        sockets.send_all(sock, [ANSWERED[:stall]])
        ended.wait(WAIT_S)

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError, match="sent nothing within the time limit"):
        send(where, timeout_s=0.05)
    ended.set()
    receiver.join()


def test_a_receiver_that_takes_nothing(url: str) -> None:
    ended = threading.Event()

    def script(sock: socket.socket) -> None:
        sockets.send_all(sock, [answer(1)])
        ended.wait(WAIT_S)

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError, match="took nothing within the time limit"):
        transport.send([bytes(64 << 20)], where, total_bytes=64 << 20, timeout_s=0.05)
    ended.set()
    receiver.join()


# Lies


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (hello(0) + summed(DATA), "checksum does not match"),
        (hello(len(DATA) - 1) + summed(DATA), "checksum does not match"),
        (hello(len(DATA) + 1) + summed(DATA), "ended the connection"),
        (hello(len(DATA)) + summed(DATA[:-1] + b"!")[:-8] + summed(DATA)[-8:], "checksum"),
        (hello(1 << 63), "of 9223372036854775807 allowed"),
        (hello((1 << 63) - 1), "there is no memory"),
        (hello((1 << 64) - 1), "allowed"),
        (hello(1, descriptors=1), "not expected here"),
    ],
)
def test_a_lie_is_refused_and_the_liar_told(url: str, stream: bytes, text: str) -> None:
    receiver = Receiver(url)
    with sockets.connect(receiver.url, timeout_s=WAIT_S) as sock:
        sockets.send_all(sock, [stream])
        sockets.shut_down(sock, socket.SHUT_WR)
        error = receiver.join()
    assert isinstance(error, MigrateReceiveError)
    assert text in str(error)


def test_more_than_is_allowed_is_refused_before_it_is_sent(url: str) -> None:
    receiver = Receiver(url, max_bytes=len(DATA) - 1)
    with pytest.raises(MigrateSendError, match="refused it: 16 bytes are to come, of 15 allowed"):
        send(receiver.url)
    assert "16 bytes are to come, of 15 allowed" in str(receiver.join())


def test_a_length_costs_no_memory(url: str) -> None:
    import resource

    receiver = Receiver(url)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with sockets.connect(receiver.url, timeout_s=WAIT_S) as sock:
        sockets.send_all(sock, [hello(1 << 30) + bytes(100)])
        sockets.recv_exactly(sock, 16)
    assert isinstance(receiver.join(), MigrateReceiveError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before_kib + (64 << 10)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(min_size=32, max_size=80), st.binary(max_size=40).map(SENT[:8].__add__)))
def test_garbage_spoils_nothing_for_the_right_sender(url: str, garbage: bytes) -> None:
    receiver = Receiver(url)
    with sockets.connect(receiver.url, timeout_s=WAIT_S) as stray:
        sockets.send_all(stray, [garbage])
        send(receiver.url)
        assert receiver.join() == DATA


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=40).map(b"VMA\n".__add__)))
def test_a_sender_is_not_deceived_by_garbage(url: str, garbage: bytes) -> None:
    def script(sock: socket.socket) -> None:
        sockets.recv_exactly(sock, 32)
        sockets.send_all(sock, [garbage])

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError):
        send(where)
    receiver.join()


def test_a_reason_is_bounded_and_can_be_shown(url: str) -> None:
    def script(sock: socket.socket) -> None:
        sockets.recv_exactly(sock, 32)
        sockets.send_all(sock, [answer(3, b"no\x1b[2J\xff\n")])

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError) as caught:
        send(where)
    assert str(caught.value).endswith("the other side refused it: no?[2J\ufffd?")
    receiver.join()


def test_another_version_is_refused_by_name(url: str) -> None:
    receiver = Receiver(url, timeout_s=0.1)
    with sockets.connect(receiver.url, timeout_s=WAIT_S) as sock:
        sockets.send_all(sock, [hello(0, version=2)])
        assert b"version 2 of the protocol" in sockets.recv_exactly(sock, 60)
        assert "version 2 of the protocol" in str(receiver.join())


# Cancellation and callbacks


@pytest.mark.parametrize("stage", ["connecting", "transferring", "confirming"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_cancellation_at_each_stage(url: str, stage: str, side: str) -> None:
    token = CancelToken()

    def cancelling(event: Progress) -> None:
        if event.stage == stage and not event.url.endswith(":0"):
            token.cancel()

    if side == "receiver":
        receiver = Receiver(url, progress=cancelling, cancel=token)
        if stage != "connecting":
            with pytest.raises(MigrateSendError, match="the other side refused it: cancelled"):
                send(receiver.url)
    else:
        receiver = Receiver(url, timeout_s=0.2)
        with pytest.raises(MigrateSendError, match="cancelled"):
            send(receiver.url, progress=cancelling, cancel=token)
    error = receiver.join()
    assert isinstance(error, MigrateReceiveError)
    assert side == "sender" or "cancelled" in str(error)


def test_a_cancellation_that_comes_when_all_is_sent_says_that_it_is_in_doubt(url: str) -> None:
    token = CancelToken()

    def script(sock: socket.socket) -> None:
        sockets.send_all(sock, [answer(1)])
        sockets.recv_exactly(sock, len(SENT))
        token.cancel()

    where, receiver = scripted_receiver(url, script)
    with pytest.raises(MigrateSendError, match=r"cancelled; all was sent, but .* may have it"):
        send(where, cancel=token)
    receiver.join()


# Memory that is handed over


def hand_over(url: str, attached: list[memoryview], **options: Any) -> Any:
    came: list[memoryview] = []
    receiver = Receiver(url, attached=came, **options)
    try:
        transport.send([DATA], receiver.url, total_bytes=len(DATA), attached=attached)
    finally:
        result = receiver.join()
        assert result == DATA or not came
    return [bytes(view) for view in came]


def test_sealed_memory_travels_as_descriptors(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/s"
    assert transport.hands_over(url)
    assert not transport.hands_over("tcp:127.0.0.1:1")
    copy = sealed_copy(b"RAM of a machine")
    assert hand_over(url, [copy, copy[7:9]]) == [b"RAM of a machine", b"a "]
    many = [sealed_copy(b"%d" % n) for n in range(300)]
    assert hand_over(url, many) == [b"%d" % n for n in range(300)]


def test_handing_over_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/s"
    with pytest.raises(MigrateSendError, match="only sealed memory"):
        transport.send([DATA], url, total_bytes=len(DATA), attached=[memoryview(b"plain")])
    with pytest.raises(MigrateSendError, match="refused it: more came than the 20 bytes"):
        hand_over(url, [sealed_copy(b"12345")], max_bytes=20)
    receiver = Receiver(url)
    with pytest.raises(MigrateSendError, match="descriptors are to come, which are not expected"):
        send(receiver.url, attached=[sealed_copy(b"12345")])
    receiver.join()


def test_a_descriptor_that_is_not_sealed_or_too_short_is_refused(tmp_path: Path) -> None:
    sealed = sealed_copy(b"12345")
    from vmmig.sealed import descriptor_of

    place = descriptor_of(sealed)
    assert place is not None
    with open(os.devnull, "rb") as null:
        for fd, length, text in (
            (null.fileno(), 0, "not of sealed memory"),
            (place[0], 6, "bytes 0 to 6 were announced of a descriptor with 5"),
        ):
            came: list[memoryview] = []
            receiver = Receiver(f"unix:{tmp_path}/s", attached=came)
            with sockets.connect(receiver.url, timeout_s=WAIT_S) as sock:
                sockets.send_all(sock, [hello(0, descriptors=1)])
                sockets.recv_exactly(sock, 16)
                sockets.send_fds(sock, struct.pack("<QQ", 0, length), [fd])
                assert text in str(receiver.join())
            assert not came
