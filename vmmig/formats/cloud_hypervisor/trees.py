"""The trees of snapshots in JSON, of both generations: text to a `Snapshot` and back.

What the text has besides the tree - keys that nobody knows - is kept in a section `REST` of the
node, as one JSON object of the text as it was found, and put back where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import attrs

from vmmig.errors import DecodeError, SnapshotError
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

STATE = "state"
"""The section of a node of today's trees that has its state, a text."""

REST = "$rest"
"""The section that has what a node's JSON has and the tree has not: a JSON object."""

Generation = Literal["2020", "today"]

_ENCODED_BYTES = 1 << 16


@attrs.define(eq=False)
class _Open:
    """A node whose object is being read."""

    node: Snapshot
    seen: set[str] = attrs.field(factory=set)
    rest: list[bytes] = attrs.field(factory=list)
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
                top.rest.append(b'"snapshot_data":' + rest)
        elif key == "id" and generation == "2020":
            at = scanner.at
            id = scanner.string()
            if len(stack) == 1:
                root.id = id
            elif id != top.node.id:
                scanner.fail(f"the id is {_shown(id)} under the key {_shown(top.node.id)}", at)
        else:
            top.rest.append(_member(key, scanner.value()))
        top.seen.add(key)
    scanner.end()
    return root


def encode_tree(root: Snapshot, generation: Generation) -> Iterator[bytes]:
    """The JSON text of a tree, piece by piece; a large section takes no more than a piece.

    Raises:
        SnapshotError: The tree cannot be written so; says where and why.

    >>> b"".join(encode_tree(Snapshot("vm"), "2020"))
    b'{"id":"vm","snapshots":{},"snapshot_data":{}}'
    """
    flatten(root)
    yield from _head(SnapshotPath(), root, generation)
    # Each open node's children that are to come.
    stack = [(root, SnapshotPath(), iter(root.snapshots.values()))]
    first = True
    while stack:
        node, place, children = stack[-1]
        child = next(children, None)
        if child is not None:
            below = place.child(child.id)
            key = _text(child.id, below)
            yield (b"" if first else b",") + key + b":"
            yield from _head(below, child, generation)
            stack.append((child, below, iter(child.snapshots.values())))
            first = True
        else:
            yield b"}"
            yield from _tail(place, node, generation)
            stack.pop()
            first = False


def _head(place: SnapshotPath, node: Snapshot, generation: Generation) -> Iterator[bytes]:
    if generation == "2020":
        yield b'{"id":' + _text(node.id, place) + b',"snapshots":{'
    else:
        yield b'{"snapshots":{'


def _tail(place: SnapshotPath, node: Snapshot, generation: Generation) -> Iterator[bytes]:
    rest = _rest_of(place, node)
    data = rest.pop("snapshot_data", None)
    if generation == "2020":
        yield b',"snapshot_data":{'
        yield from _encoded_sections(place, node, data)
        yield b"}"
    else:
        yield from _encoded_state(place, node, data)
    for key, value in rest.items():
        if key in ("id", "snapshots") and (generation == "2020" or key == "snapshots"):
            raise SnapshotError(f"{place.section(REST)}: {key!r} is what the tree itself has")
        yield b"," + _member(key, value)
    yield b"}"


def _encoded_state(place: SnapshotPath, node: Snapshot, data: bytes | None) -> Iterator[bytes]:
    strange = [id for id in node.snapshot_data if id not in (STATE, REST)]
    if strange:
        raise SnapshotError(
            f"{place.section(strange[0])}: a node of Cloud Hypervisor's state has one section, "
            f"{STATE!r}, and no other; convert to another format"
        )
    if STATE in node.snapshot_data:
        try:
            text = str(raw_view(node.snapshot_data[STATE].snapshot), "utf-8")
        except UnicodeDecodeError as error:
            raise SnapshotError(
                f"{place.section(STATE)}: it is not UTF-8 from byte {error.start} on; "
                "convert to another format"
            ) from error
        others = {} if data in (None, b"null") else _members(data or b"{}", place)
        members = [_member(STATE, _text(text, place))]
        members += [_member(key, value) for key, value in others.items() if key != STATE]
        yield b',"snapshot_data":{' + b",".join(members) + b"}"
    elif REST not in node.snapshot_data:
        yield b',"snapshot_data":null'
    elif data is not None:
        yield b',"snapshot_data":' + data


def _encoded_sections(place: SnapshotPath, node: Snapshot, data: bytes | None) -> Iterator[bytes]:
    others = {} if data is None else _members(data, place)
    comma = b""
    for id, section in node.snapshot_data.items():
        if id == REST:
            continue
        name = _text(id, place)
        yield comma + name + b':{"id":' + name + b',"snapshot":['
        comma = b","
        view = raw_view(section.snapshot)
        for start in range(0, len(view), _ENCODED_BYTES):
            if start:
                yield b","
            yield encode_integers(bytes(view[start : start + _ENCODED_BYTES]))
        yield b"]"
        for key, value in _members(others.get(id, b"{}"), place).items():
            if key not in ("id", "snapshot"):
                yield b"," + _member(key, value)
        yield b"}"


def _close(scanner: JsonScanner, top: _Open, generation: Generation) -> None:
    required = ("id", "snapshots", "snapshot_data") if generation == "2020" else ("snapshots",)
    for key in required:
        if key not in top.seen:
            scanner.fail(f"the object that ends here has no {key!r}")
    if generation == "today":
        usual = [] if STATE in top.node.snapshot_data else [b'"snapshot_data":null']
        keep = top.rest != usual
    else:
        keep = bool(top.rest)
    if keep:
        rest = b"{" + b",".join(top.rest) + b"}"
        top.node.add_data_section(SnapshotDataSection(REST, rest))


def _state(scanner: JsonScanner, node: Snapshot) -> bytes | None:
    """Read today's data of a node; what there is besides the state."""
    if scanner.is_null():
        return b"null"
    rest: list[bytes] = []
    seen: set[str] = set()
    scanner.begin("{")
    while (key := scanner.key(seen)) is not None:
        seen.add(key)
        if key == STATE:
            node.add_data_section(SnapshotDataSection(STATE, scanner.string().encode()))
        else:
            rest.append(_member(key, scanner.value()))
    return b"{" + b",".join(rest) + b"}" if rest or STATE not in seen else None


def _sections(scanner: JsonScanner, node: Snapshot) -> bytes | None:
    """Read the data of a node of 2020; what there is besides the sections."""
    rest: list[bytes] = []
    scanner.begin("{")
    sections: set[str] = set()
    while (id := scanner.key(sections)) is not None:
        sections.add(id)
        if id == REST:
            scanner.fail(
                f"no section can be called {REST!r} here: it is where unknown keys are kept"
            )
        seen: set[str] = set()
        others: list[bytes] = []
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
                others.append(_member(key, scanner.value()))
        for required in ("id", "snapshot"):
            if required not in seen:
                scanner.fail(f"the section that ends here has no {required!r}")
        if others:
            rest.append(_member(id, b"{" + b",".join(others) + b"}"))
    return b"{" + b",".join(rest) + b"}" if rest else None


def _rest_of(place: SnapshotPath, node: Snapshot) -> dict[str, bytes]:
    if REST not in node.snapshot_data:
        return {}
    return _members(node.snapshot_data[REST].snapshot, place)


def _members(text: Buffer, place: SnapshotPath) -> dict[str, bytes]:
    """The values of a JSON object as texts."""
    try:
        scanner = JsonScanner(text, "byte")
        members: dict[str, bytes] = {}
        scanner.begin("{")
        while (key := scanner.key(members.keys())) is not None:
            members[key] = scanner.value()
        scanner.end()
    except DecodeError as error:
        raise SnapshotError(
            f"{place.section(REST)}: it is no JSON object of unknown keys: {error.cause}; "
            "remove the section"
        ) from error
    return members


def _member(key: str, value: bytes) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode() + b":" + value


def _text(text: str, place: SnapshotPath) -> bytes:
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SnapshotError(f"{place}: {_shown(text)} cannot be written as UTF-8") from error


def _shown(text: str) -> str:
    return json.dumps(text)[:80]
