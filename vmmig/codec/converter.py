"""Snapshots by way of cattrs, for formats other than the container."""

from __future__ import annotations

from typing import Any

from cattrs import Converter

from vmmig.errors import DecodeError
from vmmig.snapshot import (
    Buffer,
    Columns,
    Snapshot,
    SnapshotDataSection,
    build,
    flatten,
    raw_view,
)


def make_converter() -> Converter:
    """A `cattrs.Converter` that knows snapshots; see `configure_converter`.

    >>> make_converter().unstructure(SnapshotDataSection("regs", b"x"))
    {'id': 'regs', 'snapshot': b'x'}
    """
    converter = Converter()
    configure_converter(converter)
    return converter


def configure_converter(converter: Converter) -> None:
    """Teach a cattrs converter snapshots, for attrs classes of one's own that hold them.

    A `Snapshot` becomes a dict of its `vmmig.snapshot.Columns`, at any depth, and a
    `SnapshotDataSection` a dict of its two fields. Payloads become bytes, by the converter's own
    hook for bytes where the format needs one. Nothing is coerced on the way back: what has
    another type than it should is refused with a `DecodeError`.

    >>> import attrs
    >>> @attrs.define
    ... class SaveGame:
    ...     name: str
    ...     machine: Snapshot
    >>> from cattrs.preconf.msgpack import make_converter
    >>> converter = make_converter()
    >>> configure_converter(converter)
    >>> data = converter.dumps(SaveGame("level 3", Snapshot("vm")))
    >>> converter.loads(data, SaveGame)
    SaveGame(name='level 3', machine=Snapshot('vm'))
    """

    def payload_out(payload: Buffer) -> Any:
        return converter.unstructure(bytes(raw_view(payload)), bytes)

    def payload_in(data: Any, where: str) -> Any:
        if isinstance(data, (bytes, bytearray, memoryview)):
            return data
        if not isinstance(data, str):
            raise DecodeError(f"bytes are needed, not {type(data).__name__}", where=where)
        try:
            return converter.structure(data, bytes)
        except Exception as error:
            raise DecodeError(error, where=where) from error

    def snapshot_out(snapshot: Snapshot) -> dict[str, Any]:
        columns = flatten(snapshot)
        return columns._replace(payloads=[*map(payload_out, columns.payloads)])._asdict()

    def snapshot_in(data: Any, _: Any) -> Snapshot:
        fields = _fields(data, Columns._fields)
        for name, kind in zip(Columns._fields, (str, int, int, str, None), strict=True):
            _check_types(fields[name], kind, name)
        payloads = [payload_in(p, f"payloads[{i}]") for i, p in enumerate(fields["payloads"])]
        counts = fields["children"] + fields["sections"]
        if counts and min(counts) < 0:
            raise DecodeError("a node cannot have fewer than no children", where="index")
        ids, children, sections, section_ids = (fields[name] for name in Columns._fields[:4])
        return build(ids, children, sections, section_ids, payloads)

    def section_out(section: SnapshotDataSection) -> dict[str, Any]:
        return {"id": section.id, "snapshot": payload_out(section.snapshot)}

    def section_in(data: Any, _: Any) -> SnapshotDataSection:
        fields = _fields(data, ("id", "snapshot"))
        _check_types([fields["id"]], str, "id")
        return SnapshotDataSection(fields["id"], payload_in(fields["snapshot"], "snapshot"))

    converter.register_unstructure_hook(Snapshot, snapshot_out)
    converter.register_structure_hook(Snapshot, snapshot_in)
    converter.register_unstructure_hook(SnapshotDataSection, section_out)
    converter.register_structure_hook(SnapshotDataSection, section_in)


def _check_types(values: Any, kind: type | None, where: str) -> None:
    if not isinstance(values, list):
        raise DecodeError(f"a list is needed, not {type(values).__name__}", where=where)
    if kind is not None and not {*map(type, values)} <= {kind}:
        wrong = next(value for value in values if type(value) is not kind)
        raise DecodeError(
            f"each must be {kind.__name__}, but one is {type(wrong).__name__}", where=where
        )


def _fields(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or data.keys() != set(names):
        raise DecodeError(f"a dict of {', '.join(names)} is needed, not {type(data).__name__}")
    return data
