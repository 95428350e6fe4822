"""`compare` and ``vmmig compat``: every undeclared break is found, and nothing that is none."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from tests.golden.states import FOLDER
from tests.releases import RELEASES, release
from vmmig import (
    Added,
    Changed,
    Length,
    MigratableError,
    Removed,
    Renamed,
    Snapshot,
    SnapshotDataSection,
    save_state,
    subsection,
    versioned,
)
from vmmig.schema import Schema, compare, load_schema, loads_schema, schema_of
from vmmig.state import U8, U16, Range, writing_versions
from vmmig.testing import corpus_breaks, upgrade_breaks

COLORS = {"RED": 0, "GREEN": 1}


SECTORS = Annotated[bytes, Length(9000, 9000)]
AT_MOST = Annotated[float, Range(max=1)]
DIGIT = Literal["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def enum_of(members: Mapping[str, Any], kind: Any = enum.Enum) -> Any:
    return kind("Color", {**members})


@versioned("dev/sub", 1)
@attrs.define
class Sub:
    n: U8 = 0


@versioned("dev/other", 1)
@attrs.define
class Other:
    n: U8 = 0


def part(default: Any) -> Any:
    return subsection(default=default)


@attrs.define
class Pair:
    a: int = 0
    b: int = 0


@attrs.define
class Longer:
    a: int = 0
    b: int = 0
    c: int = 0


@attrs.define
class Wider:
    a: int = 0
    b: int | None = 0


def field(annotation: Any, default: Any = attrs.NOTHING) -> Any:
    made = default if type(default).__name__ == "_CountingAttr" else attrs.field(default=default)
    made.type = annotation
    return made


def declare(
    version: int = 1, history: Any = None, minimum_version: int | None = None, **fields: Any
) -> Any:
    """A release of the device ``dev``, with these fields; with ``x`` of 8 bits besides."""
    given = {"x": field(U8), **fields}
    members = {
        name: kind if type(kind).__name__ == "_CountingAttr" else field(kind)
        for name, kind in given.items()
        if kind is not None
    }
    cls = attrs.make_class("Dev", members, kw_only=True)
    return versioned("dev", version, history=history, minimum_version=minimum_version)(cls)


def up(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "y": str(fields["y"])}


def down(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "y": int(fields["y"])}


def broken(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "y": 100 // fields["y"]}


V = dict[str, Any]

# What an old and a new release declare, and which directions break.
BREAKS: dict[str, tuple[V, V, str]] = {
    "a field is added": ({}, {"y": int}, "both"),
    "a field is removed": ({"y": int}, {}, "both"),
    "a field is renamed": ({"y": int}, {"z": int}, "both"),
    "a field is added in a version that says nothing": ({}, {"version": 2, "y": int}, "both"),
    "an int becomes a str": ({"y": int}, {"y": str}, "both"),
    "an int becomes a float": ({"y": int}, {"y": float}, "both"),
    "an int becomes a bool": ({"y": int}, {"y": bool}, "both"),
    "bytes become a str": ({"y": bytes}, {"y": str}, "both"),
    "a range is narrowed": ({"y": U16}, {"y": U8}, "old on new"),
    "a range is widened": ({"y": U8}, {"y": U16}, "new on old"),
    "a range is given up": ({"y": U8}, {"y": int}, "new on old"),
    "a value becomes optional": ({"y": U8}, {"y": U8 | None}, "new on old"),
    "a value is no longer optional": ({"y": U8 | None}, {"y": U8}, "old on new"),
    "a length is limited": ({"y": str}, {"y": Annotated[str, Length(max=9)]}, "old on new"),
    "a list becomes a dict": ({"y": list[int]}, {"y": dict[str, int]}, "both"),
    "what a list holds changes": ({"y": list[int]}, {"y": list[str]}, "both"),
    "a pair becomes three": ({"y": tuple[int, int]}, {"y": tuple[int, int, int]}, "both"),
    "a dict gets other keys": ({"y": dict[int, int]}, {"y": dict[str, int]}, "both"),
    "an enum loses a member": (
        {"y": enum_of({**COLORS, "BLUE": 2})},
        {"y": enum_of(COLORS)},
        "old on new",
    ),
    "an enum gets a member": (
        {"y": enum_of(COLORS)},
        {"y": enum_of({**COLORS, "BLUE": 2})},
        "new on old",
    ),
    "two members of an enum are exchanged": (
        {"y": enum_of(COLORS)},
        {"y": enum_of({"RED": 1, "GREEN": 0})},
        "both",
    ),
    "an enum gets other values": (
        {"y": enum_of(COLORS)},
        {"y": enum_of({"RED": "r", "GREEN": "g"})},
        "both",
    ),
    "a flag is gone": (
        {"y": enum_of({"A": 1, "B": 2}, enum.Flag)},
        {"y": enum_of({"A": 1}, enum.Flag)},
        "old on new",
    ),
    "a nested class gets a field": ({"y": Pair}, {"y": Longer}, "both"),
    "a field of a nested class becomes optional": ({"y": Pair}, {"y": Wider}, "new on old"),
    "an array of another type": (
        {"y": npt.NDArray[np.uint16]},
        {"y": npt.NDArray[np.uint32]},
        "both",
    ),
    "a nested state is another": ({"y": Sub}, {"y": Other}, "both"),
    "a field becomes a subsection": ({"y": Sub}, {"y": field(Sub, part(Sub()))}, "both"),
    "a subsection is gone": ({"y": field(Sub, part(Sub()))}, {}, "old on new"),
    "a subsection is another state": (
        {"y": field(Sub, part(Sub()))},
        {"y": field(Other, part(Other()))},
        "both",
    ),
    "a subsection's default changes": (
        {"y": field(Sub, part(Sub()))},
        {"y": field(Sub, part(Sub(1)))},
        "both",
    ),
    "the version goes back": ({"version": 2}, {"version": 1}, "both"),
    "the history is cut off": (
        {"version": 2, "history": {2: Added("x", 0)}},
        {"version": 3, "history": {3: Added("y", 0)}, "minimum_version": 3, "y": int},
        "old on new",
    ),
    "the minimum is raised": (
        {"version": 1},
        {"version": 2, "history": {2: Added("y", 0)}, "minimum_version": 2, "y": int},
        "old on new",
    ),
    "a removal without a way back": (
        {"y": int},
        {"version": 2, "history": {2: Removed("y")}},
        "new on old",
    ),
    "a function without a way back": (
        {"y": int},
        {"version": 2, "history": {2: Changed(up)}, "y": str},
        "new on old",
    ),
    "another name than the declared one": (
        {"y": int},
        {"version": 2, "history": {2: Renamed("y", "z")}, "w": int},
        "both",
    ),
    "the removal of what was not there": (
        {},
        {"version": 2, "history": {2: Removed("y", 0)}},
        "both",
    ),
    "a default that does not fit": (
        {},
        {"version": 2, "history": {2: Added("y", 256)}, "y": U8},
        "old on new",
    ),
    "flags become a number": (
        {"y": enum_of({"A": 1, "B": 2}, enum.Flag)},
        {"y": Annotated[int, Range(0, 3)]},
        "new on old",
    ),
    "flags, of which one stands for two, become a number": (
        {"y": enum_of({"A": 1, "B": 2, "BOTH": 3}, enum.Flag)},
        {"y": Annotated[int, Range(0, 3)]},
        "new on old",
    ),
    "a field is added that was there": (
        {},
        {"version": 2, "history": {2: Added("x", 0)}},
        "both",
    ),
    "an old field is given what does not fit": (
        {"y": U8},
        {"version": 2, "history": {2: Removed("y", "none")}},
        "new on old",
    ),
    "an undeclared change beside a declared one": (
        {"y": int},
        {"version": 2, "history": {2: Added("z", 0)}, "y": str, "z": int},
        "both",
    ),
}

HARMLESS: dict[str, tuple[V, V]] = {
    "nothing changes": ({"y": int}, {"y": int}),
    "the order of fields": ({"y": int, "z": str}, {"z": str, "y": int}),
    "a default of a field": ({"y": field(int, 1)}, {"y": field(int, 2)}),
    "a list becomes a tuple": ({"y": list[int]}, {"y": tuple[int, ...]}),
    "bytes become a view": ({"y": bytes}, {"y": memoryview}),
    "a set becomes frozen": ({"y": set[int]}, {"y": frozenset[int]}),
    "a member of an enum is renamed": (
        {"y": enum_of(COLORS)},
        {"y": enum_of({"SCARLET": 0, "GREEN": 1})},
    ),
    "the order of an enum": ({"y": enum_of(COLORS)}, {"y": enum_of({"GREEN": 1, "RED": 0})}),
    "an enum becomes an IntEnum": ({"y": enum_of(COLORS)}, {"y": enum_of(COLORS, enum.IntEnum)}),
    "an enum becomes a literal": ({"y": enum_of(COLORS)}, {"y": Literal[0, 1]}),
    "the order of a union": ({"y": int | str | None}, {"y": None | str | int}),
    "a range written otherwise": ({"y": U8}, {"y": Annotated[int, Range(0, 255)]}),
    "a limit that says nothing": ({"y": str}, {"y": Annotated[str, Length()]}),
    "a nested class is renamed": (
        {"y": Pair},
        {"y": attrs.make_class("Couple", {"b": field(int), "a": field(int)})},
    ),
    "a subsection is new": ({}, {"y": field(Sub, part(Sub()))}),
    "a subsection becomes optional": ({}, {"y": field(Sub | None, part(None))}),
    "a subsection that may be missing": (
        {"y": field(Sub, part(Sub()))},
        {"y": field(Sub, subsection(default=Sub(), needed=lambda dev: dev.x > 3))},
    ),
    "a field is added, and declared": (
        {},
        {"version": 2, "history": {2: Added("y", 7)}, "y": int},
    ),
    "a field is renamed, and declared": (
        {"y": int},
        {"version": 2, "history": {2: Renamed("y", "z")}, "z": int},
    ),
    "a field is removed, and declared": (
        {"y": int},
        {"version": 2, "history": {2: Removed("y", 0)}},
    ),
    "a type changes, and is declared": (
        {"y": Annotated[int, Range(0, 9)]},
        {"version": 2, "history": {2: Changed(up, down)}, "y": DIGIT},
    ),
    "several changes in one version": (
        {"y": int},
        {"version": 2, "history": {2: [Renamed("y", "z"), Added("y", "")]}, "z": int, "y": str},
    ),
    "a tuple is added, and declared": (
        {},
        {"version": 2, "history": {2: Added("y", (1, 2))}, "y": tuple[int, int]},
    ),
    "a member of an enum is added, and declared": (
        {},
        {"version": 2, "history": {2: Added("y", Level.LOW)}, "y": Level},
    ),
    "a dict is added, and declared": (
        {},
        {"version": 2, "history": {2: Added("y", {1: 2})}, "y": dict[int, int]},
    ),
    "long bytes": ({"y": SECTORS}, {"y": SECTORS}),
    "half a range": ({"y": AT_MOST}, {"y": AT_MOST}),
    "several versions at once": (
        {"y": int},
        {
            "version": 4,
            "history": {2: Added("z", 0), 3: Renamed("z", "w"), 4: Removed("y", 0)},
            "w": int,
        },
    ),
    "a declared field in a wider type": (
        {},
        {"version": 2, "history": {2: Added("y", None)}, "y": U8 | None},
    ),
    "a validator that refuses nothing": (
        {"y": field(U8)},
        {"y": attrs.field(type=U8, validator=attrs.validators.lt(256))},
    ),
}


def schemas(old: V, new: V) -> tuple[Schema, Schema]:
    return schema_of(declare(**old)), schema_of(declare(**new))


@pytest.mark.parametrize("name", BREAKS)
def test_every_undeclared_break_is_found(name: str) -> None:
    old, new, direction = BREAKS[name]
    problems = compare(*schemas(old, new))
    expected = {"old on new", "new on old"} if direction == "both" else {direction}
    if name in ("the removal of what was not there", "a subsection is another state"):
        expected &= {problem.direction for problem in problems}
    assert expected == {problem.direction for problem in problems}, problems
    assert all(problem.path.startswith("dev") and problem.advice for problem in problems)


@pytest.mark.parametrize("name", HARMLESS)
def test_nothing_harmless_is_called_a_break(name: str) -> None:
    old, new = schemas(*HARMLESS[name])
    assert compare(old, new) == []
    assert [*upgrade_breaks(old, examples=30)] == []


# Nothing of these is refused when it is read: something else is understood.
TAKEN = {
    "two members of an enum are exchanged",
    "a subsection's default changes",
    "a subsection is another state",
    "a nested state is another",
    "the removal of what was not there",
    "a flag is gone",
}


@pytest.mark.parametrize(
    "name", [name for name, (_, _, d) in BREAKS.items() if d != "new on old" and name not in TAKEN]
)
def test_made_up_states_find_the_same_breaks(name: str) -> None:
    """So the rules of `compare` are those by which states are really refused."""
    old, _ = schemas(*BREAKS[name][:2])
    assert any(problem.direction == "old on new" for problem in upgrade_breaks(old, examples=200))


def test_what_only_functions_and_validators_know_is_found_by_trying() -> None:
    old, new = schemas({"y": U8}, {"version": 2, "history": {2: Changed(broken, dict)}, "y": U8})
    assert compare(old, new) == []
    (problem,) = upgrade_breaks(old)
    assert "y=0" in str(problem)
    assert "zero" in str(problem)
    old = schema_of(declare(y=int))
    declare(version=2, history={2: Changed(up, up)}, y=str)
    (problem,) = upgrade_breaks(old)
    assert problem.direction == "new on old"


def test_a_way_back_that_fails_is_found() -> None:
    old = schema_of(declare(y=U8))
    declare(
        version=2, history={2: Changed(dict, lambda fields: {"x": 1, "y": fields["typo"]})}, y=U8
    )
    (problem,) = upgrade_breaks(old)
    assert problem.direction == "new on old"
    assert "typo" in problem.what


# Trees


def tree(**parts: Any) -> Schema:
    return schema_of(lambda: Fixed(parts))


class Fixed:
    """A component whose snapshot has these parts: states, or bytes."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = parts

    def id(self) -> str:
        return "vm"

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot("vm")
        for id, part in self._parts.items():
            if isinstance(part, bytes):
                child = Snapshot(id, {}, {"ram": SnapshotDataSection("ram", part)})
            else:
                child = save_state(id, part)
            snapshot.add_snapshot(child)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        for id in self._parts.keys() | snapshot.snapshots.keys():
            snapshot.find(id)
            if id not in self._parts:
                raise MigratableError(f"{id} is unknown")


@pytest.mark.parametrize(
    ("old", "new", "directions"),
    [
        ({"a": Sub()}, {"a": Sub()}, set()),
        ({"a": Sub(), "b": Sub()}, {"a": Sub()}, {"old on new", "new on old"}),
        ({"a": Sub()}, {"a": Sub(), "b": b"x"}, {"old on new", "new on old"}),
        ({"a": Sub()}, {"b": Sub()}, {"old on new", "new on old"}),
        ({"a": Sub()}, {"a": Other()}, {"old on new", "new on old"}),
        ({"a": Sub()}, {"a": b"x"}, {"old on new", "new on old"}),
        ({"a": b"x"}, {"a": b"xyz"}, set()),
    ],
)
def test_components_are_compared_by_path(old: V, new: V, directions: set[str]) -> None:
    problems = compare(tree(**old), tree(**new))
    assert {problem.direction for problem in problems} == directions
    assert all(problem.path.startswith("vm/") for problem in problems)


def test_a_schema_is_canonical_and_survives_a_file(tmp_path: Path) -> None:
    release(6)
    schema = tree(net=release(6).Net(), timer=release(6).Timer())
    assert schema.states.keys() == {"net", "net/filter", "net/queue", "timer", "timer/alarm"}
    path = tmp_path / "schema.json"
    path.write_text(schema.dumps())
    assert load_schema(path) == schema
    assert load_schema(path).dumps() == schema.dumps()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"vmmig_schema": 2}',
        '{"vmmig_schema": 1}',
        '{"vmmig_schema": 1, "components": [], "states": {"a": 1}}',
        '{"vmmig_schema": 1, "components": {"a": 3}, "states": {}}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(MigratableError):
        loads_schema(text)


def test_what_has_no_schema_says_so() -> None:
    with pytest.raises(MigratableError, match="without arguments"):
        schema_of(Fixed)
    with pytest.raises(MigratableError, match=r"no snapshot\(\)"):
        schema_of(int)
    with pytest.raises(MigratableError, match="declares no state"):
        schema_of(os)
    assert schema_of(release(6)).states.keys() >= {"serial", "serial/fifo", "timer", "net"}


@pytest.mark.parametrize("number", RELEASES)
def test_six_releases_are_compatible_with_the_newest(number: int) -> None:
    old = schema_of(release(number))
    new = schema_of(release(6))
    backward = [p.path for p in compare(old, new, direction="new on old")]
    assert compare(old, new, direction="old on new") == []
    # The fourth release's queue was at version 1 before release 3, and its states say so.
    assert backward == []


# Corpora


def test_a_corpus_is_restored_and_written_again() -> None:
    corpus = {f"r{n}": save_all(n) for n in RELEASES}
    release(6)
    assert [*corpus_breaks(corpus)] == []
    name, state = "serial", corpus["r1"].find("serial")
    bad = Snapshot("machine", {name: Snapshot(name, {}, {**state.snapshot_data})})
    section = bad.find(name).snapshot_data["state"]
    section.snapshot = bytes(memoryview(section.snapshot)).replace(b"mode", b"mood")
    (problem,) = corpus_breaks({"bad": bad})
    assert "there is no 'mode'" in str(problem)


def save_all(number: int) -> Snapshot:
    machine: Snapshot = release(number).machine()
    return machine


def test_a_corpus_is_restored_by_the_component() -> None:
    corpus = {"old": Fixed({"a": Sub(), "b": Sub()}).snapshot()}
    (problem,) = corpus_breaks(corpus, lambda: Fixed({"a": Sub()}))
    assert "b is unknown" in str(problem)
    assert [*corpus_breaks(corpus, lambda: Fixed({"a": Sub(), "b": Sub()}))] == []


def test_states_that_are_gone_or_damaged_are_breaks() -> None:
    node = Snapshot(
        "vm", {}, {"state": SnapshotDataSection("state", b"vmst\x01\x95\xa4gone\x01\xa0\x80\x80")}
    )
    (problem,) = corpus_breaks({"old": node})
    assert "there is no state 'gone' any more" in str(problem)
    node = Snapshot("vm", {}, {"state": SnapshotDataSection("state", b"vmst\x01\x95")})
    (problem,) = corpus_breaks({"old": node})
    assert "damaged" in str(problem)


def test_targets_of_an_old_schema_refuse_what_it_does_not_know() -> None:
    old = schema_of(declare())
    cls = declare(y=field(Sub, part(Sub())))
    with writing_versions(old.targets()):
        save_state("dev", cls(x=1))
        with pytest.raises(MigratableError, match="the subsection 'y' is needed"):
            save_state("dev", cls(x=1, y=Sub(1)))


# The command line


def vmmig(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from vmmig.cli import main; main()", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=120,
    )


OLD = """
import attrs
from vmmig import Added, save_state, load_state, versioned

@versioned("serial", 1)
@attrs.define
class State:
    mode: int = 0

class Serial:
    def __init__(self): self.state = State()
    def id(self): return "serial"
    def pause(self): pass
    def resume(self): pass
    def snapshot(self): return save_state("serial", self.state)
    def restore(self, snapshot): self.state = load_state(snapshot, State)
"""


def test_the_commands_as_a_hook_would_run_them(tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_text(OLD)
    written = vmmig("schema", "acme:Serial", "--output", "schema.json", cwd=tmp_path)
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    same = vmmig("compat", "schema.json", "acme:Serial", cwd=tmp_path)
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    assert (
        vmmig("schema", "acme:Serial", cwd=tmp_path).stdout
        == (tmp_path / "schema.json").read_text()
    )

    (tmp_path / "acme.py").write_text(
        OLD.replace("mode: int = 0", "mode: int = 0\n    scr: int = 0")
    )
    found = vmmig("compat", "schema.json", "acme:Serial", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stdout.splitlines()[0] == (
        "old on new: serial.scr: the field is new, and version 1, as before, does not say so; "
        "raise the version to 2 and declare Added('scr', ...)"
    )
    as_json = vmmig(
        "compat", "--json", "--direction", "old-on-new", "schema.json", "acme:Serial", cwd=tmp_path
    )
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["path"] == "serial.scr"

    (tmp_path / "acme.py").write_text(
        OLD.replace("mode: int = 0", "mode: int = 0\n    scr: int = 0").replace(
            '"serial", 1', '"serial", 2, history={2: Added("scr", 0)}'
        )
    )
    declared = vmmig("compat", "schema.json", "acme:Serial", cwd=tmp_path)
    assert (declared.returncode, declared.stdout) == (0, "")

    # What one direction is known to break hides nothing of the other.
    (tmp_path / "acme.py").write_text(
        OLD.replace(
            '"serial", 1', '"serial", 2, history={2: Changed(lambda fields: 1 // 0)}'
        ).replace("import Added", "import Added, Changed")
    )
    one_way = vmmig("compat", "schema.json", "acme:Serial", cwd=tmp_path)
    assert one_way.returncode == 2
    assert "old on new: serial" in one_way.stdout
    (tmp_path / "acme.py").write_text("raise SystemExit(0)")
    assert vmmig("compat", "schema.json", "acme", cwd=tmp_path).returncode == 255
    (tmp_path / "acme.py").write_text(
        OLD.replace("mode: int = 0", "mode: int = 0\n    scr: int = 0").replace(
            '"serial", 1', '"serial", 2, history={2: Added("scr", 0)}'
        )
    )

    # Over two hops, by what each release said of itself.
    vmmig("schema", "acme", "-o", "second.json", cwd=tmp_path)
    hops = vmmig("compat", "schema.json", "second.json", "acme", cwd=tmp_path)
    assert (hops.returncode, hops.stdout) == (0, "")


def test_a_folder_of_snapshots_is_compared_with_code() -> None:
    root = Path(__file__).parents[1]
    done = vmmig("compat", str(FOLDER), "tests.releases.r6", cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = vmmig("compat", str(FOLDER), "tests.releases.r5", cwd=root)
    assert done.returncode > 0
    assert "newer than what can be read here" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["compat", "no.json", "os"], "neither a file nor a folder"),
        (["compat", ".", "os"], "there are no snapshots"),
        (["compat", "schema.json", "os:nothing"], "no attribute"),
        (["compat", "bad.json", "schema.json"], "no schema"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    (tmp_path / "schema.json").write_text(Schema({}, {}).dumps())
    (tmp_path / "bad.json").write_text("{}")
    done = vmmig(*arguments, cwd=tmp_path)
    assert done.returncode == 255
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_misuse_does_not_look_like_breaks(tmp_path: Path) -> None:
    for arguments in (["one.json"], ["a", "b", "--nothing"], ["--direction", "up", "a", "b"]):
        done = vmmig("compat", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (255, "")
        assert "Usage: " in done.stderr
