"""The snapshot folder of today's Cloud Hypervisor: `config.json`, `state.json`, `memory-ranges`.

The tree: the root ``cloud-hypervisor`` has the section ``config``, the JSON as it was found, and
the nodes of ``state.json`` as its children, each with its state as the section ``state``, a JSON
text. The child ``memory`` has the RAM: one section for each range, named by its address
(``0x100000000``).
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, NamedTuple

from vmmig.errors import DecodeError, MigratableError, MigrateReceiveError, SnapshotError
from vmmig.formats.cloud_hypervisor.folders import (
    map_folder,
    memory_writer,
    text_writer,
    write_folder,
)
from vmmig.formats.cloud_hypervisor.scanning import parse_json
from vmmig.formats.cloud_hypervisor.trees import (
    MEMORY,
    STATE,
    decode_tree,
    encode_tree,
    split_memory,
    with_memory,
)
from vmmig.memory import MemoryRange
from vmmig.snapshot import Buffer, Snapshot, SnapshotDataSection, raw_view
from vmmig.transport.file import path_of

NAME = "cloud-hypervisor"
"""The format's name, and the id of its trees' root."""

CONFIG = "config"
"""The root's section with the configuration, a JSON text."""

_CONFIG_FILE, _STATE_FILE, _MEMORY_FILE = "config.json", "state.json", "memory-ranges"
_FILES = (_CONFIG_FILE, _STATE_FILE, _MEMORY_FILE)
_RAM = re.compile("0x(0|[1-9a-f][0-9a-f]{0,15})")
_END = 1 << 64


class Parts(NamedTuple):
    """What a snapshot is on the wire, and in a folder.

    Attributes:
        config: The configuration, a JSON text.
        state: The tree of states, a JSON text.
        memory: The RAM: for each guest-physical address what lies from there on.
    """

    config: bytes
    state: bytes
    memory: dict[int, Buffer]


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether the folder at ``path`` looks like a snapshot of today's Cloud Hypervisor.

    >>> sniff("no-such-folder")
    False
    """
    try:
        return all(os.path.isfile(os.path.join(path, name)) for name in (_CONFIG_FILE, _STATE_FILE))
    except (OSError, ValueError, TypeError):
        return False


def read(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot in the folder ``path``; its RAM is mapped, and read where it is touched.

    Raises:
        DecodeError: A file is not what it should be; the error says which, and where.
        MigrateReceiveError: The folder, or a file in it, is not there or cannot be read.

    >>> read("no-such-folder")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...'no-such-folder': No such file or directory; ...
    """
    folder = path_of(path, MigrateReceiveError)
    files = map_folder(folder, _FILES.__contains__, required=(_CONFIG_FILE, _STATE_FILE))
    config = bytes(files[_CONFIG_FILE])
    snapshot = _tree(config, files[_STATE_FILE], folder)
    ram = files.get(_MEMORY_FILE, memoryview(b""))
    ranges = _declared(config, snapshot, has_ram=bool(ram), folder=folder)
    total_bytes = sum(each.length for each in ranges)
    if len(ram) != total_bytes:
        raise DecodeError(
            f"it has {len(ram)} bytes, but the ranges in it are {total_bytes} bytes in all"
            if _MEMORY_FILE in files
            else f"it is missing; there should be {total_bytes} bytes of RAM in it",
            where=os.path.join(folder, _MEMORY_FILE),
        )
    memory: dict[int, Buffer] = {}
    at = 0
    for each in ranges:
        memory[each.gpa] = ram[at : at + each.length]
        at += each.length
    return _with_memory(snapshot, memory)


def write(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write the folder ``path``, durably, all of it or nothing; RAM's zeros become holes.

    Args:
        snapshot: A tree as `read` or `from_parts` makes it.
        path: Where to: nothing, or an empty folder, may be there.

    Raises:
        SnapshotError: The tree is not one of Cloud Hypervisor's; says what does not fit.
        MigrateSendError: It could not be written, and why.

    >>> write(Snapshot("vm"), "folder")
    Traceback (most recent call last):
    vmmig.errors.SnapshotError: ...: the root has no section 'config'...
    """
    config, tree, memory = _split(snapshot)
    try:
        ranges = _declared(config, tree, has_ram=bool(memory))
    except DecodeError as error:
        raise SnapshotError(f"its sections do not tell the memory's ranges: {error}") from error
    files = {
        _CONFIG_FILE: text_writer([config]),
        _STATE_FILE: text_writer(encode_tree(tree, "today")),
    }
    if ranges:
        files[_MEMORY_FILE] = memory_writer(_arranged(ranges, memory))
    elif memory:
        raise SnapshotError(
            "the configuration tells no ranges of memory, but there is RAM; it would not be found"
        )
    write_folder(path, files)


def from_parts(config: Buffer, state: Buffer, memory: Mapping[int, Buffer]) -> Snapshot:
    """The snapshot of the wire's messages: Config's and State's JSON, and the RAM.

    Args:
        config: A JSON object, kept as it is.
        state: A tree of states, as JSON; what is in it under unknown keys is kept too.
        memory: For each guest-physical address what lies from there on; not copied.

    Raises:
        DecodeError: The JSON is not what it should be, or two pieces of memory overlap.

    >>> state = b'{"snapshots":{"cpu-manager":{"snapshots":{},"snapshot_data":{"state":"{}"}}},'
    >>> state += b'"snapshot_data":null}'
    >>> snapshot = from_parts(b"{}", state, {0: bytes(4096)})
    >>> snapshot
    Snapshot('cloud-hypervisor', snapshots: ['cpu-manager', 'memory'], \
snapshot_data: ['config': 2 bytes])
    >>> to_parts(snapshot).state == state
    True
    """
    snapshot = _tree(bytes(config), state)
    _check_apart(
        [MemoryRange(gpa, raw_view(payload).nbytes) for gpa, payload in memory.items()], "memory"
    )
    return _with_memory(snapshot, memory)


def to_parts(snapshot: Snapshot) -> Parts:
    """What `from_parts` was given: the state's JSON has the same values, compact.

    Raises:
        SnapshotError: The tree is not one of Cloud Hypervisor's; says what does not fit.

    >>> to_parts(from_parts(b"{}", b'{"snapshots": {}, "snapshot_data": null}', {}))
    Parts(config=b'{}', state=b'{"snapshots":{},"snapshot_data":null}', memory={})
    """
    config, tree, memory = _split(snapshot)
    return Parts(config, b"".join(encode_tree(tree, "today")), memory)


def _tree(config: bytes, state: Buffer, folder: str = "") -> Snapshot:
    where = os.path.join(folder, _CONFIG_FILE)
    _object(parse_json(config, where), where)
    snapshot = decode_tree(state, os.path.join(folder, _STATE_FILE), "today", NAME)
    snapshot.add_data_section(SnapshotDataSection(CONFIG, config))
    return snapshot


def _with_memory(snapshot: Snapshot, memory: Mapping[int, Buffer]) -> Snapshot:
    sections = {f"{gpa:#x}": payload for gpa, payload in memory.items()}
    return with_memory(snapshot, sections, "today")


def _split(snapshot: Snapshot) -> tuple[bytes, Snapshot, dict[int, Buffer]]:
    """The configuration, the tree of states and the RAM by its addresses."""
    tree, sections = split_memory(snapshot, _is_ram)
    if CONFIG not in tree.snapshot_data:
        raise SnapshotError(
            f"the root has no section {CONFIG!r}: it is no snapshot of today's Cloud Hypervisor, "
            "and cannot be written as one; convert to another format"
        )
    tree = copy(tree)
    config = bytes(raw_view(tree.snapshot_data.pop(CONFIG).snapshot))
    memory = {int(id, 16): payload for id, payload in sections.items()}
    ranges = [MemoryRange(gpa, raw_view(payload).nbytes) for gpa, payload in memory.items()]
    _check_apart(ranges, MEMORY, SnapshotError)
    return config, tree, memory


def _is_ram(id: str) -> bool:
    return _RAM.fullmatch(id) is not None


def _declared(
    config: bytes, tree: Snapshot, *, has_ram: bool, folder: str = ""
) -> list[MemoryRange]:
    """The ranges of which the RAM's file is made, in their order there.

    They stand in the configuration as the wire has it, or in the state of the memory manager.
    Where both tell none, as in a live migration, the RAM is all that the machine has.
    """
    where = os.path.join(folder, _CONFIG_FILE)
    data = _object(parse_json(config, where), where).get("memory_manager_data")
    sources = [(_object(data, where), where)] if data is not None else []
    manager = tree.snapshots.get("memory-manager")
    if manager is not None and STATE in manager.snapshot_data:
        where = f"{os.path.join(folder, _STATE_FILE)}, the state of 'memory-manager'"
        state = parse_json(manager.snapshot_data[STATE].snapshot, where)
        sources.append((_object(state, where), where))
    for data, where in sources:
        table = _object(data.get("memory_ranges", {"data": []}), f"{where}, memory_ranges")
        if ranges := _ranges(table, "data", "length", f"{where}, memory_ranges"):
            return ranges
    for data, where in sources if has_ram else []:
        if ranges := _ranges(
            {"guest_ram_mappings": []} | data, "guest_ram_mappings", "size", where
        ):
            return ranges
    return []


def _ranges(holder: dict[str, Any], key: str, length_key: str, where: str) -> list[MemoryRange]:
    """The ranges in the list under ``key``."""
    where = f"{where}, {key}"
    items = holder.get(key)
    if not isinstance(items, list):
        raise DecodeError("a list must stand here", where=where)
    ranges = []
    for i, item in enumerate(items):
        place = f"{where}[{i}]"
        found = _object(item, place)
        gpa, length = _u64(found, "gpa", place), _u64(found, length_key, place)
        try:
            ranges.append(MemoryRange(gpa, length))
        except MigratableError as error:
            raise DecodeError(error.cause, where=place) from None
    _check_apart(ranges, where)
    return ranges


def _arranged(ranges: Iterable[MemoryRange], memory: Mapping[int, Buffer]) -> list[memoryview]:
    """The RAM in the order of the ranges, which may be cut elsewhere than it is."""
    starts = sorted(memory)
    views: list[memoryview] = []
    for each in ranges:
        at = each.gpa
        while at < each.end:
            i = bisect_right(starts, at) - 1
            view = raw_view(memory[starts[i]])[at - starts[i] :] if i >= 0 else memoryview(b"")
            if not view:
                raise SnapshotError(
                    f"the machine has memory from {each.gpa:#x} to {each.end:#x}, but the snapshot "
                    f"has no RAM at {at:#x}"
                )
            views.append(view[: each.end - at])
            at += len(views[-1])
    written_bytes = sum(map(len, views))
    held_bytes = sum(raw_view(payload).nbytes for payload in memory.values())
    if written_bytes != held_bytes:
        raise SnapshotError(
            f"the machine has {written_bytes} bytes of memory, but the snapshot has {held_bytes} "
            "bytes of RAM; the others would be lost"
        )
    return views


def _check_apart(
    ranges: Iterable[MemoryRange], where: str, error: type[MigratableError] = DecodeError
) -> None:
    last = None
    for each in sorted(ranges):
        if last is not None and (each.gpa < last.end or each.gpa == last.gpa):
            raise error(
                f"{where}: the {each.length} bytes at {each.gpa:#x} overlap the {last.length} "
                f"bytes at {last.gpa:#x}"
            )
        last = each


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DecodeError("an object must stand here", where=where)
    return value


def _u64(found: dict[str, Any], key: str, where: str) -> int:
    value = found.get(key)
    if type(value) is not int or not 0 <= value < _END:
        raise DecodeError(f"{key!r} must be an integer from 0 to 2^64-1", where=where)
    return value
