"""A `Snapshot` that was a migration stream into the stream's bytes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from vmmig.codec import WritableStream
from vmmig.errors import DecodeError, MigratableError, SnapshotError
from vmmig.formats.qemu import wire
from vmmig.formats.qemu.pages import PlainRecords
from vmmig.formats.qemu.replay import RamWriter
from vmmig.snapshot import Snapshot, raw_view

_LAYOUT = "$.snapshot_data['stream']"
_CHUNK_BYTES = 1 << 20
_LARGE_BYTES = 1 << 18
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    AttributeError,
    RecursionError,
)
_SHOWN = 8
_KINDS = {
    "start": wire.SECTION_START,
    "part": wire.SECTION_PART,
    "end": wire.SECTION_END,
    "full": wire.SECTION_FULL,
}


def chunks(root: Snapshot) -> Iterator[bytes | memoryview]:
    """The stream's bytes, about 1 MiB at a time.

    Raises:
        MigratableError: The tree is no QEMU stream's, or has what a stream cannot carry; that
            is said before the first chunk, except for damage of the layout.
    """
    parts = scattered(root)
    return (part.joined() if isinstance(part, PlainRecords) else part for part in parts)


def scattered(root: Snapshot) -> Iterator[bytes | memoryview | PlainRecords]:
    """As `chunks`, with pages that were not put together with their headers."""
    with _blaming_layout():
        parts = _layout(root)
        ram = _ram_of(root, parts)
        _refuse_strange(root, parts, ram)
    return _joined(_pieces(root, parts, ram))


def write_to(stream: WritableStream, parts: Iterable[bytes | memoryview | PlainRecords]) -> None:
    """Write what `scattered` gives; pages are not copied on the way to a raw file or socket.

    Raises:
        MigratableError: It was not written, or not all of it.
    """
    fd = _descriptor_of(stream)
    for part in parts:
        if isinstance(part, PlainRecords):
            if fd is not None:
                with _failing():
                    part.write(fd)
                continue
            part = part.joined()
        view = memoryview(part)
        while view:
            with _failing():
                written_bytes = stream.write(view)
            if not written_bytes:
                raise MigratableError("the stream takes no more: it must be a blocking one")
            view = view[written_bytes:]


def _descriptor_of(stream: WritableStream) -> int | None:
    """What can be written to past the stream: where it keeps nothing back, and blocks."""
    if not isinstance(stream, io.RawIOBase) or not hasattr(os, "writev"):
        return None
    try:
        fd = stream.fileno()
        return fd if os.get_blocking(fd) else None
    except OSError:
        return None


@contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise MigratableError(f"the stream could not be written: {error}") from error


@contextmanager
def _blaming_layout() -> Iterator[None]:
    try:
        yield
    except MigratableError:
        raise
    except _DAMAGE as error:
        raise DecodeError(f"the stream's layout is damaged: {error!r}", where=_LAYOUT) from error


def _layout(root: Snapshot) -> list[dict[str, Any]]:
    layout = json.loads(bytes(raw_view(root.section("stream").snapshot)))
    if layout["layout"] != 1:
        raise ValueError(f"its version is {layout['layout']}; only 1 is known")
    parts = layout["parts"]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError("it has no list of parts")
    return parts


def _ram_of(root: Snapshot, parts: list[dict[str, Any]]) -> RamWriter | None:
    for part in parts:
        if part.get("blocks") is not None:
            earlier = root.snapshot_data.get("stream-earlier-pages")
            return RamWriter(
                root.find("ram"),
                part,
                raw_view(root.section("stream-runs").snapshot),
                raw_view(earlier.snapshot if earlier else b""),
            )
    return None


def _refuse_strange(root: Snapshot, parts: list[dict[str, Any]], ram: RamWriter | None) -> None:
    """Raise if the tree has what would be lost."""
    known = {("stream",), ("configuration", "state")}
    for part in parts:
        if part.get("part") in ("vmdesc", "trailing"):
            known.add((part["part"],))
        elif "child" in part:
            known.add((part["child"], "state"))
    if ram is not None:
        known |= {("stream-runs",), ("stream-earlier-pages",)}
        known |= {("ram", name) for name in ram.sections}
    strange = [f"$.snapshot_data[{id!r}]" for id in root.snapshot_data if (id,) not in known]
    for name, node in root.snapshots.items():
        place = f"$.snapshots[{name!r}]"
        for id in node.snapshot_data:
            if (name, id) not in known:
                strange.append(f"{place}.snapshot_data[{id!r}]")
        strange += [f"{place}.snapshots[{id!r}]" for id in node.snapshots]
        if not node.snapshot_data and not node.snapshots and name != "ram":
            strange.append(place)
    if strange:
        more = f", and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else ""
        raise SnapshotError(
            "its stream has no place for " + ", ".join(strange[:_SHOWN]) + more + "; remove it"
        )


def _joined(
    pieces: Iterator[bytes | memoryview | PlainRecords],
) -> Iterator[bytes | memoryview | PlainRecords]:
    pending: list[bytes | memoryview] = []
    size = 0
    with _blaming_layout():
        for piece in pieces:
            if isinstance(piece, PlainRecords) and len(piece.pages) < _LARGE_BYTES:
                piece = piece.joined()
            if isinstance(piece, PlainRecords) or len(piece) >= _LARGE_BYTES:
                yield b"".join(pending)
                pending, size = [], 0
                yield piece
                continue
            pending.append(piece)
            size += len(piece)
            if size >= _CHUNK_BYTES:
                yield b"".join(pending)
                pending, size = [], 0
    yield b"".join(pending)


def _pieces(
    root: Snapshot, parts: list[dict[str, Any]], ram: RamWriter | None
) -> Iterator[bytes | memoryview | PlainRecords]:
    done: dict[str, int] = {}
    yield wire.MAGIC + wire.VERSION.to_bytes(4, "big")
    for part in parts:
        kind = part["part"]
        if kind == "configuration":
            yield bytes((wire.CONFIGURATION,))
            yield _payload(root, "configuration")
        elif kind == "command":
            data = bytes.fromhex(part["data"])
            yield bytes((wire.COMMAND,)) + part["command"].to_bytes(2, "big")
            yield len(data).to_bytes(2, "big") + data
        elif kind == "eof":
            yield bytes((wire.EOF,))
        elif kind == "vmdesc":
            description = raw_view(root.section("vmdesc").snapshot)
            yield bytes((wire.DESCRIPTION,)) + len(description).to_bytes(4, "big")
            yield description
        elif kind == "trailing":
            yield raw_view(root.section("trailing").snapshot)
        elif kind == "rest":
            yield _payload(root, part["child"])
        else:
            yield _header(_KINDS[kind], part)
            if "child" in part:
                state = _payload(root, part["child"])
                if kind != "full":
                    state = _next_of(state, part, done)
                yield state
            elif ram is None:
                raise ValueError("RAM goes on, but has not begun")
            else:
                if kind == "start":
                    yield ram.blocks_list()
                yield from ram.records(part["runs"])
            if part["footer"]:
                yield bytes((wire.FOOTER,)) + part["id"].to_bytes(4, "big")
    if ram is not None:
        ram.check_all_written()


def _header(kind: int, part: dict[str, Any]) -> bytes:
    header: bytes = bytes((kind,)) + part["id"].to_bytes(4, "big")
    if kind in (wire.SECTION_START, wire.SECTION_FULL):
        name = part["name"].encode("ascii")
        header += bytes((len(name),)) + name
        header += part["instance"].to_bytes(4, "big") + part["version"].to_bytes(4, "big")
    return header


def _next_of(state: memoryview, part: dict[str, Any], done: dict[str, int]) -> memoryview:
    """The bytes of a section of a device that has several."""
    start = done.get(part["child"], 0)
    end = done[part["child"]] = start + part["bytes"]
    if end > len(state) or (part["part"] == "end" and end != len(state)):
        raise ValueError(f"the sections of {part['child']!r} have not {len(state)} bytes together")
    return state[start:end]


def _payload(root: Snapshot, child: str) -> memoryview:
    return raw_view(root.find([child]).section("state").snapshot)
