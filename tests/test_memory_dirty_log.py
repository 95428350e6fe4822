"""Dirty logs: no write is ever missed, and nothing else is reported."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmig import dirty_log
from vmmig._native import libc
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import PAGE_BYTES, MemoryRange, MemoryRangeTable

MIB = 1 << 20
LAYOUT = [MemoryRange(0x4000, 0x8000), MemoryRange(0xC000, 0x4000), MemoryRange(1 << 32, 0x8000)]
PAGES = [at for r in LAYOUT for at in range(r.gpa, r.end, PAGE_BYTES)]


def kernel_logs() -> bool:
    memory = GuestMemory([MemoryRange(0, PAGE_BYTES)], dirty_log_backend="pagemap")
    try:
        memory.start_dirty_log()
    except MigratableError:
        return False
    return True


needs_kernel = pytest.mark.skipif(
    not kernel_logs() and not os.environ.get("CI"), reason="this kernel has no PAGEMAP_SCAN"
)
BACKENDS = ["shadow", pytest.param("pagemap", marks=needs_kernel)]


def pages_of(table: MemoryRangeTable) -> set[int]:
    assert MemoryRangeTable.merge([table]) == table
    return {at for r in table for at in range(r.gpa, r.end, PAGE_BYTES)}


def by_slice(memory: GuestMemory, gpa: int, data: bytes) -> None:
    memory.write(gpa, data)


def by_c(memory: GuestMemory, gpa: int, data: bytes) -> None:
    for region in memory.regions:
        part = MemoryRangeTable([MemoryRange(gpa, len(data))]) & MemoryRangeTable([region.range])
        for at, length in part.pairs():
            source = data[at - gpa : at - gpa + length]
            libc().memmove(region.address + at - region.gpa, source, length)


def by_kernel(memory: GuestMemory, gpa: int, data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        for view in memory.views([MemoryRange(gpa, len(data))]):
            there.sendall(data[: view.nbytes])
            assert here.recv_into(view, flags=socket.MSG_WAITALL) == view.nbytes
            data = data[view.nbytes :]


WRITES = st.tuples(
    st.sampled_from([by_slice, by_c, by_kernel]),
    st.one_of(st.integers(0x4000, 0xFF00), st.integers(1 << 32, (1 << 32) + 0x7F00)),
    st.binary(min_size=1, max_size=3),
    st.sampled_from([1, 1, 0x20, 0x55]),
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(PAGES)),
    st.lists(st.lists(WRITES, max_size=5), max_size=5),
    st.sets(st.sampled_from(PAGES)),
)
def test_each_look_has_what_was_written_since_the_last(
    backend: Any,
    touched: list[int],
    rounds: list[list[tuple[Callable[..., None], int, bytes, int]]],
    read: set[int],
) -> None:
    memory = GuestMemory(LAYOUT, dirty_log_backend=backend)
    for page in touched:
        memory.write(page, b"before")
    memory.start_dirty_log()
    assert memory.dirty_log_backend == backend
    for writes in rounds:
        before = {page: memory.read(page, PAGE_BYTES) for page in PAGES}
        written = set()
        for write, gpa, data, repeats in writes:
            data = (data * repeats)[:0x100]
            write(memory, gpa, data)
            written |= {at & -PAGE_BYTES for at in range(gpa, gpa + len(data))}
        for page in read:
            memory.read(page, 1)
        changed = {page for page in PAGES if memory.read(page, PAGE_BYTES) != before[page]}
        assert changed <= written
        assert pages_of(memory.dirty_log()) == (written if backend == "pagemap" else changed)
    assert memory.dirty_log() == MemoryRangeTable()
    memory.stop_dirty_log()
    with pytest.raises(MigratableError, match=r"start_dirty_log\(\) first"):
        memory.dirty_log()


def copied(table: MemoryRangeTable, source: GuestMemory, destination: GuestMemory) -> set[int]:
    for view, new in zip(destination.views(table), source.views_to_send(table), strict=True):
        view[:] = new
    return pages_of(table)


def writers(memory: GuestMemory, pages: list[int], stamp: int) -> Iterator[Thread]:
    """Threads which together write to each page once, each in its own way."""
    ways = [by_slice, by_c, by_kernel]
    for i, way in enumerate(ways):

        def run(mine: list[int], way: Callable[..., None] = way) -> None:
            for page in mine:
                way(memory, page + page // PAGE_BYTES % 4000, stamp.to_bytes(8, "little"))

        yield Thread(target=run, args=(pages[i :: len(ways)],))


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_that_race_the_look_are_in_this_one_or_the_next(backend: Any) -> None:
    # Each page is written to once a round, so one that is missed stays missed.
    layout = [MemoryRange(0, 4 * MIB), MemoryRange(1 << 32, 4 * MIB)]
    source = GuestMemory(layout, dirty_log_backend=backend)
    destination = GuestMemory(layout)
    pages = [at for r in layout for at in range(r.gpa, r.end, PAGE_BYTES)]
    rng = random.Random(5)
    source.start_dirty_log()
    copied(source.nonzero(), source, destination)
    for stamp in range(1, 13):
        rng.shuffle(pages)
        written = pages[: len(pages) * 3 // 4]
        seen: set[int] = set()
        threads = [*writers(source, written, stamp)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            seen |= copied(source.dirty_log(), source, destination)
        for thread in threads:
            thread.join()
        seen |= copied(source.dirty_log(), source, destination)
        assert seen == {*written}
        assert all(
            a.memory == b.memory for a, b in zip(source.regions, destination.regions, strict=True)
        )
        assert source.dirty_log() == MemoryRangeTable()


@pytest.mark.parametrize("backend", BACKENDS)
def test_native_code_that_writes_all_the_time_loses_nothing(backend: Any) -> None:
    # It runs without the interpreter's lock, so it writes during every look.
    size = 2 * MIB
    source = GuestMemory([MemoryRange(0, size)], dirty_log_backend=backend)
    destination = GuestMemory([MemoryRange(0, size)])
    (region,) = source.regions
    over = []

    def run() -> None:
        rng = random.Random(7)
        memset = libc().memset
        while not over:
            at = rng.randrange(size // PAGE_BYTES)
            length = rng.choice([1, 1, 5000, 600_000])
            at = min(at * PAGE_BYTES + 4000, size - length)
            memset(region.address + at, rng.randrange(256), length)

    source.start_dirty_log()
    thread = Thread(target=run)
    thread.start()
    for _ in range(150):
        copied(source.dirty_log(), source, destination)
    over.append(True)
    thread.join()
    copied(source.dirty_log(), source, destination)
    assert region.memory == destination.regions[0].memory


def test_a_page_that_changes_back_before_the_next_look_is_no_error_of_the_copy() -> None:
    source = GuestMemory([MemoryRange(0, PAGE_BYTES)], dirty_log_backend="shadow")
    destination = GuestMemory([MemoryRange(0, PAGE_BYTES)])
    source.start_dirty_log()
    source.write(0, b"1")
    table = source.dirty_log()
    source.write(0, b"2")
    copied(table, source, destination)
    source.write(0, b"1")
    copied(source.dirty_log(), source, destination)
    assert destination.read(0, 1) == b"1"


def test_a_page_that_was_zero_for_a_moment_is_in_the_first_pass() -> None:
    source = GuestMemory([MemoryRange(0, 2 * PAGE_BYTES)], dirty_log_backend="shadow")
    destination = GuestMemory([MemoryRange(0, 2 * PAGE_BYTES)])
    source.write(0, b"1")
    source.write(PAGE_BYTES, b"0")
    source.start_dirty_log()
    source.write(0, b"\0")
    table = source.nonzero()
    source.write(0, b"1")
    copied(table, source, destination)
    copied(source.dirty_log(), source, destination)
    assert destination.read(0, 1) == b"1"


@needs_kernel
def test_more_ranges_than_one_call_to_the_kernel_gives() -> None:
    memory = GuestMemory([MemoryRange(1 << 32, 1 << 29)], dirty_log_backend="pagemap")
    memory.start_dirty_log()
    (region,) = memory.regions
    written = range(0, 70_000 * PAGE_BYTES, 2 * PAGE_BYTES)
    for at in written:
        region.memory[at] = 1
    expected = MemoryRangeTable(MemoryRange((1 << 32) + at, PAGE_BYTES) for at in written)
    assert len(expected) > 2 * dirty_log._RANGES_A_CALL
    assert memory.dirty_log() == expected
    assert memory.dirty_log() == MemoryRangeTable()
    region.memory[: 1 << 28] = bytes(1 << 28)
    assert memory.dirty_log() == MemoryRangeTable([MemoryRange(1 << 32, 1 << 28)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_that_is_started_again_forgets(backend: Any) -> None:
    memory = GuestMemory(LAYOUT, dirty_log_backend=backend)
    memory.start_dirty_log()
    memory.write(0x4000, b"before")
    memory.start_dirty_log()
    memory.write(0x5000, b"after")
    assert pages_of(memory.dirty_log()) == {0x5000}


@needs_kernel
def test_the_kernels_log_is_preferred() -> None:
    memory = GuestMemory(LAYOUT)
    memory.start_dirty_log()
    assert memory.dirty_log_backend == "pagemap"


LIES = {"_PAGE_IS_WRITTEN": 1 << 7, "_PM_SCAN_WP_MATCHING": 0, "_SYS_USERFAULTFD": {}}


@pytest.mark.parametrize("name", LIES)
def test_a_kernel_that_cannot_or_is_wrong_is_found_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Soft-dirty bits stay clear here; without protection all that was written comes again.
    monkeypatch.setattr(dirty_log, name, LIES[name])
    forced = GuestMemory(LAYOUT, dirty_log_backend="pagemap")
    with pytest.raises(MigratableError, match="'shadow' needs no help"):
        forced.start_dirty_log()
    assert forced.dirty_log_backend is None
    memory = GuestMemory(LAYOUT)
    memory.start_dirty_log()
    assert memory.dirty_log_backend == "shadow"


@needs_kernel
def test_after_a_look_that_failed_all_is_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GuestMemory(LAYOUT, dirty_log_backend="pagemap")
    memory.start_dirty_log()
    memory.write(0x4000, b"early")
    with monkeypatch.context() as patch:
        patch.setattr(dirty_log, "_PAGEMAP_SCAN", 0xC0606611)
        with pytest.raises(MigratableError, match="all of the memory"):
            memory.dirty_log()
    assert memory.dirty_log() == MemoryRangeTable.merge([memory.ranges])
    assert memory.dirty_log() == MemoryRangeTable()


def child(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


PREAMBLE = """
import os
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRange
"""


@needs_kernel
def test_an_ordinary_user_may_log() -> None:
    # A process that drops its privileges is closed to itself too, until it says otherwise.
    # What the modules import when they are used may be in a folder that only the first user reads.
    code = """
from vmmig._native import libc
GuestMemory([MemoryRange(0, 1 << 20)]).start_dirty_log()
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    libc().prctl(4, 1, 0, 0, 0)
status = open("/proc/self/status").read()
assert "CapEff:\\t0000000000000000" in status, status
memory = GuestMemory([MemoryRange(0, 1 << 20)], dirty_log_backend="pagemap")
memory.start_dirty_log()
memory.write(0x3000, b"new")
reading, writing = os.pipe()
os.write(writing, b"from the kernel")
os.readv(reading, memory.views([MemoryRange(0x7000, 100)]))
print([*memory.dirty_log().pairs()], len(memory.dirty_log()), os.getuid() != 0)
"""
    assert child(PREAMBLE + code) == "[(12288, 4096), (28672, 4096)] 0 True\n"


@needs_kernel
def test_a_forked_child_disturbs_nothing() -> None:
    code = """
memory = GuestMemory([MemoryRange(0, 1 << 20)], dirty_log_backend="pagemap")
memory.start_dirty_log()
memory.write(0x3000, b"parent")
child = os.fork()
if child == 0:
    try:
        memory.dirty_log()
    except MigratableError as error:
        print("not of this fork" in str(error), flush=True)
    memory.stop_dirty_log()
    memory.start_dirty_log()
    memory.write(0x5000, b"child")
    print([*memory.dirty_log().pairs()], flush=True)
    memory.close()
    os._exit(0)
os.waitpid(child, 0)
memory.write(0x7000, b"parent")
print([*memory.dirty_log().pairs()], memory.read(0x5000, 5))
memory.write(0x3000, b"parent")
print([*memory.dirty_log().pairs()])
"""
    assert child(PREAMBLE + code).splitlines() == [
        "True",
        "[(20480, 4096)]",
        "[(12288, 4096), (28672, 4096)] b'child'",
        "[(12288, 4096)]",
    ]


@needs_kernel
def test_memory_that_is_dropped_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in itertools.repeat(None, 5):
        memory = GuestMemory(LAYOUT, dirty_log_backend="pagemap")
        memory.start_dirty_log()
    del memory
    assert os.listdir("/proc/self/fd") == before


@needs_kernel
def test_memory_shared_by_descriptor_logs_its_own_writes_only() -> None:
    source = GuestMemory(LAYOUT, dirty_log_backend="pagemap")
    parts = [(region.range, region.fd) for region in source.regions if region.fd is not None]
    other = GuestMemory.from_fds(parts, dirty_log_backend="pagemap")
    other.start_dirty_log()
    source.write(0x4000, b"not seen")
    other.write(0x5000, b"seen")
    assert pages_of(other.dirty_log()) == {0x5000}
