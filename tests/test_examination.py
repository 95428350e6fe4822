"""Containers opened by their index, and damaged ones: what is said of them, and what is left."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from tests.strategies import snapshots
from vmmig import DecodeError, MigratableError, Snapshot, SnapshotDataSection, dumps
from vmmig.codec import Container, Limits, examine
from vmmig.codec import encode as encoded

MIB = 1 << 20
RAM = random.Random(5).randbytes(3 * MIB + 5000)


def machine() -> Snapshot:
    vm = Snapshot("vm")
    cpu = Snapshot("cpu")
    cpu.add_data_section(SnapshotDataSection("regs", bytes(range(100))))
    cpu.add_data_section(SnapshotDataSection("empty", b""))
    vm.add_snapshot(cpu)
    vm.add_data_section(SnapshotDataSection("ram", RAM))
    return vm


WHOLE = dumps(machine())


class Ranges:
    """A container far away; it remembers what was read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.total_bytes = data, len(data)
        self.read: list[tuple[int, int]] = []

    def read_into(self, start: int, view: memoryview) -> None:
        self.read.append((start, len(view)))
        view[:] = self.data[start : start + len(view)]


@settings(max_examples=20)
@given(snapshots())
def test_an_opened_container_is_the_snapshot(snapshot):
    data = dumps(snapshot)
    container = Container(data)
    assert container.snapshot == snapshot
    assert Container(Ranges(data)).snapshot == snapshot
    assert container.header.writer.startswith("vmmig")
    assert examine(data).sound
    assert examine(Ranges(data)).sound


@pytest.mark.parametrize("compression", [None, "zstd"])
@given(start=st.integers(0, len(RAM)), length=st.integers(0, 2 * MIB))
def test_any_part_of_a_section_can_be_read(compression, start, length):
    data = WHOLE if compression is None else COMPRESSED
    whole = RAM if compression is None else ZEROS
    ram = Container(Ranges(data)).snapshot.section("ram")
    assert bytes(ram.read(start, start + length)) == whole[start : start + length]
    assert bytes(ram.read(start, start + length, checked=False)) == whole[start : start + length]


ZEROS = RAM[:5000] + bytes(3 * MIB)
COMPRESSED = dumps(
    Snapshot("vm", {}, {"ram": SnapshotDataSection("ram", ZEROS)}), compression="zstd"
)


def test_no_more_is_fetched_than_is_asked_for():
    source = Ranges(WHOLE)
    container = Container(source)
    ram = container.snapshot.section("ram")
    assert ram.digest()
    ram.read(2 * MIB + 5, 2 * MIB + 10)
    fetched = sum(length for _, length in source.read)
    assert fetched <= (1 << 16) + MIB + 4096, source.read
    assert (ram.stored, ram.stored_bytes, ram.nbytes) == ("plain", len(RAM), len(RAM))
    assert WHOLE[ram.offset_bytes :][: len(RAM)] == RAM


def test_equal_sections_have_equal_digests():
    one, two = Container(WHOLE).snapshot, Container(dumps(machine())).snapshot
    assert one.section("ram").digest() == two.section("ram").digest()
    assert one.find("cpu").section("regs").digest() != one.find("cpu").section("empty").digest()


def test_a_detached_section_is_known_and_not_there():
    encoding = encoded(machine(), detach=lambda _: True)
    data = b"".join(encoding)
    ram = Container(data).snapshot.section("ram")
    assert (ram.stored, ram.digest(), ram.nbytes) == ("detached", None, len(RAM))
    with pytest.raises(DecodeError, match="elsewhere"):
        _ = ram.snapshot
    found = examine(data)
    assert found.sound
    assert [section.verdict for section in found.sections].count("detached") == 1


def damaged(at: int, data: bytes = WHOLE) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("at", range(0, 96, 5))
def test_one_damaged_byte_of_the_header_is_put_right(at):
    found = examine(damaged(at))
    assert [damage.where for damage in found.damages] == ["header"]
    assert f"byte {at}," in found.damages[0].what
    assert found.header == Container(WHOLE).header
    assert {section.verdict for section in found.sections} == {"sound"}


def test_a_header_with_more_damage_is_reported():
    found = examine(damaged(40, damaged(50)))
    assert not found.sound
    assert (found.header, found.sections) == (None, ())
    assert "checksum" in found.damages[0].what


def test_a_damaged_id_leaves_the_sections_readable():
    found = examine(damaged(WHOLE.index(b"regs")))
    assert [damage.where for damage in found.damages] == ["index"]
    assert "ids may be wrong" in found.damages[0].what
    assert {section.verdict for section in found.sections} == {"sound"}


def test_an_index_that_cannot_be_understood_is_reported():
    found = examine(damaged(96))
    assert found.header is not None
    assert found.sections == ()
    assert "no section can be located" in found.damages[0].what


def test_a_damaged_small_section_is_lost_and_no_other():
    found = examine(damaged(WHOLE.index(bytes(range(100)))))
    verdicts = {section.id: section.verdict for section in found.sections}
    assert verdicts == {"regs": "lost", "empty": "sound", "ram": "sound"}
    assert found.damages[0].where == "$.snapshots['cpu'].snapshot_data['regs']"
    snapshot = Container(damaged(WHOLE.index(bytes(range(100))))).snapshot
    assert snapshot.section("ram").nbytes == len(RAM)
    with pytest.raises(DecodeError, match="regs"):
        _ = snapshot.find("cpu").section("regs").snapshot


def test_of_a_large_section_only_the_damaged_mib_is_lost():
    at = WHOLE.index(RAM[:100]) + MIB + 7
    found = examine(damaged(at))
    ram = next(section for section in found.sections if section.id == "ram")
    assert ram.verdict == "damaged"
    assert [(r.gpa, r.length) for r in ram.lost] == [(MIB, MIB)]
    section = Container(damaged(at)).snapshot.section("ram")
    assert bytes(section.read(2 * MIB)) == RAM[2 * MIB :]
    with pytest.raises(DecodeError, match=f"bytes {MIB} to {2 * MIB - 1}"):
        section.read(MIB + 100, MIB + 101)


def test_a_damaged_table_proves_nothing_and_loses_nothing():
    found = examine(damaged(len(WHOLE) - 20))
    verdicts = {section.id: section.verdict for section in found.sections}
    assert verdicts == {"regs": "sound", "empty": "sound", "ram": "unproven"}
    assert any(damage.where == "table of checksums" for damage in found.damages)
    found = examine(damaged(len(WHOLE) - 3))
    assert {section.verdict for section in found.sections} == {"sound"}
    assert not found.sound


def test_padding_that_is_not_zero_is_reported():
    start = WHOLE.index(RAM[:100])
    found = examine(damaged(start - 1))
    assert "bytes before it" in found.damages[0].what
    assert {section.verdict for section in found.sections} == {"sound"}


def test_a_damaged_compressed_section_is_lost():
    found = examine(damaged(COMPRESSED.index(b"\x28\xb5\x2f\xfd") + 3000, COMPRESSED))
    assert [section.verdict for section in found.sections] == ["lost"]
    assert examine(COMPRESSED).sound


@pytest.mark.parametrize("keep", [0, 5, 90, 100, 140, 300, 4200, MIB, 3 * MIB, len(WHOLE) - 30])
def test_what_is_left_of_a_truncated_container_is_told(keep):
    found = examine(WHOLE[:keep])
    assert not found.sound
    assert found.found_bytes == keep
    text = " ".join(map(str, found.damages))
    assert "truncated" in text or "empty" in text
    if keep >= 4200:
        verdicts = {section.id: section.verdict for section in found.sections}
        assert verdicts["regs"] == ("unproven" if keep < 3 * MIB + 5000 else "sound")
        assert verdicts["ram"] == ("damaged" if keep < 3 * MIB + 5000 else "unproven")
        ram = next(section for section in found.sections if section.id == "ram")
        there = keep - WHOLE.index(RAM[:100])
        lost = sum(r.length for r in ram.lost)
        assert lost == max(len(RAM) - there, 0)


def test_bytes_behind_the_container_are_reported():
    found = examine(WHOLE + b"more")
    assert "4 bytes stand behind" in found.damages[0].what
    assert {section.verdict for section in found.sections} == {"sound"}


SMALL = dumps(Snapshot("a", {"b": Snapshot("b")}, {"x": SnapshotDataSection("x", b"0123456789")}))


@given(st.data())
def test_whatever_the_bytes_something_is_said_and_nothing_else_raised(data):
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    found = examine(bytes(raw), limits=Limits(max_nodes=1000))
    assert found.sound == (bytes(raw) == SMALL)
    try:
        Container(bytes(raw))
    except MigratableError:
        assert not found.sound


def test_progress_reaches_the_end():
    told: list[tuple[int, int]] = []
    examine(WHOLE, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(WHOLE), len(WHOLE))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_many_small_sections_far_away_are_few_requests_and_take_no_time_each():
    vm = Snapshot("vm")
    for i in range(5_000):
        vm.add_snapshot(Snapshot(f"{i}", {}, {"a": SnapshotDataSection("a", b"%20d" % i)}))
    data = dumps(vm)
    source = Ranges(data)
    assert examine(source).sound
    assert len(source.read) < 10
    start = data.index(b"%20d" % 0)
    found = examine(data[:start] + bytes(100_000) + data[start + 100_000 :])
    assert len(found.damages) == 5_000
    assert {section.verdict for section in found.sections} == {"lost"}


def test_a_frame_that_is_wrong_though_its_checksum_is_right_is_lost():
    data = bytearray(COMPRESSED)
    at = data.index(b"\x28\xb5\x2f\xfd")
    (part,) = Container(bytes(data)).snapshot.snapshot_data.values()
    data[at + part.stored_bytes - 1] ^= 1
    table = len(data) - 8 - 8 * len(part.checksums())
    data[table:-8] = xxh3_64_intdigest(data[at : at + part.stored_bytes]).to_bytes(8, "little")
    data[-8:] = xxh3_64_intdigest(data[table:-8]).to_bytes(8, "little")
    found = examine(bytes(data))
    assert [section.verdict for section in found.sections] == ["lost"]
    assert "frame" in found.damages[0].what
