"""The JSON of Cloud Hypervisor's ``vm-migration`` crate as it was in 2020.

A snapshot is ``{"id": text, "snapshots": {id: snapshot}, "snapshot_data": {id: section}}``, a
section ``{"id": text, "snapshot": [byte, byte, ...]}``. Each byte of a section takes two to four
characters, and Python's decoder ends at about 490 levels; the container has neither limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmmig.errors import DecodeError, MigrateReceiveError, MigrateSendError
from vmmig.snapshot import Snapshot, SnapshotDataSection, SnapshotPath, flatten, raw_view
from vmmig.transfer import Transfer
from vmmig.transport import file

_PIECE_BYTES = 1 << 16
_DIGITS = [b"%d" % byte for byte in range(256)]
_NODE_FIELDS = ("id", "snapshots", "snapshot_data")
_SECTION_FIELDS = ("id", "snapshot")


def sniff(path: Path) -> bool:
    """Whether the file begins as a JSON object does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as opened:
            return opened.read(64).lstrip(b" \t\r\n")[:1] == b"{"
    except OSError:
        return False


def read(path: Path) -> Snapshot:
    """The snapshot in a JSON file.

    Raises:
        MigrateReceiveError: The file cannot be read.
        DecodeError: It is not a snapshot's JSON.

    >>> path = getfixture("tmp_path") / "vm.json"
    >>> path.write_text('{"id": "vm", "snapshots": {}, "snapshot_data": {"a": 1}}')
    56
    >>> read(path)
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ...: $.snapshot_data['a']: an object of id, snapshot is needed, ...
    """
    view = file.recv(Transfer(path, MigrateReceiveError))
    try:
        return loads(bytes(view))
    except DecodeError as error:
        raise DecodeError(f"{str(path)!r}: {error.cause}", where=error.where) from error.__cause__


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot as JSON, atomically and durably; equal ones become equal bytes.

    Raises:
        MigrateSendError: It was not written; what was there before still is.
        SnapshotError: The tree is not valid.

    >>> path = getfixture("tmp_path") / "vm.json"
    >>> write(Snapshot("vm"), path)
    >>> path.read_text()
    '{"id":"vm","snapshots":{},"snapshot_data":{}}'
    """
    flatten(snapshot)
    file.send(_pieces(snapshot), Transfer(path, MigrateSendError))


def loads(text: str | bytes) -> Snapshot:
    """The snapshot in a JSON text.

    Raises:
        DecodeError: It is not a snapshot's JSON; the error says where.

    >>> loads('{"id": "vm", "snapshots": {}, "snapshot_data": {}}')
    Snapshot('vm')
    """
    try:
        tree = json.loads(text, object_pairs_hook=_object)
    except DecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"it is not JSON: {error}") from error
    place = SnapshotPath()
    root, children = _node(tree, str(place))
    stack = [(root, place, children)]
    while stack:
        node, place, children = stack.pop()
        for id, value in children.items():
            below = place.child(id)
            child, grandchildren = _node(value, str(below))
            _agree(id, child.id, str(below))
            node.snapshots[id] = child
            if grandchildren:
                stack.append((child, below, grandchildren))
    return root


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise DecodeError(f"an object has the key {twice!r} more than once")
    payload = value.get("snapshot")
    # At once, for as a list it takes eight times as much memory.
    if len(value) == 2 and "id" in value and isinstance(payload, list):
        value["snapshot"] = _payload(payload)
    return value


def _payload(numbers: list[Any]) -> bytes | list[Any]:
    """The bytes, or the list itself where it is not one of bytes."""
    if not {*map(type, numbers)} <= {int}:
        return numbers
    try:
        return bytes(numbers)
    except ValueError:
        return numbers


def _node(value: Any, place: str) -> tuple[Snapshot, dict[str, Any]]:
    """A node without its children, and these as they were found."""
    id, children, sections = _fields(value, _NODE_FIELDS, place)
    node = Snapshot(_text(id, place))
    for name, held in (("snapshots", children), ("snapshot_data", sections)):
        if not isinstance(held, dict):
            raise DecodeError(
                f"an object is needed, not {type(held).__name__}", where=f"{place}.{name}"
            )
    for key, section in sections.items():
        where = f"{place}.snapshot_data[{key!r}]"
        id, payload = _fields(section, _SECTION_FIELDS, where)
        if not isinstance(payload, bytes):
            raise DecodeError("an array of integers from 0 to 255 is needed", where=where)
        _agree(key, _text(id, where), where)
        node.snapshot_data[key] = SnapshotDataSection(key, payload)
    return node, children


def _fields(value: Any, names: tuple[str, ...], place: str) -> list[Any]:
    if not isinstance(value, dict) or value.keys() != {*names}:
        found = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise DecodeError(
            f"an object of {', '.join(names)} is needed, not {found[:200]}", where=place
        )
    return [value[name] for name in names]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DecodeError(f"the id is not a text, but {type(value).__name__}", where=place)
    return value


def _agree(key: str, id: str, place: str) -> None:
    if id != key:
        raise DecodeError(f"kept under this id, but its own is {id!r}"[:300], where=place)


def _pieces(root: Snapshot) -> Iterator[bytes]:
    stack: list[bytes | Snapshot | SnapshotDataSection] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, SnapshotDataSection):
            view = raw_view(item.snapshot)
            yield b'{"id":%s,"snapshot":[' % _quoted(item.id)
            for start in range(0, view.nbytes, _PIECE_BYTES):
                numbers = map(_DIGITS.__getitem__, view[start : start + _PIECE_BYTES])
                yield (b"," if start else b"") + b",".join(numbers)
            yield b"]}"
        else:
            parts: list[bytes | Snapshot | SnapshotDataSection] = [
                b'{"id":%s,"snapshots":{' % _quoted(item.id)
            ]
            for i, (id, child) in enumerate(sorted(item.snapshots.items())):
                parts += [b"," * (i > 0) + _quoted(id) + b":", child]
            parts.append(b'},"snapshot_data":{')
            for i, (id, section) in enumerate(sorted(item.snapshot_data.items())):
                parts += [b"," * (i > 0) + _quoted(id) + b":", section]
            stack += reversed([*parts, b"}}"])


def _quoted(id: str) -> bytes:
    return json.dumps(id).encode()
