"""Cloud Hypervisor's snapshot folders, of both generations."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import chain, snapshots
from vmmig import (
    DecodeError,
    MigrateReceiveError,
    MigrateSendError,
    Snapshot,
    SnapshotDataSection,
    SnapshotError,
    dumps,
    loads,
)
from vmmig.formats import cloud_hypervisor as today
from vmmig.formats.cloud_hypervisor import FOLDER_2020, SEED_JSON

MIB = 1 << 20
CONFIG = '{"cpus": {"boot_vcpus": 2, "max": 1' + "0" * 50 + '}, "rate": 1.50e3, "new": null}'


def text_of(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def node(state: str | None = None, **children: Any) -> dict[str, Any]:
    data = None if state is None else {"state": state}
    return {"snapshots": children, "snapshot_data": data}


def manager(*ranges: tuple[int, int]) -> dict[str, Any]:
    data = [{"gpa": gpa, "length": length} for gpa, length in ranges]
    return node(text_of({"memory_ranges": {"data": data}, "boot_ram": 1 << 30}))


def state_of(*ranges: tuple[int, int], **children: Any) -> dict[str, Any]:
    tree = {"cpu-manager": node(**{"0": node('{"rip":4096}')}), "device-manager": node("{}")}
    return node("{}", **tree, **{"memory-manager": manager(*ranges)}, **children)


def folder_of(
    path: Path, state: Any, ram: bytes | None = None, config: str | bytes = CONFIG
) -> Path:
    path.mkdir()
    text = state if isinstance(state, (str, bytes)) else json.dumps(state, indent=1)
    (path / "state.json").write_bytes(text.encode() if isinstance(text, str) else text)
    (path / "config.json").write_bytes(config.encode() if isinstance(config, str) else config)
    if ram is not None:
        (path / "memory-ranges").write_bytes(ram)
    return path


def folder_2020_of(path: Path, tree: Any, *regions: bytes) -> Path:
    path.mkdir()
    (path / "vm.json").write_bytes(tree if isinstance(tree, bytes) else json.dumps(tree).encode())
    for i, region in enumerate(regions):
        (path / f"memory-region-{i}").write_bytes(region)
    return path


def tree_2020() -> dict[str, Any]:
    def leaf(id: str, data: bytes, **more: Any) -> dict[str, Any]:
        section = {"id": f"{id}-section", "snapshot": [*data]}
        return {"id": id, "snapshots": {}, "snapshot_data": {f"{id}-section": section}, **more}

    children = [leaf("cpu-manager", bytes(range(256))), leaf("memory-manager", b"{}")]
    children.append(leaf("device-manager", b"", unknown=[1.5, 10**40, {"deep": None}]))
    return {"id": "vm", "snapshots": {c["id"]: c for c in children}, "snapshot_data": {}}


def contents(folder: Path) -> dict[str, Any]:
    """What a folder's files say: JSON as values with their numbers' texts, else bytes."""
    return {
        path.name: json.loads(path.read_bytes(), parse_int=str, parse_float=str)
        if path.name in ("state.json", "vm.json")
        else path.read_bytes()
        for path in folder.iterdir()
    }


def assert_survives(format: Any, folder: Path) -> Snapshot:
    """Read then written it is the same, and so it is by way of the container."""
    snapshot: Snapshot = format.read(folder)
    for name, tree in (("direct", snapshot), ("by-container", loads(dumps(snapshot)))):
        again = folder.with_name(f"{folder.name}-{name}")
        format.write(tree, again)
        assert contents(again) == contents(folder)
        assert format.read(again) == snapshot
    return snapshot


def test_the_folder_of_today_becomes_a_tree_and_comes_back(tmp_path: Path) -> None:
    ranges = [(1 << 32, 8192), (0, 4096), (0xF0000, 3)]
    ram = b"h" * 8192 + b"l" * 4096 + b"odd"
    folder = folder_of(tmp_path / "vm", state_of(*ranges), ram)
    assert today.sniff(folder)
    assert not FOLDER_2020.sniff(folder)
    vm = assert_survives(today, folder)
    assert vm.id == "cloud-hypervisor"
    assert bytes(vm.section("config").snapshot) == CONFIG.encode()
    assert bytes(vm.find("cpu-manager/0").section("state").snapshot) == b'{"rip":4096}'
    memory = vm.find("memory")
    assert {*memory.snapshot_data} == {"0x0", "0x100000000", "0xf0000"}
    assert bytes(memory.section("0x0").snapshot) == b"l" * 4096
    assert bytes(memory.section("0xf0000").snapshot) == b"odd"


def test_ram_is_mapped_and_keeps_its_holes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "vm", state_of((0, 256 * MIB), (1 << 32, 64 * MIB)), b"")
    with (folder / "memory-ranges").open("wb") as file:
        os.pwrite(file.fileno(), b"here", 5 * MIB + 100)
        os.pwrite(file.fileno(), bytes(MIB), 100 * MIB)
        os.pwrite(file.fileno(), b"there", 300 * MIB)
        os.truncate(file.fileno(), 320 * MIB)
    vm = today.read(folder)
    for section in vm.find("memory").snapshot_data.values():
        assert isinstance(memoryview(section.snapshot).obj, mmap.mmap)
    for tree in (vm, today.from_parts(*today.to_parts(vm))):
        today.write(tree, tmp_path / "again")
        again = tmp_path / "again" / "memory-ranges"
        assert again.stat().st_size == 320 * MIB
        # The zeros that took a MiB of the first file are a hole in the second.
        assert again.stat().st_blocks * 512 < MIB
        copy = today.read(tmp_path / "again").find("memory")
        assert bytes(memoryview(copy.section("0x0").snapshot)[5 * MIB + 100 :][:4]) == b"here"
        high = memoryview(copy.section("0x100000000").snapshot)
        assert bytes(high[44 * MIB :][:5]) == b"there"
        for path in [*(tmp_path / "again").iterdir()]:
            path.unlink()


def test_ram_of_this_process_is_written_sparse(tmp_path: Path) -> None:
    ram = bytearray(3 * MIB + 5)
    ram[MIB : MIB + 3] = b"abc"
    ram[-1] = 1
    state = text_of(state_of((0, len(ram)))).encode()
    vm = today.from_parts(CONFIG.encode(), state, {0: ram})
    today.write(vm, tmp_path / "vm")
    file = tmp_path / "vm" / "memory-ranges"
    assert file.read_bytes() == ram
    assert file.stat().st_blocks * 512 <= 64 << 10
    assert today.to_parts(today.read(tmp_path / "vm")).state == today.to_parts(vm).state


def test_the_ranges_may_stand_in_the_configuration_as_on_the_wire(tmp_path: Path) -> None:
    data = {"memory_ranges": {"data": [{"gpa": 4096, "length": 3}, {"gpa": 0, "length": 2}]}}
    config = json.dumps({"vm_config": {}, "common_cpuid": [], "memory_manager_data": data})
    vm = assert_survives(today, folder_of(tmp_path / "vm", node("{}"), b"abcde", config))
    assert bytes(vm.find("memory").section("0x1000").snapshot) == b"abc"


def test_without_ranges_the_ram_is_all_that_the_machine_has(tmp_path: Path) -> None:
    mapping = {"slot": 1, "zone_id": "mem0", "virtio_mem": False, "file_offset": 0}
    mappings = [{**mapping, "gpa": 4096, "size": 2}, {**mapping, "gpa": 0, "size": 1}]
    data = {"memory_ranges": {"data": []}, "guest_ram_mappings": mappings}
    config = json.dumps({"memory_manager_data": data})
    vm = assert_survives(today, folder_of(tmp_path / "vm", node(), b"abc", config))
    assert bytes(vm.find("memory").section("0x0").snapshot) == b"c"
    # RAM of which the snapshot has nothing, as that in a file of its own, has no file here.
    vm = assert_survives(today, folder_of(tmp_path / "shared", node(), None, config))
    assert "memory" not in vm.snapshots


def test_ram_may_be_cut_elsewhere_than_the_ranges(tmp_path: Path) -> None:
    state = text_of(state_of((0x1000, 6), (0, 2))).encode()
    memory = {0x1000: b"abc", 0x1003: b"def", 0: b"xy"}
    today.write(today.from_parts(b"{}", state, memory), tmp_path / "vm")
    assert (tmp_path / "vm" / "memory-ranges").read_bytes() == b"abcdefxy"
    for memory, what in [
        ({0x1000: b"abc", 0: b"xy"}, "no RAM at 0x1003"),
        ({0x1000: b"abcdef"}, "no RAM at 0x0"),
        ({}, "no RAM at 0x1000"),
        ({0x1000: b"abcdef", 0: b"xyz"}, "8 bytes of memory, but the snapshot has 9"),
        ({0x1000: b"abcdef", 0: b"xy", 8: b"z"}, "8 bytes of memory, but the snapshot has 9"),
    ]:
        with pytest.raises(SnapshotError, match=what):
            today.write(today.from_parts(b"{}", state, memory), tmp_path / "other")
    with pytest.raises(DecodeError, match="overlap"):
        today.from_parts(b"{}", state, {0: b"abc", 2: b"d"})


def test_the_text_is_that_of_cloud_hypervisor_itself() -> None:
    """Compact, with the keys sorted and only those characters escaped that must be."""
    text = (
        '{"snapshots":{"a\\"b":{"snapshots":{},"snapshot_data":null},"ä":{"snapshots":{},'
        '"snapshot_data":{"state":"{\\"t\\":\\"\\\\n\\u001f\\",\\"/\\":\\"\\t€\x7f\\"}"}}},'
        '"snapshot_data":{"state":"{}"}}'
    ).encode()
    assert today.to_parts(today.from_parts(b"{}", text, {})).state == text
    text = (
        '{"id":"vm","snapshots":{"ü":{"id":"ü","snapshots":{},"snapshot_data":{"ü-section":'
        '{"id":"ü-section","snapshot":[0,7,10,99,100,255]}}}},"snapshot_data":{}}'
    ).encode()
    assert SEED_JSON.dumps(SEED_JSON.loads(text)) == text


UNKNOWN = st.recursive(
    st.one_of(
        st.sampled_from(["null", "true", "1e400", "-0", "-0.0", "1E+2", "1.50", "9" * 5000]),
        st.integers().map(str),
        st.text().map(json.dumps),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(
            lambda items: "{%s}" % ",".join(f"{json.dumps(k)}:{v}" for k, v in items.items())  # noqa: UP031
        ),
    ),
    max_leaves=5,
)
KEYS = st.text(max_size=4).filter(
    lambda key: key not in ("id", "snapshots", "snapshot_data", "state", "snapshot")
)
SPACE = st.sampled_from(["", " ", "\n\t", "  \r\n"])


def object_of(draw: st.DrawFn, members: dict[str, str]) -> str:
    """An object with these members, others between them, in any order, with white space."""
    others = draw(st.dictionaries(KEYS, UNKNOWN, max_size=2))
    order = draw(st.permutations([*({**others, **members}).items()]))
    space = draw(SPACE)
    texts = [f"{space}{json.dumps(key)}{space}:{space}{value}{space}" for key, value in order]
    return "{" + ",".join(texts) + "}"


@st.composite
def trees_of_today(draw: st.DrawFn, depth: int = 2) -> str:
    names = draw(st.lists(st.sampled_from(["memory", "a", "é", "/"]), max_size=depth, unique=True))
    children = [f"{json.dumps(name)}: {draw(trees_of_today(depth=depth - 1))}" for name in names]
    members = {"snapshots": "{" + ",".join(children) + "}"}
    kind = draw(st.sampled_from(["null", "none", "object", "empty"]))
    if kind == "object":
        members["snapshot_data"] = object_of(draw, {"state": json.dumps(draw(st.text()))})
    elif kind == "empty":
        members["snapshot_data"] = object_of(draw, {})
    elif kind == "null":
        members["snapshot_data"] = "null"
    return object_of(draw, members)


@st.composite
def trees_of_2020(draw: st.DrawFn, id: str = "vm", depth: int = 2) -> str:
    names = draw(st.lists(st.sampled_from(["memory", "a", "é", "/"]), max_size=depth, unique=True))
    children = [
        f"{json.dumps(name)}: {draw(trees_of_2020(id=name, depth=depth - 1))}" for name in names
    ]
    sections = []
    for name in draw(st.lists(st.text(max_size=3), max_size=2, unique=True)):
        numbers = [f"{draw(SPACE)}{byte}{draw(SPACE)}" for byte in draw(st.binary(max_size=5))]
        listed = f"[{','.join(numbers) or draw(SPACE)}]"
        members = {"id": json.dumps(name), "snapshot": listed}
        sections.append(f"{json.dumps(name)}: {object_of(draw, members)}")
    members = {
        "id": json.dumps(id),
        "snapshots": "{" + ",".join(children) + "}",
        "snapshot_data": "{" + ",".join(sections) + "}",
    }
    return object_of(draw, members)


def values(text: bytes | str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str)


@given(text=trees_of_today(), with_ram=st.booleans())
def test_a_state_keeps_all_its_values(text: str, with_ram: bool) -> None:
    memory = {0: b"ram", 1 << 33: bytes(5)} if with_ram else {}
    vm = today.from_parts(b"{}", text.encode(), memory)
    again = today.to_parts(loads(dumps(vm)))
    assert values(again.state) == values(text)
    assert {gpa: bytes(part) for gpa, part in again.memory.items()} == memory
    assert today.from_parts(*again) == vm


@given(text=trees_of_2020())
def test_a_tree_of_2020_keeps_all_its_values(text: str) -> None:
    vm = SEED_JSON.loads(text.encode())
    again = SEED_JSON.dumps(loads(dumps(vm)))
    assert values(again) == values(text)
    assert SEED_JSON.loads(again) == vm


@given(snapshot=snapshots(payloads=st.binary(max_size=300)))
def test_every_tree_can_be_written_as_the_json_of_2020(snapshot: Snapshot) -> None:
    text = SEED_JSON.dumps(snapshot)
    assert SEED_JSON.loads(text) == snapshot
    json.loads(text)


def test_no_depth_is_too_deep(tmp_path: Path) -> None:
    SEED_JSON.write(chain(5000), tmp_path / "vm.json")
    assert SEED_JSON.read(tmp_path / "vm.json") == chain(5000)


@pytest.mark.parametrize("separator", [",", ", ", " ,\n  "])
def test_a_long_list_is_read_in_pieces(separator: str) -> None:
    data = bytes(range(256)) * 1000
    numbers = separator.join(map(str, data))
    text = (
        '{"id":"vm","snapshots":{},"snapshot_data":{"s":{"id":"s","snapshot":[' + numbers + "]}}}"
    ).encode()
    assert bytes(SEED_JSON.loads(text).section("s").snapshot) == data
    for place in (2, len(text) // 2, len(text) - 8):
        place = text.index(b"255", place - 2)
        wrong = text[:place] + b"256" + text[place + 3 :]
        with pytest.raises(DecodeError, match=f"byte {place}: a byte from 0 to 255 .* not '256"):
            SEED_JSON.loads(wrong)


def test_the_folder_of_2020_becomes_a_tree_and_comes_back(tmp_path: Path) -> None:
    folder = folder_2020_of(tmp_path / "vm", tree_2020(), b"r" * 5000, bytes(2 * MIB))
    assert FOLDER_2020.sniff(folder)
    assert not today.sniff(folder)
    vm = assert_survives(FOLDER_2020, folder)
    assert vm.id == "vm"
    assert {*vm.snapshots} == {"cpu-manager", "device-manager", "memory", "memory-manager"}
    regs = vm.find("cpu-manager").section("cpu-manager-section")
    assert bytes(regs.snapshot) == bytes(range(256))
    ram = memoryview(vm.find("memory").section("memory-region-1").snapshot)
    assert isinstance(ram.obj, mmap.mmap)
    assert (tmp_path / "vm-direct" / "memory-region-1").stat().st_blocks == 0


@pytest.mark.parametrize("own", [{}, {"s": {"id": "s", "snapshot": [1]}}])
def test_a_component_of_2020_may_be_called_memory(tmp_path: Path, own: Any) -> None:
    tree = tree_2020()
    tree["snapshots"]["memory"] = {"id": "memory", "snapshots": {}, "snapshot_data": own}
    assert_survives(FOLDER_2020, folder_2020_of(tmp_path / "a", tree))
    assert_survives(FOLDER_2020, folder_2020_of(tmp_path / "b", tree, b"ram"))
    tree["snapshots"]["memory"]["snapshot_data"] = {
        "memory-region-0": {"id": "memory-region-0", "snapshot": []}
    }
    with pytest.raises(DecodeError, match="'memory-region-0' is in it, which should be a file"):
        FOLDER_2020.read(folder_2020_of(tmp_path / "c", tree))


def test_the_json_alone_is_a_format(tmp_path: Path) -> None:
    path = tmp_path / "vm.json"
    path.write_text(json.dumps(tree_2020()))
    assert SEED_JSON.sniff(path)
    assert not SEED_JSON.sniff(tmp_path)
    SEED_JSON.write(SEED_JSON.read(path), tmp_path / "again.json")
    assert values((tmp_path / "again.json").read_bytes()) == values(path.read_bytes())


@given(text=trees_of_today())
def test_a_snapshot_of_today_goes_through_the_json_of_2020(text: str) -> None:
    vm = today.from_parts(b"{}", text.encode(), {0: b"ram"})
    again = SEED_JSON.loads(SEED_JSON.dumps(vm))
    assert again == vm
    assert values(today.to_parts(again).state) == values(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"null", "no JSON object of unknown keys"),
        (b'{"snapshots":{}}', "'snapshots' is what the tree itself has"),
        (b'{"id":"x"}', "'id' is what the tree itself has"),
        (b'{"snapshot_data":[]}', "no JSON object of unknown keys"),
        (b'{"snapshot_data":{"s":1}}', "no JSON object of unknown keys"),
        (b'{"a":1', "no JSON object of unknown keys"),
    ],
)
def test_unknown_keys_that_are_none_are_refused(text: bytes, what: str) -> None:
    vm = Snapshot("vm")
    vm.add_data_section(SnapshotDataSection("s", b""))
    vm.add_data_section(SnapshotDataSection("$vm.json", text))
    with pytest.raises(SnapshotError, match=what) as raised:
        SEED_JSON.dumps(vm)
    assert "$.snapshot_data['$vm.json']: " in str(raised.value)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    ram = folder_of(tmp_path / "today", state_of((0, 3)), b"ram")
    old = FOLDER_2020.read(folder_2020_of(tmp_path / "old", tree_2020(), b"ram"))
    new = today.read(ram)
    strange = today.read(ram)
    strange.find("cpu-manager").add_data_section(SnapshotDataSection("regs", b""))
    binary = today.read(ram)
    binary.find("cpu-manager").add_data_section(SnapshotDataSection("state", b"\xff"))
    surrogate = Snapshot("vm")
    surrogate.add_snapshot(Snapshot("\ud800"))
    unranged = today.from_parts(b"{}", text_of(node()).encode(), {0: b"ram"})
    odd = today.from_parts(b"{}", text_of(node()).encode(), {})
    odd.add_data_section(SnapshotDataSection("$state.json", b'{"snapshot_data":[]}'))
    broken = today.from_parts(b"{}", text_of(node()).encode(), {})
    broken.add_data_section(SnapshotDataSection("config", b"{"))
    cases: list[tuple[Any, Snapshot, str]] = [
        (today, old, "no section 'config'"),
        (today, strange, "'cpu-manager'.*'regs'.*convert to another format"),
        (today, binary, "'cpu-manager'.*not UTF-8 from byte 0"),
        (today, unranged, "no ranges of memory, but there is RAM"),
        (today, odd, "no JSON object of unknown keys"),
        (today, broken, "config.json, byte 1"),
        (FOLDER_2020, new, "'0x0'.*convert to another format"),
        (FOLDER_2020, surrogate, "cannot be written as UTF-8"),
        (SEED_JSON, surrogate, "cannot be written as UTF-8"),
    ]
    before = sorted(tmp_path.iterdir())
    for format, snapshot, what in cases:
        with pytest.raises(SnapshotError, match=what):
            format.write(snapshot, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    vm = today.read(folder_of(tmp_path / "vm", state_of((0, 3)), b"ram"))
    (tmp_path / "empty").mkdir()
    today.write(vm, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    for there in ("empty", "file"):
        with pytest.raises(MigrateSendError, match="there already, and is not an empty folder"):
            today.write(vm, tmp_path / there)
    with pytest.raises(MigrateSendError, match="No such file or directory; check the path"):
        today.write(vm, tmp_path / "no" / "folder")
    with pytest.raises(MigrateSendError, match="is a file; check the path"):
        today.write(vm, tmp_path / "file" / "folder")
    assert sorted(tmp_path.rglob("*")) == before
    url = f"file://{tmp_path}/by-url"
    today.write(vm, url)
    assert today.read(url) == vm


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from vmmig import MigrateSendError
from vmmig.formats import cloud_hypervisor as today
state = {text_of(state_of((0, 1 << 20))).encode()!r}
vm = today.from_parts(b"{{}}", state, {{0: b"x" * (1 << 20)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    today.write(vm, {str(tmp_path / "vm")!r})
except MigrateSendError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "File too large; raise the limit" in run.stdout
    assert not [*tmp_path.iterdir()]


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "vm", state_of((0, 3)), b"ram")
    old = folder_2020_of(tmp_path / "old", tree_2020(), b"ram", b"more")
    bad = folder_of(tmp_path / "bad", "{", b"ram")
    before = os.listdir("/proc/self/fd")
    for i in range(3):
        today.write(today.read(folder), tmp_path / f"vm-{i}")
        FOLDER_2020.write(FOLDER_2020.read(old), tmp_path / f"old-{i}")
        with pytest.raises(DecodeError):
            today.read(bad)
    assert os.listdir("/proc/self/fd") == before


STATES: list[tuple[bytes, str]] = [
    (b"", "byte 0: an object must stand here, not the end of the file"),
    (b"[]", "byte 0: an object must stand here"),
    (b'\xef\xbb\xbf{"snapshots":{}}', "byte 0: an object"),
    (b'{"snapshots":{}', "byte 15: a comma or a closing brace"),
    (b'{"snapshots":{}}x', "byte 16: nothing may follow here, but there is 'x'"),
    (b'{"snapshots":{},}', "byte 16: a string must stand here, not '}'"),
    (b'{"snapshots" {}}', "byte 13: a colon"),
    (b'{"snapshot_data":null}', "has no 'snapshots'"),
    (b'{"snapshots":null}', "byte 13: an object"),
    (b'{"snapshots":[]}', "byte 13: an object"),
    (b'{"snapshots":{"a":1}}', "byte 18: an object"),
    (b'{"snapshots":{},"snapshots":{}}', 'byte 16: the key "snapshots" is there more than once'),
    (b'{"snapshots":{"a":{"snapshots":{}},"\\u0061":{"snapshots":{}}}}', 'byte 35: the key "a"'),
    (b'{"snapshots":{},"snapshot_data":nul}', "null must stand here, not 'nul}'"),
    (b'{"snapshots":{},"snapshot_data":"x"}', "byte 32: an object"),
    (b'{"snapshots":{},"snapshot_data":{"state":1}}', "byte 41: a string"),
    (b'{"snapshots":{},"snapshot_data":{"state":"a","state":"b"}}', "more than once"),
    (b'{"snapshots":{},"snapshot_data":{"state":"\xff"}}', "byte 42: the text is not UTF-8"),
    (b'{"snapshots":{},"snapshot_data":{"state":"\\ud800"}}', "surrogate"),
    (b'{"snapshots":{},"snapshot_data":{"state":"\n"}}', "Invalid control character"),
    (b'{"snapshots":{},"snapshot_data":{"state":"\\x"}}', "Invalid \\escape"),
    (b'{"snapshots":{},"snapshot_data":{"state":"abc', "the string that begins here does not end"),
    (b'{"snapshots":{},"x":NaN}', "byte 20: in the value that begins here, there is NaN"),
    (b'{"snapshots":{},"x":[-Infinity]}', "there is -Infinity"),
    (b'{"snapshots":{},"x":01}', "byte 21: a comma"),
    (b'{"snapshots":{},"x":{"y":1,"y":2}}', 'the key "y" is there more than once'),
    (b'{"snapshots":{},"x":"\xff"}', "byte 21: the text is not UTF-8"),
    (b'{"snapshots":{},"x":' + b"[" * 100_000, "nested too deep"),
    (b'{"snapshots":{},"x":[1,}', "byte 23: "),
    (b'{"snapshots":{},"x":["' + b"1" * (17 << 20) + b'"]}', "more than 16777216 bytes"),
]


@pytest.mark.parametrize(("state", "what"), STATES, ids=[str(i) for i in range(len(STATES))])
def test_a_malformed_state_is_refused(tmp_path: Path, state: bytes, what: str) -> None:
    with pytest.raises(DecodeError, match=r"state\.json, byte") as raised:
        today.read(folder_of(tmp_path / "vm", state))
    assert what in str(raised.value)


def with_ranges(*ranges: Any) -> Any:
    data = {"memory_ranges": {"data": [*ranges]}}
    return node("{}", **{"memory-manager": node(text_of(data))})


FOLDERS: list[tuple[Any, bytes | None, str, str]] = [
    (state_of((0, 4)), b"ram", "{}", "memory-ranges: it has 3 bytes, but .* are 4 bytes in all"),
    (state_of((0, 2)), b"ram", "{}", "memory-ranges: it has 3 bytes, but .* are 2 bytes in all"),
    (state_of((0, 2)), None, "{}", "memory-ranges: it is missing; .* 2 bytes of RAM"),
    (state_of(), b"ram", "{}", "memory-ranges: it has 3 bytes, but .* are 0 bytes"),
    (state_of((0, 2), (1, 1)), b"ram", "{}", "memory_ranges, data: the 1 bytes at 0x1 overlap"),
    (state_of((5, 1), (5, 2)), b"ram", "{}", "overlap the 1 bytes at 0x5"),
    (state_of((1 << 64, 1)), b"r", "{}", r"data\[0\]: 'gpa' must be an integer from 0 to 2\^64-1"),
    (state_of((-1, 1)), b"r", "{}", "'gpa' must be"),
    (state_of(((1 << 64) - 1, 2)), b"ra", "{}", "not within 64 bits"),
    (with_ranges({"gpa": 0, "length": 1.0}), b"r", "{}", "'length' must be"),
    (with_ranges({"gpa": True, "length": 1}), b"r", "{}", "'gpa' must be"),
    (with_ranges({"gpa": 0}), b"r", "{}", "'length' must be"),
    (with_ranges(1), b"r", "{}", r"data\[0\]: an object must stand here"),
    (node(**{"memory-manager": node("[]")}), None, "{}", "the state of 'memory-manager': an obj"),
    (node(**{"memory-manager": node("x")}), None, "{}", "the state of 'memory-manager', byte 0"),
    (node(), None, "[]", "config.json: an object must stand here"),
    (node(), None, "{", "config.json, byte 1: "),
    (node(), None, '{"a":1,"a":1}', "config.json, byte 0: .* more than once"),
    (node(), None, '{"memory_manager_data": 1}', "config.json: an object"),
    (node(), None, '{"memory_manager_data": {"memory_ranges": []}}', "memory_ranges: an object"),
    (node(), None, '{"memory_manager_data": {"memory_ranges": {}}}', "data: a list must stand"),
    (node(), b"r", '{"memory_manager_data": {"guest_ram_mappings": 1}}', "mappings: a list must"),
]


@pytest.mark.parametrize("case", range(len(FOLDERS)))
def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path, case: int) -> None:
    state, ram, config, what = FOLDERS[case]
    with pytest.raises(DecodeError, match=what):
        today.read(folder_of(tmp_path / "vm", state, ram, config))


SECTION = '{"id":"vm","snapshots":{},"snapshot_data":{"s":{"id":"s","snapshot":%s}}}'
TREES: list[tuple[str, str]] = [
    *((SECTION % f"[{numbers}]", "a byte from 0 to 255 must stand here") for numbers in (
        "256", "-1", "1.0", "1e1", "01", "00", "1,,2", "1,", ",1", "1 2", "null", "true", '"1"',
        "[1]", "1;2", "0x1", "99999999999999999999", "+1", "1\v,2", "٣",
    )),
    (SECTION % "[1", "a byte from 0 to 255 must stand here, not '1}}}'"),
    (SECTION % "null", "a list must stand here"),
    (SECTION % '"AQI="', "a list must stand here"),
    (SECTION % ("[1" + " " * 70_000 + "]"), "a byte from 0 to 255"),
    (SECTION % '[],"snapshot":[]', 'the key "snapshot" is there more than once'),
    (SECTION.replace('"id":"s"', '"id":"t"') % "[]", 'the id is "t" under the key "s"'),
    (SECTION.replace('"s"', '"$vm.json"') % "[]", "no section can be called '$vm.json' here"),
    (SECTION.replace('"id":"s",', "") % "[]", "the section that ends here has no 'id'"),
    ('{"id":"vm","snapshots":{},"snapshot_data":{"s":{"id":"s"}}}', "has no 'snapshot'"),
    ('{"id":"vm","snapshots":{},"snapshot_data":null}', "an object must stand here"),
    ('{"id":"vm","snapshots":{}}', "the object that ends here has no 'snapshot_data'"),
    ('{"snapshots":{},"snapshot_data":{}}', "the object that ends here has no 'id'"),
    ('{"id":1,"snapshots":{},"snapshot_data":{}}', "a string must stand here"),
    (
        '{"id":"vm","snapshots":{"a":{"id":"b","snapshots":{},"snapshot_data":{}}},'
        '"snapshot_data":{}}',
        'the id is "b" under the key "a"',
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(TREES)))
def test_a_malformed_tree_of_2020_is_refused(tmp_path: Path, case: int) -> None:
    text, what = TREES[case]
    with pytest.raises(DecodeError, match=r"vm\.json, byte") as raised:
        FOLDER_2020.read(folder_2020_of(tmp_path / "vm", text.encode()))
    assert what in str(raised.value)


@pytest.mark.parametrize("name", ["memory-region-01", "memory-region-x", "memory-region-٣", "x"])
def test_a_file_that_would_be_lost_is_refused(tmp_path: Path, name: str) -> None:
    folder = folder_2020_of(tmp_path / "old", tree_2020())
    (folder / ".hidden").touch()
    FOLDER_2020.read(folder)
    (folder / name).touch()
    with pytest.raises(DecodeError, match="which would be lost; move it elsewhere"):
        FOLDER_2020.read(folder)


def test_what_is_no_folder_of_files_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "vm", node())
    (folder / "config.json").unlink()
    with pytest.raises(DecodeError, match=r"'config\.json' is missing"):
        today.read(folder)
    os.mkfifo(folder / "config.json")
    with pytest.raises(MigrateReceiveError, match=r"config\.json': it is not a regular file"):
        today.read(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(MigrateReceiveError, match=r"config\.json': Is a directory; name a file"):
        today.read(folder)
    for format in (today, FOLDER_2020):
        with pytest.raises(MigrateReceiveError, match="Not a directory"):
            format.read(folder / "state.json")
        for path in ("", "a\0b", tmp_path / "nothing", folder / "state.json" / "x"):
            assert not format.sniff(path)
            with pytest.raises(MigrateReceiveError):
                format.read(path)


def test_an_id_never_becomes_a_path(tmp_path: Path) -> None:
    vm = Snapshot("vm")
    names = ["../../x", "memory-region-/x", "memory-region-0/../x", "..", "/etc/passwd"]
    for name in ["memory", *names]:
        child = Snapshot(name)
        for id in names:
            child.add_data_section(SnapshotDataSection(id, b"x"))
        vm.add_snapshot(child)
    FOLDER_2020.write(vm, tmp_path / "a" / ".." / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "vm.json"]
    assert FOLDER_2020.read(tmp_path / "out") == vm


def oracle(text: bytes) -> Snapshot | None:
    """The tree as the json module sees it; None where it is not one."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(found)) == len(found)
        return dict(found)

    def refuse(name: str) -> Any:
        raise ValueError(name)

    def number(digits: str) -> int:
        assert not digits.startswith("-")
        return int(digits)

    def built(tree: Any) -> Snapshot:
        made = Snapshot(tree["id"])
        assert type(tree["id"]) is str
        made.id.encode()
        assert type(tree["snapshots"]) is type(tree["snapshot_data"]) is dict
        for id, child in tree["snapshots"].items():
            assert child["id"] == id
            made.add_snapshot(built(child))
        for id, section in tree["snapshot_data"].items():
            assert section["id"] == id
            assert type(section["snapshot"]) is list
            assert all(type(byte) is int for byte in section["snapshot"])
            made.add_data_section(SnapshotDataSection(id, bytes(section["snapshot"])))
        return made

    try:
        parsed = json.loads(
            text.decode(), object_pairs_hook=pairs, parse_constant=refuse, parse_int=number
        )
        return built(parsed)
    except (ValueError, AssertionError, KeyError, TypeError):
        return None


PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"0", b"1", b"25", b"256"]
PIECES += [b"-", b".", b"e", b"null", b"NaN", b"\xff", b"\xc3", b'"id"', b'"s"', b"", b"\\u00e9"]


@given(
    text=st.sampled_from(
        [
            SECTION.encode() % b"[1, 22,255]",
            b'{"id":"vm","snapshots":{"s":{"id":"s","snapshots":{},"snapshot_data":{}}},'
            b'"snapshot_data":{"s":{"id":"s","snapshot":[]},"t":{"id":"t","snapshot":[0,0]}}}',
        ]
    ),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(PIECES)),
        min_size=1,
        max_size=3,
    ),
)
def test_exactly_that_is_read_which_is_json(
    text: bytes, edits: list[tuple[float, int, bytes]]
) -> None:
    for share, removed, added in edits:
        place = int(share * len(text))
        text = text[:place] + added + text[place + removed :]
    expected = oracle(text)
    if expected is None:
        with pytest.raises(DecodeError, match=r"the JSON, byte \d+: "):
            SEED_JSON.loads(text)
        return
    found = SEED_JSON.loads(text)
    for _, each in found.walk():
        each.snapshot_data.pop("$vm.json", None)
    assert found == expected


@given(state=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), config=st.binary())
def test_any_bytes_end_in_a_decode_error_or_a_tree(state: bytes, config: bytes) -> None:
    calls: list[Callable[[], object]] = [
        lambda: SEED_JSON.loads(state),
        lambda: today.from_parts(b"{}", state, {}),
        lambda: today.from_parts(config, b'{"snapshots":{}}', {}),
    ]
    for call in calls:
        with suppress(DecodeError):
            call()


def test_a_long_list_takes_little_more_memory_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "vm.json"
    vm = Snapshot("vm")
    vm.add_data_section(SnapshotDataSection("s", bytes(range(256)) * (8 << 12)))
    SEED_JSON.write(vm, path)
    assert path.stat().st_size > 28 * MIB
    code = f"""
import re
from pathlib import Path
from vmmig.formats.cloud_hypervisor import SEED_JSON
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
path = Path({str(path)!r})
empty = SEED_JSON.loads(b'{{"id":"","snapshots":{{}},"snapshot_data":{{}}}}')
SEED_JSON.write(empty, path.with_name("empty"))
before = peak()
vm = SEED_JSON.read(path)
read = peak()
SEED_JSON.write(vm, path)
print(read - before, peak() - read)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read_bytes, write_bytes = map(int, run.stdout.split())
    assert 8 * MIB < read_bytes < (8 + 6) * MIB
    # The writer gathers 8 MiB for one write.
    assert write_bytes < (16 + 4) * MIB
