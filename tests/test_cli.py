"""The command line as its users run it: real processes, files, pipes, sockets and a terminal."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmmig
from vmmig import Snapshot, SnapshotDataSection

COMMAND = [sys.executable, "-m", "vmmig.cli"]
RAM = random.Random(4).randbytes(3 << 20)
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "vm.vmsnap"
    vmmig.send(Snapshot("vm", snapshot_data={"ram": SnapshotDataSection("ram", RAM)}), path)
    return path


@pytest.fixture(autouse=True)
def _signals_reach_children() -> Iterator[None]:
    """What this process ignores, as a shell's background jobs do SIGINT, its children would."""
    before = {number: signal.signal(number, lambda *_: None) for number, _ in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments, **how) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *arguments], **{"capture_output": True, "timeout": 60, "check": False} | how
    )


@contextmanager
def started(*arguments, **how) -> Iterator[subprocess.Popen[bytes]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, *arguments], **pipes | how) as process:
        try:
            yield process
        finally:
            process.kill()


def on_terminal(*arguments, **how) -> tuple[str, int]:
    """What a command prints when its stderr is a terminal, and its status."""
    ours, theirs = pty.openpty()
    how["env"] = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    with started(*arguments, stderr=theirs, **how) as process:
        os.close(theirs)
        printed = b""
        # The end of a terminal is an error on Linux.
        while True:
            try:
                printed += os.read(ours, 1 << 16)
            except OSError:
                break
        os.close(ours)
        assert process.wait(60) is not None
        return printed.decode(), process.returncode


@pytest.mark.parametrize("command", ["send", "recv"])
def test_a_snapshot_is_copied_byte_for_byte_and_nothing_is_printed(command, saved, tmp_path):
    result = run(command, saved, tmp_path / "copy.vmsnap")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert (tmp_path / "copy.vmsnap").read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.vmsnap"]


def test_pipes_at_both_ends(saved, tmp_path):
    with started("recv", saved, "-") as sender:
        result = run("send", "-", tmp_path / "copy.vmsnap", stdin=sender.stdout)
        assert sender.wait(60) == 0
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert (tmp_path / "copy.vmsnap").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("arguments", [["send", "{saved}", "{copy}"], ["recv", "-", "{copy}"]])
def test_json_is_one_object_a_line_and_the_last_is_the_result(arguments, saved, tmp_path):
    copy = tmp_path / "copy.vmsnap"
    words = [word.format(saved=saved, copy=copy) for word in arguments]
    with saved.open("rb") as file:
        result = run(*words, "--json", stdin=file)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    size_bytes = saved.stat().st_size
    assert {"stage": "done", "done_bytes": size_bytes, "total_bytes": size_bytes}.items() <= (
        lines[-1].items()
    )
    assert lines[-1]["url"] == str(copy if arguments[0] == "send" else "-")
    assert lines[-1]["elapsed_s"] > 0
    assert lines[-1]["rate_bytes_per_s"] > 0
    assert [line["stage"] for line in lines].count("done") == 1
    assert {"connecting", "transferring", "confirming"} <= {line["stage"] for line in lines}
    assert all(line.keys() == lines[-1].keys() for line in lines)
    assert all(line["done_bytes"] <= size_bytes for line in lines)


def test_a_terminal_sees_a_bar_and_then_what_was_done(saved, tmp_path):
    # What stands in brackets is no markup to the bar.
    copy = tmp_path / "[red]copy.vmsnap"
    printed, status = on_terminal("send", saved, copy)
    assert status == 0, printed
    assert f"transferring {copy}" in printed
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in printed
    assert "3.1/3.1 MB" in printed
    last = printed[printed.rindex(f"{copy}: 3.1 MB in ") :]
    assert "B/s" in last
    assert copy.read_bytes() == saved.read_bytes()


def test_on_a_terminal_json_replaces_the_bar(saved, tmp_path):
    assert on_terminal("send", saved, tmp_path / "copy.vmsnap", "--json") == ("", 0)


def test_a_terminal_sees_an_error_in_one_line_below_the_bar(tmp_path):
    printed, status = on_terminal("recv", tmp_path / "none.vmsnap", tmp_path / "copy.vmsnap")
    assert status == 1
    assert printed.count("vmmig: Failed to receive migratable component snapshot: ") == 1
    assert "Traceback" not in printed
    assert printed.endswith("\r\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("send {folder}/none.vmsnap {folder}/copy", "Failed to send {folder}/none.vmsnap No such"),
        ("recv {folder}/none.vmsnap {folder}/copy", "Failed to receive No such file"),
        ("recv {saved} {folder}/none/copy", "Failed to receive {folder}/none/copy No such file"),
        ("recv {saved} {folder}", "Failed to receive Is a directory"),
        ("send {damaged} {folder}/copy", "Failed to send damaged.vmsnap damaged checksum"),
        ("recv {damaged} {folder}/copy", "Failed to receive damaged.vmsnap damaged checksum"),
        ("send {saved} pigeon:coop", "Failed to send pigeon:coop no transport"),
        ("send {saved} {folder}/copy --timeout 5", "Failed to send takes no option 'timeout_s'"),
    ],
)
def test_a_failure_is_one_line_and_status_1_and_leaves_nothing(command, words, saved, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    damaged = tmp_path / "damaged.vmsnap"
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    places = {"folder": folder, "saved": saved, "damaged": damaged}
    result = run(*(word.format(**places) for word in command.split()))
    error = result.stderr.decode()
    assert (result.returncode, result.stdout, error.count("\n")) == (1, b"", 1), error
    assert error.startswith("vmmig: Failed to ")
    for word in words.format(**places).split():
        assert word in error
    assert not [*folder.iterdir()]


def test_verbose_shows_the_causes(tmp_path):
    short = run("send", tmp_path / "none", tmp_path / "copy")
    long = run("send", "--verbose", tmp_path / "none", tmp_path / "copy")
    first, *causes = long.stderr.decode().splitlines(keepends=True)
    assert first == short.stderr.decode()
    assert len(causes) == 1
    assert causes[0].startswith("  caused by FileNotFoundError: [Errno 2] No such file or direct")


@pytest.mark.parametrize(
    "arguments",
    [
        ["send", "vm.vmsnap"],
        ["send", "a", "b", "--timeout", "0"],
        ["send", "a", "b", "--tls", "no-such-folder"],
        ["send", "a", "b", "--token-file", "no-such-file"],
        ["send", "a", "b", "--token-file", os.devnull],
        ["recv", "a", "-", "--json"],
        ["receive", "a", "b"],
    ],
)
def test_misuse_is_status_2(arguments):
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"Usage: vmmig" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_snapshot_is_not_printed_on_a_terminal(saved):
    ours, theirs = pty.openpty()
    result = run("recv", saved, "-", capture_output=False, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.close(ours)
    assert result.returncode == 2
    assert b"name a file" in result.stderr


def test_the_token_is_not_printed(saved, tmp_path):
    (tmp_path / "token").write_text("very-secret\n")
    result = run("send", saved, tmp_path / "copy", "--token-file", tmp_path / "token", "-v")
    assert result.returncode == 1
    assert b"'token'" in result.stderr
    assert b"very-secret" not in result.stderr


def test_the_token_variable_is_for_http_alone(saved, tmp_path):
    env = {**os.environ, "VMMIG_TOKEN": "very-secret"}
    assert run("send", saved, tmp_path / "copy", env=env).returncode == 0


@pytest.mark.parametrize(("signal_number", "status"), SIGNALS)
def test_a_signal_while_bytes_come_ends_it_and_leaves_nothing(
    signal_number, status, saved, tmp_path
):
    with started("send", "-", tmp_path / "copy.vmsnap", "--json") as process:
        process.stdin.write(saved.read_bytes()[:1000])
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["stage"] == "transferring"
        process.send_signal(signal_number)
        assert process.wait(60) == status
        assert process.stderr.read() == b"vmmig: cancelled\n"
    assert not [*tmp_path.iterdir()]


@contextmanager
def stalling_server() -> Iterator[tuple[str, socket.socket]]:
    """An http URL, and the socket that listens there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        yield f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}/vm", listener


def request(connection: socket.socket) -> bytes:
    connection.settimeout(60)
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1 << 10)
    return head


def lines_until(stage: str, url: str, process: subprocess.Popen[bytes]) -> None:
    while (line := json.loads(process.stdout.readline()))["stage"] != stage or line["url"] != url:
        pass


@pytest.mark.parametrize(("signal_number", "status"), SIGNALS)
def test_a_signal_ends_a_send_to_a_server_that_stalls(signal_number, status, saved, tmp_path):
    (tmp_path / "token").write_text("very-secret")
    words = ["--json", "--verbose", "--timeout", "600", "--token-file", tmp_path / "token"]
    with stalling_server() as (url, listener):
        plain = url.replace("me:secret@", "")
        with started("send", saved, plain, *words) as process:
            connection, _ = listener.accept()
            with connection:
                assert b"Bearer very-secret" in request(connection)
                lines_until("transferring", plain, process)
                process.send_signal(signal_number)
                assert process.wait(60) == status
            assert process.stderr.read().decode().splitlines()[0] == (
                f"vmmig: Failed to send migratable component snapshot: '{plain}': cancelled"
            )


@pytest.mark.parametrize(("signal_number", "status"), SIGNALS)
def test_a_signal_ends_a_recv_in_its_midst_and_keeps_the_old_file(
    signal_number, status, saved, tmp_path
):
    copy = tmp_path / "copy.vmsnap"
    copy.write_bytes(b"old")
    with (
        stalling_server() as (url, listener),
        started("recv", url, copy, "--json", "--timeout", "600") as process,
    ):
        connection, _ = listener.accept()
        with connection:
            request(connection)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {saved.stat().st_size}\r\n\r\n"
            connection.sendall(head.encode() + saved.read_bytes()[:100_000])
            lines_until("transferring", url.replace("me:secret", "***"), process)
            process.send_signal(signal_number)
            assert process.wait(60) == status
        error = process.stderr.read()
        assert error.endswith(b": cancelled\n")
        assert b"secret" not in error + process.stdout.read()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.vmsnap"]
    assert copy.read_bytes() == b"old"


def test_a_signal_that_is_ignored_stays_ignored(saved, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with started("send", "-", tmp_path / "copy.vmsnap", "--json") as process:
        assert json.loads(process.stdout.readline())["stage"] == "transferring"
        process.send_signal(signal.SIGHUP)
        process.communicate(saved.read_bytes(), timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "copy.vmsnap").read_bytes() == saved.read_bytes()


def test_a_reader_that_goes_away_is_an_error(saved):
    with started("recv", saved, "-") as process:
        process.stdout.close()
        assert process.wait(60) == 1
        assert b"Broken pipe" in process.stderr.read()


def test_help_shows_examples_statuses_and_completion_and_loads_no_rich():
    result = run("--help")
    for words in ("vmmig send vm.vmsnap tcp:host:9000", "130", "_VMMIG_COMPLETE=bash_source"):
        assert words in result.stdout.decode()
    code = "import sys; from vmmig.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    code += "\nsys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(("typed", "expected"), [("vmmig se", b"send"), ("vmmig recv --ti", b"-")])
def test_the_shell_completes_commands_and_options(typed, expected):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = run(env={**os.environ, **words, "_VMMIG_COMPLETE": "bash_complete"})
    assert expected in result.stdout
