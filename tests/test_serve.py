"""``vmmig serve``, in a process of its own, with our client, curl, and clients that misbehave."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http_peers import ROOT, certificates, needed, serving
from vmmig import Snapshot, SnapshotDataSection, recv, send, transport
from vmmig.errors import MigrateReceiveError, MigrateSendError
from vmmig.transfer import CancelToken, Progress

MIB = 1 << 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder) as (url, _):
        yield url, folder


@pytest.fixture
def empty(served: tuple[str, Path]) -> tuple[str, Path]:
    """The URL, and its folder, in which there is only ``old``."""
    for path in served[1].iterdir():
        path.unlink()
    (served[1] / "old").write_bytes(b"old bytes")
    return served


def raw(url: str, request: bytes) -> bytes:
    """All that is answered to these bytes."""
    where = urlsplit(url)
    assert where.hostname
    with socket.create_connection((where.hostname, where.port or 0), 30) as sock:
        came = b""
        # The server may have hung up already.
        with suppress(OSError):
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                came += piece
        return came


def status(url: str, request: str, body: bytes = b"") -> int:
    head = request.replace("\n", "\r\n").encode("latin-1")
    answer = raw(url, head + b"\r\nHost: x\r\nConnection: close\r\n\r\n" + body)
    match = re.match(rb"HTTP/1\.1 (\d+)", answer)
    assert match is not None, answer
    return int(match[1])


def curl(*arguments: str | Path, given: bytes = b"") -> bytes:
    program = needed("curl", "curl")
    run = subprocess.run(
        [program, "-sS", "--max-time", "60", *arguments],
        input=given,
        stdout=subprocess.PIPE,
        check=True,
    )
    return run.stdout


def test_a_snapshot_goes_there_and_back(empty: tuple[str, Path]) -> None:
    url, folder = empty
    snapshot = Snapshot("vm")
    snapshot.add_data_section(SnapshotDataSection("ram", os.urandom(3 * MIB)))
    send(snapshot, f"{url}vm")
    assert recv(f"{url}vm") == snapshot
    assert recv(folder / "vm") == snapshot
    assert sorted(os.listdir(folder)) == ["old", "vm"]


def test_ranges_are_read_until_the_file_is_replaced(empty: tuple[str, Path]) -> None:
    url, _ = empty
    data = os.urandom(MIB)
    transport.send([data], f"{url}vm", total_bytes=len(data))
    reader: Any = transport.recv(f"{url}vm", lazily=True)
    part = bytearray(1000)
    reader.read_into(500_000, memoryview(part))
    assert part == data[500_000:501_000]
    transport.send([data], f"{url}vm", total_bytes=len(data))
    with pytest.raises(MigrateReceiveError, match="has changed"):
        reader.read_into(500_000, memoryview(part))


def test_curl_is_another_client(empty: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = empty
    data = os.urandom(5 * MIB + 7)
    source = tmp_path / "source"
    source.write_bytes(data)
    code = ("-o", "/dev/null", "-w", "%{http_code}")
    assert curl(*code, "-T", source, f"{url}vm") == b"201"
    assert (folder / "vm").read_bytes() == data
    assert (folder / "vm").stat().st_mode & 0o777 == 0o600
    assert curl(*code, "-T", "-", f"{url}vm", given=data[::-1]) == b"204"
    assert (folder / "vm").read_bytes() == data[::-1]
    assert curl(f"{url}vm") == data[::-1]
    assert curl("-r", "5-10", f"{url}vm") == data[::-1][5:11]
    assert curl("-r", "-10", f"{url}vm") == data[::-1][-10:]
    assert curl(*code, "-H", "If-None-Match: *", "-T", source, f"{url}vm") == b"412"
    assert curl(*code, "-H", "If-None-Match: *", "-T", source, f"{url}new") == b"201"
    for name, wanted in (("sha-256", b"204"), ("sha-512", b"400")):
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        announced = f"Repr-Digest: {name}=:{digest}:"
        assert curl(*code, "-H", announced, "-T", source, f"{url}vm") == wanted
    assert sorted(os.listdir(folder)) == ["new", "old", "vm"]
    for target in ("../../etc/passwd", "%2e%2e/old", "..%2fold", ".hidden", "a/b", "", "a%00b"):
        assert curl(*code, "--path-as-is", f"{url}{target}") == b"404"


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ("GET /old HTTP/1.1", 200),
        ("HEAD /old HTTP/1.1", 200),
        ("GET /none HTTP/1.1", 404),
        ("GET /link HTTP/1.1", 404),
        ("GET /pipe HTTP/1.1", 404),
        ("GET /folder HTTP/1.1", 404),
        ("GET / HTTP/1.1", 404),
        ("GET /../old HTTP/1.1", 404),
        ("GET /%2e%2e/old HTTP/1.1", 404),
        ("GET /..\\old HTTP/1.1", 404),
        ("GET /.hidden HTTP/1.1", 404),
        ("GET /" + "a" * 300 + " HTTP/1.1", 400),
        ("DELETE /old HTTP/1.1", 405),
        ("POST /old HTTP/1.1\nContent-Length: 0", 405),
        ("GET /old HTTP/1.1\nRange: bytes=0-3", 206),
        ("GET /old HTTP/1.1\nRange: bytes=9-", 416),
        ("GET /old HTTP/1.1\nRange: bytes=-0", 416),
        ("GET /old HTTP/1.1\nRange: bytes=3-1", 200),
        ("GET /old HTTP/1.1\nRange: bytes=0-1,3-4", 200),
        ("GET /old HTTP/1.1\nRange: lines=1-2", 200),
        ('GET /old HTTP/1.1\nRange: bytes=0-3\nIf-Range: "other"', 200),
        ('GET /old HTTP/1.1\nIf-Match: "other"', 412),
        ("GET /old HTTP/1.1\nIf-None-Match: *", 304),
        ("PUT /vm HTTP/1.1", 411),
        ("PUT /vm HTTP/1.1\nContent-Length: 5", 400),
        ("PUT /link HTTP/1.1\nContent-Length: 0", 403),
        ("PUT /pipe HTTP/1.1\nContent-Length: 0", 403),
        ("PUT /folder HTTP/1.1\nContent-Length: 0", 403),
        ("PUT /a/b HTTP/1.1\nContent-Length: 0", 404),
        ("PUT /../b HTTP/1.1\nContent-Length: 0", 404),
        ("PUT /.part HTTP/1.1\nContent-Length: 0", 404),
        ("PUT /vm HTTP/1.1\nContent-Length: 0\nContent-Range: bytes 0-1/5", 501),
        ("PUT /vm HTTP/1.1\nContent-Length: 0\nIf-Match: *", 501),
        ('PUT /vm HTTP/1.1\nContent-Length: 0\nIf-None-Match: "a"', 501),
        ("PUT /vm HTTP/1.1\nContent-Length: 0\nContent-Encoding: gzip", 415),
        ("PUT /vm HTTP/1.1\nContent-Length: 0\nRepr-Digest: sha-256=:A:", 400),
        ("PUT /old HTTP/1.1\nContent-Length: 0\nIf-None-Match: *", 412),
    ],
)
def test_what_is_answered(empty: tuple[str, Path], request_: str, wanted: int) -> None:
    url, folder = empty
    outside = folder.parent / "outside"
    outside.write_bytes(b"secret")
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    try:
        assert status(url, request_) == wanted
        assert sorted(os.listdir(folder)) == ["folder", "link", "old", "pipe"]
    finally:
        (folder / "folder").rmdir()
    assert (folder / "old").read_bytes() == b"old bytes"
    assert outside.read_bytes() == b"secret"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"5\r\nhello\r\n",
        b"5\r\nhello\r\n0",
        b"5\r\nhel",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"fffffffffffffff\r\nhello",
        b"ffffffffffffffffffff\r\nhello",
        b"5;" + b"x" * 9000 + b"\r\nhello\r\n0\r\n\r\n",
        b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    ],
)
def test_chunks_that_are_malformed_or_cut_leave_nothing(
    empty: tuple[str, Path], body: bytes
) -> None:
    url, folder = empty
    assert status(url, "PUT /old HTTP/1.1\nTransfer-Encoding: chunked", body) == 400
    assert os.listdir(folder) == ["old"]
    assert (folder / "old").read_bytes() == b"old bytes"


def test_a_put_that_is_cut_after_any_byte_leaves_nothing(empty: tuple[str, Path]) -> None:
    url, folder = empty
    request = b"PUT /old HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nnew bytes"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda count: raw(url, request[:count]), range(len(request))))
    assert os.listdir(folder) == ["old"]
    assert (folder / "old").read_bytes() == b"old bytes"
    assert b"204 No Content" in raw(url, request)
    assert (folder / "old").read_bytes() == b"new bytes"


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda method, path, headers, body: (
            method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + b"".join(headers) + b"\r\n" + body
        ),
        st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT"]),
        st.sampled_from([b"/old", b"*", b"http://x/old", b"/%", b"//old"]) | st.binary(max_size=20),
        st.lists(
            st.sampled_from(
                [
                    b"Content-Length: 99\r\n",
                    b"Content-Length: -1\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"Transfer-Encoding: gzip\r\n",
                    b"Range: bytes=1-\r\n",
                    b"Expect: 100-continue\r\n",
                ]
            )
            | st.binary(max_size=30),
            max_size=4,
        ),
        st.binary(max_size=30),
    )
)
def test_no_request_does_harm(served: tuple[str, Path], request_: bytes) -> None:
    url, folder = served
    (folder / "old").write_bytes(b"old bytes")
    raw(url, request_)
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert status(url, "GET /old HTTP/1.1") == 200


def test_many_at_once(empty: tuple[str, Path]) -> None:
    url, folder = empty

    def there_and_back(number: int) -> None:
        data = bytes([number]) * (100_000 + number)
        transport.send([data], f"{url}vm{number}", total_bytes=len(data))
        assert transport.recv(f"{url}vm{number}") == data

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(there_and_back, range(200)))
    assert len(os.listdir(folder)) == 201


def test_one_name_by_many_at_once(empty: tuple[str, Path]) -> None:
    url, folder = empty
    head = "PUT /new HTTP/1.1\nIf-None-Match: *\nContent-Length: 9"
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: status(url, head, b"new bytes"), range(32)))
    assert sorted(set(answers)) == [201, 412]
    assert answers.count(201) == 1
    assert sorted(os.listdir(folder)) == ["new", "old"]


def test_a_cancelled_put_leaves_nothing(empty: tuple[str, Path]) -> None:
    url, folder = empty
    token = CancelToken()

    def progress(event: Progress) -> None:
        if event.done_bytes:
            token.cancel()

    with pytest.raises(MigrateSendError, match="cancelled"):
        transport.send(
            [bytes(32 * MIB)],
            f"{url}old",
            total_bytes=32 * MIB,
            cancel=token,
            progress=progress,
        )
    assert (folder / "old").read_bytes() == b"old bytes"


def test_a_limit_on_sizes(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-bytes", "10") as (url, _):
        with pytest.raises(MigrateSendError, match=r"413 .*no more than 10 bytes are taken"):
            transport.send([bytes(64 * MIB)], f"{url}vm", total_bytes=64 * MIB)
        chunked = "PUT /vm HTTP/1.1\nTransfer-Encoding: chunked"
        assert status(url, chunked, b"b\r\nhello world\r\n") == 413
        assert status(url, chunked, b"a\r\nhello worl\r\n0\r\n\r\n") == 201
    assert os.listdir(tmp_path) == ["vm"]


def test_a_full_disk(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path)]
    refusal = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    if refusal and not os.environ.get("CI"):
        pytest.skip("needs a mount namespace of its own")
    with serving(tmp_path, prefix=prefix) as (url, _):
        with pytest.raises(MigrateSendError, match=r"507 .*: No space left on device; free some"):
            transport.send([b"x" * (4 * MIB)], f"{url}vm", total_bytes=4 * MIB)
        data = b"x" * (900 << 10)
        transport.send([data], f"{url}vm", total_bytes=len(data))
        assert transport.recv(f"{url}vm") == data


def test_a_limit_of_the_system(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with serving(tmp_path) as (url, _), pytest.raises(MigrateSendError, match="413"):
            transport.send([bytes(4 * MIB)], f"{url}vm", total_bytes=4 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("from_file", [True, False])
def test_a_token(tmp_path: Path, from_file: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "token").write_text("s3cret-token\n")
    options = ["--token-file", str(tmp_path / "token")] if from_file else []
    env = {} if from_file else {"VMMIG_TOKEN": "s3cret-token"}
    with serving(folder, *options, env=env) as (url, _):
        transport.send([b"x"], f"{url}vm", total_bytes=1, token="s3cret-token")
        assert transport.recv(f"{url}vm", token="s3cret-token") == b"x"
        for token in ({}, {"token": "other"}):
            with pytest.raises(MigrateReceiveError, match=r"401 .*; give the option token"):
                transport.recv(f"{url}vm", **token)  # type: ignore[arg-type]
            with pytest.raises(MigrateSendError, match="401"):
                transport.send([b"y"], f"{url}vm", total_bytes=1, **token)  # type: ignore[arg-type]
        assert status(url, "GET /vm HTTP/1.1\nAuthorization: Bearer \xe4") == 401
    assert (folder / "vm").read_bytes() == b"x"


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    tls = certificates(tmp_path / "tls")
    folder = tmp_path / "folder"
    folder.mkdir()
    data = os.urandom(3 * MIB)
    with serving(folder, "--tls", str(tls)) as (url, _):
        where = urlsplit(url)
        assert where.scheme == "https"
        # One that says nothing does not keep the others waiting.
        with socket.create_connection((where.hostname or "", where.port or 0)):
            transport.send([data], f"{url}vm", total_bytes=len(data), tls=tls)
            assert transport.recv(f"{url}vm", tls=tls) == data
        raw(url, b"GET /vm HTTP/1.1\r\nHost: x\r\n\r\n")
        alone = tmp_path / "alone"
        alone.mkdir()
        (alone / "ca-cert.pem").write_bytes((tls / "ca-cert.pem").read_bytes())
        with pytest.raises(MigrateReceiveError, match=r"TLS failed|connection"):
            transport.recv(f"{url}vm", tls=alone, timeout_s=0.2)
        with pytest.raises(MigrateReceiveError, match="certificate is not accepted"):
            transport.recv(f"{url}vm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_no_part_is_left(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as (url, process):
        where = urlsplit(url)
        with socket.create_connection((where.hostname or "", where.port or 0)) as sock:
            sock.sendall(
                b"PUT /vm HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                b"Content-Length: 99\r\n\r\nhello"
            )
            assert sock.recv(100).startswith(b"HTTP/1.1 100")
            process.send_signal(number)
            assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "everyone who reaches 0.0.0.0 could read and write"),
        (["--host", "::"], "everyone who reaches"),
        (["--host", "example.org"], "everyone who reaches"),
        (["--host", "192.0.2.1", "--insecure"], "cannot listen at 192.0.2.1"),
        (["--tls", "."], "no usable ca-cert.pem, server-cert.pem"),
        (["--token-file", "empty"], "the token is empty"),
        (["--port", "70000"], "70000"),
    ],
)
def test_what_is_not_served(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "empty").write_text("\n")
    run = subprocess.run(
        [sys.executable, "-m", "vmmig.cli", "serve", ".", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode in (1, 2)
    assert message in run.stderr
    assert "Traceback" not in run.stderr
