"""Save a snapshot durably, against plain write and fsync; open one, and read one section."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.timing import medians_s, ms, table
from vmmig import Snapshot, SnapshotDataSection, recv, send

MIB = 1 << 20


def machine(ram_mib: int, sections: int) -> Snapshot:
    """RAM of random bytes in equal sections, and a vCPU."""
    ram = mmap.mmap(-1, ram_mib * MIB)
    block = os.urandom(MIB)
    for start in range(0, len(ram), MIB):
        ram[start : start + MIB] = block
        ram[start : start + 8] = start.to_bytes(8, "little")
    view, size = memoryview(ram), ram_mib * MIB // sections
    snapshot = Snapshot("vm")
    for name in range(sections):
        part = SnapshotDataSection(f"ram-{name:04d}", view[name * size : (name + 1) * size])
        snapshot.add_data_section(part)
    snapshot.add_data_section(SnapshotDataSection("cpu", bytes(1024)))
    return snapshot


def plain_write(payloads: list[memoryview], path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for payload in payloads:
            for start in range(0, len(payload), MIB):
                file.write(payload[start : start + MIB])
        os.fsync(file.fileno())


def main(*, quick: bool = False) -> None:
    scale = 64 if quick else 1
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR", ".")) as folder:
        path, other = Path(folder, "vm.vmsnap"), Path(folder, "plain")
        size = 2048 // scale
        snapshot = machine(size, 2)
        payloads = [s.snapshot for s in snapshot.snapshot_data.values()]
        views = [memoryview(payload) for payload in payloads]

        def plain(views: list[memoryview]) -> None:
            other.unlink(missing_ok=True)
            plain_write(views, other)

        def save(snapshot: Snapshot) -> None:
            path.unlink(missing_ok=True)
            send(snapshot, path)

        actions = {"plain": partial(plain, views), "send": partial(save, snapshot)}
        times = medians_s(actions, rounds=1 if quick else 7)
        rows: list[tuple[object, ...]] = [
            ("write 1 MiB at a time, fsync", ms(times["plain"]), "1.00"),
            ("vmmig.send", ms(times["send"]), f"{times['plain'] / times['send']:.2f}"),
        ]
        print(table(f"Durable save of {size} MiB", ("how", "ms", "x plain write + fsync"), rows))
        other.unlink()
        del snapshot, payloads, views, actions

        size = 4096 // scale
        for count in (4, size):
            send(machine(size, count), path)
            opened = {
                "open, read the vCPU's section": lambda: (
                    recv(path, lazily=True).section("cpu").nbytes
                ),
                f"open, check and read one of {count} RAM sections of {size // count} MiB": (
                    lambda: memoryview(recv(path, lazily=True).section("ram-0001").snapshot)[0]
                ),
                "open, check everything": lambda: recv(path),
            }
            times = medians_s(opened, rounds=1 if quick else 7)
            rows = [(name, ms(time)) for name, time in times.items()]
            print(table(f"A container of {size} MiB", ("what", "ms"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
