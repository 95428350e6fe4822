"""Mutual TLS on tcp: who is let in, and what the others are told."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmmig import tls, transport
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.live import MigrationAborted, migrate, receive
from vmmig.testing.components import LiveCounter
from vmmig.transfer import CancelToken, Progress

trustme = pytest.importorskip("trustme")
TIMEOUT_S = 20.0


def folder(
    path: Path,
    authority: Any,
    *,
    trusts: Any = None,
    names: tuple[str, ...] = ("127.0.0.1", "localhost"),
    expired: bool = False,
) -> Path:
    """Both sides' files, as Cloud Hypervisor names them."""
    path.mkdir()
    (trusts or authority).cert_pem.write_to_path(str(path / "ca-cert.pem"))
    until = datetime.datetime(2001, 1, 1) if expired else None
    since = datetime.datetime(2000, 1, 1) if expired else None
    for side in ("client", "server"):
        issued = authority.issue_cert(*names, not_before=since, not_after=until)
        (path / f"{side}-cert.pem").write_bytes(
            b"".join(part.bytes() for part in issued.cert_chain_pems)
        )
        key = path / f"{side}-key.pem"
        key.touch(0o600)
        issued.private_key_pem.write_to_path(str(key))
    return path


@pytest.fixture(scope="module")
def ours() -> Any:
    return trustme.CA()


@pytest.fixture(scope="module")
def foreign() -> Any:
    return trustme.CA()


@pytest.fixture
def good(tmp_path: Path, ours: Any) -> Path:
    return folder(tmp_path / "good", ours)


class Receiver:
    """`transport.recv` in a thread, ended on leaving by a cancellation if it is still at it."""

    def __init__(self, url: str = "tcp:127.0.0.1:0", **options: Any) -> None:
        self.options: Any = {"timeout_s": TIMEOUT_S, **options}
        self.asked_url = url
        self.url = ""
        self.result: bytes | MigratableError | None = None
        self.cancel = CancelToken()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _progress(self, event: Progress) -> None:
        if not event.url.endswith(":0"):
            self.url = event.url
            self._listening.set()

    def _run(self) -> None:
        try:
            self.result = bytes(
                transport.recv(
                    self.asked_url, progress=self._progress, cancel=self.cancel, **self.options
                )
            )
        except MigratableError as error:
            self.result = error
        finally:
            self._listening.set()

    def __enter__(self) -> Receiver:
        self._thread.start()
        assert self._listening.wait(TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel.cancel()
        self._thread.join()

    def join(self) -> Any:
        self._thread.join(TIMEOUT_S)
        return self.result


def send(url: str, data: bytes = b"payload", **options: Any) -> None:
    transport.send([data], url, total_bytes=len(data), **{"timeout_s": TIMEOUT_S, **options})


def refused(receiver: Receiver, **options: Any) -> str:
    with pytest.raises(MigrateSendError) as caught:
        send(receiver.url, **options)
    return str(caught.value)


def test_bytes_come_through(good: Path) -> None:
    data = bytes(range(256)) * 20_000
    with Receiver(tls=good) as receiver:
        send(receiver.url, data, tls=good)
        assert receiver.join() == data


def test_a_name_is_checked_as_well_as_an_address(good: Path) -> None:
    with Receiver("tcp:localhost:0", tls=good) as receiver:
        send(f"tcp:localhost:{receiver.url.rpartition(':')[2]}", tls=good)
        assert receiver.join() == b"payload"


Make = Callable[[Path, Any, Any], Path]
WRONG_CLIENTS: dict[str, tuple[Make, str]] = {
    "expired": (
        lambda path, ours, foreign: folder(path, ours, expired=True),
        "our certificate has expired",
    ),
    "of another CA": (
        lambda path, ours, foreign: folder(path, foreign, trusts=ours),
        "ca-cert.pem has not signed our certificate",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CLIENTS)
def test_a_wrong_client_is_told_why_and_the_right_one_is_served_after_it(
    tmp_path: Path, good: Path, ours: Any, foreign: Any, wrong: str
) -> None:
    make, text = WRONG_CLIENTS[wrong]
    bad = make(tmp_path / "bad", ours, foreign)
    with Receiver(tls=good) as receiver:
        assert text in refused(receiver, tls=bad)
        send(receiver.url, tls=good)
        assert receiver.join() == b"payload"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"expired": True}, "its certificate has expired"),
        ({"names": ("other.example",)}, "its certificate is for another address"),
        ({"foreign": True}, "its certificate is not signed by our ca-cert.pem"),
    ],
)
def test_a_wrong_server_is_refused(
    tmp_path: Path, good: Path, ours: Any, foreign: Any, wrong: dict[str, Any], text: str
) -> None:
    authority = foreign if wrong.pop("foreign", False) else ours
    bad = folder(tmp_path / "bad", authority, trusts=ours, **wrong)
    with Receiver(tls=bad, timeout_s=1.0) as receiver:
        assert text in refused(receiver, tls=good)
        error = receiver.join()
    assert isinstance(error, MigrateReceiveError)
    assert "the last one was refused: TLS: the other side" in str(error)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_without_a_certificate_is_refused(good: Path, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(good / "ca-cert.pem"))
    context.maximum_version = version
    with Receiver(tls=good, timeout_s=1.0) as receiver:
        port = int(receiver.url.rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as plain,
            pytest.raises(ssl.SSLError, match=r"(?i)certificate.required|handshake.failure"),
            context.wrap_socket(plain, server_hostname="127.0.0.1") as sock,
        ):
            sock.recv(1)
        assert "it showed no certificate" in str(receiver.join())


def test_our_client_hears_from_any_server_that_it_must_show_another_certificate(
    tmp_path: Path, good: Path, ours: Any, foreign: Any
) -> None:
    """With TLS 1.3 the refusal comes after the client's handshake: in the answer it awaits."""
    bad = folder(tmp_path / "bad", foreign, trusts=ours)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(good / "server-cert.pem", good / "server-key.pem")
    context.load_verify_locations(good / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, pytest.raises(ssl.SSLError):
                context.wrap_socket(sock, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MigrateSendError, match="has not signed our certificate"):
            send(f"tcp:127.0.0.1:{listener.getsockname()[1]}", tls=bad)
        thread.join()


def test_tls_1_1_is_refused(good: Path) -> None:
    context = tls.client_context(good)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert tls.server_context(good).minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_plain_sender_is_told_that_the_receiver_speaks_tls(good: Path) -> None:
    with Receiver(tls=good, timeout_s=1.0) as receiver:
        assert "if it speaks TLS, give the option tls" in refused(receiver)
        assert "does not speak TLS" in str(receiver.join())


def test_a_tls_sender_is_told_that_the_receiver_is_plain(good: Path) -> None:
    with Receiver(timeout_s=1.0) as receiver:
        assert "does not speak TLS" in refused(receiver, tls=good)
        assert "the other side speaks TLS" in str(receiver.join())


def test_tls_over_a_unix_socket_is_refused(tmp_path: Path, good: Path) -> None:
    url = f"unix:{tmp_path}/s"
    with pytest.raises(MigrateSendError, match="TLS is for tcp: only"):
        send(url, tls=good)
    with pytest.raises(MigrateReceiveError, match="TLS is for tcp: only"):
        transport.recv(url, tls=good)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("side", ["client", "server"])
def test_wrong_files_are_named(good: Path, side: str) -> None:
    make = tls.client_context if side == "client" else tls.server_context
    key, certificate, authority = (
        good / name for name in (f"{side}-key.pem", f"{side}-cert.pem", "ca-cert.pem")
    )
    for mode in (0o640, 0o604, 0o620):
        key.chmod(mode)
        with pytest.raises(MigratableError, match=rf"{side}-key.pem' is open to others.*{mode:o}"):
            make(good)
    key.chmod(0o600)
    other = good / ("server-key.pem" if side == "client" else "client-key.pem")
    own = key.read_bytes()
    key.write_bytes(other.read_bytes())
    with pytest.raises(MigratableError, match=r"key.pem' are no certificate and its key"):
        make(good)
    key.write_bytes(
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    with pytest.raises(MigratableError, match="without a password"):
        make(good)
    key.write_bytes(own)
    for path in (authority, certificate, key):
        content = path.read_bytes()
        path.write_bytes(b"garbage")
        with pytest.raises(MigratableError, match=path.name):
            make(good)
        path.unlink()
        with pytest.raises(MigratableError, match=rf"{path.name}' cannot be read"):
            make(good)
        path.touch(0o600)
        path.write_bytes(content)
    make(good)


def test_a_peer_that_never_shakes_hands_does_not_keep_the_sender_out(good: Path) -> None:
    with Receiver(tls=good) as receiver:
        port = int(receiver.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(b"\x16\x03")
            send(receiver.url, tls=good)
            assert receiver.join() == b"payload"


def test_a_cancelled_handshake_ends_at_once(good: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cancel = CancelToken()

        def cancelling() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1)
                cancel.cancel()
                ended.wait(TIMEOUT_S)

        ended = threading.Event()
        thread = threading.Thread(target=cancelling)
        thread.start()
        with pytest.raises(MigrateSendError, match="cancelled"):
            send(f"tcp:127.0.0.1:{listener.getsockname()[1]}", tls=good, cancel=cancel)
        ended.set()
        thread.join()


@pytest.mark.parametrize("connections", [1, 3])
def test_a_machine_moves_live_over_tls(good: Path, connections: int) -> None:
    source, destination = LiveCounter(), LiveCounter()
    source.guest_memory().write(1 << 16, bytes(range(256)) * 2048)
    source.count(7)
    urls: list[str] = []
    ready = threading.Event()

    def listening(url: str) -> None:
        urls.append(url)
        ready.set()

    options: dict[str, Any] = {"listening": listening, "tls": good, "timeout_s": TIMEOUT_S}
    thread = threading.Thread(target=receive, args=(destination, "tcp:127.0.0.1:0"), kwargs=options)
    thread.start()
    ready.wait()
    report = migrate(source, urls[0], connections=connections, tls=good, timeout_s=TIMEOUT_S)
    thread.join()
    assert report.sent_bytes
    assert destination.counted == 7
    assert destination.guest_memory().read(0, 1 << 20) == source.guest_memory().read(0, 1 << 20)


def test_a_machine_does_not_move_to_whom_it_cannot_trust(
    tmp_path: Path, good: Path, foreign: Any
) -> None:
    other = folder(tmp_path / "other", foreign)
    urls: list[str] = []
    ready = threading.Event()
    token = CancelToken()
    failed: list[MigratableError] = []

    def listening(url: str) -> None:
        urls.append(url)
        ready.set()

    def wait() -> None:
        try:
            receive(LiveCounter(), "tcp:127.0.0.1:0", listening=listening, tls=good, cancel=token)
        except MigrateReceiveError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    source = LiveCounter()
    with pytest.raises(MigrationAborted, match="certificate"):
        migrate(source, urls[0], tls=other, timeout_s=TIMEOUT_S)
    assert not source.paused
    token.cancel()
    thread.join()
    assert failed
