"""Live migration as its users see it."""

from __future__ import annotations

import json
import os
import random
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.live_machines import (
    PAGE,
    Guest,
    Receiving,
    outcome_of,
    paused_guest,
    settled,
    traces,
)
from vmmig.errors import MigratableError
from vmmig.live import MigrationAborted, MigrationProgress, MigrationReport, migrate, receive
from vmmig.memory import MemoryRange
from vmmig.precopy import PrecopyPolicy
from vmmig.transfer import CancelToken

MIGRATIONS = int(os.environ.get("VMMIG_TEST_MIGRATIONS", "1000"))
"""How many random migrations; for more, set it in the environment."""

SEVERAL = (MemoryRange(0, 64 * PAGE), MemoryRange(1 << 20, 16 * PAGE), MemoryRange(1 << 32, PAGE))


def filled(ranges: Any = SEVERAL) -> Guest:
    guest = Guest(ranges)
    rng = random.Random(1)
    for each in ranges:
        for page in range(each.gpa, each.end, 3 * PAGE):
            guest.store(page, rng.randbytes(PAGE))
    return guest


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
@pytest.mark.parametrize("connections", [1, 2, 3, 8])
@pytest.mark.parametrize("made", [False, True])
def test_a_machine_that_writes_all_the_time_arrives_whole(
    scheme: str, connections: int, made: bool, tmp_path: Path
) -> None:
    source, given = filled(), paused_guest(SEVERAL)
    before = traces()
    url = "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/m"
    receiving = Receiving(Guest.made if made else given, url)
    stop = threading.Event()

    def write(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            each = rng.choice(SEVERAL)
            source.store(rng.randrange(each.gpa, each.end - 16), rng.randbytes(16))

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    for writer in writers:
        writer.start()
    try:
        outcome = outcome_of(
            source,
            receiving.url,
            connections=connections,
            configuration={"cpus": 2},
            policy=PrecopyPolicy(max_iterations=3, downtime_limit_s=0),
        )
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert settled(source, outcome, receiving) == "committed"
    assert isinstance(outcome, MigrationReport)
    assert outcome.handed_over == (scheme == "unix")
    assert outcome.connections == connections
    if made:
        assert receiving.machine.configuration == {"cpus": 2}
    assert [*tmp_path.iterdir()] == []
    receiving.machine = None
    assert traces() == before


def test_memory_that_is_handed_over_is_the_same_memory(tmp_path: Path) -> None:
    source = filled()
    receiving = Receiving(Guest.made, f"unix:{tmp_path}/m")
    migrate(source, receiving.url)
    receiving.result().store(0, b"shared")
    assert source.guest_memory().read(0, 6) == b"shared"


def test_the_source_may_come_first(tmp_path: Path) -> None:
    source, url = filled(), f"unix:{tmp_path}/m"
    thread = threading.Thread(target=migrate, args=(source, url))
    thread.start()
    machine = receive(Guest.made, url)
    thread.join()
    assert machine.contents() == source.at_pause


@pytest.mark.parametrize("scheme", ["tcp:127.0.0.1:0", "unix"])
def test_a_paused_machine_stays_paused(scheme: str, tmp_path: Path) -> None:
    source = filled()
    source.pause()
    receiving = Receiving(Guest.made, scheme if scheme != "unix" else f"unix:{tmp_path}/m")
    migrate(source, receiving.url, resume=False)
    machine = receiving.result()
    assert machine.paused
    assert source.paused
    assert machine.contents() == source.contents()
    assert "resume" not in source.calls + machine.calls


def test_zero_pages_are_not_sent() -> None:
    source = Guest([MemoryRange(0, 1 << 24)])
    source.store(5 * PAGE, b"one page")
    dirty = paused_guest([MemoryRange(0, 1 << 24)])
    dirty.guest_memory().write(9 * PAGE, b"of another machine")
    receiving = Receiving(dirty)
    report = migrate(source, receiving.url)
    assert settled(source, report, receiving) == "committed"
    assert report.sent_bytes == PAGE


def restless() -> Guest:
    source = filled()
    numbers = iter(range(10**9))
    source.before_look = lambda: source.store(0, b"%d" % next(numbers))
    return source


def test_at_the_timeout_the_policy_decides() -> None:
    source = restless()
    receiving = Receiving(Guest.made)
    policy = PrecopyPolicy(timeout_s=0, downtime_limit_s=0)
    outcome = outcome_of(source, receiving.url, policy=policy)
    assert settled(source, outcome, receiving) == "aborted"
    assert "pause" not in source.calls
    receiving = Receiving(Guest.made)
    policy = PrecopyPolicy(timeout_s=0, downtime_limit_s=0, timeout_strategy="ignore")
    outcome = outcome_of(source, receiving.url, policy=policy)
    assert settled(source, outcome, receiving) == "committed"


@pytest.mark.parametrize("cap", [0, 1, 5])
def test_passes_are_capped(cap: int) -> None:
    source = restless()
    receiving = Receiving(Guest.made)
    policy = PrecopyPolicy(max_iterations=cap, downtime_limit_s=0)
    report = migrate(source, receiving.url, policy=policy)
    assert settled(source, report, receiving) == "committed"
    assert len(report.iterations) == cap


@pytest.mark.parametrize("connections", [1, 4])
def test_progress_goes_on_in_order_and_the_report_is_json(connections: int) -> None:
    source, seen = restless(), list[MigrationProgress]()
    receiving = Receiving(Guest.made)
    report = migrate(
        source,
        receiving.url,
        connections=connections,
        progress=seen.append,
        policy=PrecopyPolicy(max_iterations=3, downtime_limit_s=0),
    )
    assert settled(source, report, receiving) == "committed"
    phases = [*dict.fromkeys(event.phase for event in seen)]
    assert phases == ["connecting", "pre-copy", "stop-and-copy", "handing over", "done"]
    for a, b in pairwise(seen):
        assert phases.index(a.phase) <= phases.index(b.phase)
        assert a.sent_bytes <= b.sent_bytes
        assert a.elapsed_s <= b.elapsed_s
    assert seen[-1].sent_bytes == report.sent_bytes
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["ram_bytes"] == 81 * PAGE
    assert len(record["iterations"]) == 3
    assert record["downtime"]["total_s"] == pytest.approx(report.downtime.total_s)


@pytest.mark.parametrize("phase", ["connecting", "pre-copy", "stop-and-copy", "handing over"])
@pytest.mark.parametrize("by", ["callback", "thread", "error", "destination"])
def test_a_migration_can_be_stopped_until_complete_is_sent(phase: str, by: str) -> None:
    source, cancel = restless(), CancelToken()
    receiving = Receiving(Guest.made)

    def progress(event: MigrationProgress) -> None:
        if event.phase != phase or cancel.cancelled:
            return
        if by == "error":
            raise ValueError("no display")
        token = receiving.cancel if by == "destination" else cancel
        if by == "thread":
            thread = threading.Thread(target=token.cancel)
            thread.start()
            thread.join()
        else:
            token.cancel()

    outcome = outcome_of(
        source,
        receiving.url,
        progress=progress,
        cancel=cancel,
        connections=3,
        timeout_s=0.5 if by == "destination" else 60.0,
        policy=PrecopyPolicy(max_iterations=2, downtime_limit_s=0),
    )
    how = settled(source, outcome, receiving)
    if phase != "handing over":
        assert how == "aborted"
    elif by != "destination":
        assert how == "committed"


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"connections": 129},
        {"connections": "2"},
        {"configuration": object()},
        {"configuration": float("nan")},
    ],
)
def test_bad_arguments_abort(options: dict[str, Any]) -> None:
    source = filled()
    receiving = Receiving(Guest.made)
    outcome = outcome_of(source, receiving.url, timeout_s=1, **options)
    assert isinstance(outcome, MigrationAborted)
    assert isinstance(receiving.drop(), MigratableError)
    assert not source.paused


def test_a_machine_of_another_shape_is_refused_and_told_why() -> None:
    source = filled()
    receiving = Receiving(paused_guest([MemoryRange(0, PAGE)]))
    outcome = outcome_of(source, receiving.url)
    assert settled(source, outcome, receiving) == "aborted"
    assert "RAM" in str(outcome)
    receiving = Receiving(Guest.made, max_memory_bytes=PAGE)
    outcome = outcome_of(source, receiving.url)
    assert settled(source, outcome, receiving) == "aborted"
    assert "max_memory_bytes" in str(outcome)


def test_nobody_comes(tmp_path: Path) -> None:
    before = traces()
    with pytest.raises(MigratableError, match="no source came"):
        receive(Guest.made, f"unix:{tmp_path}/m", timeout_s=0)
    assert traces() == before
    assert [*tmp_path.iterdir()] == []


def test_a_thousand_migrations_change_no_byte() -> None:
    before = traces()
    for seed in range(MIGRATIONS):
        rng = random.Random(seed)
        ranges, gpa = [], 0
        for _ in range(rng.randint(1, 4)):
            gpa += rng.choice([0, PAGE, 1 << 30])
            ranges.append(MemoryRange(gpa, rng.choice([1, 2, 3, 16, 64]) * PAGE))
            gpa = ranges[-1].end
        source = Guest(ranges)

        def scribble(rng: random.Random = rng, source: Guest = source) -> None:
            for _ in range(rng.choice([0, 1, 3, 20])):
                each = rng.choice(source.guest_memory().regions)
                size = rng.choice([1, 8, PAGE, min(5 * PAGE, each.length)])
                at = rng.randrange(each.gpa, each.gpa + each.length - size + 1)
                source.store(at, bytes(size) if rng.random() < 0.2 else rng.randbytes(size))

        scribble()
        source.before_look = scribble
        made = rng.random() < 0.5
        receiving = Receiving(Guest.made if made else paused_guest(ranges))
        outcome = outcome_of(
            source,
            receiving.url,
            connections=rng.choice([1, 1, 2, 3, 5]),
            progress=lambda event, scribble=scribble: scribble(),
            policy=PrecopyPolicy(max_iterations=rng.randint(0, 3), downtime_limit_s=0),
        )
        assert settled(source, outcome, receiving) == "committed", (seed, outcome)
    del source, receiving, outcome, scribble
    assert traces() == before
