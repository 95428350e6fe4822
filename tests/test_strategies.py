from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from vmmig.codec import dumps, load, loads
from vmmig.composite import Composite
from vmmig.errors import DecodeError
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.snapshot import Snapshot, SnapshotDataSection, flatten
from vmmig.testing import strategies
from vmmig.testing.components import Counter
from vmmig.testing.registration import register
from vmmig.traits import Migratable
from vmmig.verify import verify


def depth(snapshot: Snapshot) -> int:
    return max(len(path.ids) for path, _ in snapshot.walk())


def sections(snapshot: Snapshot) -> list[SnapshotDataSection]:
    return [s for _, node in snapshot.walk() for s in node.snapshot_data.values()]


def same_id_under_two_parents(snapshot: Snapshot) -> bool:
    parents = [node for _, node in snapshot.walk() if node.snapshots]
    ids = [id for node in parents for id in node.snapshots]
    return len(ids) > len({*ids})


GENERATE = settings(phases=[Phase.generate], max_examples=5000)

NASTY: dict[str, Callable[[Snapshot], object]] = {
    "an empty id": lambda s: "" in s.snapshots,
    "a path for an id": lambda s: "../../x" in s.snapshots,
    "a NUL for an id": lambda s: any("\0" in id for id in s.snapshots),
    "characters beyond 16 bits": lambda s: any(max(id) > "\uffff" for id in s.snapshots if id),
    "a deep chain": lambda s: depth(s) > 100,
    "many siblings": lambda s: len(s.snapshots) > 100,
    "an empty section": lambda s: any(not section.nbytes for section in sections(s)),
    "equal ids under different parents": same_id_under_two_parents,
    "a payload that can change": lambda s: any(
        isinstance(section.snapshot, bytearray) for section in sections(s)
    ),
}


@pytest.mark.parametrize("case", NASTY)
def test_what_is_nasty_comes_up(case: str) -> None:
    assert find(strategies.snapshots(), NASTY[case], settings=GENERATE)


@given(strategies.snapshots(ids=st.sampled_from(["cpu", "disk"])))
def test_all_ids_are_those_given(snapshot: Snapshot) -> None:
    columns = flatten(snapshot)
    assert {*columns.ids, *columns.section_ids} <= {"cpu", "disk"}


def test_trees_of_given_ids_are_deep_and_wide_too() -> None:
    one, many = st.just("cpu"), st.integers(0, 999).map(str)
    assert find(strategies.snapshots(ids=one), lambda s: depth(s) > 100, settings=GENERATE)
    wide = find(strategies.snapshots(ids=many), lambda s: len(s.snapshots) > 15, settings=GENERATE)
    assert all(id.isdigit() for id in wide.snapshots)


def test_large_sections_come_up_where_they_may() -> None:
    large = strategies.snapshots(max_section_bytes=1 << 21)
    found = find(large, lambda s: any(section.nbytes >= 65536 for section in sections(s)))
    assert [section.nbytes for section in sections(found)] == [65536]


@given(strategies.snapshots(max_nodes=30, max_section_bytes=7))
def test_bounds_hold(snapshot: Snapshot) -> None:
    assert len(flatten(snapshot).ids) <= 30
    assert all(section.nbytes <= 7 for section in sections(snapshot))


class TestShrinking:
    """Of a tree that fails, only what makes it fail is left."""

    def test_to_the_node_that_fails(self) -> None:
        found = find(
            strategies.snapshots(),
            lambda s: any(len(n.snapshot_data) == 2 and n is not s for _, n in s.walk()),
        )
        assert len(flatten(found).ids) == 2
        assert found.id == ""
        (child,) = found.snapshots.values()
        assert child.id == ""
        assert all(section.nbytes == 0 for section in child.snapshot_data.values())

    def test_to_the_depth_that_fails(self) -> None:
        found = find(strategies.snapshots(), lambda s: depth(s) >= 40)
        assert (depth(found), len(flatten(found).ids), sections(found)) == (40, 41, [])

    def test_to_the_byte_that_fails(self) -> None:
        found = find(
            strategies.snapshots(),
            lambda s: any(b"\x07" in bytes(memoryview(each.snapshot)) for each in sections(s)),
        )
        assert [bytes(memoryview(s.snapshot)) for s in sections(found)] == [b"\x07"]
        assert len(flatten(found).ids) == 1


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (strategies.snapshots, {"max_nodes": 0}),
        (strategies.snapshots, {"max_nodes": "many"}),
        (strategies.snapshots, {"max_section_bytes": -1}),
        (strategies.snapshot_data_sections, {"min_bytes": 5, "max_bytes": 4}),
        (strategies.snapshot_data_sections, {"min_bytes": True}),
        (strategies.memory_ranges, {"page_bytes": 0}),
        (strategies.memory_ranges, {"max_gpa": 1 << 64}),
        (strategies.memory_ranges, {"max_length": -1}),
        (strategies.memory_range_tables, {"max_ranges": -1}),
        (strategies.component_trees, {"max_components": 1.5}),
    ],
)
def test_bad_bounds_are_refused(strategy: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(reversed(options))):
        strategy(**options)


@given(strategies.snapshot_data_sections(min_bytes=3, max_bytes=5))
def test_sections_keep_their_bounds(section: SnapshotDataSection) -> None:
    assert 3 <= section.nbytes <= 5


@given(strategies.memory_ranges(max_gpa=0xFFFF, max_length=0x4000, page_bytes=0x1000))
def test_ranges_keep_their_bounds(each: MemoryRange) -> None:
    assert each.gpa % 0x1000 == each.length % 0x1000 == 0
    assert each.end <= 0x10000
    assert each.length <= 0x4000


def test_ranges_reach_the_ends_of_64_bits() -> None:
    assert find(strategies.memory_ranges(), lambda r: r.end == 1 << 64 and r.length)


def test_tables_may_overlap() -> None:
    find(
        strategies.memory_range_tables(),
        lambda table: table.total_bytes > MemoryRangeTable.merge([table]).total_bytes,
    )


def counters(machine: Composite) -> Iterator[Counter]:
    for part in machine.components.values():
        if isinstance(part, Counter):
            yield part
        else:
            assert isinstance(part, Composite)
            yield from counters(part)


@given(strategies.component_trees(max_components=5))
def test_component_trees_are_migratable(machine: Any) -> None:
    assert verify(machine, Migratable, defaults="error") == ()
    machine.pause()
    saved = machine.snapshot()
    parts = [*counters(machine)]
    for part in parts:
        part.add(1)
    assert (dumps(machine.snapshot()) != dumps(saved)) == bool(parts)
    machine.restore(loads(dumps(saved)))
    assert dumps(machine.snapshot()) == dumps(saved)
    assert len(flatten(saved).ids) <= 6


def test_component_trees_nest() -> None:
    find(
        strategies.component_trees(),
        lambda machine: any(hasattr(part, "components") for part in machine.components.values()),
    )


def test_counters_in_a_tree_differ_in_value() -> None:
    find(strategies.component_trees(), lambda m: len({c.value for c in counters(m)}) == 3)


@settings(max_examples=300)
@given(strategies.corrupted_containers())
def test_corrupted_containers_are_refused(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(DecodeError):
        loads(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data) + (1 << 20)


@given(strategies.corrupted_containers())
def test_a_stream_is_refused_too_or_holds_more_than_one_container(data: bytes) -> None:
    try:
        snapshot = load(io.BytesIO(data))
    except DecodeError:
        return
    assert data.startswith(dumps(snapshot))
    assert data != dumps(snapshot)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("header", "it is empty"),
        ("header", "truncated"),
        ("header", "no vmmig container begins like this"),
        ("header", "its checksum does not match"),
        ("header", "a newer vmmig is needed"),
        ("header", "larger than the container"),
        ("index", "its checksum does not match"),
        ("index", "its columns disagree"),
        ("index", "its sections make"),
        ("index", "exceeds max_array_len"),
        ("index", "exceeds max_map_len"),
        ("byte", "bytes are missing"),
        ("byte", "stand behind"),
        ("table of checksums", "its checksum does not match"),
        ("$", "damaged: the checksum of its"),
    ],
)
def test_damage_reaches_every_check_of_the_decoder(where: str, text: str) -> None:
    def refused_so(data: bytes) -> bool:
        with pytest.raises(DecodeError) as info:
            loads(data)
        return (info.value.where or "").startswith(where) and text in str(info.value.cause)

    assert find(strategies.corrupted_containers(), refused_so, settings=GENERATE) is not None


@attrs.define
class SaveGame:
    machine: Snapshot
    thumbnails: list[SnapshotDataSection]
    dirty: MemoryRangeTable
    last: MemoryRange


def test_from_type_knows_the_classes() -> None:
    register()
    attrs.resolve_types(SaveGame, globals())
    game = find(st.builds(SaveGame), lambda game: bool(game.thumbnails) and game.last.length > 0)
    assert game.machine == Snapshot("")
    assert find(st.from_type(Snapshot), lambda s: depth(s) == 2).id == ""
    assert settings.get_profile("vmmig-ci").max_examples == 1000


def test_registering_loads_no_more_than_the_classes() -> None:
    code = (
        "import sys; from vmmig.testing.registration import register; register(); "
        "print({'cattrs', 'msgpack', 'vmmig.testing.strategies'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_hypothesis_finds_them_by_itself() -> None:
    code = (
        "from hypothesis import find, strategies as st; from vmmig import Snapshot; "
        "print(find(st.from_type(Snapshot), lambda s: s.snapshots))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "Snapshot('', snapshots: [''])\n"
