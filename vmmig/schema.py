"""Schemas of states, to check in, and what would break between two of them.

A schema says which states a component tree saves, with their versions, fields and types, and
what each version changed. `compare` finds, without running anything, which snapshots of one could
not be restored by the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import attrs

from vmmig.errors import MigratableError
from vmmig.snapshot import Snapshot
from vmmig.state import StateType, Target, declared_states, peek

Json = dict[str, Any]
FORMAT = 1


class Break(NamedTuple):
    """Snapshots of one schema that the other cannot restore.

    Attributes:
        direction: ``old on new`` (old snapshots, new code) or ``new on old``.
        path: The component's path, or the state's name and the field's path.
        what: What does not fit.
        advice: How to declare it, or what else to do.

    >>> print(Break("old on new", "serial.lcr", "is gone", "declare Removed('lcr')"))
    old on new: serial.lcr: is gone; declare Removed('lcr')
    """

    direction: str
    path: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.direction}: {self.path}: {self.what}; {self.advice}"


@attrs.frozen
class Schema:
    """The states of a component tree or of a module.

    Attributes:
        components: For each node that has sections, by its path, its sections: the name of the
            state that stands there, or None for one that is not typed.
        states: For each state, by its name, what is declared of it.

    >>> from vmmig.state import U8, versioned
    >>> @versioned("power", 1)
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> schema = schema_of(Power)
    >>> schema.states["power"]["fields"]
    {'is_off': {'type': 'bool'}}
    """

    components: dict[str, dict[str, str | None]]
    states: dict[str, Json]

    def targets(self) -> dict[str, Target]:
        """For `vmmig.state.writing_versions`: what code of this schema can read.

        >>> Schema({}, {"nic": {"version": 2, "subsections": {}, "fields": {}}}).targets()
        {'nic': Target(version=2, subsections=frozenset(), fields=frozenset())}
        """
        return {
            name: Target(
                state["version"], frozenset(state["subsections"]), frozenset(state["fields"])
            )
            for name, state in self.states.items()
        }

    def dumps(self) -> str:
        """As canonical JSON: the same schema always gives the same text.

        >>> print(Schema({}, {}).dumps(), end="")
        {
          "components": {},
          "states": {},
          "vmmig_schema": 1
        }
        """
        whole = {"vmmig_schema": FORMAT, **attrs.asdict(self, recurse=False)}
        return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def loads_schema(text: str) -> Schema:
    """A schema from its JSON.

    Raises:
        MigratableError: It is none, or of a format that is newer.

    >>> loads_schema(Schema({}, {}).dumps())
    Schema(components={}, states={})
    """
    try:
        whole = json.loads(text)
        if type(whole) is not dict or "vmmig_schema" not in whole:
            raise MigratableError("this is no schema; `vmmig schema` writes one")
        if whole["vmmig_schema"] != FORMAT:
            raise MigratableError(
                f"the schema is of format {whole['vmmig_schema']!r}, not {FORMAT}; a newer vmmig "
                "reads it"
            )
        schema = Schema(whole["components"], whole["states"])
        for state in schema.states.values():
            maps = (state["fields"], state["subsections"], state["history"])
            numbers = (state["version"], state["minimum_version"], state["oldest_target"])
            if {*map(type, maps)} != {dict} or {*map(type, numbers)} != {int}:
                raise TypeError("a state is not described as it should be")
        if {*map(type, schema.components.values())} - {dict}:
            raise TypeError("a component is not described as it should be")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MigratableError(f"the schema cannot be read: {error!r}") from error
    return schema


def load_schema(path: str | os.PathLike[str]) -> Schema:
    """A schema from a file.

    Raises:
        MigratableError: It cannot be read.

    >>> load_schema("no/such.json")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: the schema 'no/such.json' cannot be read: ...
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise MigratableError(f"the schema {os.fspath(path)!r} cannot be read: {error}") from error
    try:
        return loads_schema(text)
    except MigratableError as error:
        raise MigratableError(f"{os.fspath(path)!r}: {error}") from error


def schema_of(thing: Any) -> Schema:
    """The schema of a component tree, a state's class, or all states that a module declares.

    A component is paused and asked for a snapshot, which says what stands where.

    Args:
        thing: A component; a class or function that makes one; a class that is a state; a
            module.

    Raises:
        MigratableError: It is none of these, or its snapshot cannot be taken.

    >>> from vmmig.state import U8, save_state, versioned
    >>> @versioned("dial", 1)
    ... @attrs.define
    ... class DialState:
    ...     digit: U8 = 0
    >>> class Dial:
    ...     def id(self): return "dial"
    ...     def pause(self): pass
    ...     def resume(self): pass
    ...     def snapshot(self): return save_state("dial", DialState())
    ...     def restore(self, snapshot): pass
    >>> schema_of(Dial).components
    {'dial': {'state': 'dial'}}
    """
    if isinstance(thing, ModuleType):
        inside = thing.__name__
        found = [
            state
            for state in declared_states().values()
            if f"{state.cls.__module__}.".startswith(f"{inside}.")
        ]
        if not found:
            raise MigratableError(f"the module {inside} declares no state")
        return _schema({}, found)
    if isinstance(thing, type) and "__vmmig_state__" in vars(thing):
        return _schema({}, [vars(thing)["__vmmig_state__"]])
    snapshot = _snapshot_of(thing)
    components: dict[str, dict[str, str | None]] = {}
    found = []
    for path, node in snapshot.walk():
        sections: dict[str, str | None] = {}
        for id, section in sorted(node.snapshot_data.items()):
            peeked = peek(section.snapshot)
            sections[id] = None if peeked is None else peeked.name
            if peeked is not None:
                if peeked.name not in declared_states():
                    raise MigratableError(f"the class of the state {peeked.name!r} is gone")
                state = declared_states()[peeked.name]
                subsections = state.subsections.keys() & peeked.fields.keys()
                if state.version != peeked.version or (
                    state.fields.keys() != peeked.fields.keys() - subsections
                ):
                    raise MigratableError(
                        f"two classes are declared as the state {peeked.name!r}; {state.cls!r} is "
                        "the later one, and not the one that was saved"
                    )
                found.append(state)
        typed = {id for id, name in sections.items() if name is not None}
        # What a state keeps in sections of their own is the state's.
        sections = {
            id: name
            for id, name in sections.items()
            if name is not None or not any(id.startswith((f"{t}.", f"{t}[")) for t in typed)
        }
        if sections:
            components["/".join([snapshot.id, *path.ids])] = sections
    return _schema(components, found)


def compare(
    old: Schema,
    new: Schema,
    *,
    direction: Literal["both", "old on new", "new on old"] = "both",
) -> list[Break]:
    """What would break between an older and a newer schema.

    Where a state's newer version is declared to be reached by a function (`Changed`), only the
    function knows what becomes of the fields; `vmmig.testing.states` tries it.

    >>> old = Schema({"vm": {"state": "a"}}, {})
    >>> for problem in compare(old, Schema({"vm": {}}, {})):
    ...     print(problem)
    old on new: vm: its section 'state' is gone, and old snapshots have it; keep on saving it
    new on old: vm: its section 'state' is gone, which old code needs; keep on saving it
    """
    found: list[Break] = []
    for forward in (True, False):
        words = "old on new" if forward else "new on old"
        if direction in ("both", words):
            found += _components(old, new, words, forward)
            for name in sorted(old.states.keys() & new.states.keys()):
                for path, what, advice in _state(old, new, name, forward):
                    found.append(Break(words, path, what, advice))
    return found


def _schema(components: dict[str, dict[str, str | None]], found: Iterable[StateType]) -> Schema:
    states: dict[str, Json] = {}
    todo = [*found]
    while todo:
        state = todo.pop()
        if state.name in states:
            continue
        states[state.name] = {
            "version": state.version,
            "minimum_version": state.minimum_version,
            "oldest_target": state.oldest_target,
            "fields": {name: kind.json for name, (_, kind) in state.fields.items()},
            "subsections": {
                name: {"state": sub.type.name, "default": sub.default_on_the_wire()}
                for name, sub in state.subsections.items()
            },
            "history": {
                str(step): [change.describe() for change in changes]
                for step, changes in sorted(state.history.items())
            },
        }
        todo += [sub.type for sub in state.subsections.values()]
        todo += [
            declared_states()[name]
            for kind in states[state.name]["fields"].values()
            for name in _states_in(kind)
        ]
    # Through JSON, so that a schema is the same before and after it was written.
    return loads_schema(Schema(components, states).dumps())


def _states_in(kind: Any) -> Iterator[str]:
    if isinstance(kind, dict):
        if kind.get("type") == "state":
            yield kind["name"]
        for value in kind.values():
            yield from _states_in(value)
    elif isinstance(kind, list):
        for value in kind:
            yield from _states_in(value)


def _snapshot_of(thing: Any) -> Snapshot:
    component = thing
    try:
        if isinstance(thing, type) or not hasattr(thing, "snapshot"):
            component = thing()
    except Exception as error:
        name = getattr(thing, "__qualname__", repr(thing))
        raise MigratableError(
            f"{name} cannot be made without arguments ({error}); give a function that makes one"
        ) from error
    if not hasattr(component, "snapshot"):
        raise MigratableError(f"{type(component).__qualname__} has no snapshot(): no component")
    try:
        component.pause()
        return cast(Snapshot, component.snapshot())
    except MigratableError:
        raise
    except Exception as error:
        what = f"{type(component).__qualname__} gives no snapshot: {error!r}"
        raise MigratableError(what) from error


def _components(old: Schema, new: Schema, words: str, forward: bool) -> Iterator[Break]:
    before, after = old.components, new.components
    if not before or not after:
        # One of them is of a module or a class: there is no tree to compare, only states.
        for name in sorted(old.states.keys() - new.states.keys()) if forward else []:
            yield Break(
                words,
                name,
                "there is no such state any more, and old snapshots have it",
                "keep its class, or give it its name back",
            )
        return
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            who = "and old snapshots have it" if forward else "which old code needs"
            yield Break(
                words,
                path,
                f"the component is gone, {who}",
                "keep it, or restore with " + ("unknown='keep'" if forward else "missing='skip'"),
            )
            continue
        if path not in before:
            who = "which old snapshots lack" if forward else "which old code does not know"
            yield Break(
                words,
                path,
                f"the component is new, {who}",
                "restore with " + ("missing='skip'" if forward else "unknown='keep'"),
            )
            continue
        for id in sorted(before[path].keys() | after[path].keys()):
            if id not in after[path]:
                who = "and old snapshots have it" if forward else "which old code needs"
                yield Break(words, path, f"its section {id!r} is gone, {who}", "keep on saving it")
            elif id not in before[path]:
                who = "which old snapshots lack" if forward else "which old code does not know"
                yield Break(
                    words,
                    path,
                    f"its section {id!r} is new, {who}",
                    "make it a subsection of its state",
                )
            elif before[path][id] != after[path][id]:
                yield Break(
                    words,
                    path,
                    f"its section {id!r} was {_what(before[path][id])} and is "
                    f"{_what(after[path][id])}",
                    "a state keeps its name for ever",
                )


def _what(state: str | None) -> str:
    return "bytes of its own" if state is None else f"a state {state!r}"


Problem = tuple[str, str, str]


def _state(old: Schema, new: Schema, name: str, forward: bool) -> Iterator[Problem]:
    before, after = old.states[name], new.states[name]
    was, now = before["version"], after["version"]
    if now < was:
        yield name, f"its version went back from {was} to {now}", f"make it {was + 1}"
        return
    if forward and after["minimum_version"] > was:
        yield (
            name,
            f"version {was} can no longer be read, only {after['minimum_version']}..{now}",
            f"declare what version {was + 1} changed, and keep it in the history",
        )
        return
    if not forward and after["oldest_target"] > was:
        step = after["oldest_target"]
        yield (
            name,
            f"version {now} cannot be written as version {was}",
            f"declare the way back from version {step}: Changed(..., back=...), "
            "Removed(..., default)",
        )
        return
    yield from _subsections(before, after, name, forward)
    fields: dict[str, Any] | None = {key: (kind, True) for key, kind in before["fields"].items()}
    for step in range(was + 1, now + 1):
        for change in after["history"].get(str(step), ()):
            if fields is None:
                break
            if "changed" in change:
                fields = None
                continue
            arriving = change.get("added", change.get("to"))
            if arriving is not None and arriving in fields:
                yield (
                    f"{name}.{arriving}",
                    f"version {step} brings it, but version {step - 1} has such a field already",
                    f"mend the history of version {step}",
                )
                return
            if "added" in change:
                fields[change["added"]] = (change["default"], False)
                continue
            gone = change["removed"] if "removed" in change else change["renamed"]
            if gone not in fields:
                yield (
                    f"{name}.{gone}",
                    f"version {step} takes it away, but version {step - 1} has no such field",
                    f"mend the history of version {step}",
                )
                return
            kept = fields.pop(gone)
            goes_back = "removed" in change and "default" in change and kept[1] and not forward
            if goes_back and not value_fits(kept[0], change["default"], old.states):
                yield (
                    f"{name}.{gone}",
                    f"what version {step - 1} is given for it, {change['default']!r}, does not fit",
                    "mend the default",
                )
            if "renamed" in change:
                fields[change["to"]] = kept
    if fields is None:
        return
    reached = f"version {now}" if now != was else f"version {was}, as before,"
    for key in sorted(fields.keys() | after["fields"].keys()):
        path = f"{name}.{key}"
        if key not in after["fields"]:
            yield (
                path,
                f"the field is gone, and {reached} does not say so",
                _declare(was, now, f"Removed({key!r}, ...) or Renamed({key!r}, ...)"),
            )
        elif key not in fields:
            yield (
                path,
                f"the field is new, and {reached} does not say so",
                _declare(was, now, f"Added({key!r}, ...)"),
            )
        else:
            kind, is_kind = fields[key]
            target = after["fields"][key]
            if not is_kind:
                if forward and not value_fits(target, kind, new.states):
                    yield path, f"its declared default {kind!r} does not fit", "mend the default"
                continue
            reader, writer = (target, kind) if forward else (kind, target)
            for below, what in _misfits(reader, writer):
                yield (
                    path + below,
                    what,
                    _declare(was, now, "Changed(...)"),
                )


def _declare(was: int, now: int, what: str) -> str:
    if now > was:
        return f"declare {what} in version {now}"
    return f"raise the version to {was + 1} and declare {what}"


def _subsections(before: Json, after: Json, name: str, forward: bool) -> Iterator[Problem]:
    for key in sorted(before["subsections"].keys() | after["subsections"].keys()):
        path = f"{name}.{key}"
        if key not in after["subsections"]:
            if forward:
                yield path, "the subsection is gone, and old snapshots may have it", "keep it"
        elif key in before["subsections"]:
            old, new = before["subsections"][key], after["subsections"][key]
            if old["state"] != new["state"]:
                yield (
                    path,
                    f"the subsection was a state {old['state']!r} and is {new['state']!r}",
                    "a state keeps its name for ever",
                )
            elif old["default"] != new["default"] and old["default"][0] == new["default"][0]:
                yield (
                    path,
                    "what it is when it was not written has changed",
                    "keep the default, and set another where states are made",
                )


_LIMITS = (("min", "max", ""), ("min_length", "max_length", "lengths "))


def _misfits(reader: Json, writer: Json, path: str = "") -> Iterator[tuple[str, str]]:
    """Where values of the type ``writer`` would be refused by the type ``reader``."""
    kind, other = reader["type"], writer["type"]
    options = reader["of"] if kind == "union" else [reader]
    if kind == "union" or other == "union":
        for option in writer["of"] if other == "union" else [writer]:
            if not any(not [*_misfits(fitting, option)] for fitting in options):
                yield path, f"{_named(option)} is not taken where {_named(reader)} is needed"
        return
    if {kind, other} == {"list", "tuple"}:
        if kind == "list":
            for i, item in enumerate(writer["items"]):
                yield from _misfits(reader["items"], item, f"{path}[{i}]")
            yield from _limits(
                reader,
                {"min_length": len(writer["items"]), "max_length": len(writer["items"])},
                path,
            )
            return
        yield path, f"{_named(writer)} is not taken where {_named(reader)} is needed"
        return
    if (kind, other) == ("list", "set"):
        yield from _limits(reader, writer, path)
        yield from _misfits(reader["items"], writer["items"], path + "[]")
        return
    values = _values(writer)
    if (kind, other) == ("int", "flags"):
        values = [0, _mask(writer)]
    if values is not None and _values(reader) is None and kind in ("int", "str"):
        for value in values:
            if not value_fits(reader, value, {}):
                yield path, f"{value!r} is not taken where {_named(reader)} is needed"
        return
    if kind != other and {kind, other} != {"enum", "literal"}:
        yield path, f"{_named(writer)} is not taken where {_named(reader)} is needed"
        return
    if kind in ("enum", "literal", "flags"):
        yield from _choices(reader, writer, path)
    elif kind in ("list", "set"):
        yield from _misfits(reader["items"], writer["items"], path + "[]")
    elif kind == "tuple":
        if len(reader["items"]) != len(writer["items"]):
            yield path, f"{len(writer['items'])} items where {len(reader['items'])} are needed"
            return
        for i, (wanted, given) in enumerate(zip(reader["items"], writer["items"], strict=True)):
            yield from _misfits(wanted, given, f"{path}[{i}]")
    elif kind == "dict":
        yield from _misfits(reader["keys"], writer["keys"], path + "[key]")
        yield from _misfits(reader["values"], writer["values"], path + "[]")
    elif kind == "class":
        for key in sorted(reader["fields"].keys() | writer["fields"].keys()):
            if key not in reader["fields"]:
                yield f"{path}.{key}", "there is no such field where it is read"
            elif key not in writer["fields"]:
                yield f"{path}.{key}", "it is not there where it is needed"
            else:
                yield from _misfits(reader["fields"][key], writer["fields"][key], f"{path}.{key}")
    elif (kind == "state" and reader["name"] != writer["name"]) or (
        kind == "array" and reader.get("dtype") not in (None, writer.get("dtype"))
    ):
        yield path, f"{_named(writer)} is not taken where {_named(reader)} is needed"
    yield from _limits(reader, writer, path)


def _limits(reader: Json, writer: Json, path: str) -> Iterator[tuple[str, str]]:
    for low, high, what in _LIMITS:
        least, most = reader.get(low), reader.get(high)
        given_least = writer.get(low, 0 if what else None)
        too_low = least is not None and (given_least is None or given_least < least)
        too_high = most is not None and (writer.get(high) is None or writer[high] > most)
        if too_low or too_high:
            yield (
                path,
                f"{what}{_span(given_least, writer.get(high))} where "
                f"{what}{_span(least, most)} is needed",
            )


def _span(low: Any, high: Any) -> str:
    return f"{'' if low is None else low}..{'' if high is None else high}"


def _values(kind: Json) -> list[Any] | None:
    if kind["type"] == "enum":
        return [*kind["members"].values()]
    return kind["values"] if kind["type"] == "literal" else None


def _mask(flags: Json) -> int:
    """All flags of a type; a member may stand for several of them."""
    return reduce(or_, flags["members"].values(), 0)


def _choices(reader: Json, writer: Json, path: str) -> Iterator[tuple[str, str]]:
    if reader["type"] == "flags":
        for name, value in writer["members"].items():
            if value & ~_mask(reader):
                yield path, f"the flag {name} ({value:#x}) is not known where it is read"
    else:
        known = _values(reader) or []
        for value in _values(writer) or []:
            # True is no 1: JSON tells them apart, Python does not.
            if not any(type(value) is type(k) and value == k for k in known):
                yield path, f"the value {value!r} is not known where it is read"
    if "members" in reader and "members" in writer:
        for name in sorted(reader["members"].keys() & writer["members"].keys()):
            if reader["members"][name] != writer["members"][name]:
                yield (
                    path,
                    f"{name} is {writer['members'][name]!r} where it is written and "
                    f"{reader['members'][name]!r} where it is read",
                )


def _named(kind: Json) -> str:
    if kind["type"] == "union":
        return " | ".join(map(_named, kind["of"]))
    if kind["type"] == "state":
        return f"state {kind['name']!r}"
    if kind["type"] in ("list", "set"):
        return f"{kind['type']}[{_named(kind['items'])}]"
    if "min" in kind or "max" in kind:
        return f"{kind['type']} {_span(kind.get('min'), kind.get('max'))}"
    dtype = f" of {kind['dtype']}" if "dtype" in kind else ""
    return str(kind["type"]) + dtype


def value_fits(kind: Json, value: Any, states: Mapping[str, Json]) -> bool:
    """Whether a value as it stands on the wire is of a type of a schema.

    >>> byte = {"type": "int", "min": 0, "max": 255}
    >>> [value_fits(byte, value, {}) for value in (255, 256, True)]
    [True, False, False]
    """
    name = kind["type"]
    if name == "union":
        return any(value_fits(option, value, states) for option in kind["of"])
    if name in ("int", "str", "bool", "float"):
        right = type(value).__name__ == name
    elif name == "none":
        right = value is None
    elif name == "bytes":
        right = isinstance(value, bytes | memoryview)
        if type(value) is dict and value.keys() == {"bytes"}:
            right, value = True, bytes.fromhex(value["bytes"])
    elif name in ("enum", "literal"):
        right = any(type(value) is type(v) and value == v for v in _values(kind) or ())
    elif name == "flags":
        right = type(value) is int and not value & ~_mask(kind)
    elif name in ("list", "set"):
        right = _is_list(value) and all(value_fits(kind["items"], v, states) for v in value)
    elif name == "tuple":
        right = (
            _is_list(value)
            and len(value) == len(kind["items"])
            and all(value_fits(k, v, states) for k, v in zip(kind["items"], value, strict=True))
        )
    elif name == "dict":
        if type(value) is dict and value.keys() == {"pairs"}:
            value = dict(value["pairs"])
        right = type(value) is dict and all(
            value_fits(kind["keys"], k, states) and value_fits(kind["values"], v, states)
            for k, v in value.items()
        )
    elif name == "class":
        right = _fields_fit(kind["fields"], value, states)
    elif name == "state":
        right = body_fits(kind["name"], value, states)
    else:
        right = type(value).__name__ == "ndarray" and kind.get("dtype") in (None, value.dtype.str)
    if not right:
        return False
    number = value if name in ("int", "float") else None
    length = len(cast(Any, value)) if name in ("str", "bytes", "list", "set", "dict") else None
    return all(
        measure is None or (kind.get(low, measure) <= measure <= kind.get(high, measure))
        for measure, (low, high, _) in ((number, _LIMITS[0]), (length, _LIMITS[1]))
    )


def body_fits(name: str, body: Any, states: Mapping[str, Json]) -> bool:
    """Whether a state's version, fields and subsections are what a schema says.

    >>> states = {"nic": {"version": 1, "fields": {"mtu": {"type": "int"}}, "subsections": {}}}
    >>> body_fits("nic", [1, {"mtu": 1500}, {}], states), body_fits("nic", [1, {}, {}], states)
    (True, False)
    """
    if not _is_list(body) or len(body) != 3:
        return False
    version, fields, present = body
    state = states[name]
    return (
        version == state["version"]
        and _fields_fit(state["fields"], fields, states)
        and type(present) is dict
        and all(
            key in state["subsections"]
            and body_fits(state["subsections"][key]["state"], sub, states)
            for key, sub in present.items()
        )
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | memoryview)


def _fields_fit(fields: Mapping[str, Json], value: Any, states: Mapping[str, Json]) -> bool:
    return (
        type(value) is dict
        and value.keys() == fields.keys()
        and all(value_fits(kind, value[key], states) for key, kind in fields.items())
    )


__all__ = ["Break", "Schema", "compare", "load_schema", "loads_schema", "schema_of"]
