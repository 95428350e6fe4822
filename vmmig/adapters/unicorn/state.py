"""A component's state as a section: an attrs class whose validators say what it may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from vmmig.errors import RestoreError
from vmmig.snapshot import Snapshot, SnapshotDataSection

_S = TypeVar("_S", bound=attrs.AttrsInstance)
_VERSION = 1


def only(fits: Callable[[object], bool]) -> Callable[[Any, Any, Any], None]:
    """A validator: only what ``fits``.

    >>> only(number(8))(None, attrs.field(), 255)
    """

    def check(_: object, attribute: Any, value: Any) -> None:
        if not fits(value):
            raise RestoreError(f"{attribute.name} cannot be {value!r:.80}")

    return check


def number(bits: int) -> Callable[[object], bool]:
    """Whether a value is a whole number of so many bits.

    >>> [number(8)(value) for value in (0, 255, 256, -1, 1.0, True)]
    [True, True, False, False, False, False]
    """
    return lambda value: type(value) is int and 0 <= value < 1 << bits


def list_of(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether a value is a list or tuple whose items all fit.

    >>> [list_of(number(8))(value) for value in ([], [1, 2], [256], 1)]
    [True, True, False, False]
    """
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def save(id: str, state: attrs.AttrsInstance) -> Snapshot:
    """The snapshot of the component ``id``: one section, ``state``, of JSON.

    >>> Counter = attrs.make_class("Counter", ["n"])
    >>> save("counter", Counter(3)).section("state").snapshot
    b'{"version": 1, "n": 3}'
    """
    text = json.dumps({"version": _VERSION, **attrs.asdict(state)})
    snapshot = Snapshot(id)
    snapshot.add_data_section(SnapshotDataSection("state", text.encode()))
    return snapshot


def load(snapshot: Snapshot, cls: type[_S]) -> _S:
    """The state that `save` saved.

    Raises:
        RestoreError: There is none, or it does not fit.

    >>> Counter = attrs.make_class("Counter", ["n"])
    >>> load(save("counter", Counter(3)), Counter)
    Counter(n=3)
    """
    try:
        (state,) = snapshot.take("state")
        values = json.loads(bytes(memoryview(state)))
        version = values.pop("version")
        if version != _VERSION:
            raise RestoreError(f"the state is of version {version!r}, not {_VERSION}")
        missing = {field.name for field in attrs.fields(cls)} - values.keys()
        if missing:
            raise RestoreError(f"the state of {snapshot.id!r} lacks {sorted(missing)}")
        return cls(**values)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise RestoreError(f"the state of {snapshot.id!r} is not readable: {error}") from error
