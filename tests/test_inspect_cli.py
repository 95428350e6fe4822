"""inspect, diff, verify, edit and convert as their users run them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import vmmig
from benchmarks.bench_inspect import sparse_container
from tests.http_peers import Scripted, answer, read_request
from vmmig import Snapshot, SnapshotDataSection
from vmmig.cli import console
from vmmig.cli.commands import vmmig as command

MIB = 1 << 20
RAM = bytes(MIB) + bytes(range(256)) * 16 + bytes(MIB)
REGS = b'{"rip": 4096, "flags": {"zf": true}, "name": "a\\u001b[31m"}'


def machine(regs: bytes = REGS, ram: bytes = RAM) -> Snapshot:
    vm = Snapshot("vm")
    cpu = Snapshot("cpu")
    cpu.add_data_section(SnapshotDataSection("regs", regs))
    cpu.add_data_section(SnapshotDataSection("fpu\x1b[31m", bytes(range(40))))
    vm.add_snapshot(cpu)
    vm.add_data_section(SnapshotDataSection("ram", ram))
    return vm


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    vmmig.send(machine(), folder / "vm.vmsnap")
    later = RAM[: 5 * 4096] + b"x" * 8192 + RAM[7 * 4096 :]
    vmmig.send(machine(REGS.replace(b"4096", b"8192"), later), folder / "later.vmsnap")
    data = bytearray((folder / "vm.vmsnap").read_bytes())
    data[-MIB // 2] ^= 1
    (folder / "damaged.vmsnap").write_bytes(data)
    (folder / "cut.vmsnap").write_bytes(data[: MIB // 2])
    (folder / "noise").write_bytes(b"GIF89a" * 40)
    vmmig.send(machine(), folder / "packed.vmsnap", compression="zstd")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments)], prog_name="vmmig")


def test_inspect_shows_the_tree_and_what_is_in_it(saved):
    result = run("inspect", saved / "vm.vmsnap")
    assert result.exit_code == 0, result.output
    for words in (
        "vmmig format 1, written by vmmig",
        "2 nodes, 3 sections",
        "ram  2 MiB",
        "regs  59 B",
        "rip = 4096 (0x1000)",
        "flags.zf = True",
        "00 01 02 03",
    ):
        assert words in result.output, result.output
    assert "\x1b" not in result.output
    assert len(re.findall(r"\b[0-9a-f]{16}\b", result.output)) == 3


def test_inspect_shows_one_node_or_section(saved):
    result = run("inspect", saved / "vm.vmsnap", "cpu")
    assert result.output.startswith("cpu\n")
    assert "ram" not in result.output
    result = run("inspect", saved / "vm.vmsnap", "cpu/regs")
    assert "rip = 4096" in result.output
    result = run("inspect", saved / "vm.vmsnap", "$.snapshot_data['ram']")
    assert "000001f0  00 00" in result.output
    assert "more bytes" in result.output
    result = run("inspect", saved / "vm.vmsnap", "nothing")
    assert result.exit_code == 1
    assert "there is no 'nothing' at $ (it has 'cpu', 'ram')" in result.output


def test_inspect_says_it_in_json(saved):
    document = json.loads(run("inspect", saved / "packed.vmsnap", "--json").output)
    assert document["format"] == "vmmig"
    assert [node["path"] for node in document["nodes"]] == [[], ["cpu"]]
    ram = document["nodes"][0]["sections"][0]
    assert (ram["id"], ram["nbytes"], ram["stored"]) == ("ram", len(RAM), "compressed")
    assert ram["stored_bytes"] < 10_000
    regs = document["nodes"][1]["sections"][1]
    assert regs["decoded"]["fields"]["rip"] == 4096
    section = json.loads(run("inspect", saved / "vm.vmsnap", "ram", "--json").output)["section"]
    assert section["hex"] == "00" * 512


def test_inspect_shows_what_it_can_of_a_damaged_section(saved, tmp_path):
    data = bytearray((saved / "vm.vmsnap").read_bytes())
    data[data.index(bytes(range(40)))] ^= 1
    (tmp_path / "vm.vmsnap").write_bytes(data)
    result = run("inspect", tmp_path / "vm.vmsnap")
    assert result.exit_code == 0
    assert "does not match" in result.output
    assert "rip = 4096" in result.output
    assert run("inspect", saved / "cut.vmsnap").exit_code == 1
    assert "truncated" in run("inspect", saved / "cut.vmsnap").output


def test_a_very_deep_tree_is_shown(tmp_path):
    deep = Snapshot("0")
    for i in range(1, 30_000):
        deep = Snapshot(str(i), {deep.id: deep})
    vmmig.send(deep, tmp_path / "deep.vmsnap")
    result = run("inspect", tmp_path / "deep.vmsnap")
    assert (result.exit_code, result.output.count("\n")) == (0, 30_001)
    document = json.loads(run("inspect", tmp_path / "deep.vmsnap", "--json").output)
    assert document["nodes"][10]["path"] == [str(29_999 - i) for i in range(1, 11)]
    assert (document["nodes"][-1]["path"], document["nodes"][-1]["parent"]) == (None, 29_998)


def test_diff_ends_as_diffs_do(saved):
    same = run("diff", saved / "vm.vmsnap", saved / "vm.vmsnap")
    assert (same.exit_code, same.stdout) == (0, "")
    assert "2 MiB were taken to be equal" in same.stderr
    assert run("diff", "--full", saved / "vm.vmsnap", saved / "packed.vmsnap").output == ""
    result = run("diff", saved / "vm.vmsnap", saved / "later.vmsnap")
    assert result.exit_code == 1
    assert (
        "~ $.snapshots['cpu'].snapshot_data['regs'].rip: 4096 (0x1000) -> 8192 (0x2000)"
        in result.stdout
    )
    assert "~ $.snapshot_data['ram']: 2 of 513 pages differ: 5-6\n" in result.stdout
    for other in ("none", "cut.vmsnap", "noise"):
        failed = run("diff", saved / "vm.vmsnap", saved / other)
        assert failed.exit_code == 2
        assert failed.stderr.count("\n") == 1
    document = json.loads(run("diff", saved / "vm.vmsnap", saved / "later.vmsnap", "--json").stdout)
    assert document["differ"] is True
    assert [change.get("ranges") for change in document["changes"]] == [[[20480, 8192]], None]


def test_verify_says_what_is_damaged_and_what_is_left(saved):
    sound = run("verify", saved / "vm.vmsnap")
    assert sound.exit_code == 0
    assert "sound: 3 sections, 2 MiB, every checksum matches" in sound.output
    result = run("verify", saved / "damaged.vmsnap")
    assert result.exit_code == 1
    assert "$.snapshot_data['ram']: damaged: the checksum" in result.output
    assert "What can be read: 2 of 3 sections" in result.output
    assert "1 MiB of 2 MiB can be read; lost is, counted in MiB: 1" in result.output
    result = run("verify", saved / "cut.vmsnap")
    assert result.exit_code == 1
    assert "truncated" in result.output
    assert run("verify", saved / "noise").exit_code == 1
    assert run("verify", saved / "none").exit_code == 2
    document = json.loads(run("verify", saved / "damaged.vmsnap", "--json").output)
    assert (document["sound"], len(document["sections"])) == (False, 3)
    (saved / "vm.json").write_text('{"id":"vm","snapshots":{},"snapshot_data":{}}')
    assert run("verify", saved / "vm.json").exit_code == 0
    (saved / "bad.json").write_text('{"id":"vm","snapshots":{}}')
    assert run("verify", saved / "bad.json").exit_code == 1


def test_edit_changes_a_copy(saved, tmp_path):
    (tmp_path / "fpu").write_bytes(b"new")
    before = (saved / "vm.vmsnap").read_bytes()
    out = tmp_path / "out.vmsnap"
    result = run(
        *("edit", saved / "vm.vmsnap", out, "--set", "cpu/regs", "rip", "0x10"),
        *("--set", "cpu/regs", "name", "12", "--drop", "ram", "--rename", "cpu", "cpu0"),
        *("--replace", "$.snapshots['cpu'].snapshot_data['fpu\\x1b[31m']", tmp_path / "fpu"),
    )
    assert result.exit_code == 0, result.output
    cpu = vmmig.recv(out).find("cpu0")
    assert json.loads(bytes(cpu.section("regs").snapshot))["rip"] == 16
    assert json.loads(bytes(cpu.section("regs").snapshot))["name"] == "12"
    assert bytes(cpu.section("fpu\x1b[31m").snapshot) == b"new"
    assert not vmmig.recv(out).snapshot_data
    assert (saved / "vm.vmsnap").read_bytes() == before


def test_edit_never_writes_in_place(saved, tmp_path):
    path = tmp_path / "vm.vmsnap"
    path.write_bytes((saved / "vm.vmsnap").read_bytes())
    os.link(path, tmp_path / "hard")
    os.symlink(path, tmp_path / "soft")
    for name in ("vm.vmsnap", "hard", "soft"):
        for words in (["edit", "--drop", "ram"], ["convert", "--to", "json"]):
            result = run(words[0], path, tmp_path / name, *words[1:])
            assert result.exit_code == 2
            assert "the same file" in result.output
    assert path.read_bytes() == (saved / "vm.vmsnap").read_bytes()
    assert run("edit", path, tmp_path / "new").exit_code == 2
    failed = run("edit", path, tmp_path / "new", "--set", "cpu/regs", "rip", '"text"')
    assert failed.exit_code == 1
    assert "of type int, not str" in failed.output
    assert sorted(each.name for each in tmp_path.iterdir()) == ["hard", "soft", "vm.vmsnap"]


def test_a_damaged_section_is_dropped_and_the_rest_saved(saved, tmp_path):
    assert run("edit", saved / "damaged.vmsnap", tmp_path / "a", "--drop", "cpu").exit_code == 1
    assert run("edit", saved / "damaged.vmsnap", tmp_path / "a", "--drop", "ram").exit_code == 0
    assert vmmig.recv(tmp_path / "a").find("cpu") == machine().find("cpu")
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_what_was_compressed_stays_so(saved, tmp_path):
    out = tmp_path / "out.vmsnap"
    assert run("edit", saved / "packed.vmsnap", out, "--drop", "cpu").exit_code == 0
    assert out.stat().st_size < MIB // 4
    assert vmmig.recv(out).section("ram").nbytes == len(RAM)
    assert run("convert", saved / "packed.vmsnap", "memory://bucket/out.vmsnap").exit_code == 0
    assert run("convert", saved / "packed.vmsnap", "memory://bucket/out.json").exit_code == 1


def test_convert_there_and_back(saved, tmp_path):
    source = saved / "vm.vmsnap"
    for name in ("a.msgpack", "b.json", "c.vmsnap"):
        result = run("convert", source, tmp_path / name)
        assert result.exit_code == 0, result.output
        source = tmp_path / name
    assert source.read_bytes() == (saved / "vm.vmsnap").read_bytes()
    assert run("convert", source, tmp_path / "d").exit_code == 2
    assert run("convert", source, tmp_path / "d", "--to", "json", "--from", "json").exit_code == 1
    assert run("convert", source, tmp_path / "d", "--to", "zip").exit_code == 2
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", [*command.places])
def test_each_command_has_an_example_in_its_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"  vmmig {name}" in result.output.replace("(where `", "")
    assert "--verbose" in result.output


def test_far_away_no_more_is_fetched_than_is_shown(tmp_path):
    sparse_container(tmp_path / "large.vmsnap", 1 << 30)
    fetched: list[int] = []

    def answering(sock: socket.socket) -> None:
        with (tmp_path / "large.vmsnap").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while head := read_request(sock):
                match = re.search(rb"Range: bytes=(\d+)-(\d*)", head)
                first, last = int(match[1]), min(int(match[2] or size), size - 1)
                file.seek(first)
                part = file.read(last + 1 - first)
                fetched.append(len(part))
                where = f"bytes {first}-{last}/{size}"
                sock.sendall(answer("206 Partial", part, etag='"1"', content_range=where))

    with Scripted(answering) as server:
        result = run("inspect", server.url)
        assert result.exit_code == 0, result.output
        assert "ram  1 GiB" in result.output
        assert "rip = 4096" in result.output
        assert sum(fetched) < 200_000
        result = run("inspect", server.url, "ram")
        assert "00000000  00 00" in result.output
        assert sum(fetched) < 2_000_000


def test_a_store_is_inspected_verified_and_compared(saved):
    url = "memory://bucket/vm.vmsnap"
    vmmig.send(machine(), url)
    assert "rip = 4096" in run("inspect", url).output
    assert run("verify", url).exit_code == 0
    assert run("diff", url, saved / "vm.vmsnap").exit_code == 0
    assert run("diff", "--full", url, saved / "later.vmsnap").exit_code == 1
    assert run("inspect", url, "--from", "json").exit_code == 1


def test_a_terminal_sees_how_far_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.showing_work("vm.vmsnap") as tell:
        tell(1, 4)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(console, "_PATIENCE_S", 0)
    with console.showing_work("vm.vmsnap") as tell:
        tell(1, 4)
        tell(3, 4)
    assert "vm.vmsnap" in terminal.getvalue()


def process(*arguments: object, **how) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "vmmig.cli", *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, **how)


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    vm = Snapshot("vm")
    for i in range(5000):
        vm.add_snapshot(Snapshot(f"a rather long name of a component {i}"))
    vmmig.send(vm, tmp_path / "vm.vmsnap")
    # Without a buffer, Python does not notice that not all of it was written.
    buffered = {name: each for name, each in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = ("inspect", tmp_path / "vm.vmsnap")
    with process(*words, stdout=subprocess.PIPE, env=buffered) as running:
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 141


@pytest.mark.parametrize(("variable", "colours"), [("", True), ("1", False)])
def test_colours_are_for_terminals_where_nothing_forbids_them(variable, colours, saved):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": variable, "TERM": "xterm"}
    with process("inspect", saved / "vm.vmsnap", stdout=theirs, env=environment) as running:
        os.close(theirs)
        printed = b""
        while True:
            try:
                printed += os.read(ours, 1 << 16)
            except OSError:
                break
        assert running.wait(60) == 0
    os.close(ours)
    assert (b"\x1b[" in printed) == colours


def test_an_error_is_one_line_that_a_terminal_does_not_obey(capsys):
    parts = [vmmig.PauseError("a\x1b[31m"), vmmig.PauseError("b\nc")]
    console.print_error(vmmig.MigratableErrorGroup("2 failed", parts))
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
    assert "a\\x1b[31m; " in printed


def test_an_encoding_without_a_character_is_no_obstacle(tmp_path):
    vmmig.send(Snapshot("maschine \N{SNOWMAN}"), tmp_path / "vm.vmsnap")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    words = ("inspect", tmp_path / "vm.vmsnap")
    with process(*words, stdout=subprocess.PIPE, env=environment) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, b"")
    assert b"maschine \\u2603" in out
