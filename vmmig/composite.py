"""Many components as one: a machine is paused, saved and restored whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import attrs

from vmmig.errors import (
    ContractError,
    MigratableError,
    MigratableErrorGroup,
    PauseError,
    PauseErrorGroup,
    RestoreError,
    RestoreErrorGroup,
    ResumeError,
    ResumeErrorGroup,
    SnapshotError,
    SnapshotErrorGroup,
    relocated,
)
from vmmig.migration import UrlTransport
from vmmig.snapshot import Snapshot
from vmmig.traits import Snapshottable
from vmmig.verify import verify

_GROUPS: dict[type[MigratableError], type[MigratableErrorGroup]] = {
    PauseError: PauseErrorGroup,
    ResumeError: ResumeErrorGroup,
    SnapshotError: SnapshotErrorGroup,
    RestoreError: RestoreErrorGroup,
}


@attrs.frozen
class RestoreReport:
    """What a restore did with each part of a snapshot; the entries are component paths.

    Attributes:
        consumed: Handed to the component of that path.
        missing: Components that the snapshot says nothing about; they kept their state.
        unknown: Parts of the snapshot that no component took; they are in the next snapshot.

    >>> RestoreReport(consumed=("vm/cpu",)).unknown
    ()
    """

    consumed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class Composite(UrlTransport):
    """Components under one id, which together are one `Migratable`.

    The components start in the order in which they are given, except that each starts after
    those it depends on. `resume`, `snapshot` and `restore` go in that order, `pause` in the
    reverse. When one fails, those already done are undone in reverse, and the error names the
    component that failed, with the state of each in ``component_states``: ``running``,
    ``paused``, ``as before``, ``restored``, or ``unknown`` where it broke the contract.

    To undo a restore, each component but the last has its state taken before it is restored:
    give the one with the most memory last.

    Args:
        id: The composite's id.
        components: The parts, with ids that differ; nested composites are parts like any other.
        depends_on: For a component's id, the ids of those that must start before it.

    Raises:
        ContractError: A part is not a `Snapshottable`, two share an id, a dependency names no
            part, or the dependencies form a cycle, which is named.

    >>> from vmmig.snapshot import SnapshotDataSection
    >>> class Counter:
    ...     def __init__(self, id): self._id, self.n = id, 0
    ...     def id(self): return self._id
    ...     def pause(self): print("pause", self._id)
    ...     def resume(self): print("resume", self._id)
    ...     def snapshot(self):
    ...         snapshot = Snapshot(self._id)
    ...         snapshot.add_data_section(SnapshotDataSection("n", b"%d" % self.n))
    ...         return snapshot
    ...     def restore(self, snapshot): self.n = int(snapshot.section("n").snapshot)
    >>> machine = Composite("pair", [Counter("a"), Counter("b")], depends_on={"a": ["b"]})
    >>> machine.pause()
    pause a
    pause b
    >>> saved = machine.snapshot()
    >>> machine.resume()
    resume b
    resume a
    >>> machine.pause()
    pause a
    pause b
    >>> machine.restore(saved).consumed
    ('pair/b', 'pair/a')
    """

    def __init__(
        self,
        id: str,
        components: Iterable[Snapshottable],
        *,
        depends_on: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self._id = id
        named: dict[str, Snapshottable] = {}
        for component in components:
            verify(component, Snapshottable)
            try:
                name = component.id()
            except Exception as error:
                raise ContractError(f"the id of a part of {id!r} cannot be had: {error}") from error
            if not isinstance(name, str):
                raise ContractError(f"the id of a part of {id!r} is not a str: {name!r}")
            if name in named:
                raise ContractError(f"{id!r} has two parts with the id {name!r}")
            named[name] = component
        self._components = {name: named[name] for name in _start_order(id, named, depends_on or {})}
        self._state: Literal["running", "paused", "mixed"] | None = None
        self._kept = Snapshot(id)

    def id(self) -> str:
        """The composite's id."""
        return self._id

    @property
    def components(self) -> Mapping[str, Snapshottable]:
        """The parts by id, in the order in which they start."""
        return MappingProxyType(self._components)

    def pause(self) -> None:
        """Pause every part, the last to start first; nothing happens if all are paused already.

        Raises:
            PauseError: A part could not be paused; those paused before it run again.
        """
        if self._state != "paused":
            order = [*reversed(self._components.items())]
            self._all_or_none(order, "pause", PauseError, "resume", ResumeError)

    def resume(self) -> None:
        """Resume every part in starting order; nothing happens if all were resumed already.

        Raises:
            ResumeError: A part could not be resumed; those resumed before it are paused again.
        """
        if self._state != "running":
            order = [*self._components.items()]
            self._all_or_none(order, "resume", ResumeError, "pause", PauseError)

    def snapshot(self) -> Snapshot:
        """The snapshots of all parts, and what the last restore kept for a newer version.

        Raises:
            SnapshotError: A part's snapshot failed or has another id, or the composite runs.
        """
        return self._snapshot_of(self._components)

    def _snapshot_of(self, names: Iterable[str]) -> Snapshot:
        self._refuse_running(SnapshotError)
        snapshot = Snapshot(self._id, dict(self._kept.snapshots), dict(self._kept.snapshot_data))
        for name in names:
            try:
                snapshot.add_snapshot(_snapshot_of(name, self._components[name]))
            except BaseException as error:
                same = "as before"
                self._undo(SnapshotError, error, name, [], failed=same, undone=same, left=same)
        return snapshot

    def restore(
        self,
        snapshot: Snapshot,
        *,
        missing: Literal["error", "skip"] = "error",
        unknown: Literal["error", "keep"] = "error",
    ) -> RestoreReport:
        """Restore every part from its child of ``snapshot``, or none of them.

        What is missing or unknown in a composite among the parts is treated in the same way.

        Args:
            snapshot: As `snapshot` gave it.
            missing: ``skip`` leaves a part that the snapshot does not know as it is.
            unknown: ``keep`` carries children and sections that belong to no part over into the
                next `snapshot`, so that they are not lost to a version that knows them.

        Raises:
            RestoreError: The snapshot does not fit, the composite runs, or a part failed;
                every part is as it was before.
        """
        for name, policy, other in (("missing", missing, "skip"), ("unknown", unknown, "keep")):
            if policy not in ("error", other):
                raise RestoreError(
                    f"{name} must be 'error' or {other!r}, not {policy!r}", component_path=self._id
                )
        self._refuse_running(RestoreError)
        report = self._fit(snapshot, missing, unknown)
        todo = [name for name in self._components if name in snapshot.snapshots]
        before: dict[str, Snapshot] = {}
        consumed: list[str] = []
        for name in todo:
            component = self._components[name]
            try:
                backup = self._backup(name) if name != todo[-1] else None
                nested = _restore(component, snapshot.snapshots[name], missing, unknown)
            except BaseException as error:
                self._undo(
                    RestoreError,
                    error,
                    name,
                    [(done, self._restorer(done, before[done])) for done in reversed(before)],
                    failed="as before",
                    undone="as before",
                    left="restored",
                )
            if backup is not None:
                before[name] = backup
            path = f"{self._id}/{name}"
            consumed.append(path)
            if isinstance(nested, RestoreReport):
                report = attrs.evolve(
                    report,
                    missing=report.missing + _below(self._id, nested.missing),
                    unknown=report.unknown + _below(self._id, nested.unknown),
                )
                consumed.extend(_below(self._id, nested.consumed))
        self._state = "paused"
        self._kept = Snapshot(
            self._id,
            {id: s for id, s in snapshot.snapshots.items() if id not in self._components},
            dict(snapshot.snapshot_data),
        )
        return attrs.evolve(report, consumed=tuple(consumed))

    def _refuse_running(self, kind: type[MigratableError]) -> None:
        if self._state in ("running", "mixed"):
            what = "running" if self._state == "running" else "neither running nor paused"
            raise kind(f"it is {what}; pause it first", component_path=self._id)

    def _fit(self, snapshot: Snapshot, missing: str, unknown: str) -> RestoreReport:
        """What does not fit, before anything is touched."""
        if not isinstance(snapshot, Snapshot):
            raise RestoreError(
                f"a Snapshot is needed, not {type(snapshot).__name__}", component_path=self._id
            )
        if snapshot.id != self._id:
            raise RestoreError(
                f"the snapshot is of {snapshot.id!r}, not of {self._id!r}", component_path=self._id
            )
        without = [name for name in self._components if name not in snapshot.snapshots]
        strange = [id for id in snapshot.snapshots if id not in self._components]
        sections = [*snapshot.snapshot_data]
        wrong = []
        if without and missing == "error":
            wrong.append(f"it has nothing for {_names(without)} (missing='skip' allows it)")
        if (strange or sections) and unknown == "error":
            parts = [f"snapshots {_names(strange)}"] if strange else []
            parts += [f"sections {_names(sections)}"] if sections else []
            wrong.append(f"no component knows its {' and '.join(parts)} (unknown='keep' allows it)")
        if wrong:
            raise RestoreError(
                "the snapshot does not fit: " + "; ".join(wrong), component_path=self._id
            )
        return RestoreReport(
            missing=tuple(f"{self._id}/{name}" for name in without),
            unknown=tuple(f"{self._id}/{id}" for id in strange)
            + tuple(f"{self._id}[{id!r}]" for id in sections),
        )

    def _backup(self, name: str) -> Snapshot:
        try:
            return _snapshot_of(name, self._components[name])
        except Exception as error:
            raise RestoreError(
                f"its present state could not be taken, to put it back after a failure: {error}"
            ) from error

    def _restorer(self, name: str, before: Snapshot) -> Callable[[], object]:
        return lambda: _restore(self._components[name], before, "error", "keep")

    def _all_or_none(
        self,
        order: list[tuple[str, Snapshottable]],
        action: Literal["pause", "resume"],
        kind: type[MigratableError],
        reverse: Literal["pause", "resume"],
        reverse_kind: type[MigratableError],
    ) -> None:
        states: dict[str, Literal["running", "paused"]] = {"pause": "paused", "resume": "running"}
        before, self._state = self._state, "mixed"
        untouched = states[reverse] if before in ("running", "paused") else "as before"
        for k, (name, component) in enumerate(order):
            try:
                getattr(component, action)()
            except BaseException as error:
                try:
                    self._undo(
                        kind,
                        error,
                        name,
                        [(done, getattr(part, reverse)) for done, part in reversed(order[:k])],
                        failed=untouched,
                        undone=states[reverse],
                        left=states[action],
                        undo_kind=reverse_kind,
                        untouched=untouched,
                    )
                except MigratableError as failure:
                    if {*failure.component_states.values()} <= {states[reverse], "as before"}:
                        self._state = before
                    raise
        self._state = states[action]

    def _undo(
        self,
        kind: type[MigratableError],
        error: BaseException,
        name: str,
        undo: Iterable[tuple[str, Callable[[], object]]],
        *,
        failed: str,
        undone: str,
        left: str,
        undo_kind: type[MigratableError] | None = None,
        untouched: str = "as before",
    ) -> NoReturn:
        """Undo what was done before ``name`` failed with ``error``, and raise what happened.

        A part that failed with the error its contract names is in the state the contract
        promises (``failed``; ``left`` if undoing failed); after any other error, nobody knows.
        """
        undo_kind = undo_kind or kind
        states = dict.fromkeys(self._components, untouched)
        states[name] = failed if isinstance(error, kind) else "unknown"
        failures = [(kind, error, name)] if isinstance(error, Exception) else []
        for done, action in undo:
            states[done] = undone
            try:
                action()
            except Exception as problem:
                states[done] = left if isinstance(problem, undo_kind) else "unknown"
                failures.append((undo_kind, problem, done))
        errors = [self._located(*failure) for failure in failures]
        by_path = {f"{self._id}/{part}": state for part, state in states.items()}
        for known in errors:
            by_path.update(known.component_states)
        if not isinstance(error, Exception):
            for undoing in errors:
                error.add_note(f"while undoing: {undoing}")
            raise error
        if len(errors) == 1:
            errors[0].component_states = by_path
            raise errors[0]
        raise _GROUPS[kind](
            f"{name!r} failed, and so did undoing what was done before",
            errors,
            component_path=self._id,
            component_states=by_path,
        )

    def _located(self, kind: type[MigratableError], error: Exception, name: str) -> MigratableError:
        """``error`` as one of ``kind``, with the path of the part ``name`` it came from."""
        if isinstance(error, kind):
            # An error class of the component's own may be one that cannot be copied.
            with suppress(Exception):
                return relocated(error, self._id, name)
        return kind(error, component_path=f"{self._id}/{name}")


def _snapshot_of(name: str, component: Snapshottable) -> Snapshot:
    snapshot: Any = component.snapshot()
    if not isinstance(snapshot, Snapshot):
        raise SnapshotError(f"snapshot() gave a {type(snapshot).__name__}, not a Snapshot")
    if snapshot.id != name:
        raise SnapshotError(f"snapshot() gave the id {snapshot.id!r}, but id() is {name!r}")
    return snapshot


def _restore(
    component: Snapshottable,
    snapshot: Snapshot,
    missing: Literal["error", "skip"],
    unknown: Literal["error", "keep"],
) -> object:
    if isinstance(component, Composite):
        return component.restore(snapshot, missing=missing, unknown=unknown)
    return component.restore(snapshot)


def _start_order(
    id: str, names: Iterable[str], depends_on: Mapping[str, Iterable[str]]
) -> Iterator[str]:
    """Each name after those it depends on, and else in the order given."""
    waiting = {name: [*depends_on.get(name, ())] for name in names}
    strange = {*depends_on, *(need for needs in waiting.values() for need in needs)} - {*waiting}
    if strange:
        raise ContractError(f"a dependency of {id!r} names {_names(strange)}, which it has not")
    done: set[str] = set()
    for name in waiting:
        trail = [name]
        while trail:
            need = next((need for need in waiting[trail[-1]] if need not in done), None)
            if need is None:
                if trail[-1] not in done:
                    done.add(trail[-1])
                    yield trail[-1]
                trail.pop()
            elif need in trail:
                cycle = " -> ".join([*trail[trail.index(need) :], need])
                raise ContractError(f"the dependencies of {id!r} form a cycle: {cycle}")
            else:
                trail.append(need)


def _below(id: str, paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{id}/{path}" for path in paths)


def _names(ids: Iterable[str]) -> str:
    return ", ".join(repr(id) for id in sorted(ids))
