"""Everything that can happen to a component, in any order."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmmig.codec import dumps
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Snapshot
from vmmig.testing.attempts import (
    Actor,
    Attempt,
    Call,
    Subject,
    is_transportable,
    standing_time,
)
from vmmig.traits import LiveMigratable

_LAW = "any sequence of calls keeps the state"


def machine_of(subject: Subject) -> type[RuleBasedStateMachine]:
    class Machine(RuleBasedStateMachine):
        """The component, the calls that led to its state, and the snapshots with what was seen."""

        def __init__(self) -> None:
            super().__init__()
            self.time = standing_time()
            self.time.__enter__()
            aside = Attempt(subject, _LAW)
            self.alike = aside.new("component").subject_is_deterministic(aside.new("twin"))
            self.attempt = Attempt(subject, aside.law)
            self.actor = self.attempt.started("component")
            self.paused = False
            self.calls: list[Call] = []
            self.saved: list[tuple[str, Snapshot, object, bytes, list[Call]]] = []
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
                twin = Actor(Attempt(subject, self.attempt.law), "twin", subject.factory())
                twin.resume()
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

        @precondition(lambda self: is_transportable(self.actor.component))
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
    test_case: Any = Machine.TestCase
    test_case.vmmig_component = subject.name
    test_case.vmmig_notes = subject.notes
    test_case.runTest.vmmig_law = _LAW
    return Machine
