"""Plain msgpack: a snapshot as nested maps, for programs that know no vmmig.

A snapshot is the map ``{"id": str, "snapshots": {id: snapshot}, "snapshot_data": {id: section}}``,
a section the map ``{"id": str, "snapshot": bin}``. Only maps, ``str`` and ``bin`` occur, so it is
read without a copy and at any depth. Nothing is checksummed, and a section ends at 4 GiB - 1;
the container does better.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import attrs

from vmmig.errors import DecodeError, MigrateReceiveError, MigrateSendError, SnapshotError
from vmmig.snapshot import Buffer, Snapshot, SnapshotDataSection, flatten, raw_view
from vmmig.transfer import Transfer
from vmmig.transport import file

_COPIED_BYTES = 1 << 16
_NODE_FIELDS = ("id", "snapshots", "snapshot_data")
_SECTION_FIELDS = ("id", "snapshot")

# The type byte, and how the length behind it is packed.
_WIDE = {
    0xC4: ("bin", ">B"),
    0xC5: ("bin", ">H"),
    0xC6: ("bin", ">I"),
    0xD9: ("str", ">B"),
    0xDA: ("str", ">H"),
    0xDB: ("str", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def sniff(path: Path) -> bool:
    """Whether the file begins as a map of a snapshot's three fields does."""
    begins = tuple(b"\x83" + _packed_text(name) for name in _NODE_FIELDS)
    try:
        if not path.is_file():
            return False
        with path.open("rb") as opened:
            return opened.read(32).startswith(begins)
    except OSError:
        return False


def read(path: Path) -> Snapshot:
    """The snapshot in a file; large sections are views of its mapping.

    Raises:
        MigrateReceiveError: The file cannot be read.
        DecodeError: It is not a snapshot in msgpack.

    >>> path = getfixture("tmp_path") / "vm.msgpack"
    >>> write(Snapshot("vm"), path)
    >>> sniff(path), read(path)
    (True, Snapshot('vm'))
    """
    view = file.recv(Transfer(path, MigrateReceiveError))
    try:
        return loads(view)
    except DecodeError as error:
        raise DecodeError(f"{str(path)!r}: {error.cause}", where=error.where) from error.__cause__


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot as msgpack, atomically and durably; equal ones become equal bytes.

    Raises:
        MigrateSendError: It was not written; what was there before still is.
        SnapshotError: The tree is not valid, or a section is too large for msgpack.
    """
    file.send(_pieces(snapshot), Transfer(path, MigrateSendError))


def dumps(snapshot: Snapshot) -> bytes:
    """A snapshot as msgpack.

    Raises:
        SnapshotError: The tree is not valid, or a section is too large for msgpack.

    >>> dumps(Snapshot("vm"))[:6]
    b'\\x83\\xa2id\\xa2v'
    """
    return b"".join(_pieces(snapshot))


def loads(data: Buffer) -> Snapshot:
    """The snapshot in msgpack; sections of 64 KiB or more are views of ``data``.

    Raises:
        DecodeError: It is not a snapshot in msgpack; the error says where.

    >>> loads(dumps(Snapshot("vm")))
    Snapshot('vm')
    """
    reader = _Reader(raw_view(data))
    root = Snapshot()
    stack = [_Open(root, reader.map())]
    while stack:
        top = stack[-1]
        if top.children:
            top.children -= 1
            id = reader.text()
            if id in top.node.snapshots:
                raise reader.failure(f"the snapshot {id!r} is there more than once")
            child = top.node.snapshots[id] = Snapshot(id)
            stack.append(_Open(child, reader.map(), id))
        elif top.fields:
            top.fields -= 1
            name = reader.field(_NODE_FIELDS, top.seen)
            if name == "id":
                top.node.id = reader.text()
            elif name == "snapshots":
                top.children = reader.map()
            else:
                _read_sections(reader, top.node)
        else:
            reader.expect_all(_NODE_FIELDS, top.seen)
            if top.key is not None and top.node.id != top.key:
                raise reader.failure(f"{top.node.id!r} is kept under the id {top.key!r}")
            stack.pop()
    if reader.at != reader.data.nbytes:
        raise reader.failure("bytes stand behind the snapshot")
    return root


@attrs.define
class _Open:
    """A node that is being read: how many of its fields and of its children are to come."""

    node: Snapshot
    fields: int
    key: str | None = None
    children: int = 0
    seen: set[str] = attrs.field(factory=set)


def _read_sections(reader: _Reader, node: Snapshot) -> None:
    for _ in range(reader.map()):
        key = reader.text()
        if key in node.snapshot_data:
            raise reader.failure(f"the section {key!r} is there more than once")
        section = SnapshotDataSection(key)
        seen: set[str] = set()
        for _ in range(reader.map()):
            if reader.field(_SECTION_FIELDS, seen) == "snapshot":
                section.snapshot = reader.binary()
            elif (id := reader.text()) != key:
                raise reader.failure(f"{id!r} is kept under the id {key!r}")
        reader.expect_all(_SECTION_FIELDS, seen)
        node.snapshot_data[key] = section


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def failure(self, what: str) -> DecodeError:
        return DecodeError(what[:300], where=f"byte {self.at}")

    def map(self) -> int:
        return self._header("map")

    def text(self) -> str:
        count = self._header("str")
        try:
            return str(self._take(count), "utf-8")
        except UnicodeDecodeError as error:
            raise self.failure(f"a text is not UTF-8: {error}") from error

    def binary(self) -> Buffer:
        view = self._take(self._header("bin"))
        return view if view.nbytes >= _COPIED_BYTES else bytes(view)

    def field(self, names: tuple[str, ...], seen: set[str]) -> str:
        """The next field's name, which is one of ``names`` and not seen before."""
        name = self.text()
        if name not in names or name in seen:
            raise self.failure(f"one {', one '.join(names)} is needed, but {name!r} came")
        seen.add(name)
        return name

    def expect_all(self, names: tuple[str, ...], seen: set[str]) -> None:
        if len(seen) != len(names):
            missing = ", ".join(name for name in names if name not in seen)
            raise self.failure(f"missing before this: {missing}")

    def _header(self, wanted: str) -> int:
        byte = self._take(1)[0]
        if 0x80 <= byte <= 0x8F:
            kind, count = "map", byte & 0x0F
        elif 0xA0 <= byte <= 0xBF:
            kind, count = "str", byte & 0x1F
        else:
            kind, code = _WIDE.get(byte, (f"type {byte:#04x}", ""))
            count = struct.unpack(code, self._take(struct.calcsize(code)))[0] if code else 0
        if kind != wanted:
            raise self.failure(f"a {wanted} is needed, not a {kind}")
        return count

    def _take(self, count: int) -> memoryview:
        if count > self.data.nbytes - self.at:
            raise self.failure(f"truncated: {count} bytes are needed")
        self.at += count
        return self.data[self.at - count : self.at]


def _pieces(root: Snapshot) -> Iterator[Buffer]:
    flatten(root)
    stack: list[Buffer | Snapshot] = [root]
    while stack:
        item = stack.pop()
        if not isinstance(item, Snapshot):
            yield item
            continue
        yield b"\x83" + _packed_text("id") + _packed_text(item.id)
        parts: list[Buffer | Snapshot] = [_packed_text("snapshots") + _map(len(item.snapshots))]
        for id, child in sorted(item.snapshots.items()):
            parts += [_packed_text(id), child]
        parts.append(_packed_text("snapshot_data") + _map(len(item.snapshot_data)))
        for id, section in sorted(item.snapshot_data.items()):
            name, view = _packed_text(id), raw_view(section.snapshot)
            head = name + b"\x82" + _packed_text("id") + name + _packed_text("snapshot")
            parts += [head + _length(0xC4, view.nbytes, f"the section {id!r}"), view]
        stack += reversed(parts)


def _packed_text(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise SnapshotError(f"the id {text!r} is not valid Unicode") from error
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    return _length(0xD9, len(data), "an id") + data


def _map(count: int) -> bytes:
    if count < 16:
        return bytes([0x80 | count])
    return struct.pack(">BH", 0xDE, count) if count < 1 << 16 else struct.pack(">BI", 0xDF, count)


def _length(first: int, count: int, what: str) -> bytes:
    for step, code in enumerate(("B", "H", "I")):
        if count < 1 << 8 * struct.calcsize(code):
            return struct.pack(f">B{code}", first + step, count)
    raise SnapshotError(
        f"{what} has {count} bytes, and msgpack ends at {(1 << 32) - 1}; keep it in a container"
    )
