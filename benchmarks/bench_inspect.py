"""Look into a container of 8 GiB, and compare two of 2 GiB, each as a whole process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from xxhash import xxh3_64_intdigest

from benchmarks.bench_files import MIB, machine
from benchmarks.timing import medians_s, ms, table
from vmmig import Snapshot, SnapshotDataSection, send
from vmmig.codec import HEADER_BYTES
from vmmig.codec.layout import chunks_in, encode_index, encode_table, write_header
from vmmig.snapshot import flatten

_VMMIG = (sys.executable, "-m", "vmmig.cli")


def sparse_container(path: Path, ram_bytes: int) -> None:
    """A container of zeros, of which the disk holds next to nothing, and memory never did."""
    vm = Snapshot("vm", {}, {"ram": SnapshotDataSection("ram")})
    cpu = Snapshot("cpu", {}, {"state": SnapshotDataSection("state", b'{"rip": 4096}')})
    vm.add_snapshot(cpu)
    columns = flatten(vm)
    small = b'{"rip": 4096}'
    index = encode_index(columns._replace(payloads=[ram_bytes, len(small)]), None)
    start = HEADER_BYTES + len(index) + len(small)
    start += -start % 4096
    zeros = xxh3_64_intdigest(bytes(MIB))
    sums = encode_table([xxh3_64_intdigest(small)] + [zeros] * chunks_in(ram_bytes))
    end = start + ram_bytes
    with path.open("wb") as file:
        file.write(write_header(0, index, end + len(sums)) + index + small)
        file.seek(end)
        file.write(sums)


def run(*words: str | Path, status: int = 0) -> int:
    """The most memory that a process took, in bytes; it must end with this status."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, waited, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(waited)
    assert process.returncode == status, (words, process.returncode)
    return usage.ru_maxrss * 1024


def main(*, quick: bool = False) -> None:
    scale = 64 if quick else 1
    rounds = 1 if quick else 7
    with tempfile.TemporaryDirectory(dir=os.environ.get("VMMIG_BENCHMARK_DIR", ".")) as name:
        folder = Path(name)
        size = 8192 // scale
        path = folder / "large.vmsnap"
        sparse_container(path, size * MIB)
        commands: dict[str, tuple[str | Path, ...]] = {
            "python -c pass": (sys.executable, "-c", "pass"),
            "vmmig --version": (*_VMMIG, "--version"),
            "vmmig inspect": (*_VMMIG, "inspect", path),
            "vmmig inspect --json": (*_VMMIG, "inspect", path, "--json"),
            "vmmig inspect, the RAM's first bytes": (*_VMMIG, "inspect", path, "ram"),
            "vmmig inspect --html": (*_VMMIG, "inspect", path, "--html", folder / "page.html"),
        }
        memory = {what: run(*words) for what, words in commands.items()}
        times = medians_s({w: lambda c=c: run(*c) for w, c in commands.items()}, rounds=rounds)
        rows: list[tuple[object, ...]] = [
            (what, ms(times[what]), memory[what] // MIB) for what in commands
        ]
        print(table(f"A container of {size} MiB", ("process", "ms", "MiB of memory"), rows))
        path.unlink()

        size = 2048 // scale
        before, after, other = (folder / f"{name}.vmsnap" for name in ("a", "b", "c"))
        send(machine(size, 1), before)
        shutil.copyfile(before, after)
        with after.open("r+b") as file:
            file.seek(size * MIB // 2)
            file.write(b"changed, and the checksum not")
        send(machine(size, 1), other)
        comparisons: dict[str, tuple[tuple[str | Path, ...], int]] = {
            "cmp, until the first difference": (("cmp", "-s", before, after), 1),
            "diff --full, one page differs": ((*_VMMIG, "diff", "--full", before, after), 1),
            "diff, by the checksums, which agree": ((*_VMMIG, "diff", before, after), 0),
            "diff, nearly every page differs": ((*_VMMIG, "diff", before, other), 1),
            "verify": ((*_VMMIG, "verify", before), 0),
        }
        actions = {
            what: lambda words=words, status=status: run(*words, status=status)
            for what, (words, status) in comparisons.items()
        }
        times = medians_s(actions, rounds=1 if quick else 5)
        rows = [(what, ms(times[what]), f"{size / 1024 / times[what]:.2f}") for what in comparisons]
        print(table(f"Containers of {size} MiB", ("process", "ms", "GiB/s of one"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
