"""What a migration tells while it goes on, and what remains of it."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from vmmig.precopy import Decision, Forecast, IterationStatistics

Phase = Literal["connecting", "pre-copy", "stop-and-copy", "handing over", "asking", "done"]


@attrs.frozen(kw_only=True)
class MigrationProgress:
    """How far a live migration is, at its source.

    Attributes:
        phase: ``connecting``, ``pre-copy`` (the machine runs), ``stop-and-copy`` (it is paused),
            ``handing over`` (Complete is sent), ``asking`` (the answer was lost), ``done``.
        iteration: Which pass is on its way, from 1 on; 0 before the first.
        sent_bytes: Memory sent so far, in all passes.
        pass_bytes: What this pass has to send.
        pass_sent_bytes: What it has sent.
        rate_bytes_per_s: This pass's bandwidth so far.
        elapsed_s: Seconds since the migration began.
        forecast: How it will go on, as it looked before this pass.

    >>> MigrationProgress(phase="pre-copy", iteration=1, sent_bytes=0, pass_bytes=100,
    ...                   pass_sent_bytes=25, rate_bytes_per_s=50.0, elapsed_s=1.0).remaining_s
    1.5
    """

    phase: Phase
    iteration: int
    sent_bytes: int
    pass_bytes: int
    pass_sent_bytes: int
    rate_bytes_per_s: float
    elapsed_s: float
    forecast: Forecast | None = None

    @property
    def remaining_s(self) -> float | None:
        """How long this pass, and those that are expected behind it, still take, if known."""
        if not self.rate_bytes_per_s:
            return None
        this_pass_s = (self.pass_bytes - self.pass_sent_bytes) / self.rate_bytes_per_s
        later_s = self.forecast.duration_s if self.forecast else None
        return max(this_pass_s, later_s or 0.0)


@attrs.frozen(kw_only=True)
class Downtime:
    """Where the time went between the source's ``pause()`` and the end of the destination's
    ``resume()``, in seconds.

    >>> Downtime(pause_s=0.001, state_s=0.001, final_memory_s=0.002, send_state_s=0.0,
    ...          complete_s=0.001).total_s
    0.005
    """

    pause_s: float
    state_s: float
    final_memory_s: float
    send_state_s: float
    complete_s: float

    @property
    def total_s(self) -> float:
        """All of them together."""
        return (
            self.pause_s + self.state_s + self.final_memory_s + self.send_state_s + self.complete_s
        )


@attrs.frozen(kw_only=True)
class MigrationReport:
    """A migration that was committed, as its source saw it.

    Attributes:
        url: Where to, without credentials.
        ram_bytes: How much RAM the machine has.
        sent_bytes: How many bytes of it were sent, the final ones included.
        connections: How many connections carried it.
        handed_over: Whether the RAM went as descriptors instead.
        iterations: The passes while the machine ran; `IterationStatistics.dirty_bytes` of one is
            what it left to the next.
        decision: Why pre-copy ended.
        downtime: Where the downtime went.
        total_s: From the call to the end.

    >>> MigrationReport.__name__
    'MigrationReport'
    """

    url: str
    ram_bytes: int
    sent_bytes: int
    connections: int
    handed_over: bool
    iterations: tuple[IterationStatistics, ...]
    decision: Decision | None
    downtime: Downtime
    total_s: float

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values: for a plot, or a log."""
        value: dict[str, Any] = attrs.asdict(self)
        value["downtime"]["total_s"] = self.downtime.total_s
        return value
