"""One field set in a state, without its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from vmmig.errors import RestoreError
from vmmig.snapshot import Buffer, raw_view
from vmmig.state.wire import MAGIC


def with_field(payload: Buffer, steps: Sequence[str | int], value: object) -> bytes:
    """The bytes of a typed state with one field set.

    Args:
        payload: ``vmst``, a byte 1, and a msgpack array: name, version, writer, map of fields,
            map of subsections, each an array of its version and these two maps.
        steps: The field's name, and the keys and indices below it.
        value: Its new value, of the same type as the old one.

    Raises:
        RestoreError: It has no such field, or not of this type, or is damaged.

    >>> payload = MAGIC + msgpack.packb(["timer", 1, "me", {"ticks": 4}, {}])
    >>> msgpack.unpackb(with_field(payload, ["ticks"], 5)[5:])
    ['timer', 1, 'me', {'ticks': 5}, {}]
    """
    view = raw_view(payload)
    try:
        state = msgpack.unpackb(view[len(MAGIC) :], strict_map_key=False)
        *_, fields, subsections = state
        set_at(_holder(fields, subsections, steps[0]), steps, value)
        return MAGIC + msgpack.packb(state)  # type: ignore[no-any-return]
    except RestoreError:
        raise
    except Exception as error:
        raise RestoreError(f"the state cannot be changed: {error!r}") from error


def set_at(fields: Any, steps: Sequence[str | int], value: object) -> None:
    """Set what is found by these steps, where it is and has the type of ``value``.

    Raises:
        RestoreError: It is not there, or of another type.

    >>> fields = {"queues": [1, 2]}
    >>> set_at(fields, ["queues", 1], 3)
    >>> fields
    {'queues': [1, 3]}
    """
    holder: Any = fields
    for i, step in enumerate(steps[:-1]):
        holder = _entry(_inside(holder, step, i), steps[: i + 1])
    holder = _inside(holder, steps[-1], len(steps) - 1)
    old = _entry(holder, steps)
    if type(old) is not type(value) and old is not None:
        wanted, given = type(old).__name__, type(value).__name__
        raise RestoreError(f"{_named(steps)} is of type {wanted}, not {given}")
    holder[steps[-1]] = value


def _inside(holder: Any, step: str | int, depth: int) -> Any:
    """Where the next step leads from: a nested state is its version, fields and subsections."""
    if depth and type(step) is str and type(holder) is list and len(holder) == 3:
        return _holder(holder[1], holder[2], step)
    return holder


def _entry(holder: Any, steps: Sequence[str | int]) -> Any:
    try:
        return holder[steps[-1]]
    except (KeyError, IndexError, TypeError):
        raise RestoreError(f"there is no field {_named(steps)}") from None


def _holder(fields: Any, subsections: Any, step: str | int) -> Any:
    """The map in which a field stands: a subsection is one too, by its name."""
    return subsections if step not in fields and step in subsections else fields


def _named(steps: Sequence[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return repr(text.removeprefix("."))
