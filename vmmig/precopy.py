"""The policy of pre-copy live migration: statistics in, decision out.

The driver asks `decide` before each pass over the dirty memory, also before the first. The rule is
Cloud Hypervisor's, in its order:

1. stop-and-copy when nothing is dirty,
2. stop-and-copy when the expected downtime is within the downtime limit,
3. at the timeout, cancel or pause anyway, as the policy says,

and then, which Cloud Hypervisor does not have,

4. stop-and-copy at the cap on iterations, where the policy has one.

The expected downtime is the dirty bytes over the last pass's bandwidth, plus the overhead that the
driver gives. No clock is read here: time comes in with the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import attrs

from vmmig._units import format_bytes as format_bytes
from vmmig._units import format_seconds as format_seconds
from vmmig.errors import MigratableError

_SMOOTHED_PASSES = 4
_MAX_COUNT = 1 << 64
_MAX_S = 1e12


@attrs.frozen(kw_only=True)
class PrecopyPolicy:
    """When to go on copying while the source runs, when to pause it, and when to give up.

    Args:
        downtime_limit_s: The source is paused once the expected downtime is no longer than this.
        timeout_s: The longest that the source is copied while it runs. It is looked at
            between passes, so a pass that has begun is finished, and what has converged by then
            is not thrown away.
        timeout_strategy: At the timeout, ``"cancel"`` gives the migration up and the source
            runs on; ``"ignore"`` pauses it anyway, however long the downtime becomes.
        max_iterations: After so many passes the source is paused anyway. This is a bound on the
            work, so it never cancels: who sets it prefers a longer downtime to more passes. 0
            pauses before the first pass. None: no cap.

    Raises:
        MigratableError: A value is out of its range.

    >>> PrecopyPolicy(downtime_limit_s=0.02)
    PrecopyPolicy(downtime_limit_s=0.02, timeout_s=3600.0, timeout_strategy='cancel',
                  max_iterations=None)
    """

    downtime_limit_s: float = 0.3
    timeout_s: float = 3600.0
    timeout_strategy: Literal["cancel", "ignore"] = "cancel"
    max_iterations: int | None = None

    def __attrs_post_init__(self) -> None:
        check_seconds("downtime_limit_s", self.downtime_limit_s)
        check_seconds("timeout_s", self.timeout_s)
        if self.timeout_strategy not in ("cancel", "ignore"):
            raise MigratableError(
                f"timeout_strategy is 'cancel' or 'ignore', not {self.timeout_strategy!r}"
            )
        if self.max_iterations is not None:
            check_count("max_iterations", self.max_iterations)


@attrs.frozen(kw_only=True)
class IterationStatistics:
    """What is known between two passes: the pass that has ended, and what is dirty now.

    Args:
        iteration: How many passes have ended; 0 before the first.
        sent_bytes: What the last pass sent.
        duration_s: How long the last pass took.
        dirty_bytes: What is still to be sent: before the first pass all memory that is not
            known to be zero, later what the dirty log found, and what the last pass left out.
        elapsed_s: The time since the migration began.

    Raises:
        MigratableError: A value is out of its range, or no number.

    >>> IterationStatistics(iteration=1, sent_bytes=1 << 30, duration_s=0.5,
    ...                     dirty_bytes=1 << 26, elapsed_s=0.5).bandwidth_bytes_per_s
    2147483648.0
    """

    iteration: int
    sent_bytes: int
    duration_s: float
    dirty_bytes: int
    elapsed_s: float

    def __attrs_post_init__(self) -> None:
        check_count("iteration", self.iteration)
        check_count("sent_bytes", self.sent_bytes)
        check_count("dirty_bytes", self.dirty_bytes)
        check_seconds("duration_s", self.duration_s)
        check_seconds("elapsed_s", self.elapsed_s)

    @property
    def bandwidth_bytes_per_s(self) -> float | None:
        """The last pass's bandwidth; None where it sent nothing or the clock did not move."""
        return _rate(self.sent_bytes, self.duration_s) if self.sent_bytes else None


@attrs.frozen(kw_only=True)
class Forecast:
    """How pre-copy will go on if the guest and the network stay as they are.

    The model is geometric: a pass over ``dirty_bytes`` takes ``dirty_bytes / bandwidth``, in which
    the guest dirties ``dirty_rate / bandwidth`` times as much again. Both rates are averages over
    the last four passes, each weighing half of its successor. The first pass makes a guest look
    slower than it is, because pages that are written twice in one pass count once.

    Attributes:
        bandwidth_bytes_per_s: What is sent in a second; None where no pass has told it yet.
        dirty_rate_bytes_per_s: What the guest dirties in a second; None likewise.
        converges: Whether the downtime limit is reached before the timeout and within the cap;
            None where the rates are not known.
        iterations: How many further passes it takes to reach the limit; None if they never do,
            or that is not known.
        duration_s: How long these passes take together; None likewise.
        downtime_s: The downtime expected after them, overhead included; None likewise.

    >>> pass_1 = IterationStatistics(iteration=1, sent_bytes=4 << 30, duration_s=4,
    ...                              dirty_bytes=2 << 30, elapsed_s=4)
    >>> print(decide(PrecopyPolicy(), [pass_1]).forecast)
    converges after 3 more iterations, in 3.5 s, with 250 ms of downtime
    """

    bandwidth_bytes_per_s: float | None = None
    dirty_rate_bytes_per_s: float | None = None
    converges: bool | None = None
    iterations: int | None = None
    duration_s: float | None = None
    downtime_s: float | None = None

    def __str__(self) -> str:
        if self.converges is None:
            return "unknown"
        if self.iterations is None or self.duration_s is None or self.downtime_s is None:
            return (
                f"never converges: {format_bytes(self.dirty_rate_bytes_per_s or 0)}/s are dirtied,"
                f" {format_bytes(self.bandwidth_bytes_per_s or 0)}/s are sent"
            )
        downtime = f"{format_seconds(self.downtime_s)} of downtime"
        if not self.iterations:
            return f"has converged: {downtime}"
        verb = "converges" if self.converges else "ends before it would converge"
        return (
            f"{verb} after {_iterations(self.iterations, 'more ')},"
            f" in {format_seconds(self.duration_s)}, with {downtime}"
        )


@attrs.frozen(kw_only=True)
class Decision:
    """What to do next, and why.

    Attributes:
        action: ``"iterate"``: send what is dirty while the source runs, then ask again.
            ``"stop_and_copy"``: pause the source and send the rest. ``"cancel"``: give up, the
            source runs on.
        trigger: The rule that ended pre-copy: ``"nothing_dirty"``, ``"downtime_limit"``,
            ``"timeout"`` or ``"max_iterations"``; None when it goes on.
        reason: The same for a user, with the numbers.
        downtime_s: The downtime expected if the source were paused now; None if not known.
        forecast: How pre-copy would go on.

    >>> start = IterationStatistics(iteration=0, sent_bytes=0, duration_s=0,
    ...                             dirty_bytes=1 << 30, elapsed_s=0)
    >>> decision = decide(PrecopyPolicy(max_iterations=0), [start])
    >>> decision.action, decision.trigger
    ('stop_and_copy', 'max_iterations')
    """

    action: Literal["iterate", "stop_and_copy", "cancel"]
    trigger: Literal["nothing_dirty", "downtime_limit", "timeout", "max_iterations"] | None
    reason: str
    downtime_s: float | None
    forecast: Forecast


def decide(
    policy: PrecopyPolicy, history: Sequence[IterationStatistics], *, overhead_s: float = 0.0
) -> Decision:
    """What to do after the passes in ``history``.

    A pass in which the clock did not move shows only that as many bytes again take no time that
    counts; with more than these dirty, and after a pass that sent nothing, the downtime is not
    known, and pre-copy goes on. So it ends also on a clock that stands still.

    Args:
        policy: The limits.
        history: The statistics so far, oldest first. The last entry decides; the four before
            it serve the forecast, older ones are not looked at.
        overhead_s: What the downtime holds besides sending memory, as far as it is known:
            pausing, taking and sending the state, resuming. If it alone exceeds the downtime
            limit, only a guest that has stopped writing converges.

    Raises:
        MigratableError: The history is empty or out of order, or the overhead is no time.

    >>> pass_1 = IterationStatistics(iteration=1, sent_bytes=1 << 30, duration_s=1,
    ...                              dirty_bytes=1 << 28, elapsed_s=1)
    >>> decision = decide(PrecopyPolicy(), [pass_1])
    >>> decision.action, decision.reason
    ('stop_and_copy', '256 MiB left: 250 ms of downtime expected, within the limit of 300 ms')
    >>> decide(PrecopyPolicy(), [pass_1], overhead_s=0.1).action
    'iterate'
    """
    check_seconds("overhead_s", overhead_s)
    if not history:
        raise MigratableError("the history is empty: begin with the statistics of iteration 0")
    recent = history[-_SMOOTHED_PASSES - 1 :]
    for before, after in pairwise(recent):
        if after.iteration <= before.iteration or after.elapsed_s < before.elapsed_s:
            raise MigratableError(
                f"the history is out of order: iteration {after.iteration} at"
                f" {after.elapsed_s} s follows iteration {before.iteration} at"
                f" {before.elapsed_s} s"
            )
    now = recent[-1]
    downtime_s = _downtime_s(now, overhead_s)
    forecast = _forecast(policy, recent, overhead_s)

    def decision(
        action: Literal["iterate", "stop_and_copy", "cancel"],
        trigger: Literal["nothing_dirty", "downtime_limit", "timeout", "max_iterations"] | None,
        reason: str,
    ) -> Decision:
        return Decision(
            action=action,
            trigger=trigger,
            reason=reason,
            downtime_s=downtime_s,
            forecast=forecast,
        )

    if not now.dirty_bytes:
        return decision("stop_and_copy", "nothing_dirty", "nothing is dirty")
    expected = "unknown" if downtime_s is None else f"{format_seconds(downtime_s)} of"
    left = f"{format_bytes(now.dirty_bytes)} left: {expected} downtime expected"
    limit = f"the limit of {format_seconds(policy.downtime_limit_s)}"
    if downtime_s is not None and downtime_s <= policy.downtime_limit_s:
        return decision("stop_and_copy", "downtime_limit", f"{left}, within {limit}")
    if now.elapsed_s >= policy.timeout_s:
        passed = f"the timeout of {format_seconds(policy.timeout_s)} has passed; {left}"
        if policy.timeout_strategy == "ignore":
            return decision("stop_and_copy", "timeout", f"{passed}, pausing anyway")
        advice = "raise the timeout or the downtime limit, or let timeout_strategy be 'ignore'"
        return decision("cancel", "timeout", f"{passed}, above {limit}; {advice}")
    if policy.max_iterations is not None and now.iteration >= policy.max_iterations:
        cap = f"the cap of {_iterations(policy.max_iterations)} is reached"
        return decision("stop_and_copy", "max_iterations", f"{cap}; {left}, pausing anyway")
    if not now.iteration:
        return decision("iterate", None, f"first pass: {format_bytes(now.dirty_bytes)} to send")
    return decision("iterate", None, left if downtime_s is None else f"{left}, above {limit}")


def _downtime_s(now: IterationStatistics, overhead_s: float) -> float | None:
    if not now.dirty_bytes:
        return overhead_s
    if not now.sent_bytes or (not now.duration_s and now.dirty_bytes > now.sent_bytes):
        return None
    return now.dirty_bytes / now.sent_bytes * now.duration_s + overhead_s


def _forecast(
    policy: PrecopyPolicy, recent: Sequence[IterationStatistics], overhead_s: float
) -> Forecast:
    now = recent[-1]
    bandwidth = _smoothed([entry.bandwidth_bytes_per_s for entry in recent])
    dirty_rate = _smoothed(
        [
            _rate(_dirtied_bytes(before, after), after.duration_s) if after.iteration else None
            for before, after in zip([None, *recent], recent, strict=False)
        ]
    )
    if bandwidth is None or dirty_rate is None:
        return Forecast(bandwidth_bytes_per_s=bandwidth, dirty_rate_bytes_per_s=dirty_rate)
    ratio = dirty_rate / bandwidth
    # Less than one byte is nothing: so a limit that the overhead uses up can still be reached.
    goal_bytes = max((policy.downtime_limit_s - overhead_s) * bandwidth, 1.0)
    if now.dirty_bytes <= goal_bytes:
        iterations = 0
    elif not ratio:
        iterations = 1
    elif ratio < 1:
        iterations = math.ceil(math.log(goal_bytes / now.dirty_bytes) / math.log(ratio))
    else:
        return Forecast(
            bandwidth_bytes_per_s=bandwidth, dirty_rate_bytes_per_s=dirty_rate, converges=False
        )
    shrunk = ratio**iterations
    now_s = now.dirty_bytes / bandwidth
    duration_s = now_s * (1 - shrunk) / (1 - ratio) if iterations else 0.0
    in_time = now.elapsed_s + duration_s <= policy.timeout_s
    within_cap = (
        policy.max_iterations is None or now.iteration + iterations <= policy.max_iterations
    )
    return Forecast(
        bandwidth_bytes_per_s=bandwidth,
        dirty_rate_bytes_per_s=dirty_rate,
        converges=not iterations or (in_time and within_cap),
        iterations=iterations,
        duration_s=duration_s,
        downtime_s=now_s * shrunk + overhead_s,
    )


def _dirtied_bytes(before: IterationStatistics | None, after: IterationStatistics) -> int:
    """What the guest dirtied in the pass: not what the pass left out of what was dirty before."""
    left_out = max(before.dirty_bytes - after.sent_bytes, 0) if before else 0
    return max(after.dirty_bytes - left_out, 0)


def _smoothed(rates: Sequence[float | None]) -> float | None:
    """The mean of the last known rates, each weighing half of its successor."""
    known = [rate for rate in rates if rate is not None][-_SMOOTHED_PASSES:]
    if not known:
        return None
    weights = [2.0**i for i in range(len(known))]
    return sum(w / sum(weights) * rate for w, rate in zip(weights, known, strict=True))


def _rate(nbytes: int, duration_s: float) -> float | None:
    rate = nbytes / duration_s if duration_s else math.inf
    return rate if math.isfinite(rate) else None


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number from 0 to 2**64.

    >>> check_count("sent_bytes", -1)
    Traceback (most recent call last):
    vmmig.errors.MigratableError: sent_bytes is a whole number from 0 to 2**64, not -1
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
        raise MigratableError(f"{name} is a whole number from 0 to 2**64, not {value!r}")


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no number of seconds from 0 to 1e12.

    >>> check_seconds("timeout_s", float("nan"))
    Traceback (most recent call last):
    vmmig.errors.MigratableError: timeout_s is a number of seconds from 0 to 1e12, not nan
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MAX_S:
        raise MigratableError(f"{name} is a number of seconds from 0 to 1e12, not {value!r}")


def _iterations(count: int, which: str = "") -> str:
    return f"{count} {which}iteration{'' if count == 1 else 's'}"
