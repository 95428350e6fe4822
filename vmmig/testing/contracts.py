"""The laws of a component, as tests: one call proves a component or shows how it breaks.

`contract` makes a pytest class with one test for each law, `state_machine` a hypothesis state
machine that mixes everything that can happen to a component. Both need only a factory; what they
can find grows with the operations they may call and with what they may observe.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import attrs
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmmig.codec import dumps, loads
from vmmig.errors import ContractError, MigratableError, RestoreError
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Snapshot, SnapshotDataSection, diff, raw_view
from vmmig.traits import LiveMigratable, Snapshottable, Transportable
from vmmig.verify import verify

Operations = Mapping[str, Sequence[Any]]
"""Names of operations to what they are called with: see `contract`."""

_MAX_CALLS = 16
_HOUR_S = 3600
_READS_BEFORE_TIME_MOVES = 10_000
_UNKNOWN = "vmmig-unknown"


class BrokenLawError(AssertionError):
    """A component broke a law; the text says which, how, and by which calls.

    >>> error = BrokenLawError("a snapshot is a value", "it changed", ["c = factory()"])
    >>> print(error)
    it changed
    <BLANKLINE>
    The law: a snapshot is a value.
    The calls that show it:
        c = factory()
    """

    def __init__(self, law: str, what: str, script: Sequence[str] = ()) -> None:
        super().__init__(law, what, script)
        self.law = law
        self.what = what
        self.script = tuple(script)

    def __str__(self) -> str:
        calls = "".join(f"\n    {line}" for line in self.script)
        shown = f"\nThe calls that show it:{calls}" if calls else ""
        return f"{self.what}\n\nThe law: {self.law}.{shown}"


def contract(
    factory: Callable[[], Any],
    *,
    operations: Operations | None = None,
    observe: Callable[[Any], object] | None = None,
    runs_by_itself: bool = False,
) -> type:
    """A pytest class that proves a component: one test for each law.

    Bind it to a name that pytest collects, such as ``TestDisk = contract(Disk)``.

    Args:
        factory: Makes a new component, in the same state each time: a class, or any callable.
        operations: What the component does besides being migrated: the name of a method, with
            hypothesis strategies for its positional arguments; or any name, with a function
            that takes the component first, then the strategies. What an operation returns or
            raises is compared, too.
        observe: What can be seen of a component's state, as values that compare equal when the
            states are equal. It is asked only while the component is paused. Without it, only
            operations and snapshots tell one state from another.
        runs_by_itself: The component's state changes while it is not paused, also without
            operations: it has a thread, or a clock of the host. Then only what is seen in one
            pause is compared, and what operations return.

    Raises:
        InvalidArgument: An argument is not what it should be.

    >>> class Counter:
    ...     def __init__(self): self.n = 0
    ...     def id(self): return "counter"
    ...     def pause(self): pass
    ...     def resume(self): pass
    ...     def add(self, k): self.n += k; return self.n
    ...     def snapshot(self):
    ...         section = SnapshotDataSection("n", b"%d" % self.n)
    ...         return Snapshot("counter", {}, {"n": section})
    ...     def restore(self, snapshot):
    ...         (n,) = snapshot.take("n")
    ...         try:
    ...             self.n = int(bytes(n))
    ...         except ValueError as error:
    ...             raise RestoreError(error) from error
    >>> TestCounter = contract(Counter, operations={"add": [st.integers(0, 9)]})
    >>> TestCounter().test_a_snapshot_is_a_value()
    """
    subject = _Subject.of(factory, operations, observe, runs_by_itself)
    caller = sys._getframe(1).f_globals.get("__name__", __name__)
    members: dict[str, Any] = {
        "__doc__": f"The laws of {subject.name}.",
        "__module__": caller,
        "vmmig_component": subject.name,
        "vmmig_notes": subject.notes,
    }
    for law in _LAWS:
        if law.applies(subject):
            members[law.test_name] = _as_test(law, subject)
    machine = _machine(subject)

    def any_sequence(self: Any) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        run_state_machine_as_test(machine, settings=_settings(0.4, stateful_step_count=20))

    any_sequence.vmmig_law = "any sequence of calls keeps the state"  # type: ignore[attr-defined]
    members["test_any_sequence_of_calls_keeps_the_state"] = any_sequence
    return type(f"Test{subject.name}", (), members)


def state_machine(
    factory: Callable[[], Any],
    *,
    operations: Operations | None = None,
    observe: Callable[[Any], object] | None = None,
    runs_by_itself: bool = False,
) -> type[RuleBasedStateMachine]:
    """A hypothesis state machine that mixes a component's operations with its migration.

    It pauses, snapshots, restores, resumes, sends and receives it, and asks for its dirty log
    where it has one, in any order, and compares it with what it was and with a twin to which
    only the operations happen. A failure shows the calls as a script that can be run.

    Args:
        factory: As for `contract`.
        operations: As for `contract`.
        observe: As for `contract`.
        runs_by_itself: As for `contract`.

    Raises:
        InvalidArgument: An argument is not what it should be.

    >>> from vmmig import Composite
    >>> machine = state_machine(lambda: Composite("empty", []))
    >>> TestEmpty = machine.TestCase
    """
    return _machine(_Subject.of(factory, operations, observe, runs_by_itself))


@attrs.frozen
class _Call:
    """One call of an operation."""

    name: str
    function: Callable[..., Any] | None
    args: tuple[Any, ...]

    def on(self, component: Any) -> Any:
        if self.function is not None:
            return self.function(component, *self.args)
        return getattr(component, self.name)(*self.args)

    def text(self, actor: str) -> str:
        args = ", ".join(map(repr, self.args))
        if self.function is None:
            return f"{actor}.{self.name}({args})"
        return f"operations[{self.name!r}][0]({actor}{', ' if args else ''}{args})"

    def __repr__(self) -> str:
        return self.text("component")


@attrs.frozen
class _Subject:
    """A component under test."""

    factory: Callable[[], Any]
    name: str
    observe: Callable[[Any], object] | None
    runs_by_itself: bool
    calls: st.SearchStrategy[_Call] | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        factory: Callable[[], Any],
        operations: Operations | None,
        observe: Callable[[Any], object] | None,
        runs_by_itself: bool,
    ) -> _Subject:
        if not callable(factory):
            raise InvalidArgument(f"factory={factory!r} is not callable")
        if observe is not None and not callable(observe):
            raise InvalidArgument(f"observe={observe!r} is not callable")
        name = getattr(factory, "__name__", type(factory).__name__).strip("<>").title()
        if isinstance(factory, type):
            name = factory.__name__
        calls = [_calls(key, how) for key, how in (operations or {}).items()]
        notes: tuple[str, ...] = () if calls else ("no operations",)
        notes += () if observe else ("nothing observed but operations and snapshots",)
        return cls(
            factory, name, observe, runs_by_itself, st.one_of(calls) if calls else None, notes
        )

    @property
    def plans(self) -> st.SearchStrategy[list[_Call]]:
        """Operations to do, one after the other."""
        if self.calls is None:
            return st.just([])
        return st.lists(self.calls, max_size=_MAX_CALLS)


def _calls(name: str, how: Any) -> st.SearchStrategy[_Call]:
    parts = [how] if isinstance(how, st.SearchStrategy) or callable(how) else how
    if not isinstance(parts, Sequence) or isinstance(parts, (str, bytes)):
        raise InvalidArgument(f"operations[{name!r}]={how!r} is not a sequence of strategies")
    function = None
    if parts and not isinstance(parts[0], st.SearchStrategy):
        function, parts = parts[0], parts[1:]
        if not callable(function):
            raise InvalidArgument(f"operations[{name!r}] begins with {function!r}")
    for part in parts:
        if not isinstance(part, st.SearchStrategy):
            raise InvalidArgument(f"operations[{name!r}] has {part!r}, which is no strategy")
    return st.builds(_Call, st.just(name), st.just(function), st.tuples(*parts))


class _Run:
    """One attempt to break a law: its components and the script of what was called."""

    def __init__(self, subject: _Subject, law: str) -> None:
        self.subject = subject
        self.law = law
        self.script: list[str] = []

    def new(self, name: str) -> _Actor:
        self.script.append(f"{name} = factory()")
        return _Actor(self, name, self.subject.factory())

    def fail(self, what: str) -> NoReturn:
        raise BrokenLawError(self.law, what, self.script)

    def same(self, before: object, after: object, what: str) -> None:
        if before != after:
            self.fail(f"{what}:{_difference(before, after)}")

    def same_snapshots(self, before: Snapshot, after: Snapshot, what: str) -> None:
        self.same_bytes(dumps(before), dumps(after), what)

    def same_bytes(self, before: bytes, after: bytes, what: str) -> None:
        if before != after:
            lines = [str(difference) for difference in diff(loads(before), loads(after))]
            self.fail(what + ":" + "".join(f"\n  - {line}" for line in lines[:9]))


class _Actor:
    """A component of a run: what is done to it is written down."""

    def __init__(self, run: _Run, name: str, component: Any) -> None:
        self.run = run
        self.name = name
        self.component = component

    def write(self, line: str) -> None:
        self.run.script.append(line)

    def must(self, action: str) -> None:
        """Pause or resume it."""
        self.write(f"{self.name}.{action}()")
        try:
            getattr(self.component, action)()
        except Exception as error:
            self.run.fail(f"{action}() raised {_named(error)}")

    def pause(self) -> None:
        self.must("pause")

    def resume(self) -> None:
        self.must("resume")

    def do(self, call: _Call) -> tuple[str, object]:
        self.write(call.text(self.name))
        try:
            result = call.on(self.component)
        except Exception as error:
            return "raised", _named(error)
        return "returned", _frozen(result)

    def do_all(self, calls: list[_Call]) -> None:
        for call in calls:
            self.do(call)

    def snapshot(self, name: str = "saved") -> Snapshot:
        self.write(f"{name} = {self.name}.snapshot()")
        try:
            snapshot = self.component.snapshot()
            if isinstance(snapshot, Snapshot):
                dumps(snapshot)
        except Exception as error:
            self.run.fail(f"snapshot() of a paused component failed: {_named(error)}")
        if not isinstance(snapshot, Snapshot):
            self.run.fail(f"snapshot() gave a {type(snapshot).__name__}, not a Snapshot")
        return snapshot

    def restore(self, snapshot: Snapshot, name: str = "saved") -> object:
        self.write(f"{self.name}.restore({name})")
        try:
            return self.component.restore(snapshot)
        except Exception as error:
            self.run.fail(f"restore() of a snapshot of its own failed: {_named(error)}")

    def sent_and_received(self, snapshot: Snapshot, name: str = "saved") -> Snapshot:
        with tempfile.TemporaryDirectory() as folder:
            url = str(Path(folder, "saved.vmsnap"))
            self.write(f"{self.name}.send({name}, 'saved.vmsnap')")
            self.write(f"{name} = {self.name}.recv('saved.vmsnap')")
            try:
                self.component.send(snapshot, url)
                received: Snapshot = self.component.recv(url)
                dumps(received)
            except Exception as error:
                self.run.fail(f"sending and receiving failed: {_named(error)}")
        return received

    def try_to_restore(self, snapshot: Snapshot, name: str) -> tuple[bool, object]:
        """Whether a snapshot that may be refused was accepted, and what restore returned."""
        self.write(f"{self.name}.restore({name})")
        try:
            return True, self.component.restore(snapshot)
        except RestoreError:
            return False, None
        except Exception as error:
            self.run.fail(f"restore() raised {_named(error)}, not a RestoreError")

    def subject_is_deterministic(self, twin: _Actor) -> bool:
        """Whether two new components are in the same state, as far as can be seen."""
        for actor in (self, twin):
            actor.pause()
        alike = self.look() == twin.look()
        for actor in (self, twin):
            actor.resume()
        return alike

    def look(self) -> object:
        """What is seen of it while it is paused."""
        if self.run.subject.observe is not None:
            self.write(f"observe({self.name})")
            return _frozen(self.run.subject.observe(self.component))
        return dumps(self.snapshot("_"))


@attrs.frozen
class _Law:
    """One law: its name, and a check that tries to break it."""

    name: str
    check: Callable[..., None]
    effort: float
    applies: Callable[[_Subject], bool]

    @property
    def test_name(self) -> str:
        return "test_" + self.name.replace(" ", "_").replace(",", "").replace("-", "_")


_LAWS: list[_Law] = []


def _law(
    name: str, *, effort: float = 0.5, applies: Callable[[_Subject], bool] = lambda _: True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        _LAWS.append(_Law(name, check, effort, applies))
        return check

    return register


def _settings(effort: float, **more: Any) -> settings:
    return settings(
        max_examples=max(1, round(settings().max_examples * effort)),
        deadline=None,
        suppress_health_check=[*HealthCheck],
        **more,
    )


def _as_test(law: _Law, subject: _Subject) -> Callable[..., None]:
    @_settings(law.effort)
    @given(first=subject.plans, later=subject.plans, other=subject.plans, data=st.data())
    def test(
        self: Any, first: list[_Call], later: list[_Call], other: list[_Call], data: st.DataObject
    ) -> None:
        law.check(_Run(subject, law.name), first, later, other, data)

    test.__name__ = law.test_name
    test.__qualname__ = f"Test{subject.name}.{law.test_name}"
    test.__doc__ = f"{law.name[0].upper()}{law.name[1:]}."
    test.vmmig_law = law.name  # type: ignore[attr-defined]
    return test


@_law("structure", effort=0.01)
def _structure(run: _Run, *_: Any) -> None:
    subject = run.subject
    one, two = run.new("one"), run.new("two")
    if one.component is two.component:
        run.fail("the factory gave the same object twice; it must make a new one each time")
    protocols: list[type] = [Snapshottable]
    if _is_transportable(one.component):
        protocols.append(Transportable)
    for protocol in protocols:
        try:
            verify(one.component, protocol, defaults="error")
        except ContractError as error:
            run.fail(str(error))
    ids = [one.component.id(), one.component.id(), two.component.id()]
    one.write("one.id(), one.id(), two.id()")
    if not isinstance(ids[0], str):
        run.fail(f"id() gave {ids[0]!r}, which is not a str")
    if len({*ids}) > 1:
        run.fail(f"id() is not always the same: {', '.join(map(repr, ids))}")
    one.pause()
    snapshot = one.snapshot()
    if snapshot.id != ids[0]:
        run.fail(f"snapshot() has the id {snapshot.id!r}, but id() is {ids[0]!r}")
    if subject.observe is not None:
        one.look()


@_law("a snapshot changes nothing")
def _snapshot_changes_nothing(run: _Run, first: list[_Call], *_: Any) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    before = one.look()
    with _watched(one.component, "resume") as resumed:
        one.snapshot()
    if resumed:
        run.fail("snapshot() resumed the component, which was paused")
    run.same(before, one.look(), "snapshot() changed what is observed")


@_law("equal states give equal bytes")
def _equal_bytes(run: _Run, first: list[_Call], *_: Any) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    saved = dumps(one.snapshot())
    again = dumps(one.snapshot("again"))
    run.same_bytes(saved, again, "two snapshots of the same state differ")


@_law("a snapshot is a value", effort=0.6)
def _snapshot_is_a_value(
    run: _Run, first: list[_Call], later: list[_Call], other: list[_Call], *_: Any
) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    data = dumps(saved)
    one.resume()
    one.do_all(later)
    one.pause()
    one.snapshot("later")
    run.same_bytes(data, dumps(saved), "the snapshot changed when the component went on")
    before = one.look()
    saved = one.snapshot("saved")
    _scribble(one, saved)
    run.same(before, one.look(), "the component changed when its snapshot was changed")
    given = _copied(loads(data), one.snapshot("kind"))
    data = dumps(given)
    two = run.new("second")
    two.pause()
    two.restore(given, "copy_of_first")
    run.same_bytes(data, dumps(given), "restore() changed the snapshot it was given")
    before = two.look()
    _scribble(two, given, "copy_of_first")
    run.same(before, two.look(), "the component changed when the snapshot it was restored from was")
    given = loads(data)
    given = _copied(given, one.snapshot("kind"))
    two.restore(given, "copy_of_first")
    two.resume()
    two.do_all(other)
    two.pause()
    run.same_bytes(
        data, dumps(given), "the snapshot that was restored changed when the component went on"
    )


@_law("restore gives the same state", effort=1.5)
def _restore_gives_the_same(
    run: _Run, first: list[_Call], later: list[_Call], other: list[_Call], *_: Any
) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    seen = one.look()
    for kind in ("fresh", "used"):
        two = run.new(kind)
        if kind == "used":
            two.do_all(other)
        two.pause()
        if kind == "used":
            two.look()
            two.snapshot("_")
        with _watched(two.component, "resume") as resumed:
            two.restore(saved)
        if resumed:
            run.fail("restore() resumed the component, which was paused")
        run.same(seen, two.look(), f"a {kind} component is not what was saved")
        run.same_snapshots(
            saved, two.snapshot("again"), f"a {kind} component's snapshot is not what it restored"
        )
    run.same(seen, one.look(), "the component changed when another was restored from its snapshot")
    if not run.subject.runs_by_itself:
        one.resume()
        one.do_all(later)
        one.pause()
        one.restore(saved)
        run.same(seen, one.look(), "the component did not go back to what was saved")


@_law("a restored component behaves like the one that was saved", effort=1.5)
def _differential(
    run: _Run, first: list[_Call], later: list[_Call], other: list[_Call], *_: Any
) -> None:
    with _standing_time():
        one = run.new("component")
        one.do_all(first)
        one.pause()
        saved = one.snapshot()
        fresh, used = run.new("fresh"), run.new("used")
        used.do_all(other)
        for two in (fresh, used):
            two.pause()
            two.restore(saved)
        for actor in (one, fresh, used):
            actor.resume()
        for call in later:
            expected = one.do(call)
            for two in (fresh, used):
                run.same(expected, two.do(call), f"the {two.name} component behaves in another way")
        for actor in (one, fresh, used):
            actor.pause()
        if not run.subject.runs_by_itself:
            for two in (fresh, used):
                run.same(one.look(), two.look(), f"the {two.name} component came to another state")


@_law("pausing and resuming is safe, also repeated", effort=0.8)
def _pause_and_resume(
    run: _Run, first: list[_Call], later: list[_Call], _: list[_Call], data: st.DataObject
) -> None:
    rounds = st.lists(st.sampled_from(["pause", "resume"]), max_size=5)
    with _standing_time():
        one, twin = run.new("component"), run.new("twin")
        alike = one.subject_is_deterministic(twin)
        for call in first:
            for action in data.draw(rounds):
                one.must(action)
            one.resume()
            outcome, expected = one.do(call), twin.do(call)
            if alike:
                run.same(expected, outcome, "a call after a pause has another outcome")
        one.pause()
        before = one.look()
        _let_threads_run()
        run.same(before, one.look(), "the component changed while it was paused")
        for action in data.draw(rounds):
            one.must(action)
            if action == "pause" and not run.subject.runs_by_itself:
                run.same(before, one.look(), "pausing and resuming changed the state")
        one.pause()
        if not run.subject.runs_by_itself:
            run.same(before, one.look(), "pausing and resuming changed the state")
            if alike:
                twin.pause()
                run.same(twin.look(), one.look(), "it is not where one without pauses is")
        one.resume()
        for call in later:
            outcome = one.do(call)
            if alike and run.subject.runs_by_itself:
                run.same(twin.do(call), outcome, "a call after a pause has another outcome")


@_law("time that passes while it is paused does not show", effort=0.1)
def _time(run: _Run, first: list[_Call], *_: Any) -> None:
    with _standing_time() as pass_time:
        one = run.new("component")
        one.do_all(first)
        one.pause()
        saved = one.snapshot()
        before = one.look()
        pass_time(_HOUR_S)
        one.write("# an hour passes")
        run.same(before, one.look(), "the paused component noticed that time passed")
        two = run.new("restored")
        two.pause()
        two.restore(saved)
        run.same(before, two.look(), "a component restored an hour later is not what was saved")
        if not run.subject.runs_by_itself:
            for actor in (one, two):
                actor.resume()
                actor.pause()
                run.same(before, actor.look(), "the hour of the pause shows after resume()")


@_law("a foreign, truncated or altered snapshot is refused or taken whole", effort=2)
def _damaged(
    run: _Run, first: list[_Call], _: list[_Call], other: list[_Call], data: st.DataObject
) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    if not saved.snapshots and not saved.snapshot_data:
        return
    how, damaged, must_refuse = data.draw(_damages(saved))
    targets = []
    for name, calls in (("used", other), ("fresh", [])):
        two = run.new(name)
        two.do_all(calls)
        two.pause()
        before, snapshot = two.look(), dumps(two.snapshot("_"))
        accepted, _report = two.try_to_restore(copy.deepcopy(damaged), f"damaged  # {how}")
        if accepted and must_refuse:
            run.fail(f"restore() accepted a snapshot that cannot be its own: {how}")
        if not accepted:
            what = f"restore() refused a snapshot ({how}), but changed the component"
            run.same(before, two.look(), what)
            run.same_bytes(snapshot, dumps(two.snapshot("_")), what)
        targets.append((two, accepted))
    (used, one_accepted), (fresh, other_accepted) = targets
    if one_accepted != other_accepted:
        run.fail(f"whether restore() accepts a snapshot ({how}) depends on what was before")
    if one_accepted:
        what = f"restore() accepted a snapshot ({how}), but took over only a part of it"
        run.same(fresh.look(), used.look(), what)
        run.same_snapshots(fresh.snapshot("_"), used.snapshot("_"), what)
        used.restore(saved)
        run.same(one.look(), used.look(), f"after a damaged snapshot ({how}), a sound one fails")


@_law("what restore does not know is refused or kept", effort=0.1)
def _unknown(run: _Run, first: list[_Call], *_: Any) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    for kind in ("section", "child"):
        newer = copy.deepcopy(one.snapshot())
        if kind == "section":
            newer.add_data_section(SnapshotDataSection(_UNKNOWN, b"from a newer version"))
        else:
            newer.add_snapshot(Snapshot(_UNKNOWN))
        given = dumps(newer)
        two = run.new("older")
        two.pause()
        before = two.look()
        accepted, report = two.try_to_restore(newer, f"saved_with_{kind}_{_UNKNOWN!r}")
        run.same_bytes(given, dumps(newer), "restore() changed the snapshot it was given")
        if not accepted:
            run.same(before, two.look(), f"restore() refused an unknown {kind}, but changed it")
            continue
        after = two.snapshot("again")
        kept = after.snapshot_data if kind == "section" else after.snapshots
        if _UNKNOWN not in kept and _UNKNOWN not in repr(report):
            run.fail(
                f"restore() lost a {kind} that it does not know, without a word: an older version "
                "would lose what a newer one wrote. Refuse it with a RestoreError "
                "(Snapshot.take does), or give it back in the next snapshot()"
            )


@_law("a snapshot survives being encoded and decoded")
def _encoded(run: _Run, first: list[_Call], *_: Any) -> None:
    one = run.new("component")
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    seen = one.look()
    for how, again in (
        ("loads(dumps(saved))", loads(dumps(saved))),
        ("saved_in_reverse_order", _reversed(saved)),
    ):
        two = run.new("restored")
        two.pause()
        two.restore(again, how)
        run.same(seen, two.look(), f"a component restored from {how} is not what was saved")


@_law("components share nothing")
def _share_nothing(
    run: _Run, first: list[_Call], later: list[_Call], other: list[_Call], *_: Any
) -> None:
    one, two = run.new("component"), run.new("other")
    two.pause()
    early = two.snapshot("early")
    untouched = two.look()
    one.do_all(first)
    one.pause()
    run.same(untouched, two.look(), "a component changed when another one did")
    seen, saved = one.look(), dumps(one.snapshot())
    two.resume()
    two.do_all([*other, *later])
    two.pause()
    run.same(seen, one.look(), "the component changed when another one did")
    two.restore(early, "early")
    run.same(seen, one.look(), "the component changed when another one was restored")
    run.same_bytes(saved, dumps(one.snapshot("_")), "its snapshot changed when another one did")


@_law(
    "what is sent can be received",
    effort=0.05,
    applies=lambda subject: (
        not isinstance(subject.factory, type)
        or (hasattr(subject.factory, "send") and hasattr(subject.factory, "recv"))
    ),
)
def _sent(run: _Run, first: list[_Call], *_: Any) -> None:
    one = run.new("component")
    if not _is_transportable(one.component):
        return
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    received = one.sent_and_received(saved)
    run.same_snapshots(saved, received, "what was received is not what was sent")


def _machine(subject: _Subject) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        """The component, the calls that led to its state, and the snapshots with what was seen."""

        def __init__(self) -> None:
            super().__init__()
            self.time = _standing_time()
            self.time.__enter__()
            aside = _Run(subject, "any sequence of calls keeps the state")
            self.alike = aside.new("component").subject_is_deterministic(aside.new("twin"))
            self.attempt = _Run(subject, aside.law)
            self.actor = self.attempt.new("component")
            self.paused = False
            self.calls: list[_Call] = []
            self.saved: list[tuple[str, Snapshot, object, bytes, list[_Call]]] = []
            self.save()

        def teardown(self) -> None:
            self.time.__exit__(None, None, None)

        def stand(self) -> None:
            if not self.paused:
                self.actor.pause()
                self.paused = True

        def go(self) -> None:
            if self.paused:
                self.actor.resume()
                self.paused = False

        @precondition(lambda self: subject.calls is not None)
        @rule(data=st.data())
        def operate(self, data: st.DataObject) -> None:
            assert subject.calls is not None
            call = data.draw(subject.calls)
            self.go()
            outcome = self.actor.do(call)
            if self.alike:
                twin = _Actor(_Run(subject, self.attempt.law), "twin", subject.factory())
                twin.do_all(self.calls)
                what = "it does not do what one does that was never paused and never saved"
                self.attempt.same(twin.do(call), outcome, what)
            self.calls.append(call)

        @rule(times=st.integers(1, 2))
        def pause(self, times: int) -> None:
            for _ in range(times):
                self.actor.pause()
            self.paused = True

        @rule(times=st.integers(1, 2))
        def resume(self, times: int) -> None:
            for _ in range(times):
                self.actor.resume()
            self.paused = False

        @rule()
        def save(self) -> None:
            self.stand()
            name = f"saved_{len(self.saved)}"
            snapshot = self.actor.snapshot(name)
            self.saved.append((name, snapshot, self.actor.look(), dumps(snapshot), [*self.calls]))

        @rule(data=st.data(), fresh=st.booleans())
        def restore(self, data: st.DataObject, fresh: bool) -> None:
            name, snapshot, seen, _, calls = data.draw(st.sampled_from(self.saved[::-1]))
            if fresh:
                self.actor, self.paused = self.attempt.new("component"), False
            self.stand()
            self.actor.restore(snapshot, name)
            self.calls = [*calls]
            self.attempt.same(seen, self.actor.look(), f"it is not what it was at {name}")

        @precondition(lambda self: _is_transportable(self.actor.component))
        @rule()
        def send_and_receive(self) -> None:
            name, snapshot, seen, data, calls = self.saved[-1]
            received = self.actor.sent_and_received(snapshot, name)
            self.attempt.same_bytes(data, dumps(received), "what came back is not what was sent")
            self.saved[-1] = (name, received, seen, data, calls)

        @precondition(lambda self: isinstance(self.actor.component, LiveMigratable))
        @rule(data=st.data())
        def operate_with_a_dirty_log(self, data: st.DataObject) -> None:
            self.actor.write("component.start_dirty_log()")
            self.actor.component.start_dirty_log()
            if subject.calls is not None:
                self.operate(data)
            for _ in range(2):
                self.actor.write("component.dirty_log()")
                table = self.actor.component.dirty_log()
                if not isinstance(table, MemoryRangeTable):
                    what = f"dirty_log() gave a {type(table).__name__}, not a MemoryRangeTable"
                    self.attempt.fail(what)
            self.actor.write("component.stop_dirty_log()")
            self.actor.component.stop_dirty_log()

        @invariant()
        def old_snapshots_do_not_change(self) -> None:
            for name, snapshot, _, data, _ in self.saved:
                self.attempt.same_bytes(data, dumps(snapshot), f"{name} changed")

    Machine.__name__ = Machine.__qualname__ = f"{subject.name}Machine"
    return Machine


def _is_transportable(component: Any) -> bool:
    return hasattr(component, "send") and hasattr(component, "recv")


@st.composite
def _damages(draw: st.DrawFn, saved: Snapshot) -> tuple[str, Snapshot, bool]:
    """What was done to a copy of a snapshot, the copy, and whether it must be refused."""
    damaged = loads(dumps(saved))
    places = [(path, node) for path, node in damaged.walk()]
    sections = [(path, node, id) for path, node in places for id in node.snapshot_data]
    parents = [(path, node, id) for path, node in places for id in node.snapshots]
    kinds = ["foreign", "emptied"]
    kinds += ["a section is missing", "truncated", "altered", "extended"] if sections else []
    kinds += ["a child is missing"] if parents else []
    kind = draw(st.sampled_from(kinds))
    if kind == "foreign":
        foreign = Snapshot(f"not {saved.id}")
        foreign.add_data_section(SnapshotDataSection("strange", b"\xff\x00strange"))
        return "foreign: another component's", foreign, True
    if kind == "emptied":
        return "emptied: no sections, no children", Snapshot(saved.id), False
    if kind == "a child is missing":
        path, node, id = draw(st.sampled_from(parents))
        del node.snapshots[id]
        return f"without {path.child(id)}", damaged, False
    path, node, id = draw(st.sampled_from(sections))
    place = path.section(id)
    if kind == "a section is missing":
        del node.snapshot_data[id]
        return f"without {place}", damaged, False
    payload = bytes(raw_view(node.snapshot_data[id].snapshot))
    if kind == "truncated" and payload:
        length = draw(st.integers(0, len(payload) - 1))
        changed = payload[:length]
        how = f"{place} truncated from {len(payload)} to {length} bytes"
    elif kind == "altered" and payload:
        at = draw(st.integers(0, len(payload) - 1))
        junk = draw(st.binary(min_size=1, max_size=min(4, len(payload) - at)))
        changed = payload[:at] + junk + payload[at + len(junk) :]
        how = f"{place} with {junk!r} at byte {at}"
    else:
        junk = draw(st.binary(min_size=1, max_size=4))
        changed = payload + junk
        how = f"{place} with {junk!r} behind its end"
    assume(changed != payload)
    node.snapshot_data[id].snapshot = changed
    return how, damaged, False


@contextmanager
def _watched(component: Any, name: str) -> Iterator[list[str]]:
    """The calls of a method of the component's class, from wherever they come."""
    calls: list[str] = []
    cls = type(component)
    original = getattr(cls, name, None)
    if original is None:
        yield calls
        return

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is component:
            calls.append(name)
        return original(self, *args, **kwargs)

    try:
        patch = mock.patch.object(cls, name, watching)
        patch.start()
    except (AttributeError, TypeError):
        yield calls
        return
    try:
        yield calls
    finally:
        patch.stop()


@contextmanager
def _standing_time() -> Iterator[Callable[[float], None]]:
    """Time stands still for who asks the time module, except when it is told to pass.

    Who asks very often is waiting for it to move, and so it does then.
    """
    names = ("time", "monotonic", "perf_counter")
    start: dict[str, int] = {name: getattr(time, f"{name}_ns")() for name in names}
    passed_ns, reads = 0, 0

    def pass_time(seconds: float) -> None:
        nonlocal passed_ns
        passed_ns += round(seconds * 1e9)

    def reader(name: str) -> Callable[[], int]:
        def read() -> int:
            nonlocal reads
            reads += 1
            if reads > _READS_BEFORE_TIME_MOVES:
                pass_time(0.001)
            return start[name] + passed_ns

        return read

    def in_seconds(read: Callable[[], int]) -> Callable[[], float]:
        return lambda: read() / 1e9

    readers = {name: reader(name) for name in names}
    patches: list[Any] = [mock.patch.object(time, f"{name}_ns", readers[name]) for name in names]
    patches += [mock.patch.object(time, name, in_seconds(readers[name])) for name in names]
    for patch in patches:
        patch.start()
    try:
        yield pass_time
    finally:
        for patch in patches:
            patch.stop()


def _let_threads_run() -> None:
    """Give a thread that a pause should have stopped the chance to show that it was not."""
    if threading.active_count() > 1:
        threading.Event().wait(0.005)


def _scribble(actor: _Actor, snapshot: Snapshot, name: str = "saved") -> None:
    """Change all of a snapshot that can be changed."""
    actor.write(f"# everything in {name} is changed")
    for _, node in [*snapshot.walk()]:
        for section in node.snapshot_data.values():
            view = raw_view(section.snapshot)
            if not view.readonly:
                view[:] = bytes(byte ^ 0xFF for byte in view)
        node.snapshots.clear()
        node.snapshot_data.clear()
        node.id = "scribbled"


def _copied(saved: Snapshot, kind: Snapshot) -> Snapshot:
    """A copy whose payloads can be changed where those of ``kind`` can."""
    like = dict(kind.walk())
    for path, node in saved.walk():
        for id, section in node.snapshot_data.items():
            model = like[path].snapshot_data.get(id) if path in like else None
            mutable = model is not None and not raw_view(model.snapshot).readonly
            payload = bytes(raw_view(section.snapshot))
            section.snapshot = bytearray(payload) if mutable else payload
    return saved


def _reversed(snapshot: Snapshot) -> Snapshot:
    """The same snapshot, with everything in it in another order."""
    again = loads(dumps(snapshot))
    for _, node in [*again.walk()]:
        node.snapshots = dict(reversed(node.snapshots.items()))
        node.snapshot_data = dict(reversed(node.snapshot_data.items()))
    return again


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _difference(before: object, after: object) -> str:
    one, two = repr(before), repr(after)
    if isinstance(before, bytes) and isinstance(after, bytes):
        try:
            lines = [str(difference) for difference in diff(loads(before), loads(after))]
        except MigratableError:
            lines = []
        if lines:
            return "".join(f"\n  - {line}" for line in lines[:9])
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    start = max(0, at - 60) if max(len(one), len(two)) > 300 else 0
    dots = "..." if start else ""
    return (
        f"\n  before: {dots}{one[start : start + 300]}\n  after:  {dots}{two[start : start + 300]}"
    )


def _frozen(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """A value that later changes do not reach and that compares by what it holds."""
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return value
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value
    if id(value) in seen:
        return "<a cycle>"
    seen |= {id(value)}
    if isinstance(value, Snapshot):
        return dumps(value)
    if isinstance(value, Mapping):
        return {key: _frozen(each, seen) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return frozenset(_frozen_key(each, seen) for each in value)
    if isinstance(value, (list, tuple)):
        return [_frozen(each, seen) for each in value]
    try:
        view = memoryview(value)
    except TypeError:
        pass
    else:
        return view.format, view.shape, view.tobytes()
    compares_itself = getattr(type(value), "__eq__", None) is not object.__eq__
    if not compares_itself and hasattr(value, "__dict__"):
        return type(value).__qualname__, _frozen(vars(value), seen)
    try:
        return copy.deepcopy(value)
    except Exception:
        return repr(value)


def _frozen_key(value: Any, seen: frozenset[int]) -> Any:
    frozen = _frozen(value, seen)
    return tuple(frozen) if isinstance(frozen, list) else frozen
