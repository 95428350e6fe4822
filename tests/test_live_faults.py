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


def test_a_unix_connection_cut_at_any_message_leaves_one_machine(tmp_path: Path) -> None:
    def through(number: int, way: int, point: int | None) -> tuple[str, Wire]:
        names = (f"unix:{tmp_path}/d{number}", f"unix:{tmp_path}/w{number}")

        def passing(w: int, at: int, data: bytes) -> bytes | None:
            return data if w != way or point is None else data[: max(0, point - at)] or None

        source = Guest()
        # Without a descriptor to hand over, the memory is sent: a proxy passes no descriptors.
        receiving = Receiving(paused_guest(), names[0], timeout_s=10)
        with Wire(receiving.url, names[1], passing=passing) as wire:
            outcome = outcome_of(source, wire.url, policy=ONE_PASS, timeout_s=10)
            return settled(source, outcome, receiving), wire

    how, wire = through(0, 0, 16)
    assert how == "aborted"
    length = len(wire.passed[0])
    for number, point in enumerate(range(0, length, 5), 1):
        assert through(number, 0, point)[0] == "aborted"
    assert not [*tmp_path.glob("d*")]


@pytest.mark.parametrize("way", [0, 1])
def test_a_wire_that_stalls_at_any_message_ends_with_one_machine(way: int) -> None:
    there, back, complete = conversation()
    step = 16 if way else 900
    points = sorted({*range(0, len((there, back)[way]), step), complete if not way else 0})

    def stall(point: int) -> str:
        def passing(w: int, at: int, data: bytes) -> bytes | None:
            if w != way or at + len(data) <= point:
                return data
            stalled.set()
            return b" "[:0] if at >= point else data[: point - at]

        stalled = threading.Event()
        source = small_guest()
        receiving = Receiving(paused_guest(), timeout_s=1.5)
        with StallingWire(receiving.url, passing=passing) as wire:
            outcome = outcome_of(source, wire.url, policy=ONE_PASS, timeout_s=0.4)
            how = settled(source, outcome, receiving)
        assert stalled.is_set()
        return how

    with ThreadPoolExecutor(12) as pool:
        outcomes = [*pool.map(stall, points)]
    assert set(outcomes) <= {"aborted", "committed", "in doubt"}
    assert "aborted" in outcomes
    if way == 0:
        assert outcomes[0] == "aborted"


class StallingWire(Wire):
    """A wire on which what does not pass is not cut: it never comes."""

    @property
    def is_cut(self) -> bool:
        return False

    @is_cut.setter
    def is_cut(self, value: bool) -> None:
        pass


def test_a_wire_that_trickles_byte_by_byte_loses_nothing() -> None:
    source = small_guest()
    receiving = Receiving(paused_guest())
    with socket_pump(receiving.url) as url:
        outcome = outcome_of(source, url, policy=ONE_PASS)
        assert settled(source, outcome, receiving) == "committed"


class socket_pump:
    """Passes one connection on, a byte at a time, and those after it too."""

    def __init__(self, target: str) -> None:
        self._target = target

    def __enter__(self) -> str:
        import socket

        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"

    def _run(self) -> None:
        here, _ = self._listener.accept()
        there = connected(self._target)

        def pump(a: Any, b: Any) -> None:
            while byte := a.recv(1):
                b.sendall(byte)
            b.shutdown(1)

        back = threading.Thread(target=pump, args=(there, here))
        back.start()
        with here, there:
            pump(here, there)
            back.join()

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def requests(there: bytes) -> list[int]:
    """Where each request of the source begins."""
    starts, at = [], 0
    while at < len(there):
        starts.append(at)
        command, length = struct.unpack_from("<H6xQ", there, at)
        at += 16 + length
        if command == 4:
            at += PAGE + 8
    return starts


def test_a_destination_killed_at_any_message_leaves_the_source_running_or_in_doubt(
    tmp_path: Path,
) -> None:
    there, back, complete = conversation()
    points = [(0, p) for p in requests(there)] + [(1, p) for p in range(0, len(back) - 1, 16)]
    for number, (way, point) in enumerate(points):
        record, url = tmp_path / f"record{number}", f"unix:{tmp_path}/d{number}"
        child = forked(lambda url=url, record=record: receive_in_child(url, record))
        wait_for(tmp_path / f"d{number}")

        source = small_guest()
        with Wire(url, "tcp:", passing=killing([child], way, point, passes=False)) as wire:
            outcome = outcome_of(source, wire.url, policy=ONE_PASS, timeout_s=0.3)
        # One that is killed at its very last message may have tidied up before.
        (tmp_path / f"d{number}").unlink(missing_ok=True)
        if way == 1 and point == len(back) - 17:
            assert isinstance(outcome, MigrationReport)
            continue
        if isinstance(outcome, MigrationAborted):
            assert not source.paused
            assert (point <= complete) if way == 0 else (point < len(back) - 33)
            continue
        assert isinstance(outcome, (MigrationInDoubt, MigrationReport)), outcome
        assert source.paused
        if isinstance(outcome, MigrationReport):
            assert way == 0
            assert point > complete
            continue
        # The same destination begins again with its record, and is asked.
        assert outcome.key is not None
        again = Receiving(paused_guest(), url, record=record)
        told = ask(again.url, outcome.key)
        assert again.drop() is not None
        committed = way == 1
        assert told is (Outcome.COMMITTED if committed else Outcome.ABORTED), (way, point)


def test_a_source_killed_at_any_message_leaves_a_machine_only_after_complete() -> None:
    there, back, complete = conversation()
    points = [(0, p) for p in requests(there)] + [(1, p) for p in range(0, len(back) - 1, 16)]
    for way, point in points:
        children: list[int] = []
        running = threading.Event()
        receiving = Receiving(Announcing(running), timeout_s=20)
        with Wire(receiving.url, passing=killing(children, way, point, passes=True)) as wire:
            children.append(forked(lambda url=wire.url: migrate_in_child(url)))
            while not wire.passed[way][point:]:
                threading.Event().wait(0.001)
            has_complete = len(wire.passed[0]) >= complete + 16
            if has_complete:
                while not running.wait(0.001):
                    assert receiving.error is None
            receiving.cancel.cancel()
            machine = receiving.result()
        assert (machine is not None) == has_complete, (way, point, receiving.error)
        if machine is not None:
            assert not machine.paused
            assert machine.registers.startswith((8).to_bytes(8, "little") + b"look 1")


class Announcing(Guest):
    """A paused machine that says when it runs."""

    def __init__(self, running: threading.Event) -> None:
        super().__init__()
        self.paused = True
        self.running = running

    def resume(self) -> None:
        super().resume()
        self.running.set()


def killing(children: list[int], way: int, point: int, *, passes: bool) -> Any:
    """Kill the child when that byte comes, which passes or not."""

    def passing(w: int, at: int, data: bytes) -> bytes | None:
        if w != way or not at <= point < at + len(data):
            return data
        while not children:
            threading.Event().wait(0.001)
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        return data if passes else None

    return passing


def forked(work: Any) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(0)


def receive_in_child(url: str, record: Path) -> None:
    from vmmig.live import receive

    receive(paused_guest(), url, record=record)


def migrate_in_child(url: str) -> None:
    migrate(small_guest(), url, policy=ONE_PASS, timeout_s=20)


def wait_for(path: Path) -> None:
    while not path.exists():
        threading.Event().wait(0.001)


def test_a_restarted_destination_answers_again_and_again_and_still_receives(
    tmp_path: Path,
) -> None:
    _, back, _ = conversation()
    source = small_guest()
    receiving = Receiving(paused_guest(), record=tmp_path / "record", timeout_s=0.3)
    with Wire(receiving.url, passing=cut_at(1, len(back) - 30), heals=False) as wire:
        outcome = outcome_of(source, wire.url, policy=ONE_PASS, timeout_s=0.3)
    assert receiving.result() is not None
    assert isinstance(outcome, MigrationInDoubt)
    key = outcome.key
    assert key is not None
    machine = paused_guest()
    again = Receiving(machine, record=tmp_path / "record")
    for _ in range(3):
        assert ask(again.url, key) is Outcome.COMMITTED
    for _ in range(3):
        with connected(again.url):
            pass
    with connected(again.url) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.recv(1)
    other = small_guest()
    assert settled(other, outcome_of(other, again.url), again) == "committed"


@pytest.mark.parametrize("greeting", [b"", b"\1", b"\1\0", b"\1\0" + bytes(20), b"GET / HTTP/1"])
@pytest.mark.parametrize("phase", ["pre-copy", "stop-and-copy", "handing over"])
def test_strangers_who_come_in_the_middle_spoil_nothing(greeting: bytes, phase: str) -> None:
    source, machine = small_guest(), paused_guest()
    before = traces()
    receiving = Receiving(machine)
    strangers = []

    def progress(event: Any) -> None:
        if event.phase == phase:
            stranger = connected(receiving.url)
            stranger.sendall(greeting)
            strangers.append(stranger)

    outcome = outcome_of(source, receiving.url, policy=ONE_PASS, connections=2, progress=progress)
    assert settled(source, outcome, receiving) == "committed", outcome
    assert strangers
    for stranger in strangers:
        stranger.close()
    assert traces() == before


METHODS = {
    "source": [
        "guest_memory", "start_migration", "start_dirty_log", "dirty_log", "pause",
        "snapshot_state", "stop_dirty_log", "resume", "complete_migration",
    ],
    "destination": ["guest_memory", "restore_state", "resume", "complete_migration", "pause"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("side", "method"), [(side, name) for side, names in METHODS.items() for name in names]
)
@pytest.mark.parametrize(
    "error", [ValueError("broken"), MigratableError("broken"), OSError(5, "broken")]
)
def test_a_component_that_raises_leaves_one_machine(
    side: str, method: str, error: Exception, tmp_path: Path
) -> None:
    source, machine = small_guest(), paused_guest()
    (source if side == "source" else machine).failing[method] = error
    receiving = Receiving(machine, record=tmp_path / "record")
    outcome = outcome_of(source, receiving.url, policy=ONE_PASS, timeout_s=10)
    harmless = {"stop_dirty_log", "complete_migration", "pause" if side != "source" else ""}
    if method in harmless or (side == "source" and method == "resume"):
        assert settled(source, outcome, receiving) == "committed"
    else:
        assert settled(source, outcome, receiving) == "aborted"
        assert "broken" in str(outcome)


def test_a_source_that_cannot_be_resumed_says_so() -> None:
    source, machine = small_guest(), paused_guest()
    source.failing["resume"] = ValueError("stuck")
    machine.failing["restore_state"] = ValueError("broken")
    receiving = Receiving(machine)
    outcome = outcome_of(source, receiving.url, policy=ONE_PASS)
    assert isinstance(outcome, MigrationAborted)
    assert "stuck" in str(outcome)
    assert "broken" in str(outcome)
    assert "paused" in str(outcome)
    receiving.drop()


@pytest.mark.parametrize(
    "method",
    ["guest_memory", "start_dirty_log", "dirty_log", "pause", "snapshot_state"],
)
def test_an_interrupt_at_the_source_lets_it_run_on(method: str) -> None:
    source = small_guest()
    source.failing[method] = KeyboardInterrupt()
    receiving = Receiving(paused_guest())
    with pytest.raises(KeyboardInterrupt):
        migrate(source, receiving.url, policy=ONE_PASS, connections=3)
    assert not source.paused
    assert isinstance(receiving.drop(), MigratableError)


@pytest.mark.parametrize("method", ["guest_memory", "restore_state", "resume"])
def test_an_interrupt_at_the_destination_leaves_the_source(method: str, tmp_path: Path) -> None:
    source, machine = small_guest(), paused_guest()
    machine.failing[method] = KeyboardInterrupt()
    record = tmp_path / "record"
    receiving = Receiving(machine, record=record)
    outcome = outcome_of(source, receiving.url, policy=ONE_PASS, timeout_s=0.3)
    assert isinstance(receiving.drop(), KeyboardInterrupt)
    assert machine.paused
    if isinstance(outcome, MigrationAborted):
        assert not source.paused
        return
    assert method == "resume"
    assert isinstance(outcome, MigrationInDoubt)
    assert source.paused
    assert outcome.key is not None
    again = Receiving(paused_guest(), record=record)
    assert ask(again.url, outcome.key) is Outcome.ABORTED
    again.drop()


@pytest.mark.parametrize("greeting", [b"", b"\1", b"\1\0" + bytes(14), b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_who_came_first_and_stays_holds_no_source_up(greeting: bytes) -> None:
    source = small_guest()
    receiving = Receiving(paused_guest())
    with connected(receiving.url) as stranger:
        stranger.sendall(greeting)
        if greeting.startswith(b"GET"):
            stranger.recv(16)
        if greeting != b"\1\0" + bytes(14):
            outcome = outcome_of(source, receiving.url, policy=ONE_PASS)
            assert settled(source, outcome, receiving) == "committed"
            return
        # Who speaks the protocol is a source, as long as the connection holds.
        stranger.recv(16)
    outcome = outcome_of(source, receiving.url, policy=ONE_PASS)
    assert settled(source, outcome, receiving) == "committed"
