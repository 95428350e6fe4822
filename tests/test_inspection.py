"""Snapshots found by a path, compared by field and page, summed up for a picture, and edited."""

from __future__ import annotations

import json

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import snapshots
from vmmig import (
    DecodeError,
    MigrateReceiveError,
    RestoreError,
    Snapshot,
    SnapshotDataSection,
    dumps,
    send,
)
from vmmig.codec import Container
from vmmig.editing import edited
from vmmig.inspection import (
    Comparison,
    changed_pages,
    is_file,
    locate,
    open_snapshot,
    page_map,
)
from vmmig.state.wire import MAGIC as STATE_MAGIC

MIB = 1 << 20
PAGE = 4096


def section(payload, id="ram") -> SnapshotDataSection:
    return SnapshotDataSection(id, payload)


def stored(payload, **how) -> SnapshotDataSection:
    """The section as a container has it."""
    data = dumps(Snapshot("vm", {}, {"ram": section(payload)}), **how)
    return Container(data).snapshot.section("ram")


@given(snapshots())
def test_every_place_is_found_by_what_errors_show(snapshot):
    for path, node in snapshot.walk():
        if len(path.ids) > 10 or max(map(len, [*path.ids, *node.snapshot_data]), default=0) > 60:
            continue
        assert locate(snapshot, str(path)).path == path
        for id in node.snapshot_data:
            place = locate(snapshot, path.section(id))
            assert (place.path, place.section) == (path, id)


def test_ids_with_slashes_are_found_and_doubt_is_an_error():
    vm = Snapshot("vm")
    nic = Snapshot("0:2.0/nic", {"rx/0": Snapshot("rx/0")}, {"mac": section(b"", "mac")})
    vm.add_snapshot(nic)
    assert locate(vm, "0:2.0/nic/rx/0").path.ids == ("0:2.0/nic", "rx/0")
    assert locate(vm, "0:2.0/nic/mac").section == "mac"
    assert locate(vm, "").path.ids == ()
    nic.add_data_section(section(b"", "rx/0"))
    with pytest.raises(RestoreError, match="may mean"):
        locate(vm, "0:2.0/nic/rx/0")
    with pytest.raises(
        RestoreError, match=r"no 'tx' at \$.snapshots\['0:2.0/nic'\] .it has 'rx/0'"
    ):
        locate(vm, "0:2.0/nic/tx")
    with pytest.raises(RestoreError):
        locate(vm, "$.snapshots['none']")


pages = st.lists(st.integers(0, 40), max_size=8)


@given(
    size=st.integers(0, 40 * PAGE + 7),
    longer=st.sampled_from([0, 0, 1, 5000]),
    pokes=pages,
    full=st.booleans(),
)
def test_changed_pages_are_those_that_differ(size, longer, pokes, full):
    before = bytes(size)
    after = bytearray(size + longer)
    for page in pokes:
        if page * PAGE + 9 < len(after):
            after[page * PAGE + 9] = 1
    found = changed_pages(section(before), section(bytes(after)), full=full)
    changed = {at for first, length in found.ranges.pairs() for at in range(first, first + length)}
    for start in range(0, size, PAGE):
        stop = min(start + PAGE, size)
        differs = before[start:stop] != after[start:stop]
        assert all((at in changed) == differs for at in (start, stop - 1))
    assert all(at in changed for at in range(size, size + longer))
    assert found.compared_bytes == size


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "how", [({}, {}), ({"compression": "zstd"},) * 2, ({}, {"compression": "zstd"})]
)
def test_containers_are_compared_alike_however_they_are_stored(how, full):
    before = bytearray(5 * MIB + 100)
    before[7] = 1
    after = bytearray(before)
    after[3 * MIB + 5 * PAGE] = 9
    after[-1] = 9
    one, two = (stored(bytes(p), **h) for p, h in zip((before, after), how, strict=True))
    found = changed_pages(one, two, full=full)
    assert [*found.ranges.pairs()] == [(3 * MIB + 5 * PAGE, PAGE), (5 * MIB, 100)]
    assert found.compared_bytes + found.proven_bytes == len(before)
    if how == ({}, {}) and not full:
        assert found.proven_bytes == 4 * MIB
    if full:
        assert found.proven_bytes == 0


def test_equal_checksums_are_not_believed_where_all_is_compared():
    payload = bytes(2 * MIB)
    data = bytearray(dumps(Snapshot("vm", {}, {"ram": section(payload)})))
    good = Container(bytes(data)).snapshot.section("ram")
    data[-MIB] ^= 1
    bad = Container(bytes(data)).snapshot.section("ram")
    assert not changed_pages(good, bad).ranges
    assert len(changed_pages(good, bad, full=True).ranges) == 1


def test_all_that_differs_is_told_in_order():
    before = Snapshot("vm")
    before.add_data_section(section(b'{"cpus": 1, "old": true, "list": [1, 2], "n": 1}', "config"))
    before.add_data_section(section(b"\x00\x01\x02\x03", "raw"))
    before.add_data_section(section(bytes(20 * PAGE), "ram"))
    before.add_snapshot(Snapshot("gone", {}, {"x": section(b"12", "x")}))
    after = Snapshot("vm")
    after.add_data_section(section(b'{"cpus": 2, "list": [1, 3], "new": null, "n": 1.0}', "config"))
    after.add_data_section(section(b"\x00\x09\x08\x03", "raw"))
    after.add_data_section(section(bytes(5 * PAGE) + b"x" * 2 * PAGE + bytes(13 * PAGE), "ram"))
    after.add_snapshot(Snapshot("come"))
    changes = [
        (change.place, change.change, change.pages and [*change.pages.ranges.pairs()])
        for change in Comparison(before, after)
    ]
    assert changes == [
        ("$.snapshot_data['config'].cpus", "changed", None),
        ("$.snapshot_data['config'].old", "removed", None),
        ("$.snapshot_data['config'].list[1]", "changed", None),
        ("$.snapshot_data['config'].n", "changed", None),
        ("$.snapshot_data['config'].new", "added", None),
        ("$.snapshot_data['ram']", "changed", [(5 * PAGE, 2 * PAGE)]),
        ("$.snapshot_data['raw']", "changed", [(1, 2)]),
        ("$.snapshots['come']", "added", None),
        ("$.snapshots['gone']", "removed", None),
    ]


@settings(max_examples=40)
@given(snapshots(), snapshots())
def test_two_snapshots_differ_exactly_if_they_are_not_equal(one, two):
    assert bool([*Comparison(one, two)]) == (one != two)
    assert not [*Comparison(one, Container(dumps(one)).snapshot, full=True)]


@given(zero=st.sets(st.integers(0, 30)), changed=st.sets(st.integers(0, 30)))
def test_a_page_map_counts_zero_and_changed_pages(zero, changed):
    payload = bytearray(b"x" * (30 * PAGE + 10))
    for page in zero:
        payload[page * PAGE : (page + 1) * PAGE] = bytes(min(PAGE, len(payload) - page * PAGE))
    other = bytearray(payload)
    for page in changed:
        other[page * PAGE + 3] ^= 0x55
    found = page_map(section(bytes(payload)), section(bytes(other)), max_cells=40)
    assert (found.pages, found.pages_per_cell) == (31, 1)
    assert {i for i, count in enumerate(found.zero) if count} == zero
    assert {i for i, count in enumerate(found.changed) if count} == changed
    coarse = page_map(section(bytes(payload)), section(bytes(other)), max_cells=4)
    assert (coarse.pages_per_cell, sum(coarse.zero), len(coarse.zero)) == (8, len(zero), 4)


def test_zero_mibs_of_a_container_are_known_by_their_checksum():
    payload = bytes(2 * MIB) + b"x" * PAGE + bytes(MIB)
    found = page_map(stored(payload))
    assert sum(found.zero) == found.pages - 1
    assert found.zero[512] == 0


def test_any_format_is_opened_and_what_is_damaged_says_so(tmp_path):
    snapshot = Snapshot("vm", {}, {"a": section(b"1", "a")})
    send(snapshot, tmp_path / "vm.vmsnap")
    opened = open_snapshot(tmp_path / "vm.vmsnap")
    assert (opened.format, opened.version, opened.snapshot) == ("vmmig", 1, snapshot)
    (tmp_path / "vm.json").write_text(
        '{"id":"vm","snapshots":{},"snapshot_data":{"a":{"id":"a","snapshot":[49]}}}'
    )
    opened = open_snapshot(tmp_path / "vm.json")
    assert (opened.format, opened.version, opened.snapshot) == ("json", None, snapshot)
    whole = (tmp_path / "vm.vmsnap").read_bytes()
    (tmp_path / "cut.vmsnap").write_bytes(whole[:-1])
    with pytest.raises(MigrateReceiveError, match=r"cut\.vmsnap.*truncated"):
        open_snapshot(tmp_path / "cut.vmsnap")
    with pytest.raises(DecodeError, match="No such file"):
        open_snapshot(tmp_path / "none")
    with pytest.raises(MigrateReceiveError, match="fetch it first"):
        open_snapshot("http://127.0.0.1:1/vm", format="json")
    assert is_file("file:/vm")
    assert not is_file("tcp:host:1")


STATE = STATE_MAGIC + msgpack.packb(
    [
        "cpu",
        2,
        "me",
        {"rip": 16, "big": msgpack.ExtType(1, b"\x01" * 20), "mmu": [1, {"cr3": 5}, {}]},
        {"fpu": [1, {"top": 3}, {}]},
    ]
)


def test_fields_are_set_and_all_else_is_kept(monkeypatch):
    vm = Snapshot("vm", {"cpu": Snapshot("cpu", {}, {"state": section(STATE, "state")})})
    vm.add_data_section(section(b'{"a": {"b": [1, 2.5]}, "t": "x"}', "config"))
    changed = edited(
        vm, fields=[("config", "a.b[1]", 3.5), ("config", "t", "y"), ("config", "a.b[0]", 7)]
    )
    assert json.loads(changed.section("config").snapshot) == {"a": {"b": [7, 3.5]}, "t": "y"}
    assert vm.section("config").snapshot == b'{"a": {"b": [1, 2.5]}, "t": "x"}'
    for field, value, words in (
        ("a.c", 1, "has no field 'a.c'"),
        ("a.b[0]", "1", "of type int, not str"),
        ("a.b[0]", True, "of type int, not bool"),
        ("a.b[0]", 1.0, "of type int, not float"),
    ):
        with pytest.raises(RestoreError, match=words.replace("[", r"\[")):
            edited(vm, fields=[("config", field, value)])
    with pytest.raises(RestoreError, match="is a snapshot"):
        edited(vm, fields=[("cpu", "rip", 1)])


def test_a_typed_states_field_is_set_in_its_own_bytes():
    from vmmig.state.fields import with_field

    changed = msgpack.unpackb(with_field(STATE, ["rip"], 32)[5:])
    expected = msgpack.unpackb(STATE[5:])
    expected[3]["rip"] = 32
    assert changed == expected
    changed = msgpack.unpackb(with_field(STATE, ["fpu", "top"], 4)[5:])
    assert changed[4] == {"fpu": [1, {"top": 4}, {}]}
    changed = msgpack.unpackb(with_field(STATE, ["mmu", "cr3"], 4)[5:])
    assert changed[3]["mmu"] == [1, {"cr3": 4}, {}]
    with pytest.raises(RestoreError, match="no field 'none'"):
        with_field(STATE, ["none"], 1)
    with pytest.raises(RestoreError, match="cannot be changed"):
        with_field(STATE[:20], ["rip"], 1)


def test_sections_and_nodes_are_dropped_renamed_and_replaced():
    def tree() -> Snapshot:
        cpu = Snapshot("cpu", {}, {"a": section(b"1", "a"), "b": section(b"2", "b")})
        return Snapshot("vm", {"cpu": cpu, "nic": Snapshot("nic")})

    vm = tree()
    changed = edited(
        vm,
        dropped=["nic", "cpu/b"],
        renamed=[("cpu", "nic"), ("cpu/a", "b"), ("", "machine")],
        replaced=[("cpu/a", b"new")],
    )
    nic = Snapshot("nic", {}, {"b": section(b"new", "b")})
    assert changed == Snapshot("machine", {"nic": nic})
    assert dumps(changed)
    assert vm == tree()
    for how in ({"renamed": [("cpu", "nic")]}, {"renamed": [("cpu/a", "b")]}, {"dropped": [""]}):
        with pytest.raises(RestoreError):
            edited(vm, **how)
    assert vm == tree()
