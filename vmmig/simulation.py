"""What pre-copy would do with a guest: a dirty-rate trace replayed through a policy.

A trace is CSV text. Its first line names the columns, each further line is a phase of the guest::

    duration_s,dirty_bytes_per_s,working_set_bytes
    30,0,0
    5,209715200,1073741824
    60,4194304,16777216

Blank lines and lines that begin with ``#`` are skipped. The last phase lasts until the migration
ends. In the model a guest dirties its working set from its first byte to its last, so many bytes a
second, and then writes over what is dirty already; all working sets begin at the same address.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

import attrs

from vmmig.errors import MigratableError
from vmmig.precopy import (
    Decision,
    IterationStatistics,
    PrecopyPolicy,
    check_count,
    check_seconds,
    decide,
    format_bytes,
    format_seconds,
)

_COLUMNS = ["duration_s", "dirty_bytes_per_s", "working_set_bytes"]
_MOST_ITERATIONS = 100_000
_SHOWN = 20


@attrs.frozen
class TracePhase:
    """A time in which a guest behaves the same.

    Args:
        duration_s: How long it lasts; more than 0.
        dirty_bytes_per_s: How fast clean pages become dirty.
        working_set_bytes: The most that becomes dirty, however long it takes.

    Raises:
        MigratableError: A value is out of its range.

    >>> TracePhase(5, 200e6, 1 << 30)
    TracePhase(duration_s=5, dirty_bytes_per_s=200000000.0, working_set_bytes=1073741824)
    """

    duration_s: float
    dirty_bytes_per_s: float
    working_set_bytes: int

    def __attrs_post_init__(self) -> None:
        check_seconds("duration_s", self.duration_s)
        if not self.duration_s:
            raise MigratableError("duration_s is 0: a phase takes time")
        _check_rate("dirty_bytes_per_s", self.dirty_bytes_per_s)
        check_count("working_set_bytes", self.working_set_bytes)


def parse_trace(text: str) -> tuple[TracePhase, ...]:
    """The phases of a trace in the module's CSV format.

    Raises:
        MigratableError: The text is no trace; the message names the line.

    >>> parse_trace("duration_s,dirty_bytes_per_s,working_set_bytes\\n1.5,4096,8192\\n")
    (TracePhase(duration_s=1.5, dirty_bytes_per_s=4096.0, working_set_bytes=8192),)
    >>> parse_trace("duration_s,dirty_bytes_per_s,working_set_bytes\\n1.5,fast,8192\\n")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: trace, line 2: could not convert string to float: 'fast'
    """
    header: list[str] | None = None
    phases = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], strict=True))]
            if header is None:
                header = cells
                if header != _COLUMNS:
                    raise MigratableError(f"the first line is {','.join(_COLUMNS)}, not {line!r}")
                continue
            if len(cells) != len(_COLUMNS):
                raise MigratableError(f"{len(_COLUMNS)} values are needed, there are {len(cells)}")
            phases.append(TracePhase(float(cells[0]), float(cells[1]), int(cells[2])))
        except (MigratableError, ValueError, csv.Error) as error:
            raise MigratableError(f"trace, line {number}: {error}") from error
    if not phases:
        raise MigratableError(
            f"trace, line {len(text.splitlines()) + 1}: the text ends before the first phase"
        )
    return tuple(phases)


@attrs.frozen(kw_only=True)
class Simulation:
    """The record of a simulated migration; as text, a table with one line for each iteration.

    Attributes:
        statistics: What was known before each pass, and at the end.
        decisions: What the policy decided then.
        downtime_s: The downtime; None if the migration was cancelled.
        elapsed_s: The time from the begin of the migration to its end.
        sent_bytes: What was sent in all, while the guest ran and while it was paused.

    >>> trace = [TracePhase(60, 512 << 20, 2 << 30)]
    >>> print(simulate(PrecopyPolicy(), trace, memory_bytes=4 << 30,
    ...                bandwidth_bytes_per_s=1 << 30))
    iteration     sent    time     rate    dirty  forecast
            1    4 GiB     4 s  1 GiB/s    2 GiB  converges after 3 more iterations, in 3.5 s, ...
            2    2 GiB     2 s  1 GiB/s    1 GiB  converges after 2 more iterations, in 1.5 s, ...
            3    1 GiB     1 s  1 GiB/s  512 MiB  converges after 1 more iteration, in 500 ms, ...
            4  512 MiB  500 ms  1 GiB/s  256 MiB  has converged: 250 ms of downtime
    stop-and-copy: 256 MiB left: 250 ms of downtime expected, within the limit of 300 ms
    7.75 GiB sent in 7.75 s, with 250 ms of downtime
    """

    statistics: tuple[IterationStatistics, ...]
    decisions: tuple[Decision, ...]
    downtime_s: float | None
    elapsed_s: float
    sent_bytes: int

    @property
    def outcome(self) -> Decision:
        """The decision that ended pre-copy: to stop and copy, or to cancel."""
        return self.decisions[-1]

    def render(self) -> str:
        """The table with every iteration, the last decision's reason, and the sums."""
        return "\n".join([*self._table(), *self._ending()])

    def __str__(self) -> str:
        """As `render`, without the middle of a long table."""
        table = self._table()
        left_out = len(table) - 1 - 2 * _SHOWN
        if left_out > 1:
            table[1 + _SHOWN : -_SHOWN] = [f"... {left_out} more iterations ..."]
        return "\n".join([*table, *self._ending()])

    def _table(self) -> list[str]:
        rows = [("iteration", "sent", "time", "rate", "dirty", "forecast")]
        for entry, decision in zip(self.statistics, self.decisions, strict=True):
            if entry.iteration:
                rate = entry.bandwidth_bytes_per_s
                rows.append(
                    (
                        str(entry.iteration),
                        format_bytes(entry.sent_bytes),
                        format_seconds(entry.duration_s),
                        "-" if rate is None else f"{format_bytes(rate)}/s",
                        format_bytes(entry.dirty_bytes),
                        str(decision.forecast),
                    )
                )
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
        return [
            "  ".join([*map(str.rjust, row[:-1], widths), row[-1]])  # the forecast runs free
            for row in rows
        ]

    def _ending(self) -> list[str]:
        sums = f"{format_bytes(self.sent_bytes)} sent in {format_seconds(self.elapsed_s)}"
        if self.downtime_s is None:
            return [f"cancelled: {self.outcome.reason}", f"{sums}, in vain; the source runs on"]
        return [
            f"stop-and-copy: {self.outcome.reason}",
            f"{sums}, with {format_seconds(self.downtime_s)} of downtime",
        ]


def simulate(
    policy: PrecopyPolicy,
    trace: Sequence[TracePhase],
    *,
    memory_bytes: int,
    bandwidth_bytes_per_s: float,
    overhead_s: float = 0.0,
) -> Simulation:
    """Replay a trace through a policy, on a clock of its own.

    Args:
        policy: The policy to try.
        trace: The guest's phases; the last one lasts until the migration ends.
        memory_bytes: What the first pass sends.
        bandwidth_bytes_per_s: What the network carries; more than 0.
        overhead_s: The part of the downtime that is not sending memory; see `decide`.

    Raises:
        MigratableError: A value is out of its range, the trace is empty, a working set is larger
            than the memory, or the migration had not ended after 100,000 iterations.

    >>> idle = simulate(PrecopyPolicy(), [TracePhase(1, 0, 0)], memory_bytes=1 << 30,
    ...                 bandwidth_bytes_per_s=1 << 30)
    >>> idle.outcome.trigger, len(idle.statistics), idle.downtime_s
    ('nothing_dirty', 2, 0.0)
    """
    check_count("memory_bytes", memory_bytes)
    _check_rate("bandwidth_bytes_per_s", bandwidth_bytes_per_s)
    if not bandwidth_bytes_per_s:
        raise MigratableError("bandwidth_bytes_per_s is 0: nothing would ever be sent")
    if not trace:
        raise MigratableError("the trace is empty: give at least one phase")
    largest_bytes = max(phase.working_set_bytes for phase in trace)
    if largest_bytes > memory_bytes:
        raise MigratableError(
            f"the trace has a working set of {largest_bytes} bytes, the memory only {memory_bytes}"
        )
    guest = _Guest(trace)
    statistics = [
        IterationStatistics(
            iteration=0, sent_bytes=0, duration_s=0.0, dirty_bytes=memory_bytes, elapsed_s=0.0
        )
    ]
    decisions = [decide(policy, statistics, overhead_s=overhead_s)]
    sent_bytes = 0
    while decisions[-1].action == "iterate":
        before = statistics[-1]
        if before.iteration == _MOST_ITERATIONS:
            raise MigratableError(
                f"the migration has not ended after {_MOST_ITERATIONS} iterations and"
                f" {format_seconds(before.elapsed_s)}; give the policy a cap on iterations, a"
                " shorter timeout or a longer downtime limit"
            )
        duration_s = before.dirty_bytes / bandwidth_bytes_per_s
        sent_bytes += before.dirty_bytes
        statistics.append(
            IterationStatistics(
                iteration=before.iteration + 1,
                sent_bytes=before.dirty_bytes,
                duration_s=duration_s,
                dirty_bytes=guest.run(duration_s),
                elapsed_s=before.elapsed_s + duration_s,
            )
        )
        decisions.append(decide(policy, statistics, overhead_s=overhead_s))
    last = statistics[-1]
    downtime_s = None
    if decisions[-1].action == "stop_and_copy":
        downtime_s = last.dirty_bytes / bandwidth_bytes_per_s + overhead_s
        sent_bytes += last.dirty_bytes
    return Simulation(
        statistics=tuple(statistics),
        decisions=tuple(decisions),
        downtime_s=downtime_s,
        elapsed_s=last.elapsed_s + (downtime_s or 0.0),
        sent_bytes=sent_bytes,
    )


class _Guest:
    def __init__(self, trace: Sequence[TracePhase]) -> None:
        self._later = list(reversed(trace))
        self._enter_next_phase()

    def _enter_next_phase(self) -> None:
        self._phase = self._later.pop()
        self._left_s = self._phase.duration_s if self._later else math.inf

    def run(self, duration_s: float) -> int:
        """Let the guest run for this long from where it is; the bytes that it dirtied."""
        dirty_bytes = 0.0
        while True:
            step_s = min(duration_s, self._left_s)
            reached = dirty_bytes + self._phase.dirty_bytes_per_s * step_s
            dirty_bytes = max(dirty_bytes, min(reached, self._phase.working_set_bytes))
            self._left_s -= step_s
            duration_s -= step_s
            if self._left_s:
                return int(dirty_bytes)
            self._enter_next_phase()


def _check_rate(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e300:
        raise MigratableError(f"{name} is a number of bytes a second from 0 on, not {value!r}")
