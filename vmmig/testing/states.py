"""States of an old schema, made up, and proof that today's code takes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument, NoSuchExample, Unsatisfiable

from vmmig.errors import MigratableError
from vmmig.schema import Break, Schema, body_fits
from vmmig.snapshot import Snapshot, SnapshotDataSection
from vmmig.state import (
    LostError,
    StateType,
    declared_states,
    get_state,
    peek,
    put_state,
    writing_versions,
)
from vmmig.state.wire import pack_state, unpack_state

_MAX_ITEMS = 8


def states(schema: Schema, name: str) -> st.SearchStrategy[Snapshot]:
    """Snapshots with one section, ``state``, as code of that schema may have saved it.

    Only what a class refuses by itself, in validators, is not known to a schema.

    Args:
        schema: As `vmmig.schema.load_schema` reads it.
        name: The state's name.

    Raises:
        InvalidArgument: The schema has no such state.

    >>> from hypothesis import find
    >>> from vmmig.schema import loads_schema
    >>> from vmmig.state import peek
    >>> old = loads_schema('''{"vmmig_schema": 1, "components": {}, "states": {"power": {
    ...     "version": 1, "minimum_version": 1, "oldest_target": 1, "subsections": {},
    ...     "history": {}, "fields": {"is_off": {"type": "bool"}}}}}''')
    >>> snapshot = find(states(old, "power"), lambda snapshot: True)
    >>> peek(snapshot.section("state").snapshot).fields
    {'is_off': False}
    """
    if name not in schema.states:
        raise InvalidArgument(f"the schema has no state {name!r}, only {[*schema.states]}")
    return _bodies(schema, name).map(lambda body: _snapshot(name, body))


def upgrade_breaks(schema: Schema, *, examples: int = 100) -> Iterator[Break]:
    """What of an old schema today's code refuses, found by trying made-up states.

    Args:
        schema: The old one; its states must be declared in this process, by today's code.
        examples: How many states to try of each.

    >>> from vmmig.schema import schema_of
    >>> from vmmig.state import U8, versioned
    >>> import attrs
    >>> @versioned("dial", 1)
    ... @attrs.define
    ... class Dial:
    ...     digit: U8 = 0
    >>> old = schema_of(Dial)
    >>> @versioned("dial", 1)
    ... @attrs.define
    ... class Dial:
    ...     digit: U8 = attrs.field(default=0, validator=attrs.validators.lt(10))
    >>> for problem in upgrade_breaks(old):
    ...     print(problem)
    old on new: dial: digit=10: ...its class refuses it: ...
    """
    declared = declared_states()
    for name in schema.states.keys() & declared.keys():
        yield from _refused(schema, declared[name], examples)
    for name in schema.states.keys() & declared.keys():
        yield from _not_taken_back(schema, declared[name], examples)


def corpus_breaks(
    corpus: Mapping[str, Snapshot], factory: Callable[[], Any] | None = None
) -> Iterator[Break]:
    """What of old snapshots today's code refuses, or cannot write as they are.

    Every state in them is restored, and written again in the version that it was. A snapshot of
    a component of the same id as ``factory`` makes is restored by such a component, too.

    Args:
        corpus: Snapshots that older code has saved, by the names to show for them.
        factory: What makes today's component.

    >>> [*corpus_breaks({"old.vmsnap": Snapshot("vm")})]
    []
    """
    declared = declared_states()
    for name, snapshot in corpus.items():
        for place, node in snapshot.walk():
            for id in [*node.snapshot_data]:
                path = f"{name}: {place.section(id)}"
                try:
                    peeked = peek(node.snapshot_data[id].snapshot)
                except MigratableError as error:
                    yield Break("old on new", path, str(error), "the file is damaged; mend it")
                    continue
                if peeked is None:
                    continue
                if peeked.name not in declared:
                    yield Break(
                        "old on new",
                        path,
                        f"there is no state {peeked.name!r} any more",
                        "keep its class, or give it its name back",
                    )
                    continue
                yield from _of_one(path, node, id, declared[peeked.name], peeked.version)
        if factory is not None:
            component = factory()
            if component.id() == snapshot.id:
                try:
                    component.pause()
                    component.restore(snapshot)
                except Exception as error:
                    yield Break(
                        "old on new", name, f"it is not restored: {error}", "let restore take it"
                    )


def _of_one(
    path: str, node: Snapshot, section: str, state: StateType, version: int
) -> Iterator[Break]:
    try:
        value = get_state(node, state.cls, section=section)
    except MigratableError as error:
        advice = "declare in its history what has changed"
        yield Break("old on new", path, str(error.cause), advice)
        return
    before = unpack_state(node, section)
    again = Snapshot("")
    try:
        with writing_versions({state.name: version}):
            put_state(again, value, section=section)
    except MigratableError as error:
        advice = "declare the way back in its history"
        yield Break("new on old", path, str(error.cause), advice)
        return
    after = unpack_state(again, section)
    if after[1].keys() != before[1].keys():
        yield Break(
            "new on old",
            path,
            f"written again as version {version}, it has the fields {[*after[1]]}, and had "
            f"{[*before[1]]}",
            "mend the way back in its history",
        )


def _refused(schema: Schema, state: StateType, examples: int) -> Iterator[Break]:
    def is_refused(snapshot: Snapshot) -> bool:
        return _failure(snapshot, state) is not None

    shortest = _find(states(schema, state.name), is_refused, examples)
    if shortest is not None:
        yield Break(
            "old on new",
            state.name,
            f"{_shown(shortest)}: {_failure(shortest, state)}",
            "let its history, or its class, take it",
        )


def _not_taken_back(schema: Schema, state: StateType, examples: int) -> Iterator[Break]:
    """States of today, written for the old code, that the old code would not know."""
    old = schema.states[state.name]["version"]
    if not state.oldest_target <= old <= state.version:
        return
    from vmmig.schema import schema_of

    today = schema_of(state.cls)
    targets = schema.targets()

    def written(snapshot: Snapshot) -> list[Any] | None:
        try:
            value = get_state(snapshot, state.cls)
        except MigratableError:
            return None
        back = Snapshot("")
        try:
            with writing_versions(targets):
                put_state(back, value)
        except MigratableError as error:
            if _is_lost(error):
                return None  # the old version has no place for it, and says so
            return [str(error.cause)]
        return unpack_state(back, "state")

    def is_strange(snapshot: Snapshot) -> bool:
        body = written(snapshot)
        return body is not None and not body_fits(state.name, body, schema.states)

    shortest = _find(states(today, state.name), is_strange, examples)
    if shortest is not None:
        yield Break(
            "new on old",
            state.name,
            f"{_shown(shortest)} is written for version {old} as {written(shortest)}, which is "
            "none of that version",
            "mend the way back in its history",
        )


def _is_lost(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LostError):
            return True
        error = error.__cause__
    return False


def _find(strategy: st.SearchStrategy[Snapshot], condition: Any, examples: int) -> Snapshot | None:
    try:
        return find(
            strategy,
            condition,
            settings=settings(
                max_examples=examples,
                database=None,
                deadline=None,
                derandomize=True,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    except (NoSuchExample, Unsatisfiable):
        return None


def _failure(snapshot: Snapshot, state: StateType) -> MigratableError | None:
    try:
        get_state(snapshot, state.cls)
    except MigratableError as error:
        return error
    return None


def _shown(snapshot: Snapshot) -> str:
    _, fields, present = unpack_state(snapshot, "state")
    return ", ".join(f"{key}={value!r:.60}" for key, value in {**fields, **present}.items())


def _snapshot(name: str, body: list[Any]) -> Snapshot:
    snapshot = Snapshot(name)
    for section in pack_state("state", name, "made up", body):
        snapshot.add_data_section(SnapshotDataSection(*section))
    return snapshot


def _bodies(schema: Schema, name: str) -> st.SearchStrategy[list[Any]]:
    state = schema.states[name]
    fields = st.fixed_dictionaries(
        {key: _values(schema, kind) for key, kind in state["fields"].items()}
    )
    present = st.fixed_dictionaries(
        {}, optional={k: _bodies(schema, sub["state"]) for k, sub in state["subsections"].items()}
    )
    return st.tuples(st.just(state["version"]), fields, present).map(list)


def _values(schema: Schema, kind: dict[str, Any]) -> st.SearchStrategy[Any]:
    name = kind["type"]
    low, high = kind.get("min_length", 0), kind.get("max_length")
    size: dict[str, Any] = {"min_size": low, "max_size": high}
    few = {"min_size": low, "max_size": max(low, _MAX_ITEMS if high is None else min(high, 64))}
    if name == "int":
        # Beyond 64 bits, too, where nothing forbids it.
        return st.integers(kind.get("min"), kind.get("max"))
    if name == "float":
        return st.floats(
            kind.get("min"), kind.get("max"), allow_nan={"min", "max"}.isdisjoint(kind)
        )
    if name == "bool":
        return st.booleans()
    if name == "none":
        return st.none()
    if name == "str":
        return st.text(**size)
    if name == "bytes":
        most = max(low, 64) if high is None else high
        lengths = st.integers(low, min(most, low + 64)) | st.just(most if most < 1 << 17 else low)
        return st.builds(_repeated, lengths, st.binary(min_size=1, max_size=16))
    if name in ("enum", "literal"):
        return st.sampled_from([*kind["members"].values()] if name == "enum" else kind["values"])
    if name == "flags":
        bits = [*kind["members"].values()]
        return st.sets(st.sampled_from(bits)).map(lambda some: _or(some)) if bits else st.just(0)
    if name == "union":
        return st.one_of([_values(schema, option) for option in kind["of"]])
    if name == "list":
        return st.lists(_values(schema, kind["items"]), **few)
    if name == "set":
        return st.lists(_values(schema, kind["items"]), unique=True, **few)
    if name == "tuple":
        return st.tuples(*[_values(schema, item) for item in kind["items"]]).map(list)
    if name == "dict":
        keys, values = _values(schema, kind["keys"]), _values(schema, kind["values"])
        return st.dictionaries(keys, values, **few)
    if name == "class":
        return st.fixed_dictionaries({k: _values(schema, v) for k, v in kind["fields"].items()})
    if name == "state":
        return _bodies(schema, kind["name"])
    if name == "array":
        return _arrays(kind.get("dtype"))
    raise InvalidArgument(f"the schema has a type {name!r}, which this vmmig does not know")


def _repeated(length: int, fill: bytes) -> bytes:
    return (fill * (length // len(fill) + 1))[:length]


def _or(values: set[int]) -> int:
    result = 0
    for value in values:
        result |= value
    return result


def _arrays(dtype: str | None) -> st.SearchStrategy[Any]:
    import numpy

    kinds = st.just(dtype) if dtype else st.sampled_from(["<u4", "|u1", "<f8", ">i2", "|b1"])
    shapes = st.lists(st.integers(0, 4), max_size=3)

    def array(dtype: str, shape: list[int], fill: bytes) -> Any:
        items = numpy.prod(shape, dtype=int)
        kind = numpy.dtype(dtype)
        raw = _repeated(items * kind.itemsize, fill)
        if kind.kind == "b":
            raw = bytes(byte & 1 for byte in raw)
        return numpy.frombuffer(raw, kind).reshape(shape)

    return st.builds(array, kinds, shapes, st.binary(min_size=1, max_size=16))
