"""``vmmig demo``: a running machine is suspended in one process and continued in another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import attrs
import click

from vmmig.adapters import guest
from vmmig.cli import guests
from vmmig.cli.guests import MIB, booted
from vmmig.errors import MigratableError
from vmmig.migration import recv, send

_DOTS_A_ROUND = 16
_CHECK_S = 0.1

_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document; all else goes to stderr."
)


class _Screen:
    """What the user sees: what vmmig does, and between it the guest's console, indented."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._in_line = False

    def say(self, text: str) -> None:
        if self._in_line:
            click.echo(file=self._stream)
            self._in_line = False
        click.secho(text, file=self._stream, bold=True)

    def show(self, output: bytes) -> None:
        for character in output.decode("latin-1"):
            text = character if self._in_line else f"    | {character}"
            click.secho(text, file=self._stream, nl=False, fg="green")
            self._in_line = character != "\n"


@click.command()
@guests.ram_mib
@guests.rounds
@_json
@click.option(
    "--keep",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the snapshot in this file; `vmmig run` runs it.",
)
@click.option(
    "--live", is_flag=True, help="Move it over TCP while it runs, instead of by a snapshot."
)
def demo(ram_mib: int, rounds: int, as_json: bool, keep: Path | None, live: bool) -> None:
    """Suspend a running machine in this process, and continue it in another.

    A small x86-64 machine computes a SHA-256 chain over all of its RAM. Half-way it is paused
    and saved; a second process loads it and finishes. Its digest is compared with that of a
    machine that was never interrupted, and with what Python's hashlib computes. The exit status
    is 0 if all are equal, and no byte of the console was lost or doubled.

    \b
      vmmig demo
      vmmig demo --live --ram-mib 256
      vmmig demo --keep machine.vmsnap
    """
    import vmmig.adapters.unicorn  # noqa: F401 - if it is missing, nothing is begun

    if live:
        if keep is not None:
            raise click.UsageError("--live makes no snapshot that --keep could keep")
        _demo_live(ram_mib, rounds, as_json)
    screen = _Screen(sys.stderr if as_json else sys.stdout)
    facts: dict[str, Any] = {"ram_bytes": ram_mib * MIB, "rounds": rounds, "pid": os.getpid()}
    times_s: dict[str, float] = {}
    started_s = time.monotonic()
    size = ["--ram-mib", str(ram_mib), "--rounds", str(rounds)]
    with (
        tempfile.TemporaryDirectory(prefix="vmmig-") as folder,
        _vmmig("run", *size) as uninterrupted,
    ):
        screen.say(f"Process {uninterrupted.pid} runs the same machine without interruption.")
        screen.say(f"Process {os.getpid()} (this one) starts a machine with {ram_mib} MiB of RAM:")
        console = bytearray()
        half_way = threading.Event()

        def output(byte: bytes) -> None:
            console.extend(byte)
            screen.show(byte)
            if console.count(b".") > rounds * _DOTS_A_ROUND // 2:
                half_way.set()

        machine = booted(ram_mib, rounds, output)
        machine.resume()
        while not half_way.wait(_CHECK_S) and not machine.wait(0):
            pass
        with _timed(times_s, "pause"):
            machine.pause()
        paused_at_s = time.time()
        with _timed(times_s, "snapshot"):
            snapshot = machine.snapshot()
        path = keep or Path(folder, "machine.vmsnap")
        with _timed(times_s, "save"):
            send(snapshot, str(path))
        facts |= {
            "paused_at_rip": machine.vcpu.registers()["rip"],
            "ran_s": machine.timer.elapsed_s,
            "snapshot": str(path) if keep else None,
            "snapshot_bytes": path.stat().st_size,
        }
        screen.say(
            f"Paused in {_ms(times_s['pause'])}, after {facts['ran_s']:.1f} s, at address "
            f"{facts['paused_at_rip']:#x}. Snapshot of {len(snapshot.snapshots)} components in "
            f"{_ms(times_s['snapshot'])}; its {facts['snapshot_bytes'] / MIB:.1f} MiB saved, "
            f"durably, in {_ms(times_s['save'])}."
        )
        with _vmmig("run", str(path)) as second:
            screen.say(f"Process {second.pid} loads, restores and resumes it:")
            second.show(screen)
            moved = second.report()
        facts["resumed_by_pid"] = second.pid
        times_s |= {"load": moved["load_s"], "restore": moved["restore_s"]}
        times_s["suspended"] = moved["resumed_at_s"] - paused_at_s
        screen.say(
            f"Loaded and checked in {_ms(times_s['load'])}, restored in "
            f"{_ms(times_s['restore'])}; the machine was suspended for "
            f"{times_s['suspended']:.2f} s, start of the process included."
        )
        whole = uninterrupted.report()
    with _timed(times_s, "hashlib"):
        expected = guest.expected_digest(ram_mib * MIB, rounds)
    facts["digests"] = {
        "suspended and continued": _digest(moved["console"]),
        "never interrupted": _digest(whole["console"]),
        "hashlib": expected,
    }
    same_digest = {*facts["digests"].values()} == {expected}
    same_console = console.decode() + moved["console"] == whole["console"]
    times_s["total"] = time.monotonic() - started_s
    facts |= {
        "consoles_agree": same_console,
        "times_s": times_s,
        "guest_ran_s": {
            "suspended and continued": moved["ran_s"],
            "never interrupted": whole["ran_s"],
        },
        "ok": same_digest and same_console,
    }
    for who, digest in facts["digests"].items():
        screen.say(f"{digest or 'no digest':64}  {who}")
    screen.say(
        f"The digests {'agree' if same_digest else 'DIFFER'}. The console of both processes, put "
        f"together, {'is whole' if same_console else 'is NOT WHOLE'}. "
        f"{times_s['total']:.1f} s in all."
    )
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    sys.exit(0 if facts["ok"] else 1)


def _demo_live(ram_mib: int, rounds: int, as_json: bool) -> NoReturn:
    from vmmig.cli.live import told
    from vmmig.live import migrate
    from vmmig.precopy import PrecopyPolicy

    screen = _Screen(sys.stderr if as_json else sys.stdout)
    started_s = time.monotonic()
    console = bytearray()
    half_way = threading.Event()

    def output(byte: bytes) -> None:
        console.extend(byte)
        screen.show(byte)
        if console.count(b".") > rounds * _DOTS_A_ROUND // 4:
            half_way.set()

    machine = booted(ram_mib, rounds, output)
    with _vmmig("receive", "tcp:127.0.0.1:0") as second:
        url = second.first_line().removeprefix("listening at ")
        screen.say(f"Process {second.pid} waits at {url}.")
        screen.say(f"Process {os.getpid()} (this one) starts a machine with {ram_mib} MiB of RAM:")
        machine.resume()
        while not half_way.wait(_CHECK_S) and not machine.wait(0):
            pass
        report = migrate(
            machine,
            url,
            configuration=machine.configuration(),
            policy=PrecopyPolicy(downtime_limit_s=0.02),
        ).to_dict()
        for line in told(report):
            screen.say(line[0].upper() + line[1:])
        screen.say(f"Process {second.pid} runs it on:")
        second.show(screen)
        moved = second.report()
    expected = guest.expected_digest(ram_mib * MIB, rounds)
    whole = console.decode("latin-1") + moved["console"]
    digest = _digest(whole)
    same_console = whole.count(".") == rounds * min(_DOTS_A_ROUND, ram_mib * 16 - 1)
    total_s = time.monotonic() - started_s
    screen.say(f"{digest or 'no digest':64}  moved while it ran")
    screen.say(f"{expected:64}  hashlib")
    screen.say(
        f"The digests {'agree' if digest == expected else 'DIFFER'}. The console of both "
        f"processes, put together, {'is whole' if same_console else 'is NOT WHOLE'}. "
        f"{total_s:.1f} s in all."
    )
    ok = digest == expected and same_console
    if as_json:
        facts = {
            "ok": ok,
            "pid": os.getpid(),
            "resumed_by_pid": second.pid,
            "digest": digest,
            "hashlib": expected,
            "consoles_agree": same_console,
            "report": report,
            "total_s": total_s,
        }
        click.echo(json.dumps(facts, indent=2))
    sys.exit(0 if ok else 1)


@click.command()
@click.argument("snapshot", required=False)
@guests.ram_mib
@guests.rounds
@_json
def run(snapshot: str | None, ram_mib: int, rounds: int, as_json: bool) -> None:
    """Run the demo's machine to its end, from SNAPSHOT on or from its start.

    SNAPSHOT is what `vmmig demo --keep` saved; it says the machine's size itself.

    \b
      vmmig run machine.vmsnap
    """
    from vmmig.adapters.unicorn import Machine

    stream = sys.stderr if as_json else sys.stdout
    console = bytearray()
    times_s: dict[str, float] = {}

    def output(byte: bytes) -> None:
        console.extend(byte)
        click.echo(byte.decode("latin-1"), file=stream, nl=False)

    if snapshot is None:
        machine = booted(ram_mib, rounds, output)
    else:
        with _timed(times_s, "load"):
            saved = recv(snapshot)
        with _timed(times_s, "restore"):
            machine = Machine.from_snapshot(saved, output=output)
    machine.resume()
    resumed_at_s = time.time()
    machine.wait()
    machine.pause()
    if as_json:
        facts = {
            "console": console.decode("latin-1"),
            "resumed_at_s": resumed_at_s,
            "ran_s": machine.timer.elapsed_s,
            **{f"{name}_s": value for name, value in times_s.items()},
        }
        click.echo(json.dumps(facts, indent=2))


@attrs.frozen
class _Process:
    """A vmmig command in a process of its own; its console is in the pipe ``stderr``."""

    process: subprocess.Popen[bytes]
    stdout: IO[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def first_line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode().strip()

    def show(self, screen: _Screen) -> None:
        assert self.process.stderr is not None
        while byte := self.process.stderr.read(1):
            screen.show(byte)

    def report(self) -> dict[str, Any]:
        """What the command says, when it has ended."""
        _, errors = self.process.communicate()
        if self.process.returncode:
            raise MigratableError(
                f"process {self.pid} ended with status {self.process.returncode}: "
                f"{errors.decode(errors='replace').strip() or 'see its output above'}"
            )
        self.stdout.seek(0)
        facts: dict[str, Any] = json.load(self.stdout)
        return facts


@contextmanager
def _vmmig(*arguments: str) -> Iterator[_Process]:
    """Run a vmmig command; it ends with the block at the latest."""
    command = [sys.executable, "-m", "vmmig.cli", *arguments, "--json"]
    with (
        tempfile.TemporaryFile() as stdout,
        subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE) as process,
    ):
        try:
            yield _Process(process, stdout)
        finally:
            process.kill()


@contextmanager
def _timed(times_s: dict[str, float], name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    times_s[name] = time.perf_counter() - start_s


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def _digest(console: str) -> str | None:
    found = re.search(r"^digest ([0-9a-f]{64})$", console, re.MULTILINE)
    return found and found[1]
