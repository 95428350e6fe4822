from __future__ import annotations

import copy
import io
import mmap
import os
import pickle
import struct
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest as checksum

from tests.strategies import snapshots
from tests.test_codec import LARGE, SMALL, index, sealed, tree
from vmmig.codec import (
    CHUNK_BYTES,
    LARGE_BYTES,
    Limits,
    dumps,
    loads,
    open_ranges,
    read_header,
    read_pieces,
)
from vmmig.errors import DecodeError, MigrateReceiveError
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view


class Recorder:
    """Reads from bytes or a file's mapping, and remembers what was asked for."""

    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)
        self.total_bytes = len(data)
        self.reads: list[tuple[int, int]] = []

    def read_into(self, start: int, view: memoryview) -> None:
        self.reads.append((start, len(view)))
        view[:] = self.data[start : start + len(view)]

    def read_bytes(self) -> int:
        return sum(count for _, count in self.reads)


def touch(root: Snapshot) -> None:
    for _, node in root.walk():
        for section in node.snapshot_data.values():
            _ = section.snapshot


class TestRanges:
    @given(snapshots())
    def test_every_tree_comes_back(self, root: Snapshot) -> None:
        data = dumps(root)
        assert open_ranges(Recorder(data)) == root
        assert dumps(open_ranges(Recorder(data))) == data

    def test_a_small_container_is_one_read(self) -> None:
        reader = Recorder(dumps(SMALL))
        assert open_ranges(reader) == SMALL
        assert reader.reads == [(0, reader.total_bytes)]

    def test_what_a_container_of_4_gib_costs(self, tmp_path: Path) -> None:
        size = 4 << 30
        packed = index(
            [2, 0, 0],
            [1, 1, 1],
            [size, 4, LARGE_BYTES],
            ["vm", "cpu", "nic", "ram", "regs", "ring"],
        )
        head = packed + b"0123"
        ring_at = size + 4096
        sums = [checksum(b"0123"), *[checksum(bytes(1 << 20))] * 4096, checksum(b"r" * LARGE_BYTES)]
        table = struct.pack(f"<{len(sums)}Q", *sums)
        total = ring_at + LARGE_BYTES + len(table) + 8
        with (tmp_path / "big.vmsnap").open("w+b") as file:
            file.write(sealed(packed, b"0123", total_bytes=total)[: 96 + len(head)])
            file.seek(ring_at)
            file.write(b"r" * LARGE_BYTES + table + struct.pack("<Q", checksum(table)))
            file.flush()
            reader = Recorder(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        back = open_ranges(reader)
        assert reader.reads == [(0, 1 << 16)]
        assert repr(back.section("ram")) == (
            f"SnapshotDataSection('ram', {size} bytes, not read yet)"
        )
        assert back.find("cpu").section("regs").snapshot == b"0123"
        assert len(reader.reads) == 2
        assert back.find("nic").section("ring").snapshot == b"r" * LARGE_BYTES
        assert len(reader.reads) == 3
        assert back.find("nic").section("ring").snapshot == b"r" * LARGE_BYTES
        assert len(reader.reads) == 3
        assert reader.read_bytes() < 1 << 20
        assert back.section("ram").nbytes == size

    def test_a_long_index_and_many_small_sections(self) -> None:
        root = tree(*[tree(id=f"device-{i}", s=b"x" * 100) for i in range(9000)])
        reader = Recorder(dumps(root))
        back = open_ranges(reader)
        assert len(reader.reads) == 2
        assert read_header(reader.data).index_bytes + 96 == reader.read_bytes()
        assert back.find("device-7").section("s").snapshot == b"x" * 100
        assert len(reader.reads) == 4
        assert back == root
        assert len(reader.reads) == 4

    def test_large_sections_come_in_bounded_requests(self) -> None:
        ram = os.urandom((40 << 20) + 3)
        reader = Recorder(dumps(tree(ram=ram)))
        section = open_ranges(reader).section("ram")
        before = len(reader.reads)
        assert section.snapshot == ram
        counts = [count for _, count in reader.reads[before + 1 :]]
        assert counts[:2] == [16 << 20] * 2
        assert len(counts) == 3
        assert sum(counts) + (1 << 16) - 4096 == len(ram)
        assert raw_view(section.snapshot).readonly

    def test_threads_touch_it_at_once(self) -> None:
        reader = Recorder(dumps(LARGE))
        back = open_ranges(reader)
        seen: list[bool] = []
        threads = [threading.Thread(target=lambda: seen.append(back == LARGE)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 8


class TestSections:
    """A section that was not read yet is like any other."""

    def sections(self) -> list[SnapshotDataSection]:
        data = dumps(LARGE)
        opened = [loads(data, lazily=True), open_ranges(Recorder(data))]
        sections = [root.find("ram").section("low") for root in opened]
        assert all("not read yet" in repr(section) for section in sections)
        assert [section.nbytes for section in sections] == [LARGE_BYTES] * 2
        return sections

    def test_copies(self) -> None:
        original = LARGE.find("ram").section("low")
        for make in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
            for section in self.sections():
                made = make(section)
                assert type(made) is SnapshotDataSection
                assert made == section == original
                assert "not read yet" not in repr(section)

    def test_evolve(self) -> None:
        payload = LARGE.find("ram").section("low").snapshot
        for section in self.sections():
            assert attrs.evolve(section, id="x") == SnapshotDataSection("x", payload)
        for section in self.sections():
            changed = attrs.evolve(section, snapshot=b"y")
            assert changed == SnapshotDataSection("low", b"y")
            assert changed.nbytes == 1
            assert "not read yet" in repr(section)

    def test_setting(self) -> None:
        for section in self.sections():
            section.snapshot = b"mine"
            assert section == SnapshotDataSection("low", b"mine")
            assert section.nbytes == 4
            assert repr(section) == "SnapshotDataSection('low', 4 bytes: 6d 69 6e 65)"


class TestFailures:
    def test_late_errors_know_the_container(self) -> None:
        data = bytearray(dumps(LARGE))
        data[data.find(bytes(LARGE.find("ram").section("high").snapshot[:99]))] ^= 1
        for back in (loads(data, lazily=True), open_ranges(Recorder(data))):
            for _ in range(2):
                with pytest.raises(DecodeError, match="its bytes 0 to 1048575") as info:
                    _ = back.find("ram").section("high").snapshot
                assert info.value.where == "$.snapshots['ram'].snapshot_data['high']"
                assert info.value.version == 1
                assert info.value.writer == read_header(data).writer
                assert info.value.__cause__ is not info.value
            assert back.find("ram").section("low") == LARGE.find("ram").section("low")

    @pytest.mark.parametrize("root", [SMALL, LARGE], ids=["small", "large"])
    def test_truncation(self, root: Snapshot) -> None:
        data = dumps(root)
        for end in range(0, len(data), 1 + len(data) // 500):
            with pytest.raises(DecodeError):
                open_ranges(Recorder(data[:end]))

    def test_every_flipped_bit_is_found_when_all_is_read(self) -> None:
        data = dumps(SMALL)
        for bit in range(8 * len(data)):
            mutable = bytearray(data)
            mutable[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DecodeError):
                touch(open_ranges(Recorder(mutable)))

    @given(st.binary(max_size=300))
    def test_random_bytes(self, data: bytes) -> None:
        with pytest.raises(DecodeError):
            open_ranges(Recorder(data))

    def test_the_readers_own_error_comes_through_and_the_next_try_may_work(self) -> None:
        class Flaky(Recorder):
            error: Exception | None = None

            def read_into(self, start: int, view: memoryview) -> None:
                if self.error is not None:
                    raise self.error
                super().read_into(start, view)

        reader = Flaky(dumps(LARGE))
        reader.error = MigrateReceiveError("the server hung up")
        with pytest.raises(MigrateReceiveError, match="hung up"):
            open_ranges(reader)
        reader.error = None
        back = open_ranges(reader)
        for section in (back.find("ram").section("high"), back.find("cpu").section("regs")):
            reader.error = MigrateReceiveError("the server hung up")
            with pytest.raises(MigrateReceiveError, match="hung up"):
                _ = section.snapshot
            reader.error = OSError("gone")
            with pytest.raises(DecodeError, match="the reader failed: gone") as info:
                _ = section.snapshot
            assert info.value.version == 1
            reader.error = None
        assert back == LARGE

    def test_lying_lengths_cost_nothing(self) -> None:
        huge = 1 << 40

        class Liar(Recorder):
            def read_into(self, start: int, view: memoryview) -> None:
                if start + len(view) > len(self.data):
                    raise MigrateReceiveError("there is no more")
                super().read_into(start, view)

        packed = index([0], [1], [huge], ["a", "ram"])
        start = -(-(96 + len(packed)) // 4096) * 4096
        total = start + huge + 8 * (huge >> 20) + 8
        for data in (
            sealed(packed, bytes(1 << 17), total_bytes=total),
            sealed(packed, bytes(1 << 17), total_bytes=total, index_bytes=huge),
        ):
            reader = Liar(data)
            reader.total_bytes = total
            tracemalloc.start()
            with pytest.raises((DecodeError, MigrateReceiveError)):
                _ = open_ranges(reader).section("ram").snapshot
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * CHUNK_BYTES

    def test_limits(self) -> None:
        data = dumps(SMALL)
        assert open_ranges(Recorder(data), limits=Limits(6, len(data), 6)) == SMALL
        for limits in (
            Limits(max_nodes=5),
            Limits(max_bytes=len(data) - 1),
            Limits(max_id_bytes=5),
        ):
            with pytest.raises(DecodeError, match="allows more"):
                open_ranges(Recorder(data), limits=limits)

    @pytest.mark.parametrize("reader", [None, io.BytesIO(b"abc")])
    def test_what_is_no_reader(self, reader: Any) -> None:
        with pytest.raises(DecodeError, match="the reader failed"):
            open_ranges(reader)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("far", [True, False])
def test_a_section_is_read_in_pieces_and_not_kept(compression: str | None, far: bool) -> None:
    payload = bytes(20 << 20) + os.urandom(1 << 20) + b"text" * (5 << 18) + b"end"
    tree = Snapshot("vm")
    tree.add_data_section(SnapshotDataSection("ram", payload))
    tree.add_data_section(SnapshotDataSection("regs", b"0123"))
    data = dumps(tree, compression=compression)
    opened = open_ranges(Recorder(data)) if far else loads(data, lazily=True)
    pieces = [*read_pieces(opened.section("ram"))]
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 16 << 20
    assert b"".join(pieces) == payload
    assert b"".join(read_pieces(opened.section("regs"))) == b"0123"
    if far or compression:
        assert "not read yet" in repr(opened.section("ram"))
    assert opened == tree
    assert b"".join(read_pieces(opened.section("ram"))) == payload

    damaged = bytearray(data)
    damaged[data.rindex(b"text" * 8) if not compression else len(data) // 2] ^= 1
    opened = open_ranges(Recorder(bytes(damaged))) if far else loads(damaged, lazily=True)
    with pytest.raises(DecodeError, match="damaged") as caught:
        for _ in read_pieces(opened.section("ram")):
            pass
    assert caught.value.version == 1
