"""The formats by name: what is written is read again, what is sniffed, what hostile files do."""

from __future__ import annotations

import json
import os
import sys
import types
from contextlib import suppress
from pathlib import Path

import attrs
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import snapshots
from vmmig import DecodeError, MigratableError, RestoreError, Snapshot, SnapshotDataSection, formats
from vmmig.formats import msgpack_tree
from vmmig.formats.cloud_hypervisor import SEED_JSON
from vmmig.state import U16, load_state, save_state, subsection, versioned

PLAIN = ("vmmig", "json", "msgpack")
ONE = Snapshot("vm", {"cpu": Snapshot("cpu")}, {"a": SnapshotDataSection("a", b"\x00\xff")})
TREE = {
    "id": "vm",
    "snapshots": {"cpu": {"id": "cpu", "snapshots": {}, "snapshot_data": {}}},
    "snapshot_data": {"a": {"id": "a", "snapshot": [0, 255]}},
}


def as_bins(tree):
    sections = {
        id: {"id": id, "snapshot": bytes(section["snapshot"])}
        for id, section in tree["snapshot_data"].items()
    }
    below = {id: as_bins(child) for id, child in tree["snapshots"].items()}
    return {"id": tree["id"], "snapshots": below, "snapshot_data": sections}


@pytest.mark.parametrize("format", PLAIN)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(snapshot=snapshots(payloads=st.binary(max_size=60)))
def test_what_is_written_is_read_again_and_recognised(format, snapshot, tmp_path):
    path = tmp_path / "file"
    formats.write(snapshot, path, format)
    assert formats.sniff(path) == format
    assert formats.read(path) == snapshot
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("format", PLAIN)
def test_large_sections_are_written_and_read(format, tmp_path):
    ram = bytes(range(256)) * 300 + b"!"
    snapshot = Snapshot("vm", {}, {"ram": SnapshotDataSection("ram", ram)})
    formats.write(snapshot, tmp_path / "file", format)
    assert formats.read(tmp_path / "file", format) == snapshot


def test_the_json_is_the_crates(tmp_path):
    assert SEED_JSON.loads(json.dumps(TREE, indent=1).encode()) == ONE
    formats.write(ONE, tmp_path / "vm.json", "json")
    assert json.loads((tmp_path / "vm.json").read_text()) == TREE
    assert " " not in (tmp_path / "vm.json").read_text()


def test_the_msgpack_is_what_every_msgpack_library_writes_and_reads():
    packed = msgpack.packb(as_bins(TREE))
    assert msgpack_tree.loads(packed) == ONE
    assert msgpack_tree.dumps(ONE) == packed
    backwards = {name: as_bins(TREE)[name] for name in reversed(as_bins(TREE))}
    assert msgpack_tree.loads(msgpack.packb(backwards)) == ONE


def test_msgpack_has_no_depth_and_large_sections_are_not_copied(tmp_path):
    chain = Snapshot("0")
    for i in range(1, 20_000):
        chain = Snapshot(str(i), {chain.id: chain})
    chain.add_data_section(SnapshotDataSection("ram", bytes(1 << 20)))
    data = msgpack_tree.dumps(chain)
    loaded = msgpack_tree.loads(data)
    assert loaded == chain
    assert memoryview(loaded.section("ram").snapshot).obj is data


def test_a_key_that_is_there_twice_is_refused():
    twice = b"\x83\xa2id\xa1a\xa9snapshots\x82\xa1b" + msgpack_tree.dumps(Snapshot("b"))
    with pytest.raises(DecodeError, match="more than once"):
        msgpack_tree.loads(twice + b"\xa1b" + msgpack_tree.dumps(Snapshot("b")))


@given(st.data())
def test_any_bytes_end_in_a_snapshot_or_an_error(data):
    load, raw = data.draw(
        st.sampled_from(
            [
                (SEED_JSON.loads, json.dumps(TREE).encode()),
                (msgpack_tree.loads, msgpack_tree.dumps(ONE)),
            ]
        )
    )
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with suppress(MigratableError):
        load(bytes(raw))


def test_what_is_nothing_is_said_to_be_nothing(tmp_path):
    (tmp_path / "noise").write_bytes(b"GIF89a")
    with pytest.raises(DecodeError, match="no format that is known"):
        formats.sniff(tmp_path / "noise")
    with pytest.raises(DecodeError, match="no format that is known"):
        formats.sniff(tmp_path)
    with pytest.raises(DecodeError, match="No such file"):
        formats.sniff(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DecodeError):
        formats.sniff(tmp_path / "pipe")
    with pytest.raises(MigratableError, match="no format 'zip'"):
        formats.get("zip")


def test_what_cannot_be_held_is_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    bad = Snapshot("a", {"b": Snapshot("c")})
    for format in PLAIN:
        with pytest.raises(MigratableError):
            formats.write(bad, path, format)
    assert path.read_bytes() == b"old"


@versioned("test-formats/queue", 1, writer="acme")
@attrs.define
class Queue:
    size: U16 = 0


@versioned("test-formats/nic", 1, writer="acme 1.0")
@attrs.define
class Nic:
    mac: bytes = b""
    queues: list[Queue] = attrs.Factory(list)
    offload: Queue | None = subsection(default=None)


def test_typed_states_are_decoded_whatever_component_they_are_of():
    saved = save_state("nic", Nic(b"\1\2", [Queue(7)], offload=Queue(5)))
    assert formats.decode(saved, (), "state") == formats.Decoded(
        "test-formats/nic",
        1,
        "acme 1.0",
        {"mac": b"\1\2", "queues": [{"size": 7}], "offload": {"size": 5}},
    )
    payload = bytes(saved.section("state").snapshot)
    vm = Snapshot("vm", {}, {"cut": SnapshotDataSection("cut", payload[:-1])})
    with pytest.raises(DecodeError):
        formats.decode(vm, (), "cut")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mac", b"\3", Nic(b"\3", [Queue(7)], Queue(5))),
        ("queues[0].size", 9, Nic(b"\1", [Queue(9)], Queue(5))),
        ("offload.size", 6, Nic(b"\1", [Queue(7)], Queue(6))),
    ],
)
def test_a_field_of_a_typed_state_is_set(field, value, expected):
    saved = save_state("nic", Nic(b"\1", [Queue(7)], Queue(5)))
    payload = formats.set_field(saved, (), "state", field, value)
    saved.add_data_section(SnapshotDataSection("state", payload))
    assert load_state(saved, Nic) == expected


def test_a_formats_module_decodes_its_own_trees(monkeypatch):
    def decode(root, path, section_id):
        if section_id == "broken":
            raise KeyError("no such thing")
        return formats.Decoded("nic", 1, None, {"mac": b"1"}) if section_id == "nic" else None

    fake = types.ModuleType("vmmig.formats.qemu")
    fake.decode = decode
    monkeypatch.setitem(sys.modules, "vmmig.formats.qemu", fake)
    vm = Snapshot("vm", {}, {"nic": SnapshotDataSection("nic", b"")})
    assert formats.decode(vm, (), "nic") is None
    vm.id = "qemu"
    assert formats.decode(vm, (), "nic") == formats.Decoded("nic", 1, None, {"mac": b"1"})
    for id, payload in (("broken", b"{}"), ("other", b"{}")):
        vm.add_data_section(SnapshotDataSection(id, payload))
    assert formats.decode(vm, (), "other").kind == "json"
    with pytest.raises(DecodeError, match="no such thing"):
        formats.decode(vm, (), "broken")
    with pytest.raises(RestoreError, match="cannot be set"):
        formats.set_field(vm, (), "nic", "mac", b"2")
    with pytest.raises(RestoreError):
        formats.decode(vm, (), "none")


def test_json_sections_are_decoded_whatever_they_hold():
    for payload, fields in (
        (b'{"a": 1}', {"a": 1}),
        (b" [1, 2]", {"": [1, 2]}),
        (b"{", None),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
        (b"", None),
    ):
        vm = Snapshot("vm", {}, {"x": SnapshotDataSection("x", payload)})
        decoded = formats.decode(vm, (), "x")
        assert (decoded and decoded.fields) == fields


def test_names_of_files_stand_for_formats():
    assert formats.of_suffix(Path("a/b.VMSNAP")) == "vmmig"
    assert formats.of_suffix("vm.json") == "json"
    assert formats.of_suffix("folder") is None
