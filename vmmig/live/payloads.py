"""What Config and State carry: JSON, in the form that Cloud Hypervisor v53 gives it.

A `Snapshot` whose nodes have one section each, named ``state``, with a text in it, becomes the
peer's tree: ``{"snapshots": {id: ...}, "snapshot_data": {"state": "<text>"}}``. That is what
comes from a Cloud Hypervisor. Every other one goes whole, as the base64 of its container, into the
root's text: ``{"vmmig_snapshot": "<base64>"}``; so nothing is lost, at any depth.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import attrs

from vmmig import codec
from vmmig.errors import DecodeError, MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRange
from vmmig.snapshot import Snapshot, SnapshotDataSection

_ROOT_ID = "vm"
_SECTION_ID = "state"
_EMBEDDED = "vmmig_snapshot"
_PEER_DEPTH = 64


@attrs.frozen
class RamMapping:
    """Where a part of guest RAM is, and which descriptor has it.

    >>> RamMapping(0, MemoryRange(0, 1 << 20)).file_offset
    0
    """

    slot: int
    range: MemoryRange
    file_offset: int = 0


@attrs.frozen
class MachineConfig:
    """What a destination is told before the memory comes.

    Attributes:
        configuration: What the source says of the machine: any JSON value.
        mappings: Its RAM, by slot.

    >>> memory = GuestMemory([MemoryRange(0, 1 << 20)])
    >>> MachineConfig.of(memory, {"cpus": 1}).mappings[0].range.length
    1048576
    """

    configuration: Any
    mappings: tuple[RamMapping, ...]

    @classmethod
    def of(cls, memory: GuestMemory, configuration: object) -> MachineConfig:
        """The configuration of a machine with this memory; a slot is a region's number."""
        regions = enumerate(memory.regions)
        return cls(configuration, tuple(RamMapping(slot, r.range) for slot, r in regions))

    def to_json(self) -> bytes:
        """The payload of Config.

        Raises:
            MigrateSendError: The configuration is no JSON value.

        >>> MachineConfig(None, ()).to_json()[:18]
        b'{"vm_config":null,'
        """
        value = {
            "vm_config": self.configuration,
            "common_cpuid": [],
            "memory_manager_data": {
                "memory_ranges": {
                    "data": [
                        {"gpa": each.range.gpa, "length": each.range.length}
                        for each in self.mappings
                    ]
                },
                "guest_ram_mappings": [
                    {
                        "slot": each.slot,
                        "gpa": each.range.gpa,
                        "size": each.range.length,
                        "zone_id": "mem0",
                        "virtio_mem": False,
                        "file_offset": each.file_offset,
                    }
                    for each in self.mappings
                ],
            },
        }
        try:
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise MigrateSendError(
                f"the machine's configuration cannot be sent, for it is not JSON: {error}"
            ) from error

    @classmethod
    def from_json(cls, data: bytes) -> MachineConfig:
        """The reverse of `to_json`; what else is in it is not looked at.

        Raises:
            MigrateReceiveError: It is not such a payload.

        >>> memory = GuestMemory([MemoryRange(0, 1 << 20)])
        >>> config = MachineConfig.of(memory, {"cpus": 1})
        >>> MachineConfig.from_json(config.to_json()) == config
        True
        """
        value = _object(_parsed(data, "Config"), "Config")
        manager = _object(value.get("memory_manager_data"), "Config.memory_manager_data")
        listed = manager.get("guest_ram_mappings")
        if listed:
            entries = _list(listed, "Config.memory_manager_data.guest_ram_mappings")
            size = "size"
        else:
            ranges = _object(manager.get("memory_ranges"), "Config...memory_ranges")
            entries = _list(ranges.get("data"), "Config...memory_ranges.data")
            size = "length"
        mappings = tuple(_mapping(entry, i, size) for i, entry in enumerate(entries))
        return cls(value.get("vm_config"), mappings)


def state_to_json(snapshot: Snapshot) -> bytes:
    """The payload of State.

    Raises:
        MigratableError: The tree is not valid.

    >>> state_to_json(Snapshot("vm"))
    b'{"snapshots":{},"snapshot_data":null}'
    """
    value = _peer_node(snapshot, 0) if snapshot.id == _ROOT_ID else None
    if value is None:
        text = base64.b64encode(codec.dumps(snapshot)).decode()
        embedded = json.dumps({_EMBEDDED: text})
        value = {"snapshots": {}, "snapshot_data": {"state": embedded}}
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def state_from_json(data: bytes) -> Snapshot:
    """The reverse of `state_to_json`.

    Raises:
        MigrateReceiveError: It is not such a payload.

    >>> snapshot = Snapshot("console")
    >>> snapshot.add_data_section(SnapshotDataSection("screen", bytes(range(256))))
    >>> state_from_json(state_to_json(snapshot)) == snapshot
    True
    """
    root = _object(_parsed(data, "State"), "State")
    text = _state_text(root, "State")
    if text is not None and _EMBEDDED in text[:64]:
        embedded = _parsed(text, "State's text")
        if isinstance(embedded, dict) and embedded.keys() == {_EMBEDDED}:
            try:
                return codec.loads(base64.b64decode(embedded[_EMBEDDED], validate=True))
            except (DecodeError, TypeError, ValueError) as error:
                raise MigrateReceiveError(f"State's snapshot is not valid: {error}") from error
    snapshot = Snapshot(_ROOT_ID)
    pending = [(root, snapshot, "State")]
    while pending:
        node, into, where = pending.pop()
        text = _state_text(node, where)
        if text is not None:
            into.add_data_section(SnapshotDataSection(_SECTION_ID, text.encode()))
        for id, child in _object(node.get("snapshots", {}), f"{where}.snapshots").items():
            place = f"{where}.snapshots[{id!r}]"
            inner = Snapshot(id)
            into.add_snapshot(inner)
            pending.append((_object(child, place), inner, place))
    return snapshot


def warm_up() -> None:
    """Make what the first state needs, before a machine is paused for it: a millisecond or two.

    >>> warm_up()
    """
    state_from_json(state_to_json(Snapshot("")))


def _peer_node(snapshot: Snapshot, depth: int) -> dict[str, Any] | None:
    """The node as the peer has it; None where that would lose something."""
    data = None
    if snapshot.snapshot_data:
        if snapshot.snapshot_data.keys() != {_SECTION_ID}:
            return None
        payload = snapshot.snapshot_data[_SECTION_ID].snapshot
        try:
            text = bytes(payload).decode()
        except UnicodeDecodeError:
            return None
        if _EMBEDDED in text[:64]:
            return None
        data = {"state": text}
    if depth > _PEER_DEPTH:
        return None
    children: dict[str, Any] = {}
    for id, child in sorted(snapshot.snapshots.items()):
        node = _peer_node(child, depth + 1)
        if node is None or child.id != id:
            return None
        children[id] = node
    return {"snapshots": children, "snapshot_data": data}


def _state_text(node: Mapping[str, Any], where: str) -> str | None:
    data = node.get("snapshot_data")
    if data is None:
        return None
    text = _object(data, f"{where}.snapshot_data").get("state")
    if not isinstance(text, str):
        raise MigrateReceiveError(
            f"{where}.snapshot_data.state is a text, not {type(text).__name__}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MigrateReceiveError(
            f"{where}.snapshot_data.state is not valid Unicode: {error}"
        ) from error
    return text


def _mapping(entry: object, index: int, size: str) -> RamMapping:
    where = f"the RAM mapping {index} of Config"
    fields = _object(entry, where)
    numbers = [fields.get("slot", index), fields.get("gpa"), fields.get(size)]
    numbers.append(fields.get("file_offset", 0))
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << 64:
            raise MigrateReceiveError(f"{where} has {number!r} where a u64 is needed")
    slot, gpa, length, file_offset = numbers
    try:
        return RamMapping(slot, MemoryRange(gpa, length), file_offset)
    except MigratableError as error:
        raise MigrateReceiveError(f"{where}: {error}") from error


def _parsed(data: bytes | str, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MigrateReceiveError(f"{what} is not JSON: {error}") from error


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MigrateReceiveError(f"{where} is a JSON object, not {type(value).__name__}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise MigrateReceiveError(f"{where} is a JSON array, not {type(value).__name__}")
    return value
