"""A typed, versioned state as sections of a snapshot, and back; see `vmmig.state.wire`."""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import attrs
import cattrs

from vmmig.errors import DecodeError, MigratableError, SnapshotError
from vmmig.snapshot import Snapshot, SnapshotDataSection
from vmmig.state.history import Change, Fields, History, LostError, plain
from vmmig.state.types import Json, Kind, Misfit, compile_fields, fields_of, hints_of
from vmmig.state.wire import LargeSections, belongs, pack_state, unpacked

T = TypeVar("T")

_SUBSECTION = "vmmig.subsection"

_STATES: dict[str, StateType] = {}
_targets: ContextVar[Mapping[str, Target] | None] = ContextVar("vmmig_state_targets", default=None)


class Target(NamedTuple):
    """What an older reader knows of a state: its version, its subsections and its fields.

    ``subsections`` and ``fields`` are None where they are not known.
    """

    version: int
    subsections: frozenset[str] | None = None
    fields: frozenset[str] | None = None


@attrs.frozen
class _Subsection:
    attribute: str
    type: StateType
    default: Callable[[], Any]
    needed: Callable[[Any], bool]

    def default_on_the_wire(self) -> Any:
        default = self.default()
        return [0] if default is None else plain(self.type.kind.write(default))


class StateType:
    """What is declared of a state; the decorator `versioned` makes it.

    Attributes:
        name: The state's name, which stands in every section.
        version: The version that is written.
        minimum_version: The oldest that can be read.
        writer: Who writes it.
        history: What each version changed.

    >>> @versioned("timer", 1)
    ... @attrs.define
    ... class Timer:
    ...     elapsed_ns: int = 0
    >>> state_type(Timer).name, state_type(Timer).version
    ('timer', 1)
    """

    def __init__(
        self,
        cls: type[Any],
        name: str,
        version: int,
        history: Mapping[int, tuple[Change, ...]],
        minimum_version: int,
        writer: str,
        names: Mapping[str, Any],
    ) -> None:
        self.cls, self.name, self.version, self.writer = cls, name, version, writer
        self.history, self.minimum_version = history, minimum_version
        hints = hints_of(cls, names)
        self.fields = fields_of(cls, hints)
        self.subsections = {
            attribute.alias or attribute.name: _subsection(cls, attribute, hints)
            for attribute in sorted(attrs.fields(cls), key=lambda a: a.alias or a.name)
            if attribute.metadata.get(_SUBSECTION)
        }
        self._read, self._write = compile_fields(
            cls, self.fields, subsections=bool(self.subsections)
        )
        # cattrs has the last word: what is structured goes through a converter of its own,
        # with nothing in it that coerces.
        self.converter = cattrs.Converter(detailed_validation=False)
        self.converter.register_structure_hook(cls, self._structure)
        self.converter.register_unstructure_hook(cls, self._body)
        self.structure = self.converter.get_structure_hook(cls)
        self.has_buffers: bool = any(kind.has_buffers for _, kind in self.fields.values()) or any(
            sub.type.has_buffers for sub in self.subsections.values()
        )
        json: Json = {"type": "state", "name": name}
        self.kind = Kind(
            self._structure_nested,
            self._body,
            json,
            frozenset([list]),
            has_buffers=self.has_buffers,
        )

    def __repr__(self) -> str:
        return f"<state {self.name!r}, version {self.version}>"

    @property
    def oldest_target(self) -> int:
        """The oldest version that can be written.

        >>> from vmmig.state import Added, Changed
        >>> @versioned("nic", 3, history={2: Added("mtu", 1500), 3: Changed(dict)})
        ... @attrs.define
        ... class Nic:
        ...     mtu: int = 1500
        >>> state_type(Nic).oldest_target
        3
        """
        version = self.version
        while version > 1 and version in self.history:
            if not all(change.goes_back for change in self.history[version]):
                break
            version -= 1
        return version

    def upgraded(self, version: int, fields: Fields) -> Fields:
        """The fields of an older version as this one has them.

        Raises:
            Misfit: That version cannot be read, or an upgrade fails.
        """
        if version == self.version:
            return fields
        if not self.minimum_version <= version < self.version:
            raise Misfit(self._unsupported(version))
        for step in range(version + 1, self.version + 1):
            for change in self.history[step]:
                try:
                    fields = change.upgrade(fields)
                except Exception as error:
                    reason = f"there is no {error}" if isinstance(error, KeyError) else error
                    raise Misfit(f"the upgrade from version {step - 1} failed: {reason}") from error
                if type(fields) is not dict:
                    raise Misfit(f"the upgrade from version {step - 1} returned no dict")
        return fields

    def downgraded(self, version: int, fields: Fields) -> Fields:
        """This version's fields as an older one has them.

        Raises:
            Misfit: That version has no place for them.
        """
        if version > self.version or version < 1:
            raise Misfit(f"{self.name!r} has no version {version}, only 1..{self.version}")
        for step in range(self.version, version, -1):
            for change in reversed(self.history.get(step, ())):
                try:
                    fields = change.downgrade(fields)
                except Exception as error:
                    raise Misfit(
                        f"{self.name!r} cannot be written as version {step - 1}: {error}"
                    ) from error
            if step not in self.history:
                raise Misfit(
                    f"{self.name!r} cannot be written as version {step - 1}: "
                    f"what version {step} changed is not declared"
                )
        return fields

    def _unsupported(self, version: int) -> str:
        supported = f"{self.minimum_version}..{self.version}"
        if version > self.version:
            advice = "restore it with what wrote it or something newer, or have that write version "
            return (
                f"version {version} of {self.name!r} is newer than what can be read here, "
                f"{supported}; {advice}{self.version} (vmmig.writing_versions)"
            )
        return (
            f"version {version} of {self.name!r} is older than what can be read here, {supported};"
            " restore it with a release in between and save it again"
        )

    def _structure(self, body: Any, _: Any) -> Any:
        version, fields, present = body
        if type(version) is not int:
            raise Misfit("a version is needed")
        if version != self.version:
            if type(fields) is not dict or type(present) is not dict:
                raise Misfit("a map of fields and one of subsections are needed")
            fields = self.upgraded(version, {**fields, **present})
            present = {name: fields.pop(name) for name in self.subsections if name in fields}
        if not self.subsections:
            if type(present) is not dict or present:
                self._unknown_subsection(present)
            return self._read(fields)
        if type(present) is not dict or not present.keys() <= self.subsections.keys():
            self._unknown_subsection(present)
        others = {}
        for name, sub in self.subsections.items():
            if name in present:
                try:
                    others[name] = sub.type.kind.read(present[name])
                except Misfit as misfit:
                    misfit.at(f".{name}")
                    raise
            else:
                others[name] = sub.default()
        return self._read(fields, others)

    def _unknown_subsection(self, present: Any) -> None:
        if type(present) is not dict:
            raise Misfit("a map of subsections is needed")
        unknown = sorted(map(repr, present.keys() - self.subsections.keys()))
        raise Misfit(
            f"it has the subsection {', '.join(unknown[:3])}, which is not known here; restore it "
            "with what wrote it, or bring it into the state in which that is not needed"
        )

    def _body(self, value: Any) -> list[Any]:
        fields: Fields = self._write(value)
        present = {}
        for name, sub in self.subsections.items():
            if sub.needed(value):
                try:
                    present[name] = sub.type.kind.write(getattr(value, sub.attribute))
                except Misfit as misfit:
                    misfit.at(f".{name}")
                    raise
        targets = _targets.get()
        target = None if targets is None else targets.get(self.name)
        if target is None:
            return [self.version, fields, present]
        fields = self.downgraded(target.version, {**fields, **present})
        needed = [*present]
        known = needed if target.subsections is None else sorted(target.subsections)
        present = {name: fields.pop(name) for name in known if name in fields}
        if target.subsections is not None:
            for name in needed:
                if name in fields and name not in (target.fields or ()):
                    what = (
                        f"the subsection {name!r} is needed, which the reader of version "
                        f"{target.version} does not know"
                    )
                    raise Misfit(what) from LostError(what)
        return [target.version, fields, present]

    def _structure_nested(self, value: Any) -> Any:
        if type(value) is not list or len(value) != 3:
            raise Misfit(f"a state {self.name!r} is needed, not {type(value).__name__}")
        return self._structure(value, None)


def versioned(
    name: str,
    version: int,
    *,
    history: History | None = None,
    minimum_version: int | None = None,
    writer: str | None = None,
) -> Callable[[type[T]], type[T]]:
    """Declare that an attrs class is a state, under a name and a version; a class decorator.

    Args:
        name: The state's name: what it is called in snapshots, for ever.
        version: The version of its fields, from 1 on. It goes up with every change of them.
        history: For each version, what it changed of the one before: `Added`, `Renamed`,
            `Removed`, `Changed`, or several of these.
        minimum_version: The oldest version that can be read; else, as far as ``history`` goes.
        writer: Who writes it, for the errors of others: ``"acme 2.3"``. Else the name of the
            package in which the class is.

    Raises:
        MigratableError: The class cannot be a state; the error says why.

    >>> from vmmig.state import U8, Added, Renamed
    >>> @versioned("serial", 3, history={2: Added("scr", 0), 3: Renamed("mode", "lcr")})
    ... @attrs.define
    ... class Serial:
    ...     lcr: U8 = 0
    ...     scr: U8 = 0
    >>> load_state(save_state("com1", Serial(lcr=3)), Serial)
    Serial(lcr=3, scr=0)
    """
    caller = sys._getframe(1)
    names = {**caller.f_globals, **caller.f_locals}

    def declare(cls: type[T]) -> type[T]:
        if "__attrs_attrs__" not in vars(cls):
            raise MigratableError(
                f"{cls.__qualname__} is no attrs class; @attrs.define makes it one"
            )
        if type(version) is not int or version < 1:
            raise MigratableError(f"versions are whole numbers from 1 on, not {version!r}")
        if not name or not isinstance(name, str):
            raise MigratableError("a state needs a name")
        changes = {
            step: tuple(change) if isinstance(change, tuple | list) else (change,)
            for step, change in (history or {}).items()
        }
        oldest = version
        while oldest > 1 and oldest in changes:
            oldest -= 1
        unreached = sorted(step for step in changes if not oldest < step <= version)
        if unreached:
            missing = f"; version {oldest} is missing" if unreached[-1] < oldest else ""
            raise MigratableError(
                f"the history of {name!r} has version {unreached[-1]}, but its versions "
                f"{oldest + 1}..{version} are what leads to {version}{missing}"
            )
        minimum = oldest if minimum_version is None else minimum_version
        if not oldest <= minimum <= version:
            raise MigratableError(
                f"{name!r} cannot be read from version {minimum} on: its history reaches back to "
                f"{oldest}, and it is now at {version}"
            )
        own = writer or cls.__module__.partition(".")[0]
        declared = StateType(cls, name, version, changes, minimum, own, names)
        cls.__vmmig_state__ = declared  # type: ignore[attr-defined]
        _STATES[name] = declared
        return cls

    return declare


def subsection(
    *,
    default: Any = attrs.NOTHING,
    factory: Callable[[], Any] | None = None,
    needed: Callable[[Any], bool] | None = None,
) -> Any:
    """An attrs field that is written only when it is needed; its type is a state of its own.

    A reader that does not know it can still restore every state in which it is not needed.

    Args:
        default: What it is where it was not written.
        factory: What makes that, for each state anew.
        needed: Whether a state needs it; else, whether it is another than what it is by default.

    >>> from vmmig.state import U8, peek
    >>> @versioned("serial/fifo", 1)
    ... @attrs.define
    ... class Fifo:
    ...     received: list[U8] = attrs.field(factory=list)
    >>> @versioned("serial", 1)
    ... @attrs.define
    ... class Serial:
    ...     lcr: U8 = 0
    ...     fifo: Fifo = subsection(factory=Fifo)
    >>> peek(save_state("com1", Serial()).section("state").snapshot).fields
    {'lcr': 0}
    >>> load_state(save_state("com1", Serial(fifo=Fifo([65]))), Serial)
    Serial(lcr=0, fifo=Fifo(received=[65]))
    """
    if factory is not None:
        default = attrs.Factory(factory)
    return attrs.field(default=default, metadata={_SUBSECTION: True, "vmmig.needed": needed})


def state_type(thing: Any) -> StateType:
    """What is declared of a state's class, or of an object of it.

    Raises:
        MigratableError: It is not declared to be a state.

    >>> state_type(3)
    Traceback (most recent call last):
    vmmig.errors.MigratableError: int is no state; the decorator vmmig.versioned makes a class one
    """
    cls = thing if isinstance(thing, type) else type(thing)
    declared: StateType | None = vars(cls).get("__vmmig_state__")
    if declared is None:
        raise MigratableError(
            f"{cls.__qualname__} is no state; the decorator vmmig.versioned makes a class one"
        )
    return declared


def declared_states() -> dict[str, StateType]:
    """Every state that is declared in this process, by its name.

    >>> @versioned("rtc", 1)
    ... @attrs.define
    ... class Rtc:
    ...     seconds: int = 0
    >>> declared_states()["rtc"]
    <state 'rtc', version 1>
    """
    return dict(sorted(_STATES.items()))


@contextmanager
def writing_versions(targets: Mapping[str, int | Target]) -> Iterator[None]:
    """Within it, the named states are written as the given older versions.

    So a new source can send to an old destination; `vmmig.schema.load_schema(...).targets` has
    what the schema of a release can read.

    Raises:
        SnapshotError: When a state is saved that the older version has no place for.

    >>> from vmmig.state import Added, peek
    >>> @versioned("mouse", 2, history={2: Added("wheel", 0)})
    ... @attrs.define
    ... class Mouse:
    ...     x: int = 0
    ...     wheel: int = 0
    >>> with writing_versions({"mouse": 1}):
    ...     old = save_state("mouse", Mouse(x=5))
    >>> peek(old.section("state").snapshot).fields
    {'x': 5}
    """
    wanted = {
        name: target if isinstance(target, Target) else Target(target)
        for name, target in targets.items()
    }
    token = _targets.set(wanted)
    try:
        yield
    finally:
        _targets.reset(token)


def save_state(id: str, value: Any, *, section: str = "state") -> Snapshot:
    """A snapshot of the component ``id`` with nothing in it but this state.

    Raises:
        SnapshotError: A field does not hold what its type says; the error names it.

    >>> @versioned("power", 1)
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> save_state("power", Power())
    Snapshot('power', snapshot_data: ['state': 29 bytes])
    >>> save_state("power", Power(is_off=0))
    Traceback (most recent call last):
    vmmig.errors.SnapshotError: Failed to snapshot migratable component: state 'power': is_off: \
a bool is needed, not int
    """
    snapshot = Snapshot(id)
    put_state(snapshot, value, section=section)
    return snapshot


def load_state(snapshot: Snapshot, cls: type[T], *, section: str = "state") -> T:
    """The state of a snapshot that has nothing in it but this state.

    Bytes of 64 KiB and more come back as views of what is in the snapshot, arrays read-only.

    Raises:
        RestoreError: It is not there, there is more, or it does not fit; the error names the
            section, the field, the versions found and supported, and who wrote it.

    >>> @versioned("power", 1)
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> load_state(save_state("power", Power(True)), Power)
    Power(is_off=True)
    """
    snapshot.take(section, *(id for id in snapshot.snapshot_data if belongs(id, section)))
    return get_state(snapshot, cls, section=section)


def put_state(snapshot: Snapshot, value: Any, *, section: str = "state") -> None:
    """Add a state to a snapshot, in place of one that is there.

    Raises:
        SnapshotError: A field does not hold what its type says; the error names it.

    >>> @versioned("power", 1)
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> snapshot = Snapshot("power")
    >>> put_state(snapshot, Power())
    >>> list(snapshot.snapshot_data)
    ['state']
    """
    declared = state_type(value)
    _check_id(section)
    try:
        body = declared.converter.unstructure(value)
        sections = pack_state(section, declared.name, declared.writer, body)
    except (Misfit, MigratableError) as error:
        cause = error.cause if isinstance(error, MigratableError) else error
        raise SnapshotError(f"state {declared.name!r}: {cause}") from error
    except Exception as error:
        raise SnapshotError(f"state {declared.name!r} cannot be written: {error!r}") from error
    for id in [id for id in snapshot.snapshot_data if belongs(id, section)]:
        del snapshot.snapshot_data[id]
    for id, payload in sections:
        snapshot.add_data_section(SnapshotDataSection(id, payload))


def get_state(snapshot: Snapshot, cls: type[T], *, section: str = "state") -> T:
    """A state from among other sections of a snapshot.

    Raises:
        RestoreError: As by `load_state`, except that other sections are not looked at.

    >>> @versioned("power", 1)
    ... @attrs.define
    ... class Power:
    ...     is_off: bool = False
    >>> get_state(save_state("power", Power(True)), Power)
    Power(is_off=True)
    """
    declared = state_type(cls)
    payload = snapshot.section(section).snapshot
    large = None
    if declared.has_buffers or len(snapshot.snapshot_data) > 1:
        large = LargeSections(snapshot, section)
    name, version, writer = "", None, None
    try:
        name, version, writer, fields, present = unpacked(payload, large)
        if name != declared.name:
            raise Misfit(f"it is a state {name!r}, and a state {declared.name!r} is needed")
        if large is not None and large.unused:
            raise Misfit(f"the section {min(large.unused)!r} belongs to nothing in it")
        value: T = declared.structure((version, fields, present), cls)
        return value
    except Misfit as misfit:
        found = f"version {version} of {name!r}, written by {writer!r}: " if version else ""
        raise DecodeError(
            f"{found}{misfit}",
            where=f"section {section!r} of {snapshot.id!r}",
            version=version,
            writer=writer,
        ) from (misfit.__cause__ or misfit)
    except MigratableError:
        raise
    except Exception as error:
        what = "it nests too deeply" if isinstance(error, RecursionError) else repr(error)
        raise DecodeError(what, where=f"section {section!r} of {snapshot.id!r}") from error


def _check_id(section: str) -> None:
    if "." in section or "[" in section:
        raise MigratableError(
            f"a state cannot stand in a section {section!r}: with '.' and '[' begin those of the "
            "large bytes of another"
        )


def _subsection(cls: type[Any], attribute: Any, hints: Mapping[str, Any]) -> _Subsection:
    where = f"{cls.__qualname__}.{attribute.name}"
    default = attribute.default
    if default is attrs.NOTHING:
        raise MigratableError(f"{where} is a subsection and needs a default")
    if isinstance(default, attrs.Factory) and default.takes_self:  # type: ignore[arg-type]
        raise MigratableError(f"{where} is a subsection: its default must need no other field")
    make = default.factory if isinstance(default, attrs.Factory) else lambda: default  # type: ignore[arg-type]
    options = typing.get_args(hints[attribute.name]) or (hints[attribute.name],)
    states = [option for option in options if option is not type(None)]
    if len(states) != 1 or "__vmmig_state__" not in vars(states[0]):
        raise MigratableError(f"{where} is a subsection: its type must be a state of its own")
    declared = state_type(states[0])
    needed = attribute.metadata["vmmig.needed"] or (
        lambda value: _differ(declared, getattr(value, attribute.name), make())
    )
    return _Subsection(attribute.name, declared, make, needed)


def _differ(declared: StateType, a: Any, b: Any) -> bool:
    try:
        return bool(a != b)
    except Exception:  # arrays have no truth; their bytes can be compared
        packed = [pack_state("", "", "", declared.kind.write(each)) for each in (a, b)]
        return packed[0] != packed[1]
