from __future__ import annotations

import array
import copy
import ctypes
import mmap
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import IDS, chain, snapshots
from vmmig.codec import dumps
from vmmig.errors import RestoreError, SnapshotError
from vmmig.snapshot import (
    Snapshot,
    SnapshotDataSection,
    SnapshotPath,
    build,
    diff,
    flatten,
    raw_view,
)

DEPTH = 100_000


def tree(*children: Snapshot, id: str = "vm", **sections: bytes) -> Snapshot:
    snapshot = Snapshot(id)
    for child in children:
        snapshot.add_snapshot(child)
    for name, payload in sections.items():
        snapshot.add_data_section(SnapshotDataSection(name, payload))
    return snapshot


class TestSections:
    @pytest.mark.parametrize(
        "payload",
        [
            b"abcdefgh",
            bytearray(b"abcdefgh"),
            memoryview(b"abcdefgh"),
            array.array("I", [0x64636261, 0x68676665]),
            np.frombuffer(b"abcdefgh", np.uint32).reshape(2, 1),
            np.asfortranarray(np.frombuffer(b"aebfcgdh", np.uint8).reshape(4, 2)),
            (ctypes.c_char * 8)(*b"abcdefgh"),
        ],
        ids=lambda payload: type(payload).__name__,
    )
    def test_any_contiguous_buffer_is_kept_and_not_copied(self, payload: Any) -> None:
        section = SnapshotDataSection("s", payload)
        assert section.snapshot is payload
        assert section.nbytes == 8
        if type(payload) is not np.ndarray:
            assert section == SnapshotDataSection("s", b"abcdefgh")
        assert bytes(raw_view(payload)) in (b"abcdefgh", b"abcdefgh"[::1])

    def test_a_mapping_is_kept_and_not_copied(self) -> None:
        with mmap.mmap(-1, 1 << 20) as mapping:
            section = SnapshotDataSection("ram", mapping)
            mapping[:3] = b"abc"
            assert raw_view(section.snapshot)[:3] == b"abc"
            assert section.nbytes == 1 << 20

    @pytest.mark.parametrize(
        "payload",
        [
            "text",
            10,
            None,
            [1, 2],
            memoryview(b"abcdefgh")[::2],
            np.zeros((4, 4))[:, :2],
            np.array([{}]),
        ],
        ids=lambda payload: type(payload).__name__,
    )
    def test_what_is_not_contiguous_bytes_is_refused(self, payload: Any) -> None:
        with pytest.raises(SnapshotError, match="contiguous bytes-like object"):
            SnapshotDataSection("s", payload)

    def test_empty_arrays_of_any_shape_are_empty(self) -> None:
        assert SnapshotDataSection("s", np.zeros((0, 3))) == SnapshotDataSection("s", b"")

    def test_equality_is_by_id_and_bytes(self) -> None:
        big = bytes(range(256)) * 4096
        changed = bytearray(big)
        changed[-1] ^= 1
        assert SnapshotDataSection("s", big) == SnapshotDataSection("s", bytearray(big))
        assert SnapshotDataSection("s", big) != SnapshotDataSection("s", changed)
        assert SnapshotDataSection("s", big) != SnapshotDataSection("s", bytearray(big[:-1]))
        assert SnapshotDataSection("s", big) != SnapshotDataSection("t", big)
        assert SnapshotDataSection("s", b"") != "s"

    def test_repr_never_shows_megabytes(self) -> None:
        assert len(repr(SnapshotDataSection("x" * 5000, bytes(1 << 24)))) < 300


class TestTree:
    def test_an_equal_id_replaces(self) -> None:
        vm = tree(tree(id="cpu", a=b"1"))
        vm.add_snapshot(tree(id="cpu", a=b"2"))
        assert vm.snapshots == {"cpu": tree(id="cpu", a=b"2")}
        vm.add_data_section(SnapshotDataSection("s", b"1"))
        vm.add_data_section(SnapshotDataSection("s", b"2"))
        assert vm.section("s").snapshot == b"2"

    def test_find(self) -> None:
        cpu = tree(id="cpu/0")
        vm = tree(tree(cpu, id="cpus"))
        assert vm.find(["cpus", "cpu/0"]) is cpu
        assert vm.find(SnapshotPath().child("cpus").child("cpu/0")) is cpu
        with pytest.raises(RestoreError, match=r"no snapshot 'nic' at \$ \(it has 'cpus'\)"):
            vm.find("nic")
        with pytest.raises(RestoreError, match=r"\$\.snapshots\['cpus'\] \(it has 'cpu/0'\)"):
            vm.find("cpus/x")

    def test_a_missing_section_names_those_there_are(self) -> None:
        with pytest.raises(RestoreError, match=r"has no section 'x' \(it has 'a', 'b'\)"):
            tree(a=b"", b=b"").section("x")

    @given(snapshots())
    def test_walk_finds_each_node_once_parents_first(self, root: Snapshot) -> None:
        seen = [*root.walk()]
        assert all(root.find(path) is node for path, node in seen)
        assert len({path for path, _ in seen}) == len(seen) == len(flatten(root).ids)
        order = [path.ids for path, _ in seen]
        assert order == sorted(order)

    def test_repr_is_short(self) -> None:
        root = tree(
            *[tree(id=f"{i}" * 500) for i in range(1000)],
            **{f"s{i}": bytes(10**6) for i in range(99)},
        )
        assert len(repr(root)) < 3000
        assert "'s0': 1000000 bytes" in repr(root)

    def test_a_small_tree_is_shown_whole_by_hypothesis(self) -> None:
        from hypothesis.vendor.pretty import pretty

        small = tree(tree(tree(id="c", s=b"x"), id="b"))
        assert pretty(small).splitlines() == [
            "Snapshot('vm', snapshots: ['b'])",
            "    Snapshot('b', snapshots: ['c'])",
            "        Snapshot('c', snapshot_data: ['s': 1 bytes])",
        ]
        assert pretty(chain(1000)) == "Snapshot('0', snapshots: ['1'])"
        assert pretty(SnapshotDataSection("s", b"x")) == repr(SnapshotDataSection("s", b"x"))

    @given(snapshots(), snapshots())
    def test_equality_is_what_the_container_says(self, a: Snapshot, b: Snapshot) -> None:
        assert (a == b) == (dumps(a) == dumps(b))
        assert a == copy.deepcopy(a)

    def test_a_snapshot_equals_nothing_else(self) -> None:
        assert tree() != "vm"
        with pytest.raises(TypeError, match="unhashable"):
            hash(tree())


class TestCopies:
    @given(snapshots())
    def test_a_deep_copy_is_a_value_of_its_own(self, root: Snapshot) -> None:
        other = copy.deepcopy(root)
        assert other == root
        other.add_data_section(SnapshotDataSection("new one", b""))
        assert "new one" not in root.snapshot_data

    def test_a_shallow_copy_shares_what_is_below(self) -> None:
        payload = bytearray(1 << 20)
        vm = tree(tree(id="cpu"), ram=payload)
        copied = copy.copy(vm)
        assert copied == vm
        assert copied.section("ram") is vm.section("ram")
        assert copied.find("cpu") is vm.find("cpu")
        assert copy.copy(vm.section("ram")).snapshot is payload
        copied.add_snapshot(Snapshot("disk"))
        assert copied != vm

    def test_a_deep_copy_copies_what_can_change(self) -> None:
        live = bytearray(b"abc")
        section = SnapshotDataSection("ram", live)
        vm = Snapshot("vm")
        vm.add_data_section(section)
        copies = [copy.deepcopy(vm).section("ram"), copy.deepcopy(section)]
        live[0] = 0
        assert all(c == SnapshotDataSection("ram", b"abc") for c in copies)

    @given(snapshots(), st.integers(2, pickle.HIGHEST_PROTOCOL))
    def test_pickling(self, root: Snapshot, protocol: int) -> None:
        assert pickle.loads(pickle.dumps(root, protocol)) == root

    def test_large_payloads_pickle_out_of_band(self) -> None:
        ram = mmap.mmap(-1, 1 << 20)
        vm = Snapshot("vm")
        vm.add_data_section(SnapshotDataSection("ram", ram))
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(vm, 5, buffer_callback=buffers.append)
        assert len(data) < 1000
        again = pickle.loads(data, buffers=buffers)
        assert again == vm
        assert pickle.loads(pickle.dumps(vm)) == pickle.loads(pickle.dumps(vm, 4)) == vm
        section = vm.section("ram")
        assert pickle.loads(pickle.dumps(section)) == section


class TestDepth:
    def test_everything_works_at_any_depth(self) -> None:
        a, b = chain(DEPTH), chain(DEPTH)
        assert a == b
        assert len(repr(a)) < 100
        *_, (path, last) = a.walk()
        assert len(path.ids) == DEPTH - 1
        assert len(str(path)) < 1000
        last.add_data_section(SnapshotDataSection("end", b"hare"))
        assert a != b
        (difference,) = diff(a, b)
        assert (difference.path, difference.first_byte) == (path, 1)
        assert copy.deepcopy(a) == a
        assert pickle.loads(pickle.dumps(a)) == a
        assert a.find(path) is last
        assert copy.deepcopy(path) == pickle.loads(pickle.dumps(path)) == path


class TestDiff:
    @given(snapshots(), snapshots())
    def test_it_is_empty_for_equal_trees_only(self, a: Snapshot, b: Snapshot) -> None:
        assert [*diff(a, copy.deepcopy(a))] == []
        assert (not [*diff(a, b)]) == (a == b)

    def test_it_names_each_place(self) -> None:
        a = tree(tree(id="cpu", regs=b"1234", old=b""), tree(id="disk"))
        b = tree(tree(id="cpu", regs=b"12x45", new=b"n"), tree(id="nic"), id="other")
        assert [str(difference) for difference in diff(a, b)] == [
            "$: id changed from 'vm' to 'other'",
            "$.snapshots['cpu'].snapshot_data['new']: "
            "added SnapshotDataSection('new', 1 bytes: 6e)",
            "$.snapshots['cpu'].snapshot_data['old']: "
            "removed SnapshotDataSection('old', 0 bytes: )",
            "$.snapshots['cpu'].snapshot_data['regs']: changed from byte 2 on (4 -> 5 bytes)",
            "$.snapshots['disk']: removed Snapshot('disk')",
            "$.snapshots['nic']: added Snapshot('nic')",
        ]

    def test_a_prefix_differs_where_it_ends(self) -> None:
        (difference,) = diff(tree(s=b"abc"), tree(s=b"abcd"))
        assert difference.first_byte == 3


class TestColumns:
    @given(snapshots())
    def test_build_reverses_flatten(self, root: Snapshot) -> None:
        assert build(*flatten(root)) == root

    @given(snapshots())
    def test_columns_know_the_places(self, root: Snapshot) -> None:
        columns = flatten(root)
        for i, id in enumerate(columns.ids):
            assert root.find(columns.path(i)).id == id
        for i, id in enumerate(columns.section_ids):
            assert columns.section_place(i).endswith(f"snapshot_data[{id!r}]")

    @pytest.mark.parametrize(
        ("columns", "text"),
        [
            ((["a"], [1], [0], [], []), "disagree"),
            ((["a", "b"], [1, 0], [0], [], []), "disagree"),
            ((["a"], [0], [1], [], []), "disagree"),
            ((["a", "b", "c"], [0, 1, 1], [0, 0, 0], [], []), "node 1 of the tree has no parent"),
            ((["a", "b", "b"], [2, 0, 0], [0, 0, 0], [], []), r"\$.snapshots\['b'\] is there more"),
            (
                (["a", "b"], [1, 0], [0, 2], ["s", "s"], [b"", b""]),
                r"\$.snapshots\['b'\].snapshot_data\['s'\] is there more than once",
            ),
        ],
    )
    def test_columns_that_are_no_tree_are_refused(self, columns: Any, text: str) -> None:
        with pytest.raises(RestoreError, match=text):
            build(*columns)

    def test_the_one_of_many_siblings_that_is_there_twice_is_found(self) -> None:
        count = 200_000
        ids = ["vm", *map(str, range(count - 1)), str(count - 2)]
        with pytest.raises(RestoreError, match=rf"'{count - 2}'. is there more than once"):
            build(ids, [count] + [0] * count, [0] * (count + 1), [], [])


class TestBadTrees:
    def test_a_cycle_is_named(self) -> None:
        root = Snapshot("a")
        child = Snapshot("b")
        root.add_snapshot(child)
        child.add_snapshot(root)
        twin = Snapshot("a")
        twin.add_snapshot(Snapshot("b"))
        twin.snapshots["b"].add_snapshot(twin)
        for action in (
            dumps,
            pickle.dumps,
            copy.deepcopy,
            lambda s: [*s.walk()],
            lambda s: s == twin,
            lambda s: [*diff(s, twin)],
        ):
            with pytest.raises(SnapshotError, match="is its own ancestor"):
                action(root)

    def test_the_explanation_of_a_bad_tree_ends_in_a_cycle_too(self) -> None:
        root = tree(tree(id="bad"), tree(id="loop"))
        root.find("loop").add_snapshot(root.find("loop"))
        root.find("bad").snapshots.update({"x": 7, 1: 7})  # type: ignore[dict-item]
        with pytest.raises(SnapshotError, match=r"\$.snapshots\['bad'\].snapshots\['x'\]: a Snap"):
            dumps(root)

    def test_a_shared_node_is_no_cycle(self) -> None:
        shared = tree(id="s", a=b"1")
        root = tree(tree(shared, id="x"), tree(shared, id="y"))
        assert pickle.loads(pickle.dumps(root)) == root

    @given(IDS, IDS)
    def test_a_key_that_is_not_the_id_is_refused(self, key: str, id: str) -> None:
        root = Snapshot("r")
        root.snapshots[key] = Snapshot(id)
        if key == id:
            dumps(root)
        else:
            with pytest.raises(SnapshotError, match="its own id"):
                dumps(root)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s.snapshots.update({1: Snapshot("x")}), "the id is not a str"),
            (lambda s: s.snapshots.update({"x": 7}), "a Snapshot is needed, not int"),
            (lambda s: s.snapshot_data.update({"x": b""}), "a SnapshotDataSection is needed"),
            (lambda s: setattr(s, "snapshots", None), r"\$.snapshots: a dict is needed, not None"),
            (lambda s: setattr(s, "snapshot_data", ["a"]), r"\$.snapshot_data: a dict is needed"),
            (lambda s: setattr(s, "id", 7), "the id is not a str"),
            (
                lambda s: s.snapshot_data.update({"x": SnapshotDataSection("y")}),
                "its own id is 'y'",
            ),
            (
                lambda s: setattr(s.section("a"), "snapshot", "text"),
                "contiguous bytes-like object, not str",
            ),
        ],
    )
    def test_what_does_not_belong_is_named(self, change: Any, text: str) -> None:
        root = tree(tree(id="cpu"), a=b"1")
        change(root)
        with pytest.raises(SnapshotError, match=text):
            dumps(root)

    @pytest.mark.parametrize("thing", [None, "vm", {"id": "vm"}])
    def test_only_snapshots_are_encoded(self, thing: Any) -> None:
        with pytest.raises(SnapshotError, match="a Snapshot is needed"):
            dumps(thing)
