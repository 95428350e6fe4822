"""vmmig's own components, proven by the kit that it gives to others."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import strategies as st

from vmmig import Composite
from vmmig.testing.contracts import contract

unicorn = pytest.importorskip("unicorn", reason="the machine needs the extra unicorn")

from vmmig.adapters import guest  # noqa: E402
from vmmig.adapters.unicorn import Machine, PmTimer, PowerSwitch, Ram, SerialPort  # noqa: E402

_OFFSETS = st.integers(0, 7)
_BYTES = st.integers(0, 255)


def serial_port() -> SerialPort:
    return SerialPort(lambda _: None)


TestSerialPort = contract(
    serial_port,
    operations={"write": [_OFFSETS, _BYTES], "read": [_OFFSETS]},
    observe=lambda port: ([port.read(i) for i in (1, 3, 4, 5, 7)], port.transmitted_bytes),
)


class Timer(PmTimer):
    """On a clock that only the operations move."""

    def __init__(self) -> None:
        self.now_ns = 0
        super().__init__(clock_ns=lambda: self.now_ns)

    def wait(self, ns: int) -> None:
        self.now_ns += ns


TestPmTimer = contract(
    Timer,
    operations={"wait": [st.integers(0, 1 << 40)], "read": [st.just(0)]},
    observe=lambda timer: timer.elapsed_s,
)

TestPowerSwitch = contract(
    PowerSwitch,
    operations={"write": [st.just(0), st.sampled_from([0, 1 << 12, 1 << 13])]},
    observe=lambda switch: switch.is_off,
)


def ram() -> Ram:
    uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    return Ram(uc, 1 << 13, gpa=1 << 16)


def store(memory: Ram, at: int, data: bytes) -> None:
    memory.memory[at : at + len(data)] = data


TestRam = contract(
    ram,
    operations={
        "store": (
            store,
            st.sampled_from([0, 1, 4095, 4096, (1 << 13) - 4]),
            st.binary(min_size=4, max_size=4),
        )
    },
    observe=lambda memory: bytes(memory.memory),
)


def machine() -> Machine:
    """Booted, and not started: the guest runs in the operations."""
    made = Machine(1 << 17, output=bytearray().extend)
    made.boot(guest.code(), gpa=guest.ENTRY, rdi=1 << 17, rsi=1)
    return made


def run_to_the_end(made: Any) -> tuple[bool, str]:
    """What the guest computed stands in its work memory; below, it keeps the time it saw last."""
    made.resume()
    ended = made.wait(60)
    return ended, hashlib.sha256(memoryview(made.ram.memory)[1 << 16 :]).hexdigest()


TestMachine = contract(
    machine,
    operations={"run to the end": run_to_the_end},
    observe=lambda made: (bytes(made.ram.memory), made.serial.transmitted_bytes),
    runs_by_itself=True,
)


def devices() -> Composite:
    return Composite("devices", [serial_port(), Timer(), PowerSwitch()])


def write_to(board: Any, name: str, value: int) -> None:
    board.components[name].write(0, value)


TestComposite = contract(
    devices,
    operations={
        "write": (write_to, st.sampled_from(["serial", "power"]), st.integers(0, 1 << 14)),
        "wait": (lambda board, ns: board.components["timer"].wait(ns), st.integers(0, 1 << 40)),
    },
    observe=lambda board: {
        "serial": board.components["serial"].transmitted_bytes,
        "timer": board.components["timer"].elapsed_s,
        "power": board.components["power"].is_off,
    },
)
