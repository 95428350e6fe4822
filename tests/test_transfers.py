"""What holds for `vmmig.send` and `vmmig.recv`, whatever the transport."""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from hypothesis import given, settings

from tests.http_peers import serving
from vmmig import (
    Limits,
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    Snapshot,
    SnapshotDataSection,
    dumps,
    loads,
    recv,
    send,
    transport,
)
from vmmig.testing.strategies import snapshots
from vmmig.transfer import CancelToken, Progress

STAGES = ["connecting", "transferring", "confirming", "done"]
STORED = ["file", "http", "memory"]
STREAMS = ["tcp", "unix"]
LARGE = (b"a page of memory" * 4096 + os.urandom(1 << 16)) * 3


def machine(id: str, ram: bytes = LARGE) -> Snapshot:
    ram_section = SnapshotDataSection("ram", ram)
    return Snapshot(id, {"cpu": Snapshot("cpu")}, {"ram": ram_section})


OLD, NEW = machine("old", b"old" * 50_000), machine("new")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("served")) as (url, _):
        yield url


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to, for the scheme that the test is given."""
    scheme = request.param
    if scheme == "memory" and not os.environ.get("CI"):
        pytest.importorskip("fsspec", reason="fsspec is not installed (extra s3)")
    return {
        "file": lambda: str(tmp_path / "vm.vmsnap"),
        "http": lambda: request.getfixturevalue("served") + tmp_path.name,
        "memory": lambda: f"memory://{tmp_path.name}/vm.vmsnap",
        "tcp": lambda: "tcp:127.0.0.1:0",
        "unix": lambda: f"unix:{tmp_path}/s",
    }[scheme]()


def at(*schemes: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("url", schemes, indirect=True)


def is_stream(url: str) -> bool:
    return url.startswith(("tcp:", "unix:"))


@contextmanager
def receiving(
    url: str, *, progress: Callable[[Progress], object] = bool, **options: Any
) -> Iterator[tuple[str, Future[Snapshot]]]:
    """Somebody listens: at which URL, and what is received there."""
    heard: Queue[str] = Queue()
    calls: list[Progress] = []

    def listening(event: Progress) -> None:
        calls.append(event)
        if len(calls) == 2:
            heard.put(event.url)
        progress(event)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(recv, url, progress=listening, **options)
        future.add_done_callback(lambda _: heard.put(url))
        yield heard.get(), future


def carried(snapshot: Snapshot, url: str, *, lazily: bool = False, **options: Any) -> Snapshot:
    """What comes when it is sent there."""
    if not is_stream(url):
        send(snapshot, url, **options)
        return recv(url, lazily=lazily)
    with receiving(url, lazily=lazily) as (there, future):
        send(snapshot, there, **options)
        return future.result()


def left_of(tmp_path: Path) -> tuple[int, int, list[str]]:
    """Threads, descriptors and files."""
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        sorted(os.listdir(tmp_path)),
    )


@settings(max_examples=15)
@given(snapshot=snapshots(max_nodes=20, max_section_bytes=70_000))
def test_what_is_sent_is_received(
    tmp_path_factory: pytest.TempPathFactory, served: str, snapshot: Snapshot
) -> None:
    folder = tmp_path_factory.mktemp("trees")
    urls = [f"{folder}/vm.vmsnap", f"{served}{folder.name}", "tcp:127.0.0.1:0", f"unix:{folder}/s"]
    for url in urls:
        assert carried(snapshot, url) == snapshot
    assert os.listdir(folder) == ["vm.vmsnap"]


@at(*STORED, *STREAMS)
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_options_change_nothing_of_the_tree(
    url: str, lazily: bool, compression: str | None
) -> None:
    if compression and not os.environ.get("CI"):
        pytest.importorskip("backports.zstd", reason="no Zstandard (extra zstd)")
    assert carried(NEW, url, lazily=lazily, compression=compression) == NEW


@at(*STORED, *STREAMS)
def test_progress_only_grows(url: str) -> None:
    sent: list[Progress] = []
    received: list[Progress] = []
    if is_stream(url):
        with receiving(url, progress=received.append) as (there, future):
            send(NEW, there, progress=sent.append)
            future.result()
    else:
        send(NEW, url, progress=sent.append)
        recv(url, progress=received.append)
    for events in (sent, received):
        stages = [STAGES.index(event.stage) for event in events]
        assert stages == sorted(stages)
        assert [event.done_bytes for event in events] == sorted(e.done_bytes for e in events)
        assert events[-1].stage == "done"
        assert events[-1].done_bytes == events[-1].total_bytes == len(dumps(NEW))


@at(*STORED)
@pytest.mark.parametrize("stage", STAGES)
def test_a_cancelled_send_leaves_what_was_there(url: str, stage: str) -> None:
    send(OLD, url)
    token = CancelToken()

    def cancel(event: Progress) -> None:
        if event.stage == stage:
            token.cancel()

    failure = ""
    try:
        send(NEW, url, progress=cancel, cancel=token)
    except MigrateSendError as error:
        failure = str(error)
    assert ("cancelled" in failure) == (stage != "done")
    if "it may be there nevertheless" in failure:  # the server did not wait for the cancellation
        assert stage == "confirming"
        assert recv(url) in (OLD, NEW)
    else:
        assert recv(url) == (OLD if failure else NEW)


@at(*STORED)
@pytest.mark.parametrize("stage", ["connecting", "transferring"])
def test_nothing_is_there_after_a_first_send_that_was_cancelled(url: str, stage: str) -> None:
    token = CancelToken()

    def cancel(event: Progress) -> None:
        if event.stage == stage:
            token.cancel()

    with pytest.raises(MigrateSendError, match="cancelled"):
        send(NEW, url, progress=cancel, cancel=token)
    with pytest.raises(MigrateReceiveError):
        recv(url, timeout_s=1) if url.startswith("http") else recv(url)


@at(*STORED)
def test_a_failed_send_leaves_what_was_there(url: str) -> None:
    send(OLD, url)
    damaged = bytearray(dumps(NEW))
    damaged[len(damaged) // 2] ^= 1
    unreadable = loads(bytes(damaged), lazily=True)
    with pytest.raises(MigrateSendError, match=r"snapshot_data\['ram'\].*damaged"):
        send(unreadable, url)

    def fail(event: Progress) -> None:
        if event.stage == "transferring":
            raise RuntimeError("no terminal")

    with pytest.raises(MigrateSendError, match="no terminal"):
        send(NEW, url, progress=fail)
    assert recv(url) == OLD


@at(*STREAMS)
@pytest.mark.parametrize("stage", STAGES[:-1])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_cancelled_stream_hands_nothing_out(
    url: str, stage: str, side: str, tmp_path: Path
) -> None:
    before = left_of(tmp_path)
    token = CancelToken()
    calls: list[str] = []

    def cancel(event: Progress) -> None:
        calls.append(event.stage)
        # A receiver that is cancelled before it listens cannot be connected to.
        if event.stage == stage and (side, len(calls)) != ("receiver", 1):
            token.cancel()

    ours = {"progress": cancel, "cancel": token}
    with receiving(url, timeout_s=2, **(ours if side == "receiver" else {})) as (there, future):
        try:
            send(NEW, there, timeout_s=2, **(ours if side == "sender" else {}))
        except MigrateSendError as error:
            told = str(error)
        else:
            told = ""
        failure = future.exception()
    assert told
    assert isinstance(failure, MigrateReceiveError) or "may have it or not" in told
    assert "cancelled" in (told if side == "sender" else str(failure))
    assert left_of(tmp_path) == before


@at(*STREAMS)
def test_who_sent_is_told_why_it_was_refused(url: str) -> None:
    damaged = bytearray(dumps(NEW))
    damaged[-1] ^= 1
    with receiving(url) as (there, future):
        with pytest.raises(MigrateSendError, match=r"other side refused it: .*checksum"):
            transport.send([damaged], there, total_bytes=len(damaged))
        with pytest.raises(MigrateReceiveError, match="checksum"):
            future.result()
    for limits in (Limits(max_bytes=1000), Limits(max_nodes=2)):
        with receiving(url, limits=limits) as (there, future):
            with pytest.raises(MigrateSendError, match=r"other side refused it: .* allowed"):
                send(NEW, there)
            with pytest.raises(MigrateReceiveError, match="allowed"):
                future.result()


@at("file", "http", "memory")
def test_limits_are_those_of_who_receives(url: str) -> None:
    send(NEW, url)
    for lazily in (False, True):
        for limits in (Limits(max_bytes=1000), Limits(max_nodes=2)):
            with pytest.raises(MigrateReceiveError, match="allowed"):
                recv(url, lazily=lazily, limits=limits)


@pytest.mark.parametrize(
    "url",
    [
        "carrier-pigeon://me:s3cr3t@host/vm?key=s3cr3t",
        "http://me:s3cr3t@127.0.0.1:1/vm?key=s3cr3t",
        "https://me:s3cr3t@127.0.0.1:1/vm?key=s3cr3t",
        "http://me:s3cr3t@127.0.0.1:port/vm",
        "tcp://me:s3cr3t@127.0.0.1:1",
        "tcp:me:s3cr3t@127.0.0.1:1",
        "memory://me:s3cr3t@host/no/such?key=s3cr3t",
    ],
)
def test_errors_name_the_url_and_no_credentials(url: str) -> None:
    attempts: list[tuple[type[MigratableError], Callable[[], object]]] = [
        (MigrateReceiveError, lambda: recv(url)),
        (MigrateSendError, lambda: send(NEW, url)),
    ]
    if url.startswith("memory:"):
        del attempts[1]
    for expected, attempt in attempts:
        with pytest.raises(expected) as raised:
            attempt() if "127.0.0.1:1/" not in url else _at_once(attempt, expected, url)
        error = raised.value
        shown = "".join(traceback.format_exception(error, limit=0)) + repr(error)
        assert "s3cr3t" not in shown
        assert url.partition(":")[0] in str(error)
        assert "***" in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def _at_once(attempt: object, expected: type[MigratableError], url: str) -> None:
    """The same attempt, which does not wait for a server that may yet start."""
    if expected is MigrateReceiveError:
        recv(url, timeout_s=0)
    else:
        send(NEW, url, timeout_s=0)


@at(*STORED, *STREAMS)
def test_unknown_options_are_refused(url: str) -> None:
    options: dict[str, Any] = {"colour": "red"}
    with pytest.raises(MigrateSendError, match="takes no option 'colour'"):
        send(NEW, url, **options)
    with pytest.raises(MigrateReceiveError, match="takes no option 'colour'"):
        recv(url, **options)
    with pytest.raises(MigrateSendError, match="compression"):
        send(NEW, url, compression="zip")


PIGEON = """
from vmmig.errors import MigratableError

OPTIONS = frozenset({"timeout_s"})
LOFT = {}


def send(chunks, transfer):
    transfer.enter("transferring")
    LOFT[transfer.url] = b"".join(bytes(view) for view in transfer.views(chunks))
    transfer.advance(len(LOFT[transfer.url]))


def recv(transfer):
    if transfer.url not in LOFT:
        raise transfer.failure("no pigeon came")
    return memoryview(LOFT[transfer.url])
"""


def test_another_package_adds_a_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pigeon.py").write_text(PIGEON)
    metadata = tmp_path / "pigeon-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vmmig.transports]\npigeon = pigeon\nfile = pigeon\nowl = no_such_owl\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert carried(NEW, "pigeon:loft") == NEW
    assert carried(NEW, "PIGEON:loft", timeout_s=1) == NEW
    with pytest.raises(MigrateReceiveError, match="no pigeon came"):
        recv("pigeon:elsewhere")
    with pytest.raises(MigrateSendError, match="takes no option 'token', of options: 'timeout_s'"):
        send(NEW, "pigeon:loft", token="t")
    with pytest.raises(MigrateReceiveError, match=r"no_such_owl.*cannot be loaded"):
        recv("owl:night")
    with pytest.raises(MigrateReceiveError, match=r"'owl:', 'pigeon:'"):
        recv("swift:x")
    send(NEW, f"file:{tmp_path}/vm.vmsnap")
    assert recv(tmp_path / "vm.vmsnap") == NEW


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("scheme", STREAMS)
def test_200_at_once(scheme: str, tmp_path: Path) -> None:
    before = left_of(tmp_path)
    count = 200
    together = threading.Barrier(count)

    def meet(event: Progress) -> None:
        if event.stage == "transferring" and event.done_bytes == 0:
            together.wait(60)

    def transfer(number: int) -> None:
        snapshot = machine(str(number), bytes([number]) * (100_000 + number))
        url = "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/{number}"
        with receiving(url) as (there, future):
            send(snapshot, there, progress=meet)
            assert future.result() == snapshot

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(transfer, range(count)))
    assert left_of(tmp_path) == before
