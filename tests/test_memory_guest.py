"""Guest memory: bytes at guest-physical addresses, whatever regions they are in."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmig import guest_memory
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import PAGE_BYTES, MemoryRange, MemoryRangeTable

# Two regions without a gap, a hole, and one more.
LAYOUT = [MemoryRange(0x10000, 0x4000), MemoryRange(0x4000, 0x2000), MemoryRange(0x6000, 0x3000)]
RAM = {*range(0x4000, 0x9000), *range(0x10000, 0x14000)}
ADDRESSES = st.one_of(
    st.integers(0x3FF0, 0x9010), st.integers(0xFFF0, 0x14010), st.sampled_from([0, 1 << 63])
)


def open_files() -> set[str]:
    return {*os.listdir("/proc/self/fd")}


def pages_of(table: MemoryRangeTable) -> set[int]:
    assert all(gpa % PAGE_BYTES == 0 == length % PAGE_BYTES for gpa, length in table.pairs())
    return {at for r in table for at in range(r.gpa, r.end, PAGE_BYTES)}


@given(st.lists(st.tuples(ADDRESSES, st.binary(max_size=0x2100)), max_size=8))
def test_what_is_written_is_read(writes: list[tuple[int, bytes]]) -> None:
    model = dict.fromkeys(RAM, 0)
    with GuestMemory(LAYOUT) as memory:
        assert [r.gpa for r in memory.regions] == [0x4000, 0x6000, 0x10000]
        assert memory.total_bytes == memory.ranges.total_bytes == len(RAM)
        for gpa, data in writes:
            fits = {*range(gpa, gpa + len(data))} <= RAM
            if fits:
                memory.write(gpa, data)
                model.update(zip(range(gpa, gpa + len(data)), data, strict=True))
            else:
                with pytest.raises(MigratableError, match="no RAM at"):
                    memory.write(gpa, data)
        assert memory.read(0x4000, 0x5000) == bytes(model[at] for at in range(0x4000, 0x9000))
        assert memory.read(0x10000, 0x4000) == bytes(model[at] for at in range(0x10000, 0x14000))
        touched = {at & -PAGE_BYTES for at, byte in model.items() if byte}
        assert pages_of(memory.nonzero()) == touched
        assert pages_of(memory.allocated()) >= touched
        memory.zero()
        assert memory.nonzero() == MemoryRangeTable()


def test_views_are_the_memory_itself_and_its_address_is_where_it_is() -> None:
    memory = GuestMemory(LAYOUT)
    table = MemoryRangeTable([MemoryRange(0x5FFF, 2), MemoryRange(0x10000, 4)])
    first, second, third = memory.views(table)
    assert [view.nbytes for view in (first, second, third)] == [1, 1, 4]
    third[:] = b"code"
    assert memory.read(0x10000, 4) == b"code"
    address = memory.regions[2].address
    guest_memory.libc().memset(address, ord("x"), 2)
    assert bytes(third) == b"xxde"
    assert all(view.readonly for view in memory.views_to_send(table))
    assert b"".join(memory.views_to_send(table)) == b"\0\0xxde"
    with pytest.raises(MigratableError, match=r"no RAM at 0x9000, .* 0x4000 to 0x5fff, 0x6000"):
        memory.views([MemoryRange(0x8000, 0x1001)])


def test_pages_that_were_not_touched_take_no_memory() -> None:
    memory = GuestMemory([MemoryRange(0, 1 << 40)])
    memory.write(1 << 39, b"\0")
    memory.write((1 << 39) + PAGE_BYTES, b"1")
    assert [*memory.allocated().pairs()] == [(1 << 39, 2 * PAGE_BYTES)]
    assert [*memory.nonzero().pairs()] == [((1 << 39) + PAGE_BYTES, PAGE_BYTES)]


def test_a_page_is_nonzero_by_any_byte() -> None:
    memory = GuestMemory([MemoryRange(0, 64 * PAGE_BYTES)])
    memory.write(0, bytes(64 * PAGE_BYTES))
    for page in range(0, 64, 2):
        memory.write(page * PAGE_BYTES + page * 65 % PAGE_BYTES, b"\1")
    memory.write(63 * PAGE_BYTES + 4095, b"\1")
    assert pages_of(memory.nonzero()) == {p * PAGE_BYTES for p in [*range(0, 64, 2), 63]}


@pytest.mark.parametrize("advice", [guest_memory._MADV_POPULATE_WRITE, 9999])
def test_prefaulting_allocates_all_and_changes_nothing(
    advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_memory, "_MADV_POPULATE_WRITE", advice)
    memory = GuestMemory(LAYOUT)
    memory.write(0x11000, b"code")
    memory.prefault()
    assert memory.allocated() == MemoryRangeTable.merge([memory.ranges])
    assert memory.read(0x11000, 4) == b"code"
    assert pages_of(memory.nonzero()) == {0x11000}


def test_zeroing_gives_the_memory_back() -> None:
    memory = GuestMemory(LAYOUT)
    memory.prefault()
    memory.zero()
    assert memory.allocated() == MemoryRangeTable()


def test_zeroing_is_in_the_dirty_log() -> None:
    memory = GuestMemory(LAYOUT)
    memory.write(0x11000, b"code")
    memory.start_dirty_log()
    memory.zero()
    assert 0x11000 in pages_of(memory.dirty_log())
    assert memory.read(0x11000, 4) == bytes(4)


def test_closed_memory_lives_as_long_as_its_views() -> None:
    before = open_files()
    with GuestMemory(LAYOUT) as memory:
        (view,) = memory.views([MemoryRange(0x10000, 4)])
        region = memory.regions[0]
        memory.start_dirty_log()
        assert open_files() - before
    view[:] = b"code"
    region.memory[:4] = b"code"
    for act in (
        lambda: memory.read(0x10000, 4),
        lambda: memory.regions,
        memory.start_dirty_log,
        memory.dirty_log,
        memory.prefault,
    ):
        with pytest.raises(MigratableError, match=r"closed|no dirty log"):
            act()
    memory.close()
    del view, region
    assert open_files() == before


@pytest.mark.parametrize(
    ("ranges", "what"),
    [
        ([], "at least one"),
        ([MemoryRange(0, 0)], "whole pages"),
        ([MemoryRange(0, 4095)], "whole pages"),
        ([MemoryRange(1, 4096)], "whole pages"),
        ([MemoryRange(0, 8192), MemoryRange(4096, 4096)], "overlap"),
        ([MemoryRange(0, 4096), MemoryRange(0, 4096)], "overlap"),
        ([MemoryRange(0, 4096), MemoryRange(4096, 1 << 62)], "no room"),
    ],
)
def test_memory_that_cannot_be_is_refused(ranges: list[MemoryRange], what: str) -> None:
    before = open_files()
    with pytest.raises(MigratableError, match=what):
        GuestMemory(ranges)
    assert open_files() == before


# --- descriptors of another process ------------------------------------------------------------


def test_memory_of_received_descriptors_is_shared_and_keeps_its_size() -> None:
    source = GuestMemory(LAYOUT)
    received = [(region.range, os.dup(region.fd)) for region in source.regions if region.fd]
    destination = GuestMemory.from_fds(reversed(received))
    for _, fd in received:
        os.close(fd)
    source.write(0x5FFE, b"code")
    assert destination.read(0x5FFE, 4) == b"code"
    destination.write(0x10000, b"back")
    source_region = source.regions[2]
    assert bytes(source_region.memory[:4]) == b"back"
    assert source_region.fd is not None
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(source_region.fd, size)


def test_a_memfd_that_can_be_sealed_is_sealed_against_shrinking() -> None:
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with GuestMemory.from_fds([(MemoryRange(0, 8192), fd)]), pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    os.close(fd)


@pytest.mark.parametrize("size", [0, 4096, 12288])
def test_a_descriptor_of_another_size_is_refused(size: int) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        with pytest.raises(MigratableError, match=f"at 0x1000 has {size} bytes, not 8192"):
            GuestMemory.from_fds([(MemoryRange(0x1000, 8192), file.fileno())])


def test_what_is_no_memory_is_refused() -> None:
    reading, writing = os.pipe()
    for fd in (reading, -1):
        with pytest.raises(MigratableError, match="0x1000"):
            GuestMemory.from_fds([(MemoryRange(0x1000, 8192), fd)])
    os.close(reading)
    os.close(writing)


# --- who records writes ------------------------------------------------------------------------


class Own:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_dirty_log(self) -> None:
        self.calls.append("start")

    def dirty_log(self) -> MemoryRangeTable:
        self.calls.append("look")
        return MemoryRangeTable([MemoryRange(0x4000, 0x1000)])

    def stop_dirty_log(self) -> None:
        self.calls.append("stop")


def test_the_emulators_own_log_is_asked() -> None:
    own = Own()
    memory = GuestMemory(LAYOUT, dirty_log_backend=own)
    assert memory.dirty_log_backend is None
    memory.start_dirty_log()
    assert memory.dirty_log_backend is own
    assert memory.dirty_log().total_bytes == 0x1000
    memory.write(0x4000, b"now")
    assert b"".join(memory.views_to_send([MemoryRange(0x4000, 3)])) == b"now"
    memory.stop_dirty_log()
    memory.stop_dirty_log()
    assert own.calls == ["start", "look", "stop"]


def test_a_backend_that_does_not_exist_is_refused() -> None:
    backend: Any = "soft-dirty"
    with pytest.raises(MigratableError, match="'soft-dirty'"):
        GuestMemory(LAYOUT, dirty_log_backend=backend)
