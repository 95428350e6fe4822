"""A PID controller of simple-pid, which asks a clock."""

from __future__ import annotations

import json
import time

from simple_pid import PID

from retrofit.still import Still, refusing
from vmmig import Snapshot

_STATE = ("setpoint", "_proportional", "_integral", "_derivative", "_last_output", "_last_input")
_STATE += ("_last_error", "_last_time")


class Regulator(Still):
    """Its clock stands while it is paused, and goes on where it stood, on any machine."""

    def __init__(self) -> None:
        self.ran_ns, self.since_ns = 0, time.monotonic_ns()
        self.pid = PID(2.0, 0.5, 0.25, setpoint=20.0, time_fn=self.now)

    def now(self) -> float:
        return (self.ran_ns + time.monotonic_ns() - self.since_ns) / 1e9

    def pause(self) -> None:
        if self.since_ns is not None:
            self.ran_ns += time.monotonic_ns() - self.since_ns
        self.since_ns = None

    def resume(self) -> None:
        if self.since_ns is None:
            self.since_ns = time.monotonic_ns()

    def state(self) -> list[float | None]:
        values = (getattr(self.pid, name) for name in _STATE)
        return [self.ran_ns, *(None if value is None else float(value) for value in values)]

    def snapshot(self) -> Snapshot:
        return self.snapshot_of(state=json.dumps(self.state()).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (state,) = snapshot.take("state")
        with refusing():
            ran_ns, *values = json.loads(state)
            ran_ns, values = int(ran_ns), [None if v is None else float(v) for v in values]
            named = dict(zip(_STATE, values, strict=True))
        self.ran_ns = ran_ns
        vars(self.pid).update(named)
