"""The Unicorn machine, moved while its guest computes: nothing is lost."""

from __future__ import annotations

import random
import re
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vmmig.adapters import guest
from vmmig.errors import MigratableError, RestoreError
from vmmig.guest_memory import GuestMemory
from vmmig.live import migrate, receive
from vmmig.memory import MemoryRange
from vmmig.precopy import PrecopyPolicy
from vmmig.snapshot import Snapshot
from vmmig.traits import LiveMigratable, PrecopyMigratable
from vmmig.verify import verify

unicorn = pytest.importorskip("unicorn")

from vmmig.adapters.unicorn import Machine  # noqa: E402

RAM_BYTES = (1 << 20) + (1 << 16)
ROUNDS = 3


def booted(output: Any, ram_bytes: int = RAM_BYTES) -> Machine:
    machine = Machine(ram_bytes, output=output)
    machine.boot(guest.code(), gpa=guest.ENTRY, rdi=ram_bytes, rsi=ROUNDS)
    return machine


def received(url: str, output: Any) -> tuple[threading.Thread, list[str], list[Machine]]:
    urls: list[str] = []
    machines: list[Machine] = []
    ready = threading.Event()

    def listening(url: str) -> None:
        urls.append(url)
        ready.set()

    def wait() -> None:
        make = partial(Machine.from_configuration, output=output)
        machines.append(receive(make, url, listening=listening))

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    return thread, urls, machines


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_guest_goes_on_elsewhere_wherever_it_is(scheme: str, tmp_path: Path) -> None:
    expected = guest.expected_digest(RAM_BYTES, ROUNDS)
    rng = random.Random(scheme)
    url = f"unix:{tmp_path}/s" if scheme == "unix" else "tcp:127.0.0.1:0"
    for _ in range(12):
        console = bytearray()
        reached = threading.Event()
        at_bytes = rng.randrange(1, 120)

        def output(
            data: bytes, console: bytearray = console, reached: Any = reached, at: int = at_bytes
        ) -> None:
            console.extend(data)
            if len(console) >= at:
                reached.set()

        source = booted(output)
        thread, urls, machines = received(url, output)
        source.resume()
        reached.wait()
        report = migrate(
            source,
            urls[0],
            configuration=source.configuration(),
            connections=rng.choice([1, 3]),
            policy=PrecopyPolicy(downtime_limit_s=0.05),
        )
        thread.join()
        assert report.handed_over == (scheme == "unix")
        (machine,) = machines
        assert machine.wait(60)
        machine.pause()
        found = re.search(rb"^digest ([0-9a-f]{64})$", console, re.MULTILINE)
        assert found
        assert found[1].decode() == expected
        assert console.startswith(b"vmmig guest: 1088 KiB of RAM, 3 rounds\nfilling RAM, done\n")
        assert console.endswith(b"power off\n")
        assert console.count(b".") == 16 * ROUNDS


def test_the_machine_is_what_can_be_migrated_live() -> None:
    machine = Machine(1 << 16, output=print)
    assert not verify(machine, PrecopyMigratable)
    assert not verify(machine, LiveMigratable)
    assert [*machine.snapshot_state().snapshots] == ["power", "serial", "timer", "vcpu"]


@pytest.mark.parametrize(
    ("configuration", "wrong"),
    [
        (None, "no configuration of a 'unicorn' machine"),
        ({"machine": "qemu"}, "no configuration of a 'unicorn' machine"),
        ({"machine": "unicorn", "id": 3}, "the machine's id is a text"),
        ({"machine": "unicorn", "id": "m", "disks": 2}, "'disks', which this version does not"),
    ],
)
def test_a_foreign_configuration_is_refused(configuration: object, wrong: str) -> None:
    memory = GuestMemory([MemoryRange(0, 1 << 16)])
    with pytest.raises(MigratableError, match=wrong):
        Machine.from_configuration(configuration, memory, output=print)


def test_memory_of_another_shape_is_refused() -> None:
    memory = GuestMemory([MemoryRange(0, 1 << 16), MemoryRange(1 << 20, 1 << 16)])
    with pytest.raises(MigratableError, match="RAM is one region"):
        Machine(memory, output=print)


def test_what_an_older_machine_kept_is_moved_too() -> None:
    machine = Machine(1 << 16, output=print)
    saved = machine.snapshot()
    saved.add_snapshot(Snapshot("disk"))
    machine.restore(saved, unknown="keep")
    memory = GuestMemory([MemoryRange(0, 1 << 16)])
    other = Machine.from_configuration(machine.configuration(), memory, output=print)
    other.restore_state(machine.snapshot_state())
    assert "disk" in other.snapshot().snapshots


def test_a_state_that_lacks_a_device_is_refused() -> None:
    machine = Machine(1 << 16, output=print)
    state = machine.snapshot_state()
    del state.snapshots["vcpu"]
    with pytest.raises(RestoreError, match="no state of vcpu"):
        machine.restore_state(state)
