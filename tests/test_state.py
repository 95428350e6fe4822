"""Typed, versioned states: strict both ways, upgraded and downgraded, and bounded."""

from __future__ import annotations

import contextlib
import enum
import subprocess
import sys
import tracemalloc
from typing import Annotated, Any, Literal

import attrs
import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.states import FOLDER
from tests.releases import RELEASES, release
from vmmig import (
    Added,
    Changed,
    DecodeError,
    Length,
    MigratableError,
    MigrateReceiveError,
    Removed,
    Renamed,
    RestoreError,
    Snapshot,
    SnapshotDataSection,
    SnapshotError,
    dumps,
    get_state,
    load_state,
    loads,
    open_ranges,
    put_state,
    recv,
    save_state,
    subsection,
    versioned,
    writing_versions,
)
from vmmig.schema import schema_of
from vmmig.snapshot import Buffer
from vmmig.state import I8, U8, Range, declared_states, peek, state_type
from vmmig.testing import states, upgrade_breaks


class Color(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@attrs.define
class Point:
    x: int
    y: int = 0


@versioned("test/part", 1)
@attrs.define
class Part:
    n: U8 = 0


# Each type, some values of it, and what is not: Python values that a field may be set to.
TYPES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "int": (
        int,
        [0, -1, 1 << 64, -(1 << 63), -(1 << 200), 1 << 4000],
        [True, 1.0, "1", None, b"1"],
    ),
    "U8": (U8, [0, 255], [-1, 256, True, 1.0, "1", None]),
    "I8": (I8, [-128, 127], [-129, 128, False]),
    "bool": (bool, [True, False], [0, 1, "true", None]),
    "float": (float, [0.0, -1.5, float("inf")], [0, True, "1.0", None]),
    "bounded twice": (Annotated[U8, Range(min=1)], [1, 255], [0, 256]),
    "bounded twice, in a list": (list[Annotated[U8, Range(0, 999)]], [[0, 255]], [[256]]),
    "endless": (Annotated[float, Range(0, float("inf"))], [0.0, 1e300], [-1.0]),
    "bounded float": (Annotated[float, Range(0, 1)], [0.0, 1.0], [-0.1, 1.1, float("nan"), 1]),
    "str": (str, ["", "é", "\0"], [b"", 1, None, ["a"]]),
    "short str": (Annotated[str, Length(1, 3)], ["a", "abc"], ["", "abcd"]),
    "bytes": (bytes, [b"", b"ab"], ["ab", [97], 10, bytearray(b"x"), None]),
    "sector": (Annotated[bytes, Length(512, 512)], [bytes(512)], [bytes(511), bytes(513)]),
    "bytearray": (bytearray, [bytearray(b"x")], [b"x", "x", 3]),
    "none": (type(None), [None], [0, False, ""]),
    "str enum": (Color, [Color.RED], ["red", "RED", 0, None, Level.LOW]),
    "int enum": (Level, [Level.HIGH], [2, "HIGH", None]),
    "flags": (Access, [Access(0), Access.READ | Access.WRITE], [3, True, "READ"]),
    "literal": (Literal["a", 1], ["a", 1], ["b", 2, True, 1.0]),
    "list": (list[U8], [[], [1, 2]], [(1, 2), [256], [True], ["1"], b"\1", None, {1: 2}]),
    "texts": (list[str], [[], ["a"]], [["a", 1], "a"]),
    "long tuple": (tuple[int, ...], [(), (1, 1 << 70)], [[1], (1.0,), (True,)]),
    "pair": (tuple[int, str], [(1, "a")], [(1,), (1, "a", 2), ("a", 1), [1, "a"]]),
    "set": (set[int], [set(), {3, 1, 2}], [[1], {"a"}, frozenset({1}), {True}]),
    "frozenset": (frozenset[str], [frozenset({"b", "a"})], [{"a"}, frozenset({1})]),
    "dict": (dict[str, U8], [{}, {"b": 1, "a": 2}], [{"a": 256}, {1: 1}, [("a", 1)], {"a": True}]),
    "int keys": (dict[int, str], [{1: "a", -5: "b"}], [{"1": "a"}, {True: "a"}]),
    "enum keys": (dict[Color, int], [{Color.RED: 1}], [{"red": 1}]),
    "optional": (U8 | None, [None, 3], [False, 256, "3"]),
    "union": (int | str | None, [1, "a", None], [1.0, True, b"a"]),
    "class": (Point, [Point(1, 2)], [(1, 2), {"x": 1, "y": 2}, Point("1"), Point(1, None), None]),
    "classes": (list[Point], [[Point(1)]], [[Point(1.0)], [None]]),
    "optional class": (Point | None, [None, Point(3)], [Point("3"), 3]),
    "state": (Part, [Part(5)], [Part(256), Point(1), None]),
    "states": (dict[str, Part], [{"a": Part(1)}], [{"a": Part(-1)}]),
    "array": (npt.NDArray[np.uint16], [], [np.zeros(2, np.uint32), [1, 2], None]),
}
# What stands on the wire instead of the right thing, for each kind of it.
WIRE = [None, True, 0, 300, -1, 1 << 70, 1.5, "text", b"bytes", [], ["x"], [300], {}, {"a": 300}]


def holder(annotation: Any) -> type[Any]:
    cls = attrs.make_class("Holder", {"value": attrs.field(type=annotation)})
    return versioned("test/holder", 1)(cls)


@pytest.mark.parametrize("name", TYPES)
def test_what_is_saved_is_restored(name: str) -> None:
    annotation, values, _ = TYPES[name]
    cls = holder(annotation)
    for value in values:
        snapshot = loads(dumps(save_state("c", cls(value))))
        restored = load_state(snapshot, cls).value
        assert restored == value
        assert type(restored) is type(value)
        assert save_state("c", cls(restored)) == snapshot


@pytest.mark.parametrize("name", TYPES)
def test_what_does_not_fit_is_not_saved(name: str) -> None:
    annotation, _, wrong = TYPES[name]
    cls = holder(annotation)
    for value in wrong:
        with pytest.raises(SnapshotError, match=r"state 'test/holder': value"):
            save_state("c", cls(value))


def packed(
    fields: Any, *, name: str = "test/holder", version: Any = 1, present: Any = None
) -> bytes:
    head = [name, version, "somebody", fields, {} if present is None else present]
    return b"vmst\x01" + msgpack.packb(head, default=_big)


def _big(value: int) -> msgpack.ExtType:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return msgpack.ExtType(1, raw)


def having(payload: Buffer) -> Snapshot:
    return Snapshot("c", {}, {"state": SnapshotDataSection("state", payload)})


@pytest.mark.parametrize("name", TYPES)
def test_nothing_is_coerced_when_it_is_restored(name: str) -> None:
    annotation, values, _ = TYPES[name]
    cls = holder(annotation)
    right = {repr(peek(save_state("c", cls(v)).section("state").snapshot)) for v in values}
    for value in WIRE:
        snapshot = having(packed({"value": value}))
        refused = ""
        try:
            restored = load_state(snapshot, cls)
        except RestoreError as error:
            refused = str(error)
        if refused:
            assert "value" in refused
            assert "written by 'somebody'" in refused
            assert repr(peek(snapshot.section("state").snapshot)) not in right
        else:
            again = save_state("c", restored).section("state").snapshot
            assert peek(again).fields == {"value": value}  # type: ignore[union-attr]


def test_errors_name_the_place() -> None:
    cls = holder(dict[str, list[Point]])
    with pytest.raises(SnapshotError, match=r"value\['a'\]\[1\]\.y: an int is needed, not str"):
        save_state("c", cls({"a": [Point(1), Point(1, "2")]}))  # type: ignore[arg-type]
    payload = packed({"value": {"a": [{"x": 1, "y": 2}, {"x": 1}]}})
    with pytest.raises(DecodeError, match=r"value\['a'\]\[1\]\.y: is missing") as caught:
        load_state(having(payload), cls)
    assert (caught.value.version, caught.value.writer) == (1, "somebody")
    assert caught.value.where == "section 'state' of 'c'"


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Any, "cannot hold .*Any"),
        (object, "cannot hold object"),
        (complex, "cannot hold complex"),
        (list, "cannot hold list"),
        (list[int] | tuple[int, ...], "cannot be told apart"),
        (int | Level, "cannot be told apart"),
        (set[tuple[int, int]], "must be int"),
        (dict[float, int], "must be int"),
        (Annotated[int, Length(3)], "does not fit"),
        (Annotated[str, Range(3)], "does not fit"),
        (Literal[b"a"], "must be int or str"),
    ],
)
def test_what_could_not_be_checked_is_refused_when_it_is_declared(
    annotation: Any, reason: str
) -> None:
    with pytest.raises(MigratableError, match=f"Holder.value: .*{reason}"):
        holder(annotation)


def test_declarations_are_checked() -> None:
    plain = attrs.make_class("Plain", {"x": attrs.field(type=int, default=0)})
    with pytest.raises(MigratableError, match="no attrs class"):
        versioned("x", 1)(int)
    with pytest.raises(MigratableError, match="versions are whole numbers"):
        versioned("x", 0)(plain)
    with pytest.raises(MigratableError, match="needs a name"):
        versioned("", 1)(plain)
    with pytest.raises(MigratableError, match=r"history .* version 5"):
        versioned("x", 3, history={5: Added("x", 0)})(plain)
    with pytest.raises(MigratableError, match="history"):
        versioned("x", 4, history={2: Added("x", 0), 4: Added("y", 0)})(plain)
    with pytest.raises(MigratableError, match="cannot be read from version 1 on"):
        versioned("x", 3, history={3: Added("x", 0)}, minimum_version=1)(plain)
    part = subsection()
    part.type = Part
    with pytest.raises(MigratableError, match="needs a default"):
        versioned("x", 1)(attrs.make_class("C", {"s": part}))
    number = subsection(default=0)
    number.type = int
    with pytest.raises(MigratableError, match="must be a state of its own"):
        versioned("x", 1)(attrs.make_class("C", {"s": number}))
    with pytest.raises(MigratableError, match="init=True"):
        versioned("x", 1)(attrs.make_class("C", {"s": attrs.field(init=False, type=int)}))
    with pytest.raises(MigratableError, match="has no type"):
        versioned("x", 1)(attrs.make_class("C", ["s"]))
    with pytest.raises(MigratableError, match="is no state"):
        state_type(Point)

    class Forgotten(Point):
        z: int = 0

    with pytest.raises(MigratableError, match="no attrs class"):
        versioned("x", 1)(Forgotten)
    with pytest.raises(MigratableError, match="arrays of"):
        holder(npt.NDArray[np.object_])


def test_a_class_may_still_refuse() -> None:
    @versioned("test/digit", 1)
    @attrs.define
    class Digit:
        value: U8 = attrs.field(default=0, validator=attrs.validators.lt(10))

    payload = packed({"value": 10}, name="test/digit")
    with pytest.raises(DecodeError, match="its class refuses it"):
        load_state(having(payload), Digit)


def test_private_and_keyword_fields() -> None:
    @versioned("test/private", 1)
    @attrs.define
    class Private:
        _hidden: int
        shown: int = attrs.field(default=0, kw_only=True)

    state = Private(3, shown=4)
    assert load_state(save_state("c", state), Private) == state
    assert peek(save_state("c", state).section("state").snapshot).fields == {  # type: ignore[union-attr]
        "hidden": 3,
        "shown": 4,
    }


# Large bytes


@versioned("test/video", 1)
@attrs.define(eq=False)
class Video:
    frames: list[Buffer] = attrs.field(factory=list)
    palette: npt.NDArray[np.uint32] = attrs.field(factory=lambda: np.zeros(4, np.uint32))
    rom: bytes = b""


def test_large_bytes_are_not_copied() -> None:
    frame, small, rom = bytes(range(256)) * 300, b"small", bytes(1 << 16)
    palette = np.arange(1 << 15, dtype=np.uint32).reshape(2, -1)
    palette.flags.writeable = False
    video = Video([small, frame, memoryview(frame)], palette, rom)
    saved = save_state("video", video)
    sections = {id: section.snapshot for id, section in saved.snapshot_data.items()}
    assert sections.keys() == {
        "state",
        "state.frames[1]",
        "state.frames[2]",
        "state.palette",
        "state.rom",
    }
    assert sections["state.frames[1]"] is frame
    assert sections["state.rom"] is rom
    assert np.shares_memory(np.frombuffer(sections["state.palette"], np.uint8), palette)

    arrived = loads(dumps(saved))
    restored = load_state(arrived, Video)
    assert restored.frames == video.frames
    assert (restored.palette == palette).all()
    assert restored.palette.shape == palette.shape
    stored = np.frombuffer(arrived.section("state.palette").snapshot, np.uint8)
    assert np.shares_memory(restored.palette, stored)
    assert not restored.palette.flags.writeable
    frame_there = np.frombuffer(restored.frames[1], np.uint8)
    assert np.shares_memory(
        frame_there, np.frombuffer(arrived.section("state.frames[1]").snapshot, np.uint8)
    )


def test_what_may_change_is_copied_once() -> None:
    frame = bytearray(1 << 17)
    saved = save_state("video", Video([frame]))
    frame[0] = 1
    assert bytes(memoryview(saved.section("state.frames[0]").snapshot)[:1]) == b"\0"


def test_sections_that_are_missing_or_too_many_are_refused() -> None:
    saved = save_state("video", Video([bytes(1 << 16)]))
    del saved.snapshot_data["state.frames[0]"]
    with pytest.raises(DecodeError, match=r"'state\.frames\[0\]', which is not there"):
        load_state(saved, Video)
    saved = save_state("video", Video())
    saved.add_data_section(SnapshotDataSection("state.extra", b""))
    with pytest.raises(DecodeError, match=r"'state\.extra' belongs to nothing"):
        load_state(saved, Video)
    saved = save_state("video", Video())
    saved.add_data_section(SnapshotDataSection("other", b""))
    assert not get_state(saved, Video).frames
    with pytest.raises(RestoreError, match="section 'other'"):
        load_state(saved, Video)


def test_what_the_declarations_functions_raise_is_an_error_of_ours() -> None:
    def fail(*_: object) -> Any:
        raise AttributeError("no such luck")

    @versioned("test/failing", 1)
    @attrs.define
    class Failing:
        part: Part = subsection(factory=Part, needed=fail)

    with pytest.raises(SnapshotError, match="no such luck"):
        save_state("c", Failing())

    @versioned("test/failing", 1)
    @attrs.define
    class FailingDefault:
        part: Part = subsection(factory=fail, needed=bool)

    saved = save_state("c", FailingDefault(Part(1)))
    saved.section("state").snapshot = packed({}, name="test/failing")
    with pytest.raises(DecodeError, match="no such luck"):
        load_state(saved, FailingDefault)


def test_a_section_that_cannot_be_fetched_is_not_called_damaged() -> None:
    data = dumps(save_state("video", Video([bytes(1 << 20)])))

    class Server:
        total_bytes = len(data)
        is_gone = False

        def read_into(self, start: int, view: memoryview, /) -> None:
            if self.is_gone:
                raise MigrateReceiveError("the server is gone")
            view[:] = data[start : start + len(view)]

    server = Server()
    saved = open_ranges(server)
    assert saved.section("state").snapshot
    server.is_gone = True
    with pytest.raises(MigrateReceiveError, match="the server is gone"):
        get_state(saved, Video)


def test_a_section_cannot_be_named_like_those_of_large_bytes() -> None:
    for section in ("state.cache", "state[0]"):
        with pytest.raises(MigratableError, match="cannot stand in a section"):
            save_state("c", Part(), section=section)


def test_a_subsection_may_hold_an_array() -> None:
    @versioned("test/framebuffer", 1)
    @attrs.define(eq=False)
    class Framebuffer:
        pixels: npt.NDArray[np.uint8] = attrs.field(factory=lambda: np.zeros(4, np.uint8))

    @versioned("test/gpu", 1)
    @attrs.define
    class Gpu:
        framebuffer: Framebuffer = subsection(factory=Framebuffer)

    restored = load_state(save_state("gpu", Gpu(Framebuffer(np.ones(4, np.uint8)))), Gpu)
    assert restored.framebuffer.pixels.tolist() == [1] * 4
    assert schema_of(Gpu).states["test/gpu"]["subsections"]["framebuffer"]["default"][0] == 1

    @versioned("test/framebuffer", 1)
    @attrs.define
    class Compared:
        pixels: npt.NDArray[np.uint8] = attrs.field(factory=lambda: np.zeros(4, np.uint8))

    @versioned("test/gpu", 1)
    @attrs.define
    class ComparedGpu:
        framebuffer: Compared = subsection(factory=Compared)

    for first in (0, 1):
        pixels = np.array([first, 0, 0, 0], np.uint8)
        payload = save_state("gpu", ComparedGpu(Compared(pixels))).section("state").snapshot
        found = peek(payload)
        assert found is not None
        assert ("framebuffer" in found.fields) == bool(first)


def test_a_state_that_becomes_a_subsection_goes_back_to_where_it_was() -> None:
    @versioned("test/moved", 1)
    @attrs.define
    class Before:
        part: Part

    old = schema_of(Before)

    @versioned("test/moved", 2, history={2: Changed(dict, dict)})
    @attrs.define
    class After:
        part: Part = subsection(default=Part(9))

    with writing_versions(old.targets()):
        saved = save_state("c", After(Part(5)))
    assert load_state(saved, Before) == Before(Part(5))
    assert load_state(saved, After) == After(Part(5))


def test_a_state_replaces_the_one_before() -> None:
    snapshot = save_state("video", Video([bytes(1 << 16)]))
    put_state(snapshot, Video())
    assert [*snapshot.snapshot_data] == ["state"]


@given(
    st.sampled_from(["|u1", "<u4", ">u8", "<f8", "<c16", "|b1"]),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_arrays_keep_type_and_shape(dtype: str, shape: list[int]) -> None:
    cls = holder(npt.NDArray[Any])
    array = np.zeros(shape, dtype)
    for given_ in (array, np.asfortranarray(array), array[..., ::-1] if shape else array):
        restored = load_state(loads(dumps(save_state("c", cls(given_)))), cls).value
        assert restored.dtype == array.dtype
        assert restored.shape == given_.shape
        assert (restored == given_).all()


@pytest.mark.parametrize(
    "parts",
    [
        ["O", [1], bytes(8)],
        ["<u4", [1 << 62, 4], bytes(16)],
        ["<u4", [-1], bytes(16)],
        ["<u4", [3], bytes(16)],
        ["<u4", [4], bytes(15)],
        ["<u4", [0, 1 << 63], b""],
        ["<u4", "4", bytes(16)],
        ["i4,i4", [2], bytes(16)],
        ["<u4", [4]],
        [[], [4], bytes(16)],
        7,
    ],
)
def test_hostile_arrays_are_refused(parts: Any) -> None:
    array = msgpack.ExtType(3, msgpack.packb(parts))
    with pytest.raises(DecodeError):
        load_state(having(packed({"value": array})), holder(npt.NDArray[Any]))


# Hostile bytes

NET = release(6).Net
GOOD = bytes(memoryview(save_state("c", NET()).section("state").snapshot))


@settings(max_examples=300)
@given(st.data())
def test_any_bytes_give_a_state_or_a_restore_error(data: st.DataObject) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(5, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    for payload in (bytes(raw), data.draw(st.binary(max_size=60)), b"vmst\x01" + bytes(raw[9:])):
        with contextlib.suppress(RestoreError):
            load_state(having(payload), NET)
        with contextlib.suppress(RestoreError):
            peek(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdc\xff\xff" * 20_000,  # arrays that promise 65,535 items, nested
        b"\xdd\xff\xff\xff\xff" * 10_000,
        b"\xdf\xff\xff\xff\xff\x01" * 10_000,
        b"\x91" * 50_000,
        b"\xc6\xff\xff\xff\xff" + bytes(50_000),  # 4 GiB of bytes
        b"\xc9\xff\xff\xff\xff\x01" + bytes(50_000),
    ],
)
def test_what_is_promised_takes_no_memory(payload: bytes) -> None:
    cls = holder(list[int])
    for whole in (b"vmst\x01" + payload, b"vmst\x01\x95\xa1x\x01\xa1x" + payload):
        tracemalloc.start()
        with pytest.raises(DecodeError):
            load_state(having(whole), cls)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 * len(whole) + 100_000


def test_arrays_in_arrays_are_refused_however_deep() -> None:
    """As one process that crashes takes all tests with it, by another."""
    inner = msgpack.packb(b"")
    for _ in range(300):
        inner = msgpack.packb(msgpack.ExtType(3, inner))
    payload = b"vmst\x01\x95\xa1c\x01\xa1w\x81\xa1x" + inner + b"\x80"
    program = (
        "import sys; from vmmig import RestoreError; from vmmig.state import peek\n"
        "try: peek(sys.stdin.buffer.read())\n"
        "except RestoreError as error: print(error)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=payload, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"an array is not written as it should be" in done.stdout


def test_many_big_ints_of_one_hash_are_refused() -> None:
    same = {n * ((1 << 61) - 1): None for n in range(1 << 10, 3000)}
    cls = holder(dict[int, None])
    with pytest.raises(DecodeError, match="too many big ints"):
        load_state(having(packed({"value": same})), cls)
    other = {(1 << 70) + n: None for n in range(3000)}
    assert load_state(having(packed({"value": other})), cls).value == other


def test_other_bytes_are_said_to_be_no_state() -> None:
    assert peek(b"") is peek(b"{}") is None
    for payload in (b"", b'{"version": 1}'):
        with pytest.raises(DecodeError, match="it is no state"):
            load_state(having(payload), Part)
    with pytest.raises(DecodeError, match="newer format"):
        load_state(having(b"vmst\x02..."), Part)
    with pytest.raises(DecodeError, match="a state 'other', and a state 'test/part' is needed"):
        load_state(having(packed({}, name="other")), Part)


# Versions


def test_versions_beyond_what_is_supported_say_what_to_do() -> None:
    @versioned("test/old", 4, history={4: Added("x", 0)}, writer="acme 2.0")
    @attrs.define
    class Old:
        x: int = 0

    newer = packed({"x": 1, "y": 2}, name="test/old", version=5)
    with pytest.raises(DecodeError) as caught:
        load_state(having(newer), Old)
    for part in ("version 5", "'test/old'", "3..4", "somebody", "writing_versions"):
        assert part in str(caught.value)
    with pytest.raises(DecodeError, match=r"older than what can be read here, 3\.\.4; .*release"):
        load_state(having(packed({}, name="test/old", version=2)), Old)
    with pytest.raises(DecodeError, match="there is no such field"):
        load_state(having(packed({"x": 1, "z": 2}, name="test/old", version=4)), Old)


def test_upgrades_are_chained_and_their_failures_named() -> None:
    def double(fields: dict[str, Any]) -> dict[str, Any]:
        return {"n": fields["n"] * 2}

    def fail(fields: dict[str, Any]) -> dict[str, Any]:
        return {"n": 100 // fields["n"]}

    history = {2: Changed(double), 3: [Renamed("n", "m"), Renamed("m", "n")], 4: Changed(fail)}

    @versioned("test/chain", 4, history=history)
    @attrs.define
    class Chain:
        n: int = 0

    for version, n, result in ((1, 5, 10), (2, 10, 10), (3, 10, 10), (4, 10, 10)):
        snapshot = having(packed({"n": n}, name="test/chain", version=version))
        assert load_state(snapshot, Chain) == Chain(result)
    with pytest.raises(DecodeError, match=r"the upgrade from version 3 failed: .*zero"):
        load_state(having(packed({"n": 0}, name="test/chain", version=1)), Chain)
    with pytest.raises(DecodeError, match="the upgrade from version 1 failed: there is no 'n'"):
        load_state(having(packed({"k": 0}, name="test/chain", version=1)), Chain)


def test_every_change_goes_there_and_back() -> None:
    history = {
        2: Added("added", [1]),
        3: Renamed("old", "new"),
        4: Removed("gone", 7),
        5: Removed("lost"),
    }

    @versioned("test/back", 5, history=history)
    @attrs.define
    class Back:
        new: int
        added: list[int]

    state = Back(3, [1])
    with writing_versions({"test/back": 4}), pytest.raises(SnapshotError, match="it needs 'lost'"):
        save_state("c", state)

    @versioned("test/back", 4, history={k: v for k, v in history.items() if k < 5})
    @attrs.define
    class Back4:
        new: int
        added: list[int]

    for version, fields in (
        (4, {"new": 3, "added": [1]}),
        (3, {"new": 3, "added": [1], "gone": 7}),
        (2, {"old": 3, "added": [1], "gone": 7}),
        (1, {"old": 3, "gone": 7}),
    ):
        with writing_versions({"test/back": version}):
            saved = save_state("c", Back4(3, [1]))
        found = peek(saved.section("state").snapshot)
        assert found is not None
        assert (found.version, found.fields) == (version, fields)
        assert load_state(saved, Back4) == Back4(3, [1])
    with (
        writing_versions({"test/back": 1}),
        pytest.raises(SnapshotError, match="it has no 'added'"),
    ):
        save_state("c", Back4(3, [2]))
    with writing_versions({"test/back": 9}), pytest.raises(SnapshotError, match="no version 9"):
        save_state("c", Back4(3, [1]))


def test_subsections_are_written_when_they_are_needed() -> None:
    @versioned("test/sub", 1)
    @attrs.define
    class Sub:
        n: U8 = 0

    @versioned("test/whole", 1)
    @attrs.define
    class Whole:
        x: int = 0
        sub: Sub = subsection(factory=Sub)
        often: Sub = subsection(factory=Sub, needed=lambda whole: whole.x > 5)
        maybe: Sub | None = subsection(default=None)

    def written(whole: Whole) -> set[str]:
        saved = save_state("c", whole)
        restored = load_state(saved, Whole)
        expected = whole if whole.x > 5 else attrs.evolve(whole, often=Sub())
        assert restored == expected
        found = peek(saved.section("state").snapshot)
        assert found is not None
        return found.fields.keys() - {"x"}

    assert written(Whole()) == set()
    assert written(Whole(sub=Sub(1))) == {"sub"}
    assert written(Whole(x=6)) == {"often"}
    assert written(Whole(often=Sub(1))) == set()
    assert written(Whole(maybe=Sub())) == {"maybe"}
    unknown = packed({"x": 0}, name="test/whole", present={"future": [1, {}, {}]})
    with pytest.raises(DecodeError, match="the subsection 'future', which is not known here"):
        load_state(having(unknown), Whole)
    wrong = packed({"x": 0}, name="test/whole", present={"sub": [1, {"n": 256}, {}]})
    with pytest.raises(DecodeError, match=r"sub\.n: 256 is not in 0\.\.255"):
        load_state(having(wrong), Whole)
    for present in ([], 3, {"sub": 3}, {"sub": [1, {}]}):
        with pytest.raises(DecodeError):
            load_state(having(packed({"x": 0}, name="test/whole", present=present)), Whole)


@pytest.mark.parametrize("number", RELEASES)
def test_golden_states_of_every_release_restore(number: int) -> None:
    old = recv(FOLDER / f"r{number}.vmsnap")
    today = release(6)
    serial = load_state(old.find("serial"), today.Serial)
    fifo = [65, 66] if number < 6 else []
    assert serial == today.Serial(fifo=today.Fifo(fifo))
    assert load_state(old.find("timer"), today.Timer) == today.Timer()
    assert load_state(old.find("net"), today.Net) == today.Net()


@pytest.mark.parametrize("number", [n for n in RELEASES if n < 6])
def test_random_states_of_every_release_restore(number: int) -> None:
    r = release(number)
    schemas = [schema_of(cls) for cls in r.STATES]
    release(6)
    for schema in schemas:
        assert [*upgrade_breaks(schema, examples=60)] == []


@pytest.mark.parametrize("number", RELEASES)
def test_a_new_source_can_send_to_an_old_destination(number: int) -> None:
    r = release(number)
    targets = {}
    for cls in r.STATES:
        targets.update(schema_of(cls).targets())
    with writing_versions(targets):
        today = release(6)
        sent = Snapshot("machine")
        sent.add_snapshot(save_state("serial", today.Serial()))
        sent.add_snapshot(save_state("timer", today.Timer()))
        if number not in (3, 4):
            net = today.Net()
            sent.add_snapshot(save_state("net", net))
    r = release(number)
    for cls in r.STATES:
        name = cls.__name__.lower()
        if name in sent.snapshots:
            assert load_state(sent.find(name), cls) == (
                attrs.evolve(cls(), received=[]) if name == "serial" and number < 6 else cls()
            )


def test_strategies_make_what_a_schema_says() -> None:
    schema = schema_of(release(6).Net)
    seen = set()

    @settings(max_examples=50, database=None)
    @given(states(schema, "net"))
    def every(snapshot: Snapshot) -> None:
        net = load_state(snapshot, declared_states()["net"].cls)
        seen.add(bool(net.filter.macs))
        assert load_state(save_state("net", net), type(net)) == net

    every()
    assert seen == {False, True}
