"""Attempts to break a law: components, what was called on them, and what was seen."""

from __future__ import annotations

import copy
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import attrs
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from vmmig.codec import dumps, loads
from vmmig.errors import MigratableError, RestoreError
from vmmig.snapshot import Snapshot, diff

Operations = Mapping[str, Sequence[Any]]
"""Names of operations to what they are called with: see `vmmig.testing.contract`."""

_MANY_CALLS = 8
_READS_BEFORE_TIME_MOVES = 10_000


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


@attrs.frozen
class Call:
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
class Subject:
    """A component under test."""

    factory: Callable[[], Any]
    name: str
    observe: Callable[[Any], object] | None
    runs_by_itself: bool
    calls: st.SearchStrategy[Call] | None
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        factory: Callable[[], Any],
        operations: Operations | None,
        observe: Callable[[Any], object] | None,
        runs_by_itself: bool,
    ) -> Subject:
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
    def plans(self) -> st.SearchStrategy[list[Call]]:
        """Operations to do, one after the other."""
        if self.calls is None:
            return st.just([])
        few = st.lists(self.calls, max_size=_MANY_CALLS)
        return few | st.lists(self.calls, min_size=_MANY_CALLS, max_size=4 * _MANY_CALLS)


def _calls(name: str, how: Any) -> st.SearchStrategy[Call]:
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
    return st.builds(Call, st.just(name), st.just(function), st.tuples(*parts))


class Attempt:
    """One attempt to break a law: its components and the script of what was called."""

    def __init__(self, subject: Subject, law: str) -> None:
        self.subject = subject
        self.law = law
        self.script: list[str] = []

    def new(self, name: str) -> Actor:
        self.script.append(f"{name} = factory()")
        return Actor(self, name, self.subject.factory())

    def started(self, name: str) -> Actor:
        """A new component that runs: a machine, say, may be paused when it is made."""
        actor = self.new(name)
        actor.resume()
        return actor

    def paused(self, name: str, calls: list[Call]) -> Actor:
        """A new component that ran, did these calls, and is paused."""
        actor = self.started(name)
        actor.do_all(calls)
        actor.pause()
        return actor

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


class Actor:
    """A component of a run: what is done to it is written down."""

    def __init__(self, run: Attempt, name: str, component: Any) -> None:
        self.run = run
        self.name = name
        self.component = component

    def write(self, line: str) -> None:
        self.run.script.append(line)

    def must(self, action: str) -> None:
        """Pause or resume it."""
        self.write(f"{self.name}.{action}()")
        _, error = _tried(getattr(self.component, action))
        if error is not None:
            self.run.fail(f"{action}() raised {named(error)}")

    def pause(self) -> None:
        self.must("pause")

    def resume(self) -> None:
        self.must("resume")

    def do(self, call: Call) -> tuple[str, object]:
        self.write(call.text(self.name))
        result, error = _tried(lambda: call.on(self.component))
        return ("returned", _frozen(result)) if error is None else ("raised", named(error))

    def do_all(self, calls: list[Call]) -> None:
        for call in calls:
            self.do(call)

    def snapshot(self, name: str = "saved") -> Snapshot:
        self.write(f"{name} = {self.name}.snapshot()")
        snapshot, error = _tried(self.component.snapshot)
        if error is None and not isinstance(snapshot, Snapshot):
            self.run.fail(f"snapshot() gave a {type(snapshot).__name__}, not a Snapshot")
        if error is None:
            _, error = _tried(lambda: dumps(snapshot))
        if error is not None:
            self.run.fail(f"snapshot() of a paused component failed: {named(error)}")
        assert isinstance(snapshot, Snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot, name: str = "saved") -> object:
        self.write(f"{self.name}.restore({name})")
        report, error = _tried(lambda: self.component.restore(snapshot))
        if error is not None:
            self.run.fail(f"restore() of a snapshot of its own failed: {named(error)}")
        return report

    def sent_and_received(self, snapshot: Snapshot, name: str = "saved") -> Snapshot:
        with tempfile.TemporaryDirectory() as folder:
            url = str(Path(folder, "saved.vmsnap"))
            self.write(f"{self.name}.send({name}, 'saved.vmsnap')")
            self.write(f"{name} = {self.name}.recv('saved.vmsnap')")
            received, error = _tried(lambda: self.component.send(snapshot, url))
            if error is None:
                received, error = _tried(lambda: self.component.recv(url))
            if error is None:
                _, error = _tried(lambda: dumps(received))
        if error is not None:
            self.run.fail(f"sending and receiving failed: {named(error)}")
        assert isinstance(received, Snapshot)
        return received

    def try_to_restore(self, snapshot: Snapshot, name: str) -> tuple[bool, object]:
        """Whether a snapshot that may be refused was accepted, and what restore returned."""
        self.write(f"{self.name}.restore({name})")
        report, error = _tried(lambda: self.component.restore(snapshot))
        if error is not None and not isinstance(error, RestoreError):
            self.run.fail(f"restore() raised {named(error)}, not a RestoreError")
        return error is None, report

    def subject_is_deterministic(self, twin: Actor) -> bool:
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


def is_transportable(component: Any) -> bool:
    return hasattr(component, "send") and hasattr(component, "recv")


@contextmanager
def watched(component: Any, name: str) -> Iterator[list[str]]:
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
def standing_time() -> Iterator[Callable[[float], None]]:
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


def let_threads_run() -> None:
    """Give a thread that a pause should have stopped the chance to show that it was not."""
    if threading.active_count() > 1:
        threading.Event().wait(0.005)


def _tried(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What came of it; so that a failure is told outside of the component's own exception."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def named(error: BaseException) -> str:
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
