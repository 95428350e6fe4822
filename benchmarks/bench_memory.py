"""The dirty log by how much is dirty, the sparse first pass, and sealed copies."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from benchmarks.timing import medians_s, ms, table
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import PAGE_BYTES, MemoryRange
from vmmig.sealed import sealed_copy

MIB = 1 << 20


def filled(mib: int, **options: Any) -> GuestMemory:
    """RAM of which every page has random bytes."""
    memory = GuestMemory([MemoryRange(0, mib * MIB)], **options)
    view, block = memory.regions[0].memory, os.urandom(MIB)
    for start in range(0, mib * MIB, MIB):
        view[start : start + MIB] = block
    return memory


def dirty_log(mib: int, backend: str, *, rounds: int) -> list[tuple[object, ...]]:
    memory = filled(mib, dirty_log_backend=backend)
    try:
        memory.start_dirty_log()
    except MigratableError as error:
        return [(backend, str(error), "", "")]
    view = memory.regions[0].memory
    pages = range(0, mib * MIB, PAGE_BYTES)
    rng = random.Random(1)

    def write(starts: Iterable[int]) -> None:
        for at in starts:
            view[at] ^= 1

    arm = medians_s({"arm": memory.start_dirty_log}, rounds=rounds)["arm"]
    rows: list[tuple[object, ...]] = [(backend, "start", ms(arm * 1024 / mib), "")]
    for percent in (0, 1, 10, 50, 100):
        times: list[float] = []
        found = 0
        for _ in range(rounds):
            write(rng.sample(pages, len(pages) * percent // 100))
            answers: list[Any] = []
            times.append(once_s(lambda answers=answers: answers.append(memory.dirty_log())))
            found = len(answers[0])
        scan = sorted(times)[len(times) // 2]
        what = f"look, {percent} % of the pages dirty at random"
        rows.append((backend, what, ms(scan * 1024 / mib), found))
    memory.stop_dirty_log()
    return rows


def once_s(action: Any) -> float:
    """The time of one call: what it measures cannot be repeated."""
    import time

    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main(*, quick: bool = False) -> None:
    mib, rounds = (16, 1) if quick else (1024, 7)
    rows = dirty_log(mib, "pagemap", rounds=rounds) + dirty_log(mib, "shadow", rounds=rounds)
    head = ("dirty log", "what", "ms per GiB", "ranges")
    print(table(f"Dirty log of {mib} MiB", head, rows))

    full, empty, zeros = filled(mib), GuestMemory([MemoryRange(0, mib * MIB)]), filled(mib)
    view = zeros.regions[0].memory
    for start in range(0, mib * MIB, MIB):
        view[start : start + MIB] = bytes(MIB)
    every_other = GuestMemory([MemoryRange(0, mib * MIB)])
    for at in range(0, mib * MIB, 2 * PAGE_BYTES):
        every_other.write(at, b"1")
    memories = {
        "random bytes": full,
        "never touched": empty,
        "zeros, allocated": zeros,
        "every other page": every_other,
    }
    times = medians_s({name: m.nonzero for name, m in memories.items()}, rounds=rounds)
    rows = [(name, ms(time * 1024 / mib)) for name, time in times.items()]
    print(table(f"The pages that are not zero, of {mib} MiB", ("RAM", "ms per GiB"), rows))

    mib *= 2
    memory = filled(mib)
    source = memory.regions[0].memory
    copies = {
        "bytes()": partial(bytes, source),
        "sealed_copy": partial(sealed_copy, source),
        "sealed_copy of RAM never touched": partial(
            sealed_copy, GuestMemory([MemoryRange(0, mib * MIB)]).regions[0].memory
        ),
    }
    times = medians_s(copies, rounds=rounds)
    rows = [(name, ms(time)) for name, time in times.items()]
    print(table(f"A copy of {mib} MiB that does not change", ("how", "ms"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
