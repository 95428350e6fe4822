"""The trees of snapshots in JSON, of both generations: text to a `Snapshot` and back.

What the text has besides the tree - keys that nobody knows - is kept in a section `REST` of the
node, as one JSON object of the text as it was found, and put back where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Literal, TypeVar

import attrs

from vmmig.errors import DecodeError, SnapshotError
from vmmig.formats.cloud_hypervisor.folders import bytes_at
from vmmig.formats.cloud_hypervisor.integers import encode_integers
from vmmig.formats.cloud_hypervisor.scanning import JsonScanner
from vmmig.snapshot import (
    Buffer,
    Snapshot,
    SnapshotDataSection,
    SnapshotPath,
    flatten,
    raw_view,
)

MEMORY = "memory"
"""The root's child that has the RAM, which stands in other files than the tree."""

STATE = "state"
"""The section of a node of today's trees that has its state, a text."""

_T = TypeVar("_T")

Generation = Literal["2020", "today"]

REST: dict[Generation, str] = {"2020": "$vm.json", "today": "$state.json"}
"""The section that has what a node's JSON has and the tree has not: a JSON object.

Each generation has its own, for to the other it is a section like any other.
"""

_ENCODED_BYTES = 1 << 16


@attrs.define(eq=False)
class _Open:
    """A node whose object is being read."""

    node: Snapshot
    seen: set[str] = attrs.field(factory=set)
    rest: dict[str, bytes] = attrs.field(factory=dict)
    inside: bool = False
    """Whether its children are being read, rather than its own keys."""


def decode_tree(text: Buffer, name: str, generation: Generation, root_id: str = "") -> Snapshot:
    """The tree of a JSON text, at any depth.

    Args:
        text: The text, as UTF-8.
        name: What the file is called, for messages.
        generation: How a node's data are written: lists of bytes under ids (``2020``), or a text
            under ``state`` (``today``).
        root_id: The root's id, which only the JSON of 2020 has itself.

    Raises:
        DecodeError: It is no such text; the error says which byte.

    >>> decode_tree(b'{"snapshots": {}, "snapshot_data": {"state": "{}"}}', "state.json", "today")
    Snapshot('', snapshot_data: ['state': 2 bytes])
    """
    scanner = JsonScanner(text, name)
    scanner.begin("{")
    root = Snapshot(root_id)
    stack = [_Open(root)]
    while stack:
        top = stack[-1]
        if top.inside:
            id = scanner.key(top.node.snapshots.keys())
            if id is None:
                top.inside = False
            else:
                scanner.begin("{")
                child = Snapshot(id)
                top.node.snapshots[id] = child
                stack.append(_Open(child))
            continue
        key = scanner.key(top.seen)
        if key is None:
            _close(scanner, top, generation)
            stack.pop()
            continue
        if key == "snapshots":
            scanner.begin("{")
            top.inside = True
        elif key == "snapshot_data":
            rest = (_state if generation == "today" else _sections)(scanner, top.node)
            if rest is not None:
                top.rest["snapshot_data"] = rest
        elif key == "id" and generation == "2020":
            at = scanner.at
            id = scanner.string()
            if len(stack) == 1:
                root.id = id
            elif id != top.node.id:
                scanner.fail(f"the id is {_shown(id)} under the key {_shown(top.node.id)}", at)
        else:
            top.rest[key] = scanner.value()
        top.seen.add(key)
    scanner.end()
    return root


def encode_tree(root: Snapshot, generation: Generation) -> Iterator[bytes]:
    """The JSON text of a valid tree, piece by piece, in the order of the ids.

    No more than a piece of a large section is in memory at a time; and equal trees give equal
    texts.

    Raises:
        SnapshotError: The tree cannot be written so; says where and why.

    >>> b"".join(encode_tree(Snapshot("vm"), "2020"))
    b'{"id":"vm","snapshots":{},"snapshot_data":{}}'
    """
    yield from _head(SnapshotPath(), root, generation)
    # Each open node's children that are to come.
    stack = [(root, SnapshotPath(), _sorted(root.snapshots))]
    first = True
    while stack:
        node, place, children = stack[-1]
        child = next(children, None)
        if child is not None:
            below = place.child(child.id)
            key = _text(child.id, below)
            yield (b"" if first else b",") + key + b":"
            yield from _head(below, child, generation)
            stack.append((child, below, _sorted(child.snapshots)))
            first = True
        else:
            yield b"}"
            yield from _tail(place, node, generation)
            stack.pop()
            first = False


def with_memory(
    snapshot: Snapshot, memory: Mapping[str, Buffer], generation: Generation
) -> Snapshot:
    """The tree with RAM added to it: sections of the root's child `MEMORY`.

    >>> tree = with_memory(Snapshot("vm"), {"memory-region-0": bytes(4096)}, "2020")
    >>> tree.find("memory")
    Snapshot('memory', snapshot_data: ['memory-region-0': 4096 bytes])
    """
    if not memory:
        return snapshot
    node = snapshot.snapshots.get(MEMORY)
    if node is None:
        node = Snapshot(MEMORY)
        snapshot.add_snapshot(node)
    elif not node.snapshot_data and not node.snapshots:
        # The text has an empty node of this name, of which else nothing would tell.
        rest = b"{}" if generation == "2020" else b'{"snapshot_data":null}'
        node.add_data_section(SnapshotDataSection(REST[generation], rest))
    for id, payload in memory.items():
        node.add_data_section(SnapshotDataSection(id, payload))
    return snapshot


def split_memory(
    snapshot: Snapshot, is_memory: Callable[[str], bool]
) -> tuple[Snapshot, dict[str, Buffer]]:
    """The tree without its RAM, and the RAM: the reverse of `with_memory`.

    Args:
        snapshot: A tree, which stays as it is.
        is_memory: Whether a section of the child `MEMORY` is RAM, by its id.

    Raises:
        SnapshotError: The tree is not valid.
    """
    flatten(snapshot)
    node = snapshot.snapshots.get(MEMORY)
    if node is None:
        return snapshot, {}
    memory = {id: held.snapshot for id, held in node.snapshot_data.items() if is_memory(id)}
    if not memory:
        return snapshot, {}
    root = copy(snapshot)
    own = {id: held for id, held in node.snapshot_data.items() if not is_memory(id)}
    if own or node.snapshots:
        root.snapshots[MEMORY] = Snapshot(MEMORY, node.snapshots, own)
    else:
        del root.snapshots[MEMORY]
    return root, memory


def _head(place: SnapshotPath, node: Snapshot, generation: Generation) -> Iterator[bytes]:
    if generation == "2020":
        yield b'{"id":' + _text(node.id, place) + b',"snapshots":{'
    else:
        yield b'{"snapshots":{'


def _tail(place: SnapshotPath, node: Snapshot, generation: Generation) -> Iterator[bytes]:
    rest = _rest_of(place, node, generation)
    data = rest.pop("snapshot_data", None)
    if generation == "2020":
        yield b',"snapshot_data":{'
        yield from _encoded_sections(place, node, data)
        yield b"}"
    else:
        yield from _encoded_state(place, node, data)
    for key, value in rest.items():
        if key == "snapshots" or (key == "id" and generation == "2020"):
            where = place.section(REST[generation])
            raise SnapshotError(f"{where}: {key!r} is what the tree itself has; remove the section")
        yield b"," + _member(key, value)
    yield b"}"


def _encoded_state(place: SnapshotPath, node: Snapshot, data: bytes | None) -> Iterator[bytes]:
    strange = [id for id in node.snapshot_data if id not in (STATE, REST["today"])]
    if strange:
        raise SnapshotError(
            f"{place.section(strange[0])}: a node of Cloud Hypervisor's state has one section, "
            f"{STATE!r}, and no other; convert to another format"
        )
    others = {} if data is None or data == b"null" else _members(data, place, "today")
    if STATE in node.snapshot_data:
        try:
            text = str(raw_view(node.snapshot_data[STATE].snapshot), "utf-8")
        except UnicodeDecodeError as error:
            raise SnapshotError(
                f"{place.section(STATE)}: it is not UTF-8 from byte {error.start} on; "
                "convert to another format"
            ) from error
        members = [_member(STATE, _text(text, place))]
        members += [_member(key, value) for key, value in others.items() if key != STATE]
        yield b',"snapshot_data":{' + b",".join(members) + b"}"
    elif REST["today"] not in node.snapshot_data:
        yield b',"snapshot_data":null'
    elif data is not None:
        yield b',"snapshot_data":' + data


def _encoded_sections(place: SnapshotPath, node: Snapshot, data: bytes | None) -> Iterator[bytes]:
    others = {} if data is None else _members(data, place, "2020")
    comma = b""
    for section in _sorted(node.snapshot_data):
        id = section.id
        if id == REST["2020"]:
            continue
        name = _text(id, place)
        yield comma + name + b':{"id":' + name + b',"snapshot":['
        comma = b","
        view = raw_view(section.snapshot)
        for start in range(0, len(view), _ENCODED_BYTES):
            if start:
                yield b","
            end = min(start + _ENCODED_BYTES, len(view))
            yield encode_integers(bytes_at(view, start, end))
        yield b"]"
        for key, value in _members(others.get(id, b"{}"), place, "2020").items():
            if key not in ("id", "snapshot"):
                yield b"," + _member(key, value)
        yield b"}"


def _close(scanner: JsonScanner, top: _Open, generation: Generation) -> None:
    required = ("id", "snapshots", "snapshot_data") if generation == "2020" else ("snapshots",)
    for key in required:
        if key not in top.seen:
            scanner.fail(f"the object that ends here has no {key!r}")
    if generation == "today":
        usual = {} if STATE in top.node.snapshot_data else {"snapshot_data": b"null"}
        keep = top.rest != usual
    else:
        keep = bool(top.rest)
    if keep:
        top.node.add_data_section(SnapshotDataSection(REST[generation], _joined(top.rest)))


def _state(scanner: JsonScanner, node: Snapshot) -> bytes | None:
    """Read today's data of a node; what there is besides the state."""
    if scanner.is_null():
        return b"null"
    rest: dict[str, bytes] = {}
    seen: set[str] = set()
    scanner.begin("{")
    while (key := scanner.key(seen)) is not None:
        seen.add(key)
        if key == STATE:
            node.add_data_section(SnapshotDataSection(STATE, scanner.string().encode()))
        else:
            rest[key] = scanner.value()
    return _joined(rest) if rest or STATE not in seen else None


def _sections(scanner: JsonScanner, node: Snapshot) -> bytes | None:
    """Read the data of a node of 2020; what there is besides the sections."""
    rest: dict[str, bytes] = {}
    scanner.begin("{")
    sections: set[str] = set()
    while (id := scanner.key(sections)) is not None:
        sections.add(id)
        if id == REST["2020"]:
            scanner.fail(f"no section can be called {id!r} here: it is where unknown keys are kept")
        seen: set[str] = set()
        others: dict[str, bytes] = {}
        scanner.begin("{")
        while (key := scanner.key(seen)) is not None:
            seen.add(key)
            at = scanner.at
            if key == "id":
                own = scanner.string()
                if own != id:
                    scanner.fail(f"the id is {_shown(own)} under the key {_shown(id)}", at)
            elif key == "snapshot":
                node.add_data_section(SnapshotDataSection(id, scanner.byte_list()))
            else:
                others[key] = scanner.value()
        for required in ("id", "snapshot"):
            if required not in seen:
                scanner.fail(f"the section that ends here has no {required!r}")
        if others:
            rest[id] = _joined(others)
    return _joined(rest) if rest else None


def _rest_of(place: SnapshotPath, node: Snapshot, generation: Generation) -> dict[str, bytes]:
    section = node.snapshot_data.get(REST[generation])
    return {} if section is None else _members(section.snapshot, place, generation)


def _members(text: Buffer, place: SnapshotPath, generation: Generation) -> dict[str, bytes]:
    """The values of a JSON object as texts."""
    try:
        scanner = JsonScanner(text, "byte")
        members: dict[str, bytes] = {}
        scanner.begin("{")
        while (key := scanner.key(members.keys())) is not None:
            members[key] = scanner.value()
        scanner.end()
    except DecodeError as error:
        where = place.section(REST[generation])
        raise SnapshotError(
            f"{where}: it is no JSON object of unknown keys: {error.cause}; remove the section"
        ) from error
    return members


def _joined(members: Mapping[str, bytes]) -> bytes:
    return b"{" + b",".join(_member(key, members[key]) for key in sorted(members)) + b"}"


def _member(key: str, value: bytes) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode() + b":" + value


def _sorted(held: dict[str, _T]) -> Iterator[_T]:
    return (held[id] for id in sorted(held))


def _text(text: str, place: SnapshotPath) -> bytes:
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SnapshotError(f"{place}: {_shown(text)} cannot be written as UTF-8") from error


def _shown(text: str) -> str:
    return json.dumps(text)[:80]
