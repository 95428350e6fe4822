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

from vmmig.errors import DecodeError, MigratableError, SnapshotError
from vmmig.formats.cloud_hypervisor.folders import (
    map_folder,
    memory_writer,
    text_writer,
    write_folder,
)
from vmmig.formats.cloud_hypervisor.scanning import parse_json
from vmmig.formats.cloud_hypervisor.trees import REST, STATE, decode_tree, encode_tree
from vmmig.memory import MemoryRange
from vmmig.snapshot import Buffer, Snapshot, SnapshotDataSection, raw_view

NAME = "cloud-hypervisor"
"""The format's name, and the id of its trees' root."""

CONFIG = "config"
"""The root's section with the configuration, a JSON text."""

MEMORY = "memory"
"""The child with the RAM."""

_CONFIG_FILE, _STATE_FILE, _MEMORY_FILE = "config.json", "state.json", "memory-ranges"
_FILES = (_CONFIG_FILE, _STATE_FILE, _MEMORY_FILE)
_MANAGER, _MANAGER_DATA = "memory-manager", "memory_manager_data"
_MAPPINGS = "guest_ram_mappings"
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


class RamMapping(NamedTuple):
    """One of the pieces of which a machine's RAM is made.

    Attributes:
        slot: Its number; the wire's MemoryFd names it.
        gpa: The guest-physical address from which on it lies.
        size_bytes: Its size.
        file_offset: Where in its zone's file it begins.
    """

    slot: int
    gpa: int
    size_bytes: int
    file_offset: int


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
    files = map_folder(path, _FILES.__contains__)
    for name in (_CONFIG_FILE, _STATE_FILE):
        if name not in files:
            raise DecodeError("it is missing", where=name)
    config, state = bytes(files[_CONFIG_FILE]), files[_STATE_FILE]
    snapshot = _tree(config, state)
    ram = files.get(_MEMORY_FILE, memoryview(b""))
    ranges = _declared(snapshot, has_ram=bool(ram))
    total_bytes = sum(range.length for range in ranges)
    if len(ram) != total_bytes:
        raise DecodeError(
            f"it has {len(ram)} bytes, but the ranges in it are {total_bytes} bytes in all",
            where=_MEMORY_FILE,
        )
    at = 0
    memory: dict[int, Buffer] = {}
    for range in ranges:
        memory[range.gpa] = ram[at : at + range.length]
        at += range.length
    _add_memory(snapshot, memory)
    return snapshot


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
    _check_config(snapshot)
    memory = _memory_of(snapshot)
    try:
        ranges = _declared(snapshot, has_ram=bool(memory))
    except DecodeError as error:
        raise SnapshotError(f"its sections do not tell the memory's ranges: {error}") from error
    files = {
        _CONFIG_FILE: text_writer([snapshot.snapshot_data[CONFIG].snapshot]),
        _STATE_FILE: text_writer(encode_tree(_state_of(snapshot), "today")),
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
        state: A tree of states, as JSON.
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
    _add_memory(snapshot, memory)
    return snapshot


def to_parts(snapshot: Snapshot) -> Parts:
    """What `from_parts` was given: the state's JSON has the same values, compact.

    Raises:
        SnapshotError: The tree is not one of Cloud Hypervisor's; says what does not fit.

    >>> to_parts(from_parts(b"{}", b'{"snapshots": {}, "snapshot_data": null}', {}))
    Parts(config=b'{}', state=b'{"snapshots":{},"snapshot_data":null}', memory={})
    """
    _check_config(snapshot)
    state = b"".join(encode_tree(_state_of(snapshot), "today"))
    return Parts(bytes(snapshot.snapshot_data[CONFIG].snapshot), state, _memory_of(snapshot))


def ram_mappings(config: Buffer) -> list[RamMapping]:
    """How a machine's RAM is made up, as its wire's Config tells; empty where it does not.

    Raises:
        DecodeError: It is not what it should be; says where.

    >>> ram_mappings(b'{"memory_manager_data": {"guest_ram_mappings": '
    ...     b'[{"slot": 0, "gpa": 0, "size": 4096, "zone_id": "mem0", "file_offset": 0}]}}')
    [RamMapping(slot=0, gpa=0, size_bytes=4096, file_offset=0)]
    """
    data = _object(parse_json(config, _CONFIG_FILE), _CONFIG_FILE).get(_MANAGER_DATA)
    return [] if data is None else _mappings(_object(data, _CONFIG_FILE), _CONFIG_FILE)


def _tree(config: bytes, state: Buffer) -> Snapshot:
    _object(parse_json(config, _CONFIG_FILE), _CONFIG_FILE)
    snapshot = decode_tree(state, _STATE_FILE, "today", NAME)
    snapshot.add_data_section(SnapshotDataSection(CONFIG, config))
    return snapshot


def _add_memory(snapshot: Snapshot, memory: Mapping[int, Buffer]) -> None:
    if not memory:
        return
    node = snapshot.snapshots.get(MEMORY)
    if node is None:
        node = Snapshot(MEMORY)
        snapshot.add_snapshot(node)
    elif REST not in node.snapshot_data:
        # The state has a node of this name too, which shall not be lost.
        rest = b"{}" if STATE in node.snapshot_data else b'{"snapshot_data":null}'
        node.add_data_section(SnapshotDataSection(REST, rest))
    for gpa, payload in memory.items():
        node.add_data_section(SnapshotDataSection(f"{gpa:#x}", payload))


def _memory_of(snapshot: Snapshot) -> dict[int, Buffer]:
    node = snapshot.snapshots.get(MEMORY)
    if node is None:
        return {}
    memory: dict[int, Buffer] = {}
    for id, section in node.snapshot_data.items():
        if _is_ram(id):
            memory[int(id, 16)] = section.snapshot
    ranges = [MemoryRange(gpa, raw_view(payload).nbytes) for gpa, payload in memory.items()]
    _check_apart(ranges, MEMORY, SnapshotError)
    return memory


def _state_of(snapshot: Snapshot) -> Snapshot:
    """The tree without what stands in other files than the state's."""
    root = copy(snapshot)
    del root.snapshot_data[CONFIG]
    node = root.snapshots.get(MEMORY)
    if node is not None:
        own = {id: section for id, section in node.snapshot_data.items() if not _is_ram(id)}
        if own or node.snapshots:
            root.snapshots[MEMORY] = Snapshot(MEMORY, node.snapshots, own)
        else:
            del root.snapshots[MEMORY]
    return root


def _is_ram(id: str) -> bool:
    return _RAM.fullmatch(id) is not None


def _check_config(snapshot: Snapshot) -> None:
    if CONFIG not in snapshot.snapshot_data:
        raise SnapshotError(
            f"the root has no section {CONFIG!r}: it is no snapshot of today's Cloud Hypervisor, "
            "and cannot be written as one; convert to another format"
        )


def _declared(snapshot: Snapshot, *, has_ram: bool) -> list[MemoryRange]:
    """The ranges of which the RAM's file is made, in their order there.

    They stand in the configuration as the wire has it, or in the state of the memory manager.
    Where both tell none, as in a live migration, the RAM is all that the machine has.
    """
    config = parse_json(snapshot.snapshot_data[CONFIG].snapshot, _CONFIG_FILE)
    data = _object(config, _CONFIG_FILE).get(_MANAGER_DATA)
    sources = [(_object(data, _CONFIG_FILE), _CONFIG_FILE)] if data is not None else []
    manager = snapshot.snapshots.get(_MANAGER)
    if manager is not None and STATE in manager.snapshot_data:
        where = f"{_STATE_FILE}, the state of {_MANAGER!r}"
        state = parse_json(manager.snapshot_data[STATE].snapshot, where)
        sources.append((_object(state, where), where))
    for data, where in sources:
        if ranges := _ranges(data, where):
            return ranges
    for data, where in sources if has_ram else []:
        if mappings := _mappings(data, where):
            ranges = [MemoryRange(mapping.gpa, mapping.size_bytes) for mapping in mappings]
            _check_apart(ranges, f"{where}: {_MAPPINGS}")
            return ranges
    return []


def _ranges(data: dict[str, Any], where: str) -> list[MemoryRange]:
    if "memory_ranges" not in data:
        return []
    where = f"{where}: memory_ranges"
    table = _object(data["memory_ranges"], where)
    ranges = []
    for i, item in enumerate(_list(table.get("data"), f"{where}.data")):
        place = f"{where}.data[{i}]"
        range = _object(item, place)
        ranges.append(_range(_u64(range, "gpa", place), _u64(range, "length", place), place))
    _check_apart(ranges, f"{where}.data")
    return ranges


def _mappings(data: dict[str, Any], where: str) -> list[RamMapping]:
    mappings = []
    for i, item in enumerate(_list(data.get(_MAPPINGS, []), f"{where}: {_MAPPINGS}")):
        place = f"{where}: {_MAPPINGS}[{i}]"
        found = _object(item, place)
        slot, gpa, size_bytes, offset = (
            _u64(found, key, place) for key in ("slot", "gpa", "size", "file_offset")
        )
        _range(gpa, size_bytes, place)
        mappings.append(RamMapping(slot, gpa, size_bytes, offset))
    return mappings


def _arranged(ranges: Iterable[MemoryRange], memory: Mapping[int, Buffer]) -> list[memoryview]:
    """The RAM in the order of the ranges, which may be cut elsewhere than it is."""
    starts = sorted(memory)
    views = []
    for range in ranges:
        at = range.gpa
        while at < range.end:
            start = starts[max(bisect_right(starts, at) - 1, 0)] if starts else at + 1
            view = raw_view(memory[start])[at - start :] if start <= at else memoryview(b"")
            if not view:
                raise SnapshotError(
                    f"the machine has memory from {range.gpa:#x} to {range.end:#x}, but there is "
                    f"no RAM at {at:#x} in the snapshot"
                )
            views.append(view[: range.end - at])
            at += len(views[-1])
    held_bytes = sum(raw_view(payload).nbytes for payload in memory.values())
    if sum(map(len, views)) != held_bytes:
        raise SnapshotError(
            f"the machine has {sum(map(len, views))} bytes of memory, but the snapshot has "
            f"{held_bytes} bytes of RAM; the others would be lost"
        )
    return views


def _check_apart(
    ranges: Iterable[MemoryRange], where: str, error: type[MigratableError] = DecodeError
) -> None:
    last = None
    for range in sorted(ranges):
        if last is not None and (range.gpa < last.end or range.gpa == last.gpa):
            raise error(
                f"{where}: the {range.length} bytes at {range.gpa:#x} overlap the "
                f"{last.length} bytes at {last.gpa:#x}"
            )
        last = range


def _range(gpa: int, length: int, where: str) -> MemoryRange:
    try:
        return MemoryRange(gpa, length)
    except MigratableError as error:
        raise DecodeError(error.cause, where=where) from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DecodeError("an object must stand here", where=where)
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DecodeError("a list must stand here", where=where)
    return value


def _u64(found: dict[str, Any], key: str, where: str) -> int:
    value = found.get(key)
    if type(value) is not int or not 0 <= value < _END:
        raise DecodeError(f"{key!r} must be an integer from 0 to 2^64-1", where=where)
    return value
