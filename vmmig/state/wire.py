"""The bytes of a state, and what they say of themselves without its class.

A section begins with ``vmst`` and the format's version, 1. Then comes one msgpack array: the
state's name, its version, who wrote it, a map of its fields, and a map of the subsections that
are there; a nested state is an array of its version and these two maps. Ints beyond 64 bits are
ext 1 (signed, little-endian); arrays ext 3 (dtype, shape and bytes, in msgpack). Bytes of 64 KiB
and more stand in a section of their own, named by the field's path, to which ext 2 refers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import msgpack

from vmmig.errors import DecodeError, MigratableError
from vmmig.snapshot import Buffer, Snapshot, raw_view
from vmmig.state.types import Misfit

MAGIC = b"vmst\x01"
_LARGE_BYTES = 1 << 16
_BIG_INT, _REFERENCE, _ARRAY = 1, 2, 3
_CHECK_BYTES = 1 << 9
_MAX_OF_ONE_HASH = 64

_Seen = dict[int, set[bytes]] | None


def pack_state(section: str, name: str, writer: str, body: Any) -> list[tuple[str, Buffer]]:
    """A state's version, fields and subsections as sections: their ids and payloads.

    >>> pack_state("state", "power", "acme", [1, {"is_off": False}, {}])
    [('state', b'vmst...power...acme...is_off...')]
    """
    version, fields, present = body
    large: dict[str, Buffer] = {}
    head = [name, version, writer, _detached(fields, "", large), _detached(present, "", large)]
    payload = MAGIC + cast(bytes, msgpack.packb(head, default=_unpackable))
    return [(section, payload), *((section + path, buffer) for path, buffer in large.items())]


def unpack_state(snapshot: Snapshot, section: str) -> list[Any]:
    """What `pack_state` packed: a state's version, fields and subsections, as they stand there.

    Raises:
        Misfit: There is no such state.

    >>> from vmmig.snapshot import SnapshotDataSection
    >>> snapshot = Snapshot("")
    >>> (packed,) = pack_state("state", "power", "acme", [1, {"is_off": False}, {}])
    >>> snapshot.add_data_section(SnapshotDataSection(*packed))
    >>> unpack_state(snapshot, "state")
    [1, {'is_off': False}, {}]
    """
    large = LargeSections(snapshot, section)
    _, version, _, fields, present = unpacked(snapshot.section(section).snapshot, large)
    return [version, fields, present]


class LargeSections:
    """The sections of large bytes that belong to a state; each is referred to once."""

    def __init__(self, snapshot: Snapshot, section: str) -> None:
        self._snapshot, self._section = snapshot, section
        self.unused = {id for id in snapshot.snapshot_data if belongs(id, section)}

    def __call__(self, path: str) -> memoryview:
        id = self._section + path
        if id not in self.unused:
            raise Misfit(f"it refers to the section {id!r}, which is not there or used twice")
        self.unused.discard(id)
        return raw_view(self._snapshot.snapshot_data[id].snapshot)


class Peeked(NamedTuple):
    """What a state's section says of itself, without its class.

    ``fields`` has the fields and, among them, the subsections that are there; plain values.
    """

    name: str
    version: int
    writer: str
    fields: dict[str, Any]


def peek(payload: Buffer) -> Peeked | None:
    """What a section holds, if it is a state; None if it is something else.

    Large bytes, which stand in sections of their own, are shown as ``-> section '...'``.

    Raises:
        DecodeError: It begins like a state and is damaged.

    >>> import attrs
    >>> from vmmig import save_state, versioned
    >>> @versioned("power", 1, writer="acme 2.3")
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> peek(save_state("power", Power()).section("state").snapshot)
    Peeked(name='power', version=1, writer='acme 2.3', fields={'is_off': False})
    """
    if bytes(raw_view(payload)[:4]) != MAGIC[:4]:
        return None
    try:
        name, version, writer, fields, present = unpacked(
            payload, lambda path: f"-> section ...{path}", lenient=True
        )
        if type(fields) is not dict or type(present) is not dict:
            raise Misfit("it has no map of fields")
        return Peeked(name, version, writer, _without_versions({**fields, **present}))
    except (Misfit, RecursionError) as error:
        raise DecodeError(f"it begins like a state, but: {error}") from error


def _without_versions(value: Any) -> Any:
    """The same, with nested states, which are version, fields and subsections, as maps."""
    if type(value) is list and [*map(type, value)] == [int, dict, dict]:
        value = value[1] | value[2]
    if type(value) is dict:
        return {key: _without_versions(each) for key, each in value.items()}
    return [*map(_without_versions, value)] if type(value) is list else value


def belongs(id: str, section: str) -> bool:
    return id.startswith(section) and id[len(section) : len(section) + 1] in (".", "[")


def _unpackable(value: Any) -> msgpack.ExtType:
    if type(value) is not int:
        raise TypeError(f"{type(value).__name__} has no form on the wire")
    return msgpack.ExtType(_BIG_INT, _int_bytes(value))


def _int_bytes(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)


def _detached(value: Any, path: str, large: dict[str, Buffer]) -> Any:
    """The same with what is large replaced by references, and arrays by their parts."""
    if isinstance(value, dict):
        named = {
            k: f".{k}" if isinstance(k, str) and k.isidentifier() else f"[{k!r}]" for k in value
        }
        return {k: _detached(item, path + named[k], large) for k, item in value.items()}
    if isinstance(value, list):
        return [_detached(item, f"{path}[{i}]", large) for i, item in enumerate(value)]
    if isinstance(value, bytes | memoryview):
        if len(value) < _LARGE_BYTES:
            return value
        is_value = isinstance(value, bytes) or value.readonly
        large[path] = value if is_value else bytes(value)
        return msgpack.ExtType(_REFERENCE, path.encode())
    if type(value).__module__ == "numpy":
        data = memoryview(value).cast("B") if value.nbytes else memoryview(b"")
        parts = [value.dtype.str, [*value.shape], _detached(data, path, large)]
        return msgpack.ExtType(_ARRAY, msgpack.packb(parts))
    return value


def unpacked(
    payload: Buffer, large: Callable[[str], Any] | None, *, lenient: bool = False
) -> list[Any]:
    view = payload if type(payload) is bytes and len(payload) <= _CHECK_BYTES else raw_view(payload)
    if view[:5] != MAGIC:
        if view[:4] == MAGIC[:4]:
            raise Misfit(
                "it is written in a newer format than this vmmig can read; one that can is needed"
            )
        raise Misfit("it is no state: it does not begin like one")
    is_small = len(view) <= _CHECK_BYTES and large is None and not lenient
    hook = _PLAIN if is_small else partial(_extension, large, lenient, {})
    found = _unpack(view[5:], hook)
    if type(found) is not list or len(found) != 5:
        raise Misfit("it is no array of a name, a version, a writer, fields and subsections")
    if type(found[0]) is not str or type(found[1]) is not int or type(found[2]) is not str:
        raise Misfit("its name, version or writer is of a wrong type")
    return found


def _extension(
    large: Callable[[str], Any] | None, lenient: bool, seen: _Seen, code: int, data: bytes
) -> Any:
    if code == _BIG_INT:
        value = int.from_bytes(data, "little", signed=True)
        if -(1 << 63) <= value < 1 << 64 or _int_bytes(value) != data:
            raise Misfit("a big int is not written as it should be")
        if seen is not None:
            # As keys of a map, many of one hash take quadratic time.
            same = seen.setdefault(hash(value), set())
            same.add(data)
            if len(same) > _MAX_OF_ONE_HASH:
                raise Misfit("it has too many big ints that Python's hash takes for the same")
        return value
    if code == _REFERENCE:
        path = data.decode()
        if large is None:
            raise Misfit(f"it refers to a section {path!r}, and none of its fields can be in one")
        return large(path)
    if code == _ARRAY:
        # No array is in an array: msgpack's C code would recurse for it as deep as one likes.
        return _array(_unpack(memoryview(data), partial(_in_array, large, lenient, seen)), lenient)
    raise Misfit(f"it has an extension {code}, which is not known here")


def _in_array(
    large: Callable[[str], Any] | None, lenient: bool, seen: _Seen, code: int, data: bytes
) -> Any:
    if code != _REFERENCE:
        raise Misfit("an array is not written as it should be")
    return _extension(large, lenient, seen, code, data)


_PLAIN = partial(_extension, None, False, None)


def _unpack(view: bytes | memoryview, extension: Callable[[int, bytes], Any]) -> Any:
    try:
        if len(view) > _CHECK_BYTES:
            # msgpack makes room for what a header promises before it looks for it, at every
            # level of nesting; skipping makes none, and fails where something is missing.
            checker = msgpack.Unpacker(max_buffer_size=len(view))
            checker.feed(view)
            checker.skip()
            del checker
        return msgpack.unpackb(view, strict_map_key=False, ext_hook=extension)
    except (Misfit, MigratableError, RecursionError):
        raise
    except Exception as error:
        what = str(error) or type(error).__name__
        raise Misfit(f"it is damaged: {what}") from error


def _array(parts: Any, lenient: bool) -> Any:
    if type(parts) is not list or len(parts) != 3:
        raise Misfit("an array is not written as it should be")
    dtype, shape, data = parts
    if type(dtype) is not str or type(shape) is not list or {*map(type, shape)} - {int}:
        raise Misfit("an array is not written as it should be")
    if lenient:
        return {"dtype": dtype, "shape": shape, "bytes": data}
    import numpy

    if type(data) is not bytes and type(data) is not memoryview:
        raise Misfit("an array is not written as it should be")
    try:
        kind = numpy.dtype(dtype)
        if kind.kind not in "biufc" or kind.str != dtype or min(shape, default=0) < 0:
            raise Misfit(f"there is no array of {dtype[:20]!r}")
        array = numpy.frombuffer(data, kind) if len(data) else numpy.empty(0, kind)
        if len(data) % kind.itemsize:
            raise ValueError("its bytes are no whole number of items")
        array = array.reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise Misfit(f"an array of shape {shape} cannot be made: {error}") from error
    array.flags.writeable = False
    return array
