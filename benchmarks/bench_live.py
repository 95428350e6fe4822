"""Live migration between two processes over loopback, beside raw sockets and beside QEMU.

QEMU (Debian's ``qemu-system-x86`` and ``nasm``) moves a guest with as much RAM, as full, as idle
and as dirtying, under software emulation; without it, its rows are left out. The receiver's memory
is fresh in every run, and its page faults are part of the time, as they are for QEMU.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.timing import table
from vmmig.guest_memory import GuestMemory
from vmmig.live import migrate, receive
from vmmig.memory import PAGE_BYTES, MemoryRange
from vmmig.precopy import PrecopyPolicy
from vmmig.testing.components import LiveCounter

MIB = 1 << 20
DIRTIED_BYTES = 64 * MIB
SPAWN = multiprocessing.get_context("spawn")
GUEST = Path(__file__).with_name("dirtying_guest.asm")


def main(*, quick: bool = False) -> None:
    mib, rounds = (96, 1) if quick else (1024, 7)
    results: dict[str, list[tuple[float, float]]] = defaultdict(list)
    source = filled_machine(mib)
    cases: dict[str, Any] = {
        "raw sendall / recv_into": lambda: raw(source, mib),
        "vmmig, idle": lambda: live(source),
        "vmmig, idle, 2 connections": lambda: live(source, connections=2),
        "vmmig, dirtying 64 MiB": lambda: dirtying(source),
        "vmmig, local hand-over": lambda: local(source),
    }
    if shutil.which("qemu-system-x86_64") and shutil.which("nasm") and not quick:
        for limit_ms in (300, 20):
            for is_dirtying in (False, True):
                name = f"QEMU, {'dirtying 64 MiB' if is_dirtying else 'idle'}, limit {limit_ms} ms"
                cases[name] = lambda a=is_dirtying, b=limit_ms: qemu(mib, a, b)
    for _ in range(rounds):
        for name, case in cases.items():
            results[name].append(case())
    rows: list[tuple[object, ...]] = []
    raw_s = statistics.median(total for total, _ in results["raw sendall / recv_into"])
    for name, measured in results.items():
        total_s = statistics.median(total for total, _ in measured)
        downtime_s = statistics.median(downtime for _, downtime in measured)
        shown = f"{mib / 1024 / total_s:.2f}", f"{raw_s / total_s:.2f}"
        rows.append((name, *shown, f"{1e3 * total_s:.1f}", f"{1e3 * downtime_s:.2f}"))
    title = f"Live migration of {mib} MiB of filled RAM, medians of {rounds}"
    print(table(title, ("", "GiB/s", "of raw", "total ms", "downtime ms"), rows))
    if not quick:
        scaling()


def scaling() -> None:
    rows: list[tuple[object, ...]] = []
    for mib in (256, 1024, 4096):
        source = filled_machine(mib)
        total_s = statistics.median(live(source)[0] for _ in range(3))
        rows.append((str(mib), f"{1e3 * total_s:.0f}", f"{1e3 * total_s * 1024 / mib:.0f}"))
        source.guest_memory().close()
    print(table("Live migration, idle, by size", ("RAM MiB", "total ms", "ms per GiB"), rows))


def filled_machine(mib: int) -> LiveCounter:
    memory = GuestMemory([MemoryRange(0, mib * MIB)])
    view, block = memory.regions[0].memory, os.urandom(16 * MIB)
    for start in range(0, len(view), len(block)):
        view[start : start + len(block)] = block[: len(view) - start]
    return LiveCounter(memory=memory)


def live(source: LiveCounter, connections: int = 1) -> tuple[float, float]:
    with _Receiver("tcp:127.0.0.1:0") as url:
        began_s = time.perf_counter()
        report = migrate(
            source,
            url,
            connections=connections,
            policy=PrecopyPolicy(downtime_limit_s=0.02),
        )
        total_s = time.perf_counter() - began_s
    source.resume()
    return total_s, report.downtime.total_s


def dirtying(source: LiveCounter) -> tuple[float, float]:
    stopped = threading.Event()
    view = source.guest_memory().regions[0].memory

    def write() -> None:
        pages = range(0, DIRTIED_BYTES, PAGE_BYTES)
        while True:
            for first in range(0, len(pages), 16):
                if stopped.wait(0.001):
                    return
                if not source.paused:
                    for at in pages[first : first + 16]:
                        view[at + 8] ^= 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return live(source)
    finally:
        stopped.set()
        writer.join()


def local(source: LiveCounter) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder, _Receiver(f"unix:{folder}/s") as url:
        began_s = time.perf_counter()
        report = migrate(source, url)
        total_s = time.perf_counter() - began_s
    source.resume()
    return total_s, report.downtime.total_s


class _Receiver:
    """A process that receives one machine."""

    def __init__(self, url: str) -> None:
        self._said = SPAWN.Queue()
        self._process = SPAWN.Process(target=_receive, args=(url, self._said))

    def __enter__(self) -> str:
        self._process.start()
        return str(self._said.get())

    def __exit__(self, *_: object) -> None:
        self._process.join()


def _receive(url: str, said: Any) -> None:
    receive(LiveCounter.of, url, listening=said.put)


def raw(source: LiveCounter, mib: int) -> tuple[float, float]:
    said = SPAWN.Queue()
    process = SPAWN.Process(target=_receive_raw, args=(mib, said))
    process.start()
    view = source.guest_memory().regions[0].memory
    with socket.create_connection(("127.0.0.1", said.get())) as sock:
        began_s = time.perf_counter()
        for start in range(0, len(view), MIB):
            sock.sendall(view[start : start + MIB])
        sock.recv(1)
        total_s = time.perf_counter() - began_s
    process.join()
    return total_s, 0.0


def _receive_raw(mib: int, said: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        said.put(server.getsockname()[1])
        sock, _ = server.accept()
    memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    while view:
        view = view[sock.recv_into(view[:MIB]) :]
    sock.sendall(b"k")
    sock.close()


def qemu(mib: int, is_dirtying: bool, limit_ms: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        defines = [f"-DRAM_MIB={mib}", f"-DDIRTY={int(is_dirtying)}"]
        subprocess.run(
            ["nasm", "-f", "bin", *defines, GUEST, "-o", folder / "guest.bin"], check=True
        )
        with _Qemu(folder, "source", mib) as source:
            source.wait_for_ready()
            with _Qemu(folder, "destination", mib, "-incoming", "defer") as destination:
                uri = f"tcp:127.0.0.1:{_free_port()}"
                destination.command("migrate-incoming", uri=uri)
                limits = {"max-bandwidth": 100 << 30, "downtime-limit": limit_ms}
                source.command("migrate-set-parameters", **limits)
                began_s = time.perf_counter()
                source.command("migrate", uri=uri)
                source.wait_for("STOP", "RESUME")
                while (status := source.command("query-migrate"))["status"] != "completed":
                    if status["status"] == "failed":
                        raise RuntimeError(status)
                total_s = time.perf_counter() - began_s
                return total_s, status["downtime"] / 1e3


class _Qemu:
    def __init__(self, folder: Path, name: str, mib: int, *more: str) -> None:
        self._ready = folder / f"{name}.ready"
        self._path = folder / f"{name}.qmp"
        self._process = subprocess.Popen(
            [
                "qemu-system-x86_64",
                *("-accel", "tcg", "-m", str(mib), "-display", "none", "-nodefaults"),
                *("-kernel", str(folder / "guest.bin")),
                *("-debugcon", f"file:{self._ready}"),
                *("-qmp", f"unix:{self._path},server=on,wait=off"),
                *more,
            ]
        )

    def __enter__(self) -> _Qemu:
        while not self._path.exists():
            if self._process.poll() is not None:
                raise RuntimeError("QEMU did not start")
            time.sleep(0.01)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(self._path))
        self._lines = self._sock.makefile("r")
        self._lines.readline()
        self.command("qmp_capabilities")
        self.command(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._sock.close()
        self._process.kill()
        self._process.wait()

    def wait_for_ready(self) -> None:
        while not (self._ready.exists() and self._ready.read_bytes()):
            time.sleep(0.01)

    def command(self, command: str, **arguments: Any) -> Any:
        self._sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"])
            if "return" in answer:
                return answer["return"]

    def wait_for(self, *events: str) -> None:
        """Sleep until QEMU tells one of these, so that nothing polls while it works."""
        while json.loads(self._lines.readline()).get("event") not in events:
            pass


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
