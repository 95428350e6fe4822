"""What changed between the versions of a state: declared, never guessed."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, Protocol

import attrs

from vmmig.state.types import Json, shown

_NOTHING: Any = type("_Nothing", (), {"__repr__": lambda self: "none"})()
Fields = dict[str, Any]


class LostError(Exception):
    """An older version has no place for what a state holds."""


class Change(Protocol):
    """What one version changed of the one before it.

    Both functions work on the fields as they stand on the wire: enums are their values, sets,
    tuples and lists are lists, attrs classes are dicts, states are lists of a version, a dict of
    fields and a dict of subsections. The subsections that are there stand among the fields. They
    may change the dict in place.
    """

    def upgrade(self, fields: Fields) -> Fields:
        """The fields of the version before as this version has them."""
        ...

    def downgrade(self, fields: Fields) -> Fields:
        """This version's fields as the version before had them.

        Raises:
            LostError: That version has no place for what they hold.
        """
        ...

    @property
    def goes_back(self) -> bool:
        """Whether there is a way back."""
        ...

    def describe(self) -> Json:
        """The change as a schema has it."""
        ...


def _on_the_wire(value: Any) -> Any:
    """A default as fields stand on the wire."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(map(_on_the_wire, value), key=lambda item: (type(item).__name__, item))
    if isinstance(value, list | tuple):
        return [*map(_on_the_wire, value)]
    if isinstance(value, dict):
        return {_on_the_wire(key): _on_the_wire(item) for key, item in value.items()}
    return value


@attrs.frozen
class Added:
    """A field is new; states of older versions get ``default``.

    Back to the version before goes only a state in which the field still is ``default``.

    >>> Added("scr", 0).upgrade({"lcr": 3})
    {'lcr': 3, 'scr': 0}
    """

    name: str
    default: Any = attrs.field(converter=_on_the_wire)
    goes_back = True

    def upgrade(self, fields: Fields) -> Fields:
        _refuse_present(fields, self.name)
        return {**fields, self.name: deepcopy(self.default)}

    def downgrade(self, fields: Fields) -> Fields:
        value = fields.pop(self.name)
        if value != self.default:
            raise LostError(
                f"it has no {self.name!r}, which is {shown(value)} and not {shown(self.default)}"
            )
        return fields

    def describe(self) -> Json:
        return {"added": self.name, "default": plain(self.default)}


@attrs.frozen
class Renamed:
    """A field has another name.

    >>> Renamed("mode", "lcr").upgrade({"mode": 3})
    {'lcr': 3}
    """

    old: str
    new: str
    goes_back = True

    def upgrade(self, fields: Fields) -> Fields:
        _refuse_present(fields, self.new)
        fields[self.new] = fields.pop(self.old)
        return fields

    def downgrade(self, fields: Fields) -> Fields:
        fields[self.old] = fields.pop(self.new)
        return fields

    def describe(self) -> Json:
        return {"renamed": self.old, "to": self.new}


@attrs.frozen
class Removed:
    """A field is gone.

    Args:
        name: Its name.
        default: What the version before is given when a state goes back to it; without one,
            no state can.

    >>> Removed("spare", 0).downgrade({"lcr": 3})
    {'lcr': 3, 'spare': 0}
    """

    name: str
    default: Any = attrs.field(default=_NOTHING, converter=_on_the_wire)

    @property
    def goes_back(self) -> bool:
        return self.default is not _NOTHING

    def upgrade(self, fields: Fields) -> Fields:
        del fields[self.name]
        return fields

    def downgrade(self, fields: Fields) -> Fields:
        if not self.goes_back:
            raise LostError(f"it needs {self.name!r}, for which no default is declared")
        return {**fields, self.name: deepcopy(self.default)}

    def describe(self) -> Json:
        back = {"default": plain(self.default)} if self.goes_back else {}
        return {"removed": self.name, **back}


@attrs.frozen
class Changed:
    """Anything else, by functions from a dict of fields to a dict of fields.

    Args:
        forward: From the version before to this one.
        back: From this version to the one before, where there is a way.

    >>> def split(fields):
    ...     divisor = fields.pop("divisor")
    ...     return {**fields, "dll": divisor & 0xFF, "dlh": divisor >> 8}
    >>> Changed(split).upgrade({"divisor": 0x10C})
    {'dll': 12, 'dlh': 1}
    """

    forward: Callable[[Fields], Fields]
    back: Callable[[Fields], Fields] | None = None

    @property
    def goes_back(self) -> bool:
        return self.back is not None

    def upgrade(self, fields: Fields) -> Fields:
        return self.forward(fields)

    def downgrade(self, fields: Fields) -> Fields:
        if self.back is None:
            raise LostError("no way back is declared")
        return self.back(fields)

    def describe(self) -> Json:
        return {
            "changed": getattr(self.forward, "__name__", type(self.forward).__name__),
            "goes_back": self.goes_back,
        }


History = Mapping[int, Change | tuple[Change, ...] | list[Change]]


def plain(value: Any) -> Any:
    """A default as JSON can have it.

    >>> plain(b"ab"), plain([1, (2,)])
    ({'bytes': '6162'}, [1, [2]])
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list | tuple):
        return [*map(plain, value)]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return {"pairs": [[plain(key), plain(item)] for key, item in value.items()]}
        return {key: plain(item) for key, item in value.items()}
    if type(value).__module__ == "numpy":
        shape = [*value.shape]
        return {"dtype": value.dtype.str, "shape": shape, "bytes": value.tobytes().hex()}
    return value


def _refuse_present(fields: Fields, name: str) -> None:
    if name in fields:
        raise ValueError(f"there is a field {name!r} already")
