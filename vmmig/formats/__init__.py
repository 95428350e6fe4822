"""Snapshots in files of several formats, and what is in their sections.

Each format is a module, or an object in one, that is loaded when it is first used: the container
of `vmmig.codec`, plain msgpack, the JSON of Cloud Hypervisor's ``vm-migration`` crate, QEMU's
migration streams, and Cloud Hypervisor's snapshot folders. See `Format` for what it offers.

Some sections can be decoded, each by a module that knows their kind: see `decode`.
"""

from __future__ import annotations

import importlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import attrs

from vmmig.errors import DecodeError, MigratableError, RestoreError
from vmmig.snapshot import Snapshot, raw_view
from vmmig.state.fields import set_at, with_field
from vmmig.state.wire import MAGIC as STATE_MAGIC
from vmmig.state.wire import peek

_FORMATS = {
    "vmmig": "vmmig.formats.container",
    "qemu": "vmmig.formats.qemu",
    "cloud-hypervisor": "vmmig.formats.cloud_hypervisor",
    "cloud-hypervisor-2020": "vmmig.formats.cloud_hypervisor:FOLDER_2020",
    "json": "vmmig.formats.cloud_hypervisor:SEED_JSON",
    "msgpack": "vmmig.formats.msgpack_tree",
}
"""Module, and after a colon the object in it; the order is that in which they sniff."""

_SUFFIXES = {".vmsnap": "vmmig", ".json": "json", ".msgpack": "msgpack", ".qemu": "qemu"}

_DECODERS = {"qemu": "vmmig.formats.qemu"}
"""For the id of a root, a module whose function `decode` knows what is below it."""

_MAX_DECODED_BYTES = 1 << 24


class Format(Protocol):
    """What reads and writes the files, or folders, of one format."""

    def sniff(self, path: Path, /) -> bool:
        """Whether what stands at ``path`` is of this format; cheap, and raises nothing."""
        ...

    def read(self, path: Path, /) -> Snapshot:
        """The snapshot at ``path``; large sections are mapped, where that is possible.

        Raises:
            MigratableError: There is no whole, undamaged snapshot of this format.
        """
        ...

    def write(self, snapshot: Snapshot, path: Path, /) -> None:
        """Write a snapshot, atomically and durably.

        Raises:
            MigratableError: It was not written, and what was there before still is; or this
                format cannot hold it.
        """
        ...


@attrs.frozen
class Decoded:
    """A section's content, as whoever knows its kind understands it.

    Attributes:
        kind: What it is: the name of a component's state, of a device, or ``json``.
        version: The version of its layout, where it says one.
        writer: Who wrote it, where it says so.
        fields: Its fields by name, each an int, float, str, bool, None, bytes, list or dict.

    >>> Decoded("timer", 2, "vmmig 0.1.0", {"ticks": 4})
    Decoded(kind='timer', version=2, writer='vmmig 0.1.0', fields={'ticks': 4})
    """

    kind: str
    version: int | None
    writer: str | None
    fields: Mapping[str, object]


def names() -> tuple[str, ...]:
    """The names of all formats.

    >>> "vmmig" in names()
    True
    """
    return tuple(_FORMATS)


def get(name: str) -> Format:
    """The format of a name.

    Raises:
        MigratableError: There is none.

    >>> get("zip")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: there is no format 'zip', only 'vmmig', ...
    """
    found = _loaded(_FORMATS[name]) if name in _FORMATS else None
    if found is None:
        known = ", ".join(map(repr, _FORMATS))
        raise MigratableError(f"there is no format {name!r}, only {known}")
    return cast(Format, found)


def sniff(path: str | os.PathLike[str]) -> str:
    """The name of the format in which the file, or folder, at ``path`` is.

    Raises:
        DecodeError: It is of none, or cannot be read.

    >>> folder = getfixture("tmp_path")
    >>> write(Snapshot("vm"), folder / "vm", "json")
    >>> sniff(folder / "vm")
    'json'
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise DecodeError(f"{str(path)!r}: {error}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DecodeError(f"{str(path)!r}: it is a device, a pipe or a socket; name a file")
    for name, format in _each(_FORMATS.items()):
        if format.sniff(path):
            return name
    known = ", ".join(_FORMATS)
    raise DecodeError(f"{str(path)!r}: it is of no format that is known here ({known})")


def of_suffix(path: str | os.PathLike[str]) -> str | None:
    """The name of the format that the end of a path's name stands for.

    >>> of_suffix("vm.vmsnap"), of_suffix("vm")
    ('vmmig', None)
    """
    return _SUFFIXES.get(Path(path).suffix.lower())


def read(path: str | os.PathLike[str], format: str | None = None) -> Snapshot:
    """The snapshot at ``path``.

    Args:
        path: A file, or a folder.
        format: The format's name; None for what `sniff` finds.

    Raises:
        MigratableError: There is no whole, undamaged snapshot.

    >>> folder = getfixture("tmp_path")
    >>> write(Snapshot("vm"), folder / "vm.msgpack", "msgpack")
    >>> read(folder / "vm.msgpack")
    Snapshot('vm')
    """
    return get(format or sniff(path)).read(Path(path))


def write(snapshot: Snapshot, path: str | os.PathLike[str], format: str) -> None:
    """Write a snapshot, atomically and durably.

    Raises:
        MigratableError: It was not written; what was there before still is.

    >>> write(Snapshot("vm"), "no-such-folder/vm", "json")
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...
    """
    get(format).write(snapshot, Path(path))


def decode(root: Snapshot, path: Iterable[str], section_id: str) -> Decoded | None:
    """A section's fields; None where nobody knows its kind.

    Typed states (`vmmig.state`), what a format's module knows of its own trees, and JSON are
    decoded; only sections of up to 16 MiB are looked at.

    Args:
        root: The whole snapshot.
        path: The ids from below the root down to the node.
        section_id: Which section of that node.

    Raises:
        MigratableError: Somebody knows its kind, but it is not as it should be.
        RestoreError: There is no such section.

    >>> from vmmig import SnapshotDataSection
    >>> vm = Snapshot("vm")
    >>> vm.add_data_section(SnapshotDataSection("config", b'{"cpus": 2}'))
    >>> decode(vm, (), "config")
    Decoded(kind='json', version=None, writer=None, fields={'cpus': 2})
    """
    path = tuple(path)
    section = root.find(path).section(section_id)
    if section.nbytes > _MAX_DECODED_BYTES:
        return None
    head = bytes(raw_view(section.snapshot)[:16])
    try:
        if head.startswith(STATE_MAGIC):
            state = peek(section.snapshot)
            return None if state is None else Decoded(*state)
        for root_id, module in _DECODERS.items():
            found = _loaded(module) if root.id == root_id else None
            decoded = found and found.decode(root, path, section_id)
            if decoded is not None:
                return cast(Decoded, decoded)
    except MigratableError:
        raise
    except Exception as error:
        raise DecodeError(error) from error
    if head.lstrip()[:1] in (b"{", b"["):
        return _decode_json(bytes(raw_view(section.snapshot)))
    return None


def set_field(
    root: Snapshot, path: Iterable[str], section_id: str, field: str, value: object
) -> bytes:
    """A section's bytes with one of its decoded fields set.

    Args:
        root: The whole snapshot.
        path: The ids from below the root down to the node.
        section_id: Which section of that node; what it holds must be a typed state or JSON.
        field: An innermost field, as `leaves` names it.
        value: Its new value, of the same type as the old one.

    Raises:
        RestoreError: It has no such field, or not of this type, or cannot be changed.

    >>> from vmmig import SnapshotDataSection
    >>> vm = Snapshot("vm", {}, {"config": SnapshotDataSection("config", b'{"cpus": {"max": 2}}')})
    >>> set_field(vm, (), "config", "cpus.max", 4)
    b'{"cpus": {"max": 4}}'
    """
    path = tuple(path)
    decoded = decode(root, path, section_id)
    where = repr(section_id)
    if decoded is None:
        raise RestoreError(f"section {where} cannot be decoded; replace it as a whole")
    steps = next((found for name, found, _ in _walk(decoded.fields) if name == field), None)
    if steps is None:
        known = ", ".join(name for name, _, _ in islice(_walk(decoded.fields), 8))
        raise RestoreError(f"section {where} has no field {field!r} (it has {known}, ...)")
    payload = root.find(path).section(section_id).snapshot
    if bytes(raw_view(payload)[: len(STATE_MAGIC)]) == STATE_MAGIC:
        return with_field(payload, steps, value)
    if decoded.kind != "json":
        raise RestoreError(f"fields of a {decoded.kind!r} cannot be set; replace it as a whole")
    fields = {"": tree} if type(tree := json.loads(bytes(raw_view(payload)))) is list else tree
    set_at(fields, steps, value)
    return json.dumps(tree, ensure_ascii=False).encode()


def leaves(fields: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The innermost values of decoded fields, each with its path.

    >>> dict(leaves({"regs": {"rip": 16}, "queues": [1, 2], "irqs": []}))
    {'regs.rip': 16, 'queues[0]': 1, 'queues[1]': 2, 'irqs': []}
    """
    for name, _, value in _walk(fields):
        yield name, value


def _walk(fields: Mapping[str, object]) -> Iterator[tuple[str, tuple[str | int, ...], object]]:
    stack: list[tuple[str, tuple[Any, ...], object]] = [("", (), fields)]
    while stack:
        name, steps, value = stack.pop()
        below: list[tuple[str, tuple[Any, ...], object]] = []
        if isinstance(value, Mapping):
            dot = "." if name else ""
            below = [(f"{name}{dot}{key}", (*steps, key), each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            below = [(f"{name}[{i}]", (*steps, i), each) for i, each in enumerate(value)]
        if below:
            stack += reversed(below)
        elif steps:
            yield name, steps, value


def _decode_json(data: bytes) -> Decoded | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return Decoded("json", None, None, value if isinstance(value, dict) else {"": value})


def _each(table: Iterable[tuple[str, str]]) -> Iterator[tuple[str, Format]]:
    for name, place in table:
        found = _loaded(place)
        if found is not None:
            yield name, found


def _loaded(place: str) -> Any:
    """The module or the object in it; None where vmmig has no such module."""
    module, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
    return getattr(found, attribute, None) if attribute else found
