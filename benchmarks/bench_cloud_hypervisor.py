"""Read and write the JSON of a snapshot folder of 2020, against the json module and msgspec.

Each run is a process of its own, so that it can tell how much memory it took at most.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import table
from vmmig import Snapshot, SnapshotDataSection
from vmmig.formats.cloud_hypervisor import SEED_JSON

MB = 1_000_000


def read_with(decode: Callable[[bytes], Any], path: Path) -> None:
    """What a user of another decoder would do: make bytes of each list of integers."""
    tree = decode(path.read_bytes())
    for section in tree["snapshot_data"].values():
        section["snapshot"] = bytes(section["snapshot"])


def write_with(encode: Callable[[Any], bytes], snapshot: Snapshot, path: Path) -> None:
    """The same for an encoder."""
    sections = {
        id: {"id": id, "snapshot": list(memoryview(section.snapshot))}
        for id, section in snapshot.snapshot_data.items()
    }
    tree = {"id": snapshot.id, "snapshots": {}, "snapshot_data": sections}
    with path.open("wb") as file:
        file.write(encode(tree))
        file.flush()
        os.fsync(file.fileno())


def run_one(kind: str, name: str, path: Path) -> None:
    """Print the seconds and the peak, in MB, of one reading or writing."""
    import msgspec

    codecs: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
        "json": (json.loads, lambda tree: json.dumps(tree, separators=(",", ":")).encode()),
        "msgspec": (msgspec.json.decode, msgspec.json.encode),
    }
    snapshot = SEED_JSON.read(path) if kind == "write" else None
    start = time.perf_counter()
    if snapshot is None:
        SEED_JSON.read(path) if name == "vmmig" else read_with(codecs[name][0], path)
    else:
        out = path.with_suffix(".out")
        SEED_JSON.write(snapshot, out) if name == "vmmig" else write_with(
            codecs[name][1], snapshot, out
        )
    seconds = time.perf_counter() - start
    # Unlike getrusage, this does not count what the parent had at the fork.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(seconds, int(peak[1]) * 1024 / MB)


def measure(kind: str, name: str, path: Path) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.bench_cloud_hypervisor", kind, name, str(path)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak_mb = map(float, run.stdout.split())
    return seconds, peak_mb


def main(*, quick: bool = False) -> None:
    scale = 100 if quick else 1
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR", ".")) as folder:
        path = Path(folder, "vm.json")
        for title, each, size_mb in (("random bytes", 1, 56), ("one byte of four not zero", 4, 84)):
            data = bytearray(size_mb * MB // scale)
            data[::each] = random.Random(0).randbytes(len(data[::each]))
            vm = Snapshot("vm")
            vm.add_data_section(SnapshotDataSection("vm-section", bytes(data)))
            SEED_JSON.write(vm, path)
            text_mb = path.stat().st_size / MB
            for kind in ("read", "write"):
                runs: dict[str, list[tuple[float, float]]] = {
                    "vmmig": [],
                    "json": [],
                    "msgspec": [],
                }
                for _ in range(1 if quick else 3):
                    for name, found in runs.items():
                        found.append(measure(kind, name, path))
                rows: list[tuple[object, ...]] = [
                    (
                        name,
                        f"{text_mb / statistics.median(seconds for seconds, _ in found):.0f}",
                        f"{max(peak_mb for _, peak_mb in found):.0f}",
                    )
                    for name, found in runs.items()
                ]
                head = ("how", "MB/s of JSON", "peak, MB")
                print(table(f"{kind} {text_mb:.0f} MB of vm.json: {title}", head, rows))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        run_one(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        main(quick="--quick" in sys.argv)
