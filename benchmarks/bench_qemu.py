"""Snapshot and restore a QEMU VM by vmmig, against QEMU's own stream to and from a file."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.timing import ms, table
from vmmig import recv, send
from vmmig.adapters.qemu import Machine
from vmmig.formats import qemu

QEMU = "qemu-system-x86_64"
MIB = 1 << 20


@contextmanager
def machine(folder: Path, ram_mib: int, *arguments: str) -> Iterator[Machine]:
    path = folder / "vm.qmp"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        monitor = listening.fileno()
        command = f"""{QEMU} -accel tcg -machine q35 -m {ram_mib} -nodefaults -display none -S
            -chardev socket,id=qmp,fd={monitor},server=on,wait=off -mon chardev=qmp,mode=control"""
        process = subprocess.Popen([*command.split(), *arguments], pass_fds=[monitor])
    try:
        with Machine(path) as connected:
            yield connected
    finally:
        process.kill()
        process.wait()


def wait(machine: Machine) -> None:
    while (status := machine.execute("query-migrate").get("status")) != "completed":
        assert status != "failed"
        time.sleep(0.002)


def main(*, quick: bool = False) -> None:
    if not shutil.which(QEMU):
        print(f"{QEMU} is not installed: no | table |")
        return
    ram_mib = 128 if quick else 2048
    used_mib = ram_mib * 3 // 4
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR")) as name:
        folder = Path(name)
        stream, container, content = folder / "stream", folder / "vm.vmsnap", folder / "content"
        with content.open("wb") as file:
            for _ in range(used_mib):
                file.write(os.urandom(MIB))
        loader = f"loader,file={content},addr=0x1000000,force-raw=on"
        times: dict[str, list[float]] = {"to": [], "snapshot": [], "from": [], "restore": []}

        @contextmanager
        def timed(what: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            times[what].append(time.perf_counter() - start)

        for _ in range(1 if quick else 5):
            with (
                stream.open("wb") as file,
                machine(folder, ram_mib, "-device", loader) as vm,
            ):
                vm.execute("migrate-set-parameters", {"max-bandwidth": 1 << 50})
                with timed("to"):
                    vm.execute("getfd", {"fdname": "file"}, fd=file.fileno())
                    vm.execute("migrate", {"uri": "fd:file"})
                    wait(vm)
            with machine(folder, ram_mib, "-device", loader) as vm:
                with timed("snapshot"):
                    snapshot = vm.snapshot()
                send(snapshot, container)
                qemu.write(snapshot, stream)
                del snapshot
            os.sync()
            with (
                stream.open("rb") as file,
                machine(folder, ram_mib, "-incoming", "defer") as vm,
                timed("from"),
            ):
                vm.execute("getfd", {"fdname": "file"}, fd=file.fileno())
                vm.execute("migrate-incoming", {"uri": "fd:file"})
                wait(vm)
            with machine(folder, ram_mib, "-incoming", "defer") as vm, timed("restore"):
                vm.restore(recv(container))
    medians = {what: statistics.median(series) for what, series in times.items()}
    rows: list[tuple[object, ...]] = []
    for ours, theirs, how in (
        ("snapshot", "to", "QEMU writes its stream to a file"),
        ("restore", "from", "QEMU reads its stream from a file"),
    ):
        rows.append((how, ms(medians[theirs]), "1.00"))
        rows.append((f"vmmig: {ours}", ms(medians[ours]), f"{medians[ours] / medians[theirs]:.2f}"))
    head = ("how", "ms", "x QEMU's own")
    print(table(f"A VM of {ram_mib} MiB, of which {used_mib} are in use", head, rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
