from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import attrs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmmig.errors import MigratableError
from vmmig.precopy import (
    Decision,
    Forecast,
    IterationStatistics,
    PrecopyPolicy,
    decide,
    format_bytes,
    format_seconds,
)
from vmmig.simulation import TracePhase, parse_trace, simulate

PAGE = 4096
HEADER = "duration_s,dirty_bytes_per_s,working_set_bytes\n"


@attrs.frozen
class WorkingSet:
    """Pages written uniformly: after ``t`` s so many are dirty as n throws into so many bins."""

    pages: int
    writes_per_s: float

    def dirty_pages(self, duration_s: float) -> int:
        if not self.pages:
            return 0
        return math.ceil(-self.pages * math.expm1(-self.writes_per_s * duration_s / self.pages))


@attrs.frozen
class Guest:
    """A guest of ``memory_pages`` that writes to each of its working sets; hot and cold are two."""

    memory_pages: int
    working_sets: tuple[WorkingSet, ...]

    def dirty_bytes(self, duration_s: float) -> int:
        return PAGE * sum(part.dirty_pages(duration_s) for part in self.working_sets)


@attrs.frozen
class Run:
    history: list[IterationStatistics]
    decision: Decision
    clock_s: float


def migrate(
    guest: Guest,
    policy: PrecopyPolicy,
    bandwidths: Callable[[int], float],
    *,
    overhead_s: float = 0.0,
    setup_s: float = 0.0,
) -> Run:
    """Pre-copy of the guest on a clock of its own; ``bandwidths`` tells each pass's bandwidth."""
    clock_s = setup_s
    dirty = guest.memory_pages * PAGE
    history = [
        IterationStatistics(
            iteration=0, sent_bytes=0, duration_s=0, dirty_bytes=dirty, elapsed_s=clock_s
        )
    ]
    while (decision := decide(policy, history, overhead_s=overhead_s)).action == "iterate":
        assert len(history) <= 5_000
        took_s = dirty / bandwidths(len(history))
        clock_s += took_s
        sent, dirty = dirty, guest.dirty_bytes(took_s)
        history.append(
            IterationStatistics(
                iteration=len(history),
                sent_bytes=sent,
                duration_s=took_s,
                dirty_bytes=dirty,
                elapsed_s=clock_s,
            )
        )
    return Run(history, decision, clock_s)


def after(
    dirty: int,
    sent: int = 0,
    took: float = 0.0,
    *,
    iteration: int = 1,
    elapsed: float | None = None,
) -> IterationStatistics:
    return IterationStatistics(
        iteration=iteration,
        sent_bytes=sent,
        duration_s=took,
        dirty_bytes=dirty,
        elapsed_s=took if elapsed is None else elapsed,
    )


@st.composite
def guests(draw: st.DrawFn) -> Guest:
    hot = draw(st.integers(0, 100))
    cold = draw(st.integers(0, 500))
    never_written = draw(st.integers(0, 500))
    rates = st.floats(0, 2_000)
    parts = draw(
        st.sampled_from([(hot,), (hot, cold)]).flatmap(
            lambda sizes: st.tuples(*[st.builds(WorkingSet, st.just(n), rates) for n in sizes])
        )
    )
    return Guest(hot + cold + never_written, parts)


# 488 to 977 pages a second; a pass sends at least one, so a timeout of 5 s comes within 5,000.
BANDWIDTHS = st.floats(2e6, 4e6)
POLICIES = st.builds(
    PrecopyPolicy,
    downtime_limit_s=st.floats(0, 2) | st.just(0.0),
    timeout_s=st.floats(0, 5),
    timeout_strategy=st.sampled_from(["cancel", "ignore"]),
    max_iterations=st.none() | st.integers(0, 20),
)


@given(
    guests(),
    POLICIES,
    st.lists(BANDWIDTHS, min_size=1, max_size=9),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_migration_ends_and_for_the_reason_it_gives(
    guest: Guest,
    policy: PrecopyPolicy,
    bandwidths: list[float],
    overhead_s: float,
    setup_s: float,
) -> None:
    run = migrate(
        guest,
        policy,
        lambda n: bandwidths[n % len(bandwidths)],
        overhead_s=overhead_s,
        setup_s=setup_s,
    )
    last, decision = run.history[-1], run.decision
    timed_out = last.elapsed_s >= policy.timeout_s
    if decision.action == "cancel":
        assert (policy.timeout_strategy, decision.trigger, timed_out) == ("cancel", "timeout", True)
    elif decision.trigger == "nothing_dirty":
        assert last.dirty_bytes == 0
    elif decision.trigger == "downtime_limit":
        assert decision.downtime_s is not None
        assert decision.downtime_s <= policy.downtime_limit_s
    elif decision.trigger == "timeout":
        assert policy.timeout_strategy == "ignore"
        assert timed_out
    else:
        assert decision.trigger == "max_iterations"
        assert last.iteration == policy.max_iterations
        assert not timed_out
    if policy.max_iterations is not None:
        assert last.iteration <= policy.max_iterations
    assert all(entry.elapsed_s < policy.timeout_s for entry in run.history[:-1])


@given(guests(), POLICIES, BANDWIDTHS, st.floats(0, 1))
def test_on_a_steady_network_the_downtime_keeps_to_the_limit(
    guest: Guest, policy: PrecopyPolicy, bandwidth: float, overhead_s: float
) -> None:
    run = migrate(guest, policy, lambda _: bandwidth, overhead_s=overhead_s)
    downtime_s = run.history[-1].dirty_bytes / bandwidth + overhead_s
    if run.decision.trigger == "downtime_limit":
        assert downtime_s <= policy.downtime_limit_s * (1 + 1e-9)
    if run.decision.downtime_s is not None:
        assert run.decision.downtime_s == pytest.approx(downtime_s, rel=1e-9)


@given(st.integers(1, 1 << 20), BANDWIDTHS, st.floats(0, 2))
def test_a_guest_that_writes_nothing_ends_after_one_pass(
    pages: int, bandwidth: float, limit_s: float
) -> None:
    policy = PrecopyPolicy(downtime_limit_s=limit_s)
    run = migrate(Guest(pages, (WorkingSet(pages, 0.0),)), policy, lambda _: bandwidth)
    assert (run.decision.action, run.decision.trigger) == ("stop_and_copy", "nothing_dirty")
    assert len(run.history) == 2


# Of fewer than 10 dirty pages, 0.9 times as many, rounded up, are as many again: 0.05 s are 24.
@given(st.integers(1, 1 << 20), BANDWIDTHS, st.floats(0, 0.9), st.floats(0.05, 2))
def test_a_guest_slower_than_the_network_converges(
    pages: int, bandwidth: float, share: float, limit_s: float
) -> None:
    guest = Guest(pages, (WorkingSet(pages, share * bandwidth / PAGE),))
    policy = PrecopyPolicy(downtime_limit_s=limit_s, timeout_s=1e6)
    run = migrate(guest, policy, lambda _: bandwidth)
    assert run.decision.trigger in ("nothing_dirty", "downtime_limit")


@given(guests(), BANDWIDTHS, st.floats(0, 1), st.floats(0, 1), st.integers(0, 20))
def test_a_longer_limit_never_means_more_iterations(
    guest: Guest, bandwidth: float, limit_s: float, more_s: float, cap: int
) -> None:
    policy = PrecopyPolicy(downtime_limit_s=limit_s, timeout_s=5, max_iterations=cap)
    longer = attrs.evolve(policy, downtime_limit_s=limit_s + more_s)
    a, b = (migrate(guest, p, lambda _: bandwidth).history for p in (policy, longer))
    assert b == a[: len(b)]


@given(guests(), BANDWIDTHS, st.floats(0, 2), st.floats(0, 5))
def test_the_strategy_changes_the_end_and_nothing_before_it(
    guest: Guest, bandwidth: float, limit_s: float, timeout_s: float
) -> None:
    cancel = PrecopyPolicy(downtime_limit_s=limit_s, timeout_s=timeout_s)
    ignore = attrs.evolve(cancel, timeout_strategy="ignore")
    a, b = (migrate(guest, policy, lambda _: bandwidth) for policy in (cancel, ignore))
    assert a.history == b.history
    assert a.decision.trigger == b.decision.trigger
    assert b.decision.action == "stop_and_copy"
    assert (a.decision.action == "cancel") == (a.decision.trigger == "timeout")


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=30))
def test_on_a_clock_that_stands_still_a_guest_that_does_not_grow_is_stopped(
    dirty: list[int],
) -> None:
    history = [after(dirty[0], iteration=0)]
    for sent, left in pairwise([*dirty, 0]):
        decision = decide(PrecopyPolicy(downtime_limit_s=0), history)
        if decision.action != "iterate":
            break
        assert decision.forecast == Forecast()
        history.append(after(left, sent, iteration=len(history)))
    decision = decide(PrecopyPolicy(downtime_limit_s=0), history)
    assert decision.action == "stop_and_copy"
    shrank = next(n for n, (a, b) in enumerate(pairwise([*dirty, 0]), 1) if b <= a)
    assert len(history) == shrank + 1


NUMBERS = st.integers(0, 1 << 64)
TIMES = st.floats(0, 1e12)
ENTRIES = st.builds(
    IterationStatistics,
    iteration=st.integers(0, 1 << 64),
    sent_bytes=NUMBERS,
    duration_s=TIMES,
    dirty_bytes=NUMBERS,
    elapsed_s=TIMES,
)


@given(
    st.builds(
        PrecopyPolicy,
        downtime_limit_s=TIMES,
        timeout_s=TIMES,
        max_iterations=st.none() | NUMBERS,
    ),
    st.lists(ENTRIES, min_size=1, max_size=7, unique_by=lambda entry: entry.iteration),
    st.lists(TIMES, min_size=7, max_size=7),
    TIMES,
)
def test_any_history_gets_a_decision_that_can_be_read(
    policy: PrecopyPolicy,
    entries: list[IterationStatistics],
    times: list[float],
    overhead_s: float,
) -> None:
    entries.sort(key=lambda entry: entry.iteration)
    history = [
        attrs.evolve(entry, elapsed_s=elapsed_s)
        for entry, elapsed_s in zip(entries, sorted(times), strict=False)
    ]
    decision = decide(policy, history, overhead_s=overhead_s)
    assert decision.reason
    assert "nan" not in f"{decision.reason} {decision.forecast}"
    numbers = attrs.astuple(decision.forecast)
    assert not any(isinstance(n, float) and (math.isnan(n) or n < 0) for n in numbers)
    assert (decision.trigger is None) == (decision.action == "iterate")
    # Nothing before the last five entries is looked at.
    assert decide(policy, history[-5:], overhead_s=overhead_s) == decision


@given(st.integers(1 << 30, 1 << 40), st.floats(0.01, 0.95), st.floats(0.01, 1), st.floats(0, 0.2))
def test_the_forecast_comes_true(
    memory_bytes: int, share: float, limit_s: float, overhead_s: float
) -> None:
    bandwidth = 1e9
    limit_s += overhead_s
    simulation = simulate(
        PrecopyPolicy(downtime_limit_s=limit_s, timeout_s=1e6),
        [TracePhase(1, share * bandwidth, memory_bytes)],
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=bandwidth,
        overhead_s=overhead_s,
    )
    last = simulation.statistics[-1]
    for entry, decision in list(zip(simulation.statistics, simulation.decisions, strict=True))[1:]:
        forecast = decision.forecast
        assert forecast.converges
        assert forecast.iterations is not None
        assert forecast.duration_s is not None
        assert forecast.downtime_s is not None
        assert forecast.downtime_s <= limit_s * (1 + 1e-9)
        assert forecast.bandwidth_bytes_per_s == pytest.approx(bandwidth)
        assert forecast.dirty_rate_bytes_per_s == pytest.approx(share * bandwidth, rel=1e-3)
        # A limit met to the last digit may fall to either side.
        if forecast.downtime_s < limit_s * 0.98 and forecast.downtime_s > limit_s * share * 1.02:
            assert entry.iteration + forecast.iterations == last.iteration
            assert entry.elapsed_s + forecast.duration_s == pytest.approx(last.elapsed_s, rel=1e-2)
            assert forecast.downtime_s == pytest.approx(simulation.downtime_s, rel=1e-2)


@given(st.integers(1 << 20, 1 << 40), st.floats(1, 10))
def test_a_guest_that_outruns_the_network_is_forecast_never_to_converge(
    memory_bytes: int, times: float
) -> None:
    simulation = simulate(
        PrecopyPolicy(downtime_limit_s=0.01, max_iterations=6),
        [TracePhase(1, times * memory_bytes, memory_bytes)],
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=memory_bytes,
    )
    assert simulation.outcome.trigger == "max_iterations"
    for decision in simulation.decisions[1:]:
        assert decision.forecast.converges is False
        assert decision.forecast.iterations is None
        assert str(decision.forecast).startswith("never converges")


def test_a_full_working_set_is_seen_after_four_passes() -> None:
    history = [after(100 << 20, iteration=0), after(10 << 20, 100 << 20, 100.0)]
    assert decide(PrecopyPolicy(), history).forecast.converges
    for n in range(2, 6):
        history.append(after(10 << 20, 10 << 20, 10.0, iteration=n, elapsed=90.0 + 10 * n))
    assert decide(PrecopyPolicy(), history).forecast.converges is False


def test_what_a_pass_left_out_was_not_dirtied_in_it() -> None:
    history = [after(1000, iteration=0), after(650, 400, 2.0)]
    forecast = decide(PrecopyPolicy(), history).forecast
    assert (forecast.bandwidth_bytes_per_s, forecast.dirty_rate_bytes_per_s) == (200.0, 25.0)


def test_the_newer_pass_weighs_double() -> None:
    history = [after(0, iteration=0), after(10, 30, 1.0), after(40, 60, 1.0, iteration=2)]
    forecast = decide(PrecopyPolicy(), history).forecast
    assert forecast.bandwidth_bytes_per_s == pytest.approx(50)
    assert forecast.dirty_rate_bytes_per_s == pytest.approx(30)


@pytest.mark.parametrize(
    ("policy", "forecast"),
    [
        (PrecopyPolicy(downtime_limit_s=0.3), "converges after 2 more iterations, in 1.5 s"),
        (PrecopyPolicy(downtime_limit_s=0.3, timeout_s=2.4), "ends before it would converge"),
        (PrecopyPolicy(downtime_limit_s=0.3, timeout_s=2.5), "converges after 2"),
        (PrecopyPolicy(downtime_limit_s=0.3, max_iterations=2), "ends before it would converge"),
        (PrecopyPolicy(downtime_limit_s=0.3, max_iterations=3), "converges after 2"),
        (PrecopyPolicy(downtime_limit_s=1.0), "has converged: 1 s of downtime"),
    ],
)
def test_the_forecast_knows_the_timeout_and_the_cap(policy: PrecopyPolicy, forecast: str) -> None:
    history = [after(2000, iteration=0), after(1000, 1000, 1.0)]
    history[0] = attrs.evolve(history[0], dirty_bytes=1500)  # 500 left out, 500 dirtied
    assert str(decide(policy, history).forecast).startswith(forecast)


@pytest.mark.parametrize(
    ("entry", "action", "reason"),
    [
        (after(0, iteration=0), "stop_and_copy", "nothing is dirty"),
        (after(4096, iteration=0), "iterate", "first pass: 4 KiB to send"),
        (after(4096), "iterate", "4 KiB left: unknown downtime expected"),
        (after(4096, 0, 5.0), "iterate", "4 KiB left: unknown downtime expected"),
        (after(4096, 4095, 0.0), "iterate", "4 KiB left: unknown downtime expected"),
        (
            after(4096, 4096, 0.0),
            "stop_and_copy",
            "4 KiB left: 0 s of downtime expected, within the limit of 300 ms",
        ),
        (
            after(300, 1000, 1.0),
            "stop_and_copy",
            "300 B left: 300 ms of downtime expected, within the limit of 300 ms",
        ),
        (
            after(301, 1000, 1.0),
            "iterate",
            "301 B left: 301 ms of downtime expected, above the limit of 300 ms",
        ),
        (
            after(1024, 1024, 3600.0),
            "cancel",
            "the timeout of 3600 s has passed; 1 KiB left: 3600 s of downtime expected, above the"
            " limit of 300 ms; raise the timeout or the downtime limit, or let timeout_strategy be"
            " 'ignore'",
        ),
        (
            after(1, 1024, 3600.0, elapsed=3599.9),
            "iterate",
            "1 B left: 3.52 s of downtime expected, above the limit of 300 ms",
        ),
        (after(0, 1024, 3600.0), "stop_and_copy", "nothing is dirty"),
    ],
)
def test_the_rule(entry: IterationStatistics, action: str, reason: str) -> None:
    decision = decide(PrecopyPolicy(), [entry])
    assert (decision.action, decision.reason) == (action, reason)


def test_the_timeout_comes_before_the_cap_and_convergence_before_both() -> None:
    late = PrecopyPolicy(timeout_s=1, max_iterations=1)
    assert decide(late, [after(1000, 1000, 1.0)]).action == "cancel"
    assert decide(late, [after(100, 1000, 1.0)]).trigger == "downtime_limit"
    capped = decide(PrecopyPolicy(max_iterations=1), [after(1000, 1000, 1.0)])
    assert (capped.action, capped.trigger) == ("stop_and_copy", "max_iterations")
    assert capped.reason == (
        "the cap of 1 iteration is reached; 1e+03 B left: 1 s of downtime expected, pausing anyway"
    ).replace("1e+03 B", format_bytes(1000))


def test_the_overhead_belongs_to_the_downtime() -> None:
    history = [after(2000, iteration=0), after(200, 1000, 1.0)]
    assert decide(PrecopyPolicy(), history, overhead_s=0.0625).action == "stop_and_copy"
    decision = decide(PrecopyPolicy(), history, overhead_s=0.2)
    assert (decision.action, decision.downtime_s) == ("iterate", pytest.approx(0.4))
    idle = decide(PrecopyPolicy(), [after(0, 1000, 1.0)], overhead_s=9.0)
    assert (idle.trigger, idle.downtime_s) == ("nothing_dirty", 9.0)


BAD_SECONDS = [-1, -0.1, math.nan, math.inf, 2e12, 10**400, "1", None, True, Fraction(1, 2)]
BAD_COUNTS = [-1, 1.0, (1 << 64) + 1, "1", None, True]


@pytest.mark.parametrize("bad", BAD_SECONDS)
def test_a_time_is_a_number_of_seconds(bad: object) -> None:
    good = after(1, 1, 1.0)
    for name in ("duration_s", "elapsed_s"):
        with pytest.raises(MigratableError, match=name):
            attrs.evolve(good, **{name: bad})
    for name in ("downtime_limit_s", "timeout_s"):
        with pytest.raises(MigratableError, match=name):
            PrecopyPolicy(**{name: bad})  # type: ignore[arg-type]
    with pytest.raises(MigratableError, match="overhead_s"):
        decide(PrecopyPolicy(), [good], overhead_s=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", BAD_COUNTS)
def test_a_count_is_a_whole_number(bad: object) -> None:
    for name in ("iteration", "sent_bytes", "dirty_bytes"):
        with pytest.raises(MigratableError, match=name):
            attrs.evolve(after(1, 1, 1.0), **{name: bad})
    if bad is not None:
        with pytest.raises(MigratableError, match="max_iterations"):
            PrecopyPolicy(max_iterations=bad)  # type: ignore[arg-type]


def test_a_strategy_is_one_of_two() -> None:
    with pytest.raises(MigratableError, match="'cancel' or 'ignore', not 'wait'"):
        PrecopyPolicy(timeout_strategy="wait")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "history",
    [
        [],
        [after(1), after(1)],
        [after(1, iteration=2), after(1)],
        [after(1, elapsed=2.0), after(1, iteration=2, elapsed=1.9)],
    ],
)
def test_a_history_is_in_order(history: list[IterationStatistics]) -> None:
    with pytest.raises(MigratableError, match=r"empty|out of order"):
        decide(PrecopyPolicy(), history)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(999, "999 B"), (1000, "0.977 KiB"), (1 << 64, "16 EiB"), (999 << 20, "999 MiB")],
)
def test_bytes_for_people(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.floats(0, 1e12))
def test_times_for_people_are_right_to_three_digits(seconds: float) -> None:
    assume(seconds > 1e-300)
    number, unit = format_seconds(seconds).split()
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    assert float(number) * scale == pytest.approx(seconds, rel=6e-3)
    if seconds > 1e-6:
        assert "e" not in number


# The simulator


PHASES = st.builds(
    TracePhase,
    duration_s=st.floats(1e-3, 3),
    dirty_bytes_per_s=st.floats(0, 8e6),
    working_set_bytes=st.integers(0, 1 << 24),
)


@given(st.lists(PHASES, min_size=1, max_size=5), POLICIES, BANDWIDTHS, st.floats(0, 1))
def test_a_simulation_is_a_record_of_the_policy_at_work(
    trace: list[TracePhase], policy: PrecopyPolicy, bandwidth: float, overhead_s: float
) -> None:
    policy = attrs.evolve(policy, downtime_limit_s=policy.downtime_limit_s + overhead_s + 1e-3)
    simulation = simulate(
        policy,
        trace,
        memory_bytes=1 << 24,
        bandwidth_bytes_per_s=bandwidth,
        overhead_s=overhead_s,
    )
    history, decisions = simulation.statistics, simulation.decisions
    for n, decision in enumerate(decisions, 1):
        assert decision == decide(policy, history[:n], overhead_s=overhead_s)
        assert (decision.action == "iterate") == (n < len(decisions))
    for before, entry in pairwise(history):
        assert entry.sent_bytes == before.dirty_bytes
        assert entry.duration_s == before.dirty_bytes / bandwidth
        assert entry.dirty_bytes <= max(phase.working_set_bytes for phase in trace)
        fastest = max(phase.dirty_bytes_per_s for phase in trace)
        assert entry.dirty_bytes <= fastest * entry.duration_s * (1 + 1e-9) + 1
    while_running = sum(entry.sent_bytes for entry in history)
    if simulation.outcome.action == "cancel":
        assert simulation.downtime_s is None
        assert simulation.sent_bytes == while_running
        assert str(simulation).endswith("in vain; the source runs on")
    else:
        assert simulation.downtime_s == history[-1].dirty_bytes / bandwidth + overhead_s
        assert simulation.elapsed_s == history[-1].elapsed_s + simulation.downtime_s
        assert simulation.sent_bytes == while_running + history[-1].dirty_bytes
    lines = simulation.render().splitlines()
    assert len(lines) == 1 + (len(history) - 1) + 2
    assert [int(line.split()[0]) for line in lines[1:-2]] == [e.iteration for e in history[1:]]


def dirty_after_each_pass(trace: Sequence[TracePhase], passes: int) -> list[int]:
    """1000 bytes of memory at 100 bytes/s: the first pass takes 10 s."""
    policy = PrecopyPolicy(downtime_limit_s=0, max_iterations=passes)
    simulation = simulate(policy, trace, memory_bytes=1000, bandwidth_bytes_per_s=100)
    return [entry.dirty_bytes for entry in simulation.statistics]


def test_the_phases_follow_one_another() -> None:
    busy, idle = TracePhase(4, 50, 1000), TracePhase(100, 0, 0)
    assert dirty_after_each_pass([busy, idle], 9) == [1000, 200, 0]
    assert dirty_after_each_pass([attrs.evolve(idle, duration_s=7), busy], 2) == [1000, 150, 75]
    small = TracePhase(4, 50, 120)
    assert dirty_after_each_pass([small, TracePhase(1, 0, 0)], 9) == [1000, 120, 0]
    # What is dirty stays so when the working set shrinks; it is none of a later pass's.
    assert dirty_after_each_pass([busy, TracePhase(1, 50, 30)], 2) == [1000, 200, 30]
    # A phase that ends with the pass does not reach into the next.
    assert dirty_after_each_pass([TracePhase(10, 50, 1000), idle], 9) == [1000, 500, 0]


def test_the_last_phase_lasts_to_the_end() -> None:
    assert dirty_after_each_pass([TracePhase(1, 100, 400)], 3) == [1000, 400, 400, 400]


def test_a_simulation_in_which_the_guest_wins() -> None:
    simulation = simulate(
        PrecopyPolicy(),
        [TracePhase(10, 2e9, 1 << 30)],
        memory_bytes=4 << 30,
        bandwidth_bytes_per_s=1e9,
    )
    assert simulation.outcome.action == "cancel"
    assert simulation.elapsed_s == pytest.approx(3600, abs=2)
    lines = str(simulation).splitlines()
    assert len(lines) == 1 + 20 + 1 + 20 + 2
    assert lines[21] == f"... {len(simulation.statistics) - 1 - 40} more iterations ..."
    assert "never converges: 1.86 GiB/s are dirtied" not in lines[1]
    assert "never converges" in lines[20]
    assert lines[-2].startswith("cancelled: the timeout of 3600 s has passed; 1 GiB left")
    assert len(simulation.render().splitlines()) == len(simulation.statistics) + 2


def test_a_simulation_that_would_not_end_says_so() -> None:
    with pytest.raises(MigratableError, match=r"100000 iterations .* give the policy a cap"):
        simulate(
            PrecopyPolicy(downtime_limit_s=0),
            [TracePhase(1, 1e9, 1)],
            memory_bytes=1,
            bandwidth_bytes_per_s=1e8,
        )


TRACE = [TracePhase(1, 1, 1)]


@pytest.mark.parametrize(
    ("trace", "memory", "bandwidth", "problem"),
    [
        ([], 1, 1.0, "trace is empty"),
        (TRACE, 0, 1.0, "working set of 1 bytes, the memory only 0"),
        (TRACE, -1, 1.0, "memory_bytes"),
        (TRACE, 1, 0, "nothing would ever be sent"),
        (TRACE, 1, -1, "bandwidth_bytes_per_s"),
        (TRACE, 1, math.nan, "bandwidth_bytes_per_s"),
        (TRACE, 1 << 64, 1e-9, "duration_s"),
    ],
)
def test_a_simulation_needs_good_numbers(
    trace: list[TracePhase], memory: int, bandwidth: float, problem: str
) -> None:
    with pytest.raises(MigratableError, match=problem):
        simulate(PrecopyPolicy(), trace, memory_bytes=memory, bandwidth_bytes_per_s=bandwidth)


@given(st.lists(PHASES, min_size=1, max_size=9), st.sampled_from(["\n", "\r\n", "\n\n# note\n"]))
def test_a_trace_comes_back_from_its_text(trace: list[TracePhase], end: str) -> None:
    rows = [",".join(map(repr, attrs.astuple(phase))) for phase in trace]
    assert parse_trace(f"# measured\n{HEADER.strip()}{end}{end.join(rows)}") == tuple(trace)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the text ends before the first phase"),
        (HEADER, "line 2: the text ends before the first phase"),
        ("1,2,3\n", "line 1: the first line is duration_s,.* not '1,2,3'"),
        (HEADER + "1,2\n", "line 2: 3 values are needed, there are 2"),
        (HEADER + "1,2,3,4\n", "line 2: 3 values are needed, there are 4"),
        (HEADER + "# x\n\n1,2,3\n1,2,x\n", "line 5: .*'x'"),
        (HEADER + "1,2,3.5\n", "line 2: .*'3.5'"),
        (HEADER + "0,2,3\n", "line 2: duration_s is 0"),
        (HEADER + "-1,2,3\n", "line 2: duration_s"),
        (HEADER + "1,nan,3\n", "line 2: dirty_bytes_per_s"),
        (HEADER + "1,inf,3\n", "line 2: dirty_bytes_per_s"),
        (HEADER + "1,1,-3\n", "line 2: working_set_bytes"),
        (HEADER + '1,1,"3\n', "line 2: "),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(text: str, problem: str) -> None:
    with pytest.raises(MigratableError, match=f"^trace, {problem}"):
        parse_trace(text)


@given(st.text(), st.booleans())
def test_any_text_is_a_trace_or_an_error(text: str, headed: bool) -> None:
    error = None
    try:
        trace = parse_trace(HEADER + text if headed else text)
    except MigratableError as refused:
        error = refused
    assert str(error).startswith("trace, line ") if error else trace
