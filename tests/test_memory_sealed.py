"""Sealed copies: nobody can change them, and another process can be given them."""

from __future__ import annotations

import array
import fcntl
import gc
import mmap
import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmig import sealed
from vmmig._native import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRange
from vmmig.sealed import descriptor_of, map_sealed, sealed_copy

MIB = 1 << 20
ALL = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE


def memfds() -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum("memfd:" in link for link in links)


@given(
    st.lists(st.sampled_from([bytes(MIB), b"\1" + bytes(MIB - 1), bytes(MIB - 9) + b"123456789"])),
    st.binary(max_size=40),
    st.data(),
)
def test_a_copy_is_the_bytes_and_its_descriptor_has_them(
    blocks: list[bytes], tail: bytes, data: st.DataObject
) -> None:
    value = b"".join(blocks) + tail
    copy = sealed_copy(value)
    assert copy.readonly
    assert copy.nbytes == len(value)
    assert bytes(copy) == value
    if value:
        start = data.draw(st.integers(0, len(value) - 1))
        end = data.draw(st.integers(start, len(value)))
        place = descriptor_of(copy[start:end])
        assert place is not None
        fd, offset, length = place
        assert (offset, length) == (start, end - start)
        assert os.pread(fd, length, offset) == value[start:end]
        received = map_sealed(os.dup(fd), len(value))
        assert bytes(received[offset : offset + length]) == value[start:end]
        os.close(fd_of(received))


def fd_of(view: memoryview) -> int:
    place = descriptor_of(view)
    assert place is not None
    return os.dup(place[0])


def test_nobody_can_change_it() -> None:
    source = bytearray(b"value" * 1000)
    copy = sealed_copy(source)
    source[:5] = b"other"
    assert bytes(copy[:5]) == b"value"
    with pytest.raises(TypeError):
        copy[0] = 1
    fd = fd_of(copy)
    for act in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 1),
        lambda: os.ftruncate(fd, 1 << 20),
        lambda: mmap.mmap(fd, 5000),
        lambda: fcntl.fcntl(fd, F_ADD_SEALS, 0),
    ):
        with pytest.raises(PermissionError):
            act()
    os.close(fd)


def test_it_lives_as_long_as_a_view_of_it() -> None:
    gc.collect()
    before = memfds()
    copy = sealed_copy(b"value" * 1000)
    part = copy[5:10].toreadonly()
    del copy
    received = map_sealed(fd := fd_of(part), 5000)
    os.close(fd)
    assert descriptor_of(part) is not None
    del part
    assert bytes(received[:5]) == b"value"
    del received
    assert memfds() == before


def test_what_is_zero_takes_no_memory() -> None:
    copy = sealed_copy(bytes(8 * MIB) + b"end")
    fd = fd_of(copy)
    assert os.fstat(fd).st_blocks * 512 < MIB
    os.close(fd)


def test_copying_guest_memory_does_not_touch_its_holes() -> None:
    memory = GuestMemory([MemoryRange(0, 1 << 40)])
    memory.write((1 << 39) + 5, b"code")
    before = memory.allocated()
    (view,) = memory.views([MemoryRange((1 << 39) - 3, 32 * MIB)])
    copy = sealed_copy(view)
    assert memory.allocated() == before
    assert copy == bytes(8) + b"code" + bytes(32 * MIB - 12)


def test_a_copy_into_huge_pages_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    value = os.urandom(MIB) + bytes(20 * MIB) + os.urandom(5)
    for allowed in (True, False):
        monkeypatch.setattr(sealed, "_huge_pages_are_allowed", lambda allowed=allowed: allowed)
        copy = sealed_copy(value)
        fd = fd_of(copy)
        assert len(map_sealed(fd, len(value))) == len(value)
        assert os.fstat(fd).st_blocks * 512 < 6 * MIB
        os.close(fd)
        assert bytes(copy) == value


def test_other_views_have_no_descriptor() -> None:
    copy = sealed_copy(b"value")
    assert descriptor_of(copy[::2]) is None
    assert descriptor_of(memoryview(b"value")) is None
    assert descriptor_of(memoryview(mmap.mmap(-1, 4096))) is None
    assert descriptor_of(sealed_copy(b"")) is None


def test_words_are_copied_as_their_bytes() -> None:
    words = array.array("I", [1, 2, 3])
    assert bytes(sealed_copy(words)) == words.tobytes()
    assert descriptor_of(sealed_copy(bytes(64)).cast("Q")[1:3])[1:] == (8, 16)  # type: ignore[index]
    with pytest.raises(MigratableError, match="contiguous"):
        sealed_copy(memoryview(b"value")[::2])


@pytest.mark.parametrize("missing", [F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE])
def test_memory_that_its_sender_could_change_is_refused(missing: int) -> None:
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, F_ADD_SEALS, ALL & ~missing)
    with pytest.raises(MigratableError, match="not sealed with F_SEAL_"):
        map_sealed(fd, 4096)
    os.close(fd)


@pytest.mark.parametrize("length", [0, 4, 6, 4096, -1, 1 << 62])
def test_memory_of_another_size_is_refused(length: int) -> None:
    fd = fd_of(sealed_copy(b"value"))
    with pytest.raises(MigratableError, match=f"5 bytes where {length}"):
        map_sealed(fd, length)
    os.close(fd)


def test_what_is_no_sealed_memory_is_refused() -> None:
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"value")
        file.flush()
        for fd in (file.fileno(), -1):
            with pytest.raises(MigratableError, match=r"memfd|not sealed"):
                map_sealed(fd, 5)


def test_where_there_are_no_memfds_the_copy_is_a_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    copy = sealed_copy(bytearray(b"value"))
    assert (bytes(copy), copy.readonly, descriptor_of(copy)) == (b"value", True, None)


def test_a_copy_for_which_there_is_no_descriptor_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(MigratableError, match="no room for a copy of 5 bytes"):
            sealed_copy(b"value")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
