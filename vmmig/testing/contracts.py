"""The laws of a component, as tests: one call proves a component or shows how it breaks.

`contract` makes a pytest class with one test for each law, `state_machine` a hypothesis state
machine that mixes everything that can happen to a component. Both need only a factory; what they
can find grows with the operations they may call and with what they may observe.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hypothesis.stateful import RuleBasedStateMachine

from vmmig.testing.attempts import (
    Operations,
    Subject,
)
from vmmig.testing.laws import LAWS, as_test, scaled_settings
from vmmig.testing.stateful import machine_of


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

    >>> from hypothesis import strategies as st
    >>> from vmmig import RestoreError, Snapshot, SnapshotDataSection
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
    subject = Subject.of(factory, operations, observe, runs_by_itself)
    caller = sys._getframe(1).f_globals.get("__name__", __name__)
    members: dict[str, Any] = {
        "__doc__": f"The laws of {subject.name}.",
        "__module__": caller,
        "vmmig_component": subject.name,
        "vmmig_notes": subject.notes,
    }
    for law in LAWS:
        if law.applies(subject):
            members[law.test_name] = as_test(law, subject)
    machine = machine_of(subject)

    def any_sequence(self: Any) -> None:
        from hypothesis.stateful import run_state_machine_as_test

        run_state_machine_as_test(machine, settings=scaled_settings(0.4, stateful_step_count=20))

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
    return machine_of(Subject.of(factory, operations, observe, runs_by_itself))
