"""Sockets, as live migration and the stream transport use them, on real ones."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmig import sockets
from vmmig.errors import MigratableError
from vmmig.sockets import Address, Listener
from vmmig.transfer import CancelToken

WAIT_S = 20.0


@pytest.fixture(params=["tcp", "unix"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "tcp:127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/s"


@contextmanager
def pair(url: str, timeout_s: float = WAIT_S) -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        Listener(url) as listener,
        sockets.connect(listener.url, timeout_s=timeout_s) as there,
        listener.accept(timeout_s=timeout_s) as here,
    ):
        yield here, there


@contextmanager
def running(act: Callable[[], object]) -> Iterator[list[Any]]:
    """``act`` in a thread, joined on leaving; what it returned or raised, as an OSError."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(act())
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcome
    finally:
        thread.join()


# Addresses


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("tcp:host:4000", Address("host", 4000)),
        ("TCP://host:0", Address("host", 0)),
        ("tcp://[::1]:65535", Address("::1", 65535)),
        ("tcp:[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
        ("unix:/run/vm.sock", Address(path="/run/vm.sock")),
        ("unix:///run/vm.sock", Address(path="/run/vm.sock")),
        ("unix:run/vm.sock", Address(path="run/vm.sock")),
        ("unix:/" + "x" * 106, Address(path="/" + "x" * 106)),
    ],
)
def test_an_address_is_read_and_written(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("tcp:host", "the port is missing"),
        ("tcp:host:", "the port is ''"),
        ("tcp:host:65536", "from 0 to 65535"),
        ("tcp:host:-1", "from 0 to 65535"),
        ("tcp:host:+1", "from 0 to 65535"),
        ("tcp:host:1_0", "from 0 to 65535"),
        ("tcp:host:\u0661", "from 0 to 65535"),
        ("tcp::4000", "the host is missing"),
        ("tcp:[]:4000", "the host is missing"),
        ("tcp:::1:4000", "brackets"),
        ("tcp:[::1:4000", "brackets"),
        ("tcp:me:secret@host:4000", "brackets"),
        ("tcp:me@host:4000", "nothing else"),
        ("tcp://host:4000/vm", "nothing else"),
        ("tcp://host:4000?x", "nothing else"),
        ("unix:", "no path"),
        ("unix:/run/", "no path"),
        ("unix:a\0b", "no path"),
        ("unix://run/vm.sock", "three slashes"),
        ("unix:\ud800", "no path can have such characters"),
        ("unix:/" + "x" * 107, "has 108 bytes, and that of a socket 107"),
        ("unix:/" + "\u00fc" * 54, "has 109 bytes"),
        ("http://host:80", "tcp:host:port or unix:/path"),
        (None, "tcp:host:port or unix:/path"),
    ],
)
def test_what_is_no_address_is_refused(url: object, text: str) -> None:
    with pytest.raises(MigratableError, match=text.replace("'", ".")):
        Address.parse(url)


@given(st.text(st.sampled_from(string.printable + "\0\ud800é"), max_size=40))
@example("tcp:[[::1]]:1")
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for url in (text, f"tcp:{text}", f"unix:{text}"):
        try:
            address = Address.parse(url)
        except MigratableError:
            continue
        assert Address.parse(str(address)) == address


# Connecting and listening


def test_bytes_go_both_ways(url: str) -> None:
    with pair(url) as (here, there):
        sockets.send_all(there, [b"", b"abc", memoryview(b"def")[1:]])
        assert sockets.recv_exactly(here, 5) == b"abcef"
        sockets.send_all(here, iter([b"x" * 70_000] * 3))
        assert sockets.recv_some(there, 1) == b"x"
        assert sockets.recv_exactly(there, 209_999) == b"x" * 209_999
        here.close()
        assert sockets.recv_some(there, 1) == b""


def test_a_listener_says_where_it_is(tmp_path: Path) -> None:
    with Listener("tcp:127.0.0.1:0") as listener:
        assert listener.url == f"tcp:127.0.0.1:{Address.parse(listener.url).port}"
        assert Address.parse(listener.url).port > 0
    with Listener("tcp:[::1]:0") as listener:
        assert listener.url.startswith("tcp:[::1]:")
        sockets.connect(listener.url).close()


def test_a_relative_unix_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Listener("unix:s") as listener, sockets.connect("unix:s"):
        listener.accept().close()
        monkeypatch.chdir("/")
    assert not os.listdir(tmp_path)


def test_who_connects_first_waits_for_who_listens(url: str) -> None:
    if url.startswith("tcp"):
        with Listener(url) as listener:
            url = listener.url
    connecting = threading.Event()

    def connect() -> bytes:
        connecting.set()
        with sockets.connect(url, timeout_s=WAIT_S) as sock:
            return sockets.recv_exactly(sock, 2)

    with running(connect) as outcome:
        connecting.wait(WAIT_S)
        with Listener(url) as listener, listener.accept(timeout_s=WAIT_S) as sock:
            sockets.send_all(sock, [b"ok"])
    assert outcome == [b"ok"]


def test_nobody_there(tmp_path: Path) -> None:
    with Listener("tcp:127.0.0.1:0") as listener:
        free = listener.url
    for url in (free, f"unix:{tmp_path}/s"):
        with pytest.raises(ConnectionError, match=r"nobody listened there within 0.05 s"):
            sockets.connect(url, timeout_s=0.05)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionError, match="no socket"):
        sockets.connect(f"unix:{tmp_path}/file", timeout_s=WAIT_S)
    with pytest.raises(ConnectionError, match="the host"):
        sockets.connect("tcp:no-such-host.invalid:1", timeout_s=0.05)
    with pytest.raises(ConnectionError, match="the host's name cannot be one"):
        sockets.connect(f"tcp:{'x' * 70}.example:1", timeout_s=WAIT_S)
    with pytest.raises(MigratableError, match="port 0"):
        sockets.connect("tcp:127.0.0.1:0")


def test_tcp_is_kept_alive_and_not_delayed() -> None:
    with pair("tcp:127.0.0.1:0") as socks:
        for sock in socks:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            }
            assert [*options.values()] == [60, 15, 4, 120_000]
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_unix_socket_is_its_owners_alone_and_goes_with_the_listener(
    tmp_path: Path, umask: int
) -> None:
    old = os.umask(umask)
    try:
        listener = Listener(f"unix:{tmp_path}/s")
    finally:
        os.umask(old)
    with listener:
        assert os.listdir(tmp_path) == ["s"]
        assert stat.S_IMODE(os.lstat(tmp_path / "s").st_mode) == 0o600
    assert not os.listdir(tmp_path)


def test_there_is_no_moment_when_others_may_connect(tmp_path: Path) -> None:
    """Every call that touches the folder is seen, and the socket is never open to others."""
    strace = "strace"
    if subprocess.run(["which", strace], capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "strace is missing"
        pytest.skip("strace is not installed")
    code = (
        "import os; os.umask(0); from vmmig.sockets import Listener\n"
        f"with Listener('unix:{tmp_path}/s'): pass"
    )
    run = subprocess.run(
        [
            strace,
            "-f",
            "-e",
            "trace=bind,listen,fchmod,fchmodat,linkat",
            sys.executable,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [line.split("(")[0].split()[-1] for line in run.stderr.splitlines() if "(" in line]
    first = calls.index("bind")
    assert calls[first - 1 : first + 1] == ["fchmod", "bind"]
    assert calls.index("fchmodat") < calls.index("listen") < calls.index("linkat")


def test_a_dead_listeners_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listener(f"unix:{path}") as listener, sockets.connect(listener.url):
        listener.accept(timeout_s=WAIT_S).close()
    assert not path.exists()


def test_a_live_listener_and_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(f"unix:{path}") as listener:
        before = os.lstat(path)
        with pytest.raises(OSError, match="in use"):
            Listener(f"unix:{path}")
        assert os.lstat(path).st_ino == before.st_ino
        sockets.connect(listener.url).close()
    path.write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        Listener(f"unix:{path}")
    assert path.read_text() == "precious"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="no socket"):
        Listener(f"unix:{tmp_path}/link")
    with pytest.raises(OSError, match="No such file"):
        Listener(f"unix:{tmp_path}/none/s")
    assert sorted(os.listdir(tmp_path)) == ["link", "s"]


def test_a_file_that_is_not_its_own_any_more_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener(f"unix:{path}"):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_a_port_in_use_is_refused() -> None:
    with Listener("tcp:127.0.0.1:0") as listener, pytest.raises(OSError, match="cannot listen"):
        Listener(listener.url)


def test_accept_ends_when_its_time_is_up(url: str) -> None:
    with Listener(url) as listener:
        with pytest.raises(TimeoutError, match=r"within 0.01 s"):
            listener.accept(timeout_s=0.01)
        sockets.connect(listener.url).close()
        listener.accept(timeout_s=WAIT_S).close()


def test_a_cancellation_ends_an_accept(url: str) -> None:
    cancel = CancelToken()
    with Listener(url) as listener:
        with running(lambda: listener.accept(timeout_s=WAIT_S, cancel=cancel)) as outcome:
            cancel.cancel()
        assert isinstance(outcome[0], ConnectionAbortedError)


def test_a_cancellation_ends_a_connect(url: str) -> None:
    cancel = CancelToken()
    where = "tcp:127.0.0.1:1" if url.startswith("tcp") else url
    with running(lambda: sockets.connect(where, timeout_s=WAIT_S, cancel=cancel)) as outcome:
        cancel.cancel()
    assert isinstance(outcome[0], ConnectionAbortedError)


def test_a_cancellation_ends_a_blocked_receive(url: str) -> None:
    cancel = CancelToken()
    with pair(url) as (here, _), cancel.calling(lambda: sockets.shut_down(here)):
        with running(lambda: sockets.recv_exactly(here, 1)) as outcome:
            cancel.cancel()
        assert isinstance(outcome[0], ConnectionError)


def test_a_cancellation_ends_a_blocked_send(url: str) -> None:
    with pair(url) as (here, there):
        with running(lambda: sockets.send_all(here, [bytes(64 << 20)])) as outcome:
            assert select.select([there], [], [], WAIT_S)[0]
            sockets.shut_down(here)
        assert isinstance(outcome[0], ConnectionError)


def test_a_cancellation_from_a_signal_handler(url: str) -> None:
    cancel = CancelToken()
    old = signal.signal(signal.SIGALRM, lambda *_: cancel.cancel())
    try:
        with Listener(url) as listener:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(ConnectionAbortedError, match="cancelled"):
                listener.accept(timeout_s=WAIT_S, cancel=cancel)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_listener_is_shut_down_from_another_thread(url: str) -> None:
    with Listener(url) as listener:
        with running(lambda: listener.accept(timeout_s=WAIT_S)) as outcome:
            listener.shut_down()
        assert isinstance(outcome[0], ConnectionAbortedError)


# Greetings


def check(data: bytes) -> None:
    if data != b"hello":
        raise MigratableError(f"{data!r} is no greeting")


def test_the_first_right_greeting_is_accepted_whoever_came_before(url: str) -> None:
    with Listener(url) as listener, ExitStack() as stack:
        strays = [stack.enter_context(sockets.connect(listener.url)) for _ in range(4)]
        sockets.send_all(strays[1], [b"GET /"])
        sockets.send_all(strays[2], [b"hel"])
        strays[3].close()
        right = stack.enter_context(sockets.connect(listener.url))
        sockets.send_all(right, [b"hello, and more"])
        sock, greeting = listener.accept_greeted(5, check, answer=str.encode, timeout_s=WAIT_S)
        with sock:
            assert greeting == b"hello"
            assert sockets.recv_exactly(sock, 10) == b", and more"
        assert sockets.recv_exactly(strays[1], 23) == b"b'GET /' is no greeting"


def test_who_is_refused_can_read_why(url: str) -> None:
    with Listener(url) as listener, sockets.connect(listener.url) as stray:
        sockets.send_all(stray, [b"wrong, and much more" * 100])
        with pytest.raises(TimeoutError, match="refused: b'wrong' is no greeting"):
            listener.accept_greeted(5, check, answer=str.encode, timeout_s=0.05)
        assert listener.refusal == "b'wrong' is no greeting"
        assert sockets.recv_exactly(stray, 23) == b"b'wrong' is no greeting"
        assert sockets.recv_some(stray, 1) == b""


def test_many_strays_take_no_more_than_some_sockets(url: str) -> None:
    with Listener(url) as listener, ExitStack() as stack:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100):
            stack.enter_context(sockets.connect(listener.url))
            with pytest.raises(TimeoutError):
                listener.accept_greeted(5, check, timeout_s=0)
        assert len(os.listdir("/proc/self/fd")) <= before + 100 + 64
        right = stack.enter_context(sockets.connect(listener.url))
        sockets.send_all(right, [b"hello"])
        listener.accept_greeted(5, check, timeout_s=WAIT_S)[0].close()


# Bytes


@given(st.lists(st.binary(max_size=40), max_size=40), st.integers(0, 3))
def test_any_pieces_arrive_in_order(pieces: list[bytes], large: int) -> None:
    pieces = pieces + [bytes([n]) * 1_500_000 for n in range(large)]
    whole = b"".join(pieces)
    here, there = socket.socketpair()
    with here, there:
        sockets.set_timeout(here, WAIT_S)
        with running(lambda: sockets.send_all(here, pieces)) as outcome:
            assert sockets.recv_exactly(there, len(whole)) == whole
        assert outcome == [None]


def test_a_peer_that_does_nothing_times_out(url: str) -> None:
    with pair(url, 0.05) as (here, there):
        with pytest.raises(TimeoutError, match="sent nothing within the time limit"):
            sockets.recv_exactly(here, 1)
        with pytest.raises(TimeoutError, match="sent nothing within the time limit"):
            sockets.recv_some(here, 1)
        with pytest.raises(TimeoutError, match="took nothing within the time limit"):
            sockets.send_all(there, [bytes(64 << 20)])


def test_a_peer_that_goes(url: str) -> None:
    with pair(url) as (here, there):
        sockets.send_all(there, [b"ab"])
        there.close()
        with pytest.raises(ConnectionError, match="ended the connection"):
            sockets.recv_exactly(here, 3)
        with pytest.raises(ConnectionError, match="ended the connection"):
            sockets.send_all(here, [bytes(1 << 20)] * 10)


# Descriptors


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_travel_and_are_closed_in_what_is_executed(tmp_path: Path) -> None:
    with pair(f"unix:{tmp_path}/s") as (here, there):
        before = count_fds()
        with open(tmp_path / "file", "w+b") as file:
            sockets.send_fds(there, b"data", [file.fileno()] * 253)
        data, fds = sockets.recv_fds(here, 4, 253)
        assert data == b"data"
        assert len(fds) == 253
        assert not any(map(os.get_inheritable, fds))
        assert os.fstat(fds[0]) == os.stat(tmp_path / "file")
        for fd in fds:
            os.close(fd)
        assert count_fds() == before


def test_descriptors_that_are_too_many_are_closed(tmp_path: Path) -> None:
    with pair(f"unix:{tmp_path}/s") as (here, there):
        before = count_fds()
        sockets.send_fds(there, b"data", [0, 1])
        with pytest.raises(ConnectionError, match="2 descriptors came where 1 were expected"):
            sockets.recv_fds(here, 4, 1)
        sockets.send_fds(there, b"da", [0])
        sockets.shut_down(there)
        with pytest.raises(ConnectionError, match="ended"):
            sockets.recv_fds(here, 4, 1)
        assert count_fds() == before


def test_descriptors_that_cannot_all_be_opened_are_refused(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pair(f"unix:{tmp_path}/s") as (here, there):
        sockets.send_fds(there, b"data", [0] * 100)
        before = count_fds()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
        try:
            with pytest.raises(ConnectionError, match="not all descriptors"):
                sockets.recv_fds(here, 4, 100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert count_fds() == before
