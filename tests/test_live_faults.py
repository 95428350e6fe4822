"""Whatever becomes of the wire or of either process: exactly one side can run, and it is known."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.live_machines import (
    PAGE,
    Guest,
    Receiving,
    Wire,
    connected,
    outcome_of,
    paused_guest,
    settled,
    traces,
)
from vmmig.errors import MigratableError
from vmmig.live import MigrationAborted, MigrationInDoubt, MigrationReport, Outcome, ask, migrate
from vmmig.precopy import PrecopyPolicy

ONE_PASS = PrecopyPolicy(max_iterations=1, downtime_limit_s=0)


def small_guest() -> Guest:
    """One page, written to at each look: so that there is a first pass and a last one."""
    guest = Guest()
    guest.store(0, b"first")
    looks = iter(range(1, 100))
    guest.before_look = lambda: guest.store(8, b"look %d" % next(looks))
    return guest


def moved_through(
    passing: Any, heals: bool, timeout_s: float, url: str = "tcp:127.0.0.1:0", wire_url: str = ""
) -> tuple[str, Wire]:
    source = small_guest()
    receiving = Receiving(paused_guest(), url, timeout_s=timeout_s)
    with Wire(receiving.url, wire_url or url, passing=passing, heals=heals) as wire:
        outcome = outcome_of(source, wire.url, policy=ONE_PASS, timeout_s=timeout_s)
        return settled(source, outcome, receiving), wire


def conversation() -> tuple[bytes, bytes, int]:
    """All bytes of a migration in both directions, and where Complete begins."""
    how, wire = moved_through(lambda way, at, data: data, True, 10)
    assert how == "committed"
    there, back = map(bytes, wire.passed)
    complete = there.rindex(struct.pack("<H6xQ", 5, 0))
    return there, back, complete


def cut_points(there: bytes) -> list[int]:
    """Every byte of all messages, and some of the pages' own."""
    points = set(range(len(there) + 1))
    at = 0
    while (at := there.find(struct.pack("<H6xQ", 4, 16), at)) >= 0:
        body = at + 32
        points -= set(range(body + 64, body + PAGE - 64))
        points |= set(range(body + 64, body + PAGE - 64, 509))
        at = body + PAGE
    return sorted(points)


def cut_at(way: int, point: int) -> Any:
    return lambda w, at, data: data if w != way else data[: max(0, point - at)] or None


def test_a_connection_cut_after_any_byte_leaves_one_machine_and_both_sides_know() -> None:
    there, back, complete = conversation()
    cuts = [(0, point) for point in cut_points(there)[:-1]]
    cuts += [(1, point) for point in range(len(back))]
    before = traces()

    def cut(each: tuple[int, int]) -> tuple[tuple[int, int], str]:
        return each, moved_through(cut_at(*each), True, 10)[0]

    with ThreadPoolExecutor(6) as pool:
        outcomes = dict(pool.map(cut, cuts))
    # Complete is a message of 16 bytes: who read them all, had it.
    for (way, point), how in outcomes.items():
        if way == 0:
            assert how == ("committed" if point >= complete + 16 else "aborted"), (way, point)
        elif point >= len(back) - 33:
            assert how == "committed", (way, point)
        else:
            assert how == "aborted", (way, point)
    assert traces() == before


def test_a_connection_cut_for_good_after_complete_leaves_doubt_and_only_then() -> None:
    there, back, complete = conversation()
    cuts = [(0, point) for point in range(complete - 8, len(there))]
    cuts += [(1, point) for point in range(len(back) - 50, len(back))]

    def cut(each: tuple[int, int]) -> tuple[tuple[int, int], str]:
        return each, moved_through(cut_at(*each), False, 0.5)[0]

    with ThreadPoolExecutor(16) as pool:
        outcomes = dict(pool.map(cut, cuts))
    for (way, point), how in outcomes.items():
        if way == 0 and point < complete + 16:
            # The source has sent all of Complete, or not: it cannot know that it never came.
            assert how in ("aborted", "in doubt"), (way, point)
        elif way == 0:
            assert how in ("committed", "in doubt"), (way, point)
        elif point < len(back) - 33:
            assert how == "aborted", (way, point)
        else:
            assert how == ("committed" if point >= len(back) - 17 else "in doubt"), (way, point)
    assert Counter(outcomes.values())["in doubt"] >= 16


