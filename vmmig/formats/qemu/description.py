"""The stream's description of its devices (``vmdesc``): how long their states are, what is in them.

It is JSON that QEMU writes while it writes the states: for each device its fields in order, with
a type and a size each. It is not part of what QEMU reads again, and not always true: arrays of
which the elements differ in length are described by their first one. So nothing relies on it
that is not checked.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from vmmig.errors import DecodeError
from vmmig.formats.qemu import virtio

MAX_BYTES = 1 << 26

_MAX_LENGTH = 1 << 40
_MAX_STEPS = 1_000_000
_SUBSECTION = 5


class _UnfitError(Exception):
    """A description does not describe, or not these bytes."""


def parse(data: bytes, where: str) -> dict[str, Any]:
    """The description.

    Raises:
        DecodeError: It is none.

    >>> parse(b'{"page_size": 4096, "devices": []}', "here")
    {'page_size': 4096, 'devices': []}
    """
    try:
        value = json.loads(data)
        devices = value.get("devices", [])
        if isinstance(value, dict) and all(isinstance(device, dict) for device in devices):
            return value
        cause: object = "it has no list of devices"
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        cause = error
    raise DecodeError(f"the description of the devices is damaged: {cause}", where=where)


def devices(description: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """The devices by their names and instances; the first where there are several.

    >>> [*devices({"devices": [{"name": "timer", "instance_id": 0}]})]
    [('timer', 0)]
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for device in description.get("devices", []):
        name, instance = device.get("name"), device.get("instance_id", 0)
        if isinstance(name, str) and isinstance(instance, int):
            found.setdefault((name, instance & 0xFFFFFFFF), device)
    return found


def length_of(device: dict[str, Any]) -> int | None:
    """How many bytes a device's state has by its description; None where that does not say.

    >>> length_of({"fields": [{"name": "regs", "type": "uint64", "size": 8, "array_len": 2}]})
    16
    """
    try:
        return _length(device)
    except (_UnfitError, RecursionError):
        return None


def _length(described: dict[str, Any]) -> int:
    total = 0
    for field in _dicts(described, "fields"):
        total += _size(field) * _count(field)
    for subsection in _dicts(described, "subsections"):
        total += len(_head(subsection)) + _length(subsection)
    if total > _MAX_LENGTH:
        raise _UnfitError
    return total


def decode(device: dict[str, Any], state: bytes) -> dict[str, object]:
    """A device's fields by name: numbers, texts, bytes, and lists and dicts of them.

    Subsections are dicts under their names. What the description does not describe is there as
    it is, as ``undescribed``.

    >>> regs = {"name": "regs", "type": "uint16", "size": 2, "array_len": 2}
    >>> decode({"fields": [regs]}, bytes.fromhex("0001 0002"))
    {'regs': [1, 2]}
    """
    return _Decoding(state, str(device.get("name"))).device(device)


class _Decoding:
    def __init__(self, state: bytes, name: str) -> None:
        self._state = state
        self._name = name
        self._steps = _MAX_STEPS

    def device(self, described: dict[str, Any]) -> dict[str, object]:
        fields: dict[str, object] = {}
        at = 0
        try:
            at = self._fields(described, 0, len(self._state), fields, top=True)
        except (_UnfitError, RecursionError):
            at = self._reached
        if at < len(self._state):
            fields["undescribed"] = self._state[at:]
        return fields

    _reached = 0

    def _fields(
        self,
        described: dict[str, Any],
        at: int,
        end: int,
        into: dict[str, object],
        top: bool = False,
    ) -> int:
        for field in _dicts(described, "fields"):
            size, count = _size(field), _count(field)
            self._steps -= 1
            if at + size * count > end:
                raise _UnfitError
            name = str(field.get("name", ""))
            if "index" in field:
                elements = into.setdefault(name, [])
                if not isinstance(elements, list):
                    raise _UnfitError
                elements.append(self._value(field, at, size))
            else:
                while name in into:
                    name += "'"
                if "array_len" not in field:
                    into[name] = self._value(field, at, size)
                elif size == 1 and field.get("type") == "uint8":
                    into[name] = list(self._state[at : at + count])
                elif size:
                    into[name] = [
                        self._value(field, start, size)
                        for start in range(at, at + size * count, size)
                    ]
                else:
                    into[name] = []
            at += size * count
            if top:
                self._reached = at
        for subsection in _dicts(described, "subsections"):
            head = _head(subsection)
            if self._state[at : at + len(head)] != head:
                raise _UnfitError
            fields: dict[str, object] = {}
            at = self._fields(subsection, at + len(head), end, fields)
            into[str(subsection["vmsd_name"])] = fields
            if top:
                self._reached = at
        return at

    def _value(self, field: dict[str, Any], at: int, size: int) -> object:
        self._steps -= 1
        if self._steps < 0:
            raise _UnfitError
        data = self._state[at : at + size]
        described = field.get("struct", field if "fields" in field else None)
        if isinstance(described, dict):
            fields: dict[str, object] = {}
            try:
                if self._fields(described, at, at + size, fields) == at + size:
                    return fields
            except _UnfitError:
                pass
            return data
        type, _, _ = str(field.get("type", "")).partition(" ")
        if type == "virtio":
            return virtio.decode(data, mmio=self._name.startswith("virtio-mmio@")) or data
        if type == "bool" and size == 1:
            return data != b"\0"
        if type in _UNSIGNED and size <= 8:
            return int.from_bytes(data, "big")
        if type in _SIGNED and size <= 8:
            return int.from_bytes(data, "big", signed=True)
        return data


_UNSIGNED = frozenset({"uint8", "uint16", "uint32", "uint64"})
_SIGNED = frozenset({"int8", "int16", "int32", "int64", "timer"})


def _dicts(described: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = described.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise _UnfitError
    return found


def _size(field: dict[str, Any]) -> int:
    return _whole(field.get("size"))


def _count(field: dict[str, Any]) -> int:
    return _whole(field.get("array_len", 1))


def _whole(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= _MAX_LENGTH:
        raise _UnfitError
    return value


def _head(subsection: dict[str, Any]) -> bytes:
    """What stands before a subsection's fields."""
    name, version = subsection.get("vmsd_name"), subsection.get("version")
    try:
        text = str(name).encode("ascii")
        return bytes((_SUBSECTION, len(text))) + text + _whole(version).to_bytes(4, "big")
    except (ValueError, OverflowError) as error:
        raise _UnfitError from error


@lru_cache(maxsize=2)
def known(data: bytes) -> dict[tuple[str, int], dict[str, Any]]:
    """The devices of a description that was parsed before; to be left as they are.

    >>> known(b'{"devices": []}')
    {}
    """
    return devices(parse(data, "$.snapshot_data['vmdesc']"))
