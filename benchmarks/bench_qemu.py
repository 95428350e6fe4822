"""QEMU's migration streams: read and write one, against a plain copy; restore one, against QEMU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.timing import medians_s, ms, table
from vmmig import Snapshot, recv, send
from vmmig.adapters.qemu import Machine
from vmmig.formats import qemu
from vmmig.formats.qemu.pages import plain_records, zero_records

MIB = 1 << 20
PAGE = 4096
PROGRAM = "qemu-system-x86_64"


def stream(path: Path, ram_mib: int) -> None:
    """A stream whose RAM is random for four fifths, and zero for the rest."""
    block, count = memoryview(os.urandom(MIB)), ram_mib * MIB // PAGE
    begin = b"QEVM\0\0\0\3\1\0\0\0\1\3ram\0\0\0\0\0\0\0\4"
    begin += struct.pack(">QB1sQQ", ram_mib * MIB | 4, 1, b"r", ram_mib * MIB, 0x10)
    with path.open("wb") as file:
        file.write(begin + b"\3\0\0\0\1" + struct.pack(">QB1sB", 2, 1, b"r", 0))
        page = 1
        while page < count:
            some = min(256, count - page)
            if page < count // 5:
                file.write(zero_records(page * PAGE | 0x22, some, PAGE))
            else:
                file.write(plain_records(page * PAGE | 0x28, block[: some * PAGE], PAGE))
            page += some
        file.write(struct.pack(">Q", 0x10) + b"\0")


def copied(source: Path, target: int) -> None:
    buffer = bytearray(MIB)
    with source.open("rb", buffering=0) as file, open(target, "wb", buffering=0) as out:
        while count := file.readinto(buffer):
            out.write(memoryview(buffer)[:count])


def read_and_write(folder: Path, ram_mib: int, rounds: int) -> None:
    path, other = folder / "vm.qemu", folder / "other"
    stream(path, ram_mib)
    kept: list[Snapshot] = []

    def read() -> None:
        kept[:] = []
        kept.append(qemu.read(path))

    def read_pipe() -> None:
        with path.open("rb", buffering=0) as file:
            qemu.read_stream(file)

    def write() -> None:
        with other.open("wb", buffering=0) as file:
            qemu.write_stream(kept[0], file)

    read()
    actions: dict[str, Callable[[], None]] = {
        "copy the file into memory": lambda: copied(path, os.memfd_create("copy")),
        "qemu.read": read,
        "qemu.read_stream": read_pipe,
        "copy the file to another": lambda: copied(
            path, os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        ),
        "qemu.write_stream, to another file": write,
    }
    times = medians_s(actions, rounds=rounds)
    assert other.read_bytes() == path.read_bytes()
    gib = path.stat().st_size / (1 << 30)
    rows = [(name, ms(taken), f"{gib / taken:.2f}") for name, taken in times.items()]
    print(table(f"A stream of {gib * 1024:.0f} MiB", ("what", "ms", "GiB/s"), rows))


class Monitor:
    def __init__(self, sock: socket.socket, lines: Iterator[str]) -> None:
        self._sock, self._lines = sock, lines
        next(lines)
        self.ask("qmp_capabilities")
        events = [{"capability": "events", "state": True}]
        self.ask("migrate-set-capabilities", capabilities=events)

    def ask(self, command: str, *fds: int, **arguments: object) -> None:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._sock, [message], fds)
        while "return" not in (answer := json.loads(next(self._lines))):
            assert "error" not in answer, answer

    def wait(self) -> None:
        status = ""
        while status != "completed":
            event: dict[str, Any] = json.loads(next(self._lines))
            status = event.get("data", {}).get("status", "")
            assert status != "failed"


@contextmanager
def machine(folder: Path, ram_mib: int, memory: str, *more: str) -> Iterator[Monitor]:
    path = folder / "monitor"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        backend = f"{memory},id=m,size={ram_mib}M"
        arguments = ["-machine", "pc,memory-backend=m", "-m", f"{ram_mib}", "-object", backend]
        arguments += ["-S", "-nodefaults", "-display", "none", "-qmp", f"unix:{path}", *more]
        with subprocess.Popen([PROGRAM, *arguments]) as process:
            try:
                sock, _ = listening.accept()
                with sock, sock.makefile("r") as lines:
                    yield Monitor(sock, iter(lines.readline, ""))
            finally:
                process.kill()


def restore(folder: Path, ram_mib: int, rounds: int) -> None:
    """The same machine into QEMU: from the stream in a file, and from the container by vmmig."""
    if shutil.which(PROGRAM) is None:
        print(f"\n{PROGRAM} is not installed, so nothing is restored")
        return
    path, container, ram = folder / "real.qemu", folder / "real.vmsnap", folder / "ram"
    block = os.urandom(MIB)
    with ram.open("wb", buffering=0) as file:
        file.truncate(ram_mib * MIB)
        file.seek(ram_mib // 5 * MIB)
        for _ in range(ram_mib - ram_mib // 5):
            file.write(block)
    with machine(folder, ram_mib, f"memory-backend-file,mem-path={ram},share=off") as source:
        source.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        with path.open("wb") as file:
            source.ask("getfd", file.fileno(), fdname="file")
        source.ask("migrate", uri="fd:file")
        source.wait()
    ram.unlink()
    send(qemu.read(path), container)

    def from_file(monitor: Monitor) -> None:
        with path.open("rb") as file:
            monitor.ask("getfd", file.fileno(), fdname="from")
        monitor.ask("migrate-incoming", uri="fd:from")

    def by_vmmig(monitor: Monitor) -> None:
        with Machine(folder / "other") as there:
            there.restore(recv(container, lazily=True))

    times: dict[str, list[float]] = {"QEMU, from its stream in a file": [], "vmmig": []}
    for _ in range(rounds):
        for name, start in zip(times, (from_file, by_vmmig), strict=True):
            other = f"unix:{folder}/other,server=on,wait=off"
            incoming = ("-incoming", "defer", "-qmp", other)
            with machine(folder, ram_mib, "memory-backend-ram", *incoming) as target:
                begin = time.perf_counter()
                start(target)
                target.wait()
                times[name].append(time.perf_counter() - begin)
    medians = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    first, *_ = medians.values()
    rows = [(name, ms(taken), f"{taken / first:.2f}") for name, taken in medians.items()]
    print(table(f"Restore {ram_mib} MiB into QEMU", ("by", "ms", "x QEMU"), rows))


def main(*, quick: bool = False) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR", ".")) as folder:
        read_and_write(Path(folder), 32 if quick else 2048, 1 if quick else 5)
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR", ".")) as folder:
        restore(Path(folder), 32 if quick else 2048, 1 if quick else 5)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
