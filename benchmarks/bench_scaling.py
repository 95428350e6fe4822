"""Whether time grows in step with nodes and with bytes."""

from __future__ import annotations

import os
import sys
from functools import partial

from benchmarks.bench_codec import node, wide
from benchmarks.timing import medians_s, ms, table
from vmmig import dumps, loads


def main(*, quick: bool = False) -> None:
    scale = 100 if quick else 1
    rounds = 1 if quick else 5
    rows: list[tuple[object, ...]] = []
    for leaves in (10_000, 100_000, 1_000_000):
        tree = wide(leaves // scale)
        data = dumps(tree)
        times = medians_s(
            {"dumps": partial(dumps, tree), "loads": partial(loads, data)}, rounds=rounds
        )
        per_node = [f"{times[name] / (leaves // scale) * 1e9:.0f}" for name in times]
        rows.append((f"{leaves // scale} leaves", *map(ms, times.values()), *per_node))
    head = ("tree", "dumps ms", "loads ms", "dumps ns a leaf", "loads ns a leaf")
    print(table("Nodes", head, rows))
    rows = []
    for mib in (64, 256, 1024):
        ram = node("ram", os.urandom(1 << 20) * (mib // min(scale, 64)))
        data = dumps(ram)
        times = medians_s(
            {"dumps": partial(dumps, ram), "loads": partial(loads, data)}, rounds=rounds
        )
        rates = [f"{len(data) / times[name] / (1 << 30):.1f}" for name in times]
        rows.append((f"{len(data) >> 20} MiB", *map(ms, times.values()), *rates))
    head = ("section", "dumps ms", "loads ms", "dumps GiB/s", "loads GiB/s")
    print(table("Bytes", head, rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
