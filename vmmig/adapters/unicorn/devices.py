"""Devices on I/O ports: a serial port, a timer and a power switch; they know no engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import attrs

from vmmig.errors import MigratableError
from vmmig.snapshot import Snapshot
from vmmig.state import U8, U16, U64, Length, load_state, save_state, versioned

_SERIAL_REGISTERS = {1: "ier", 2: "fcr", 3: "lcr", 4: "mcr", 7: "scr"}
_LCR_DLAB = 0x80
_MCR_LOOP = 0x10
_FCR_ENABLE = 0x01
_FCR_CLEAR = 0x02
_FIFO_BYTES = 16

_PM_TIMER_HZ = 3_579_545
_SLP_EN = 1 << 13


@versioned("vmmig.serial", 1)
@attrs.define
class SerialState:
    """What a serial port holds.

    >>> SerialState().divisor
    12
    """

    ier: U8 = 0
    fcr: U8 = 0
    lcr: U8 = 0
    mcr: U8 = 0
    scr: U8 = 0
    divisor: U16 = 12
    received: Annotated[list[U8], Length(max=_FIFO_BYTES)] = attrs.field(factory=list)
    transmitted_bytes: U64 = 0


@versioned("vmmig.pm-timer", 1)
@attrs.define
class TimerState:
    """What a power-management timer holds.

    >>> TimerState().elapsed_ns
    0
    """

    elapsed_ns: U64 = 0


@versioned("vmmig.power", 1)
@attrs.define
class PowerState:
    """What a power switch holds.

    >>> PowerState().is_off
    False
    """

    is_off: bool = False


class SerialPort:
    """A 16550 UART, for drivers that poll: the transmitter is always ready, there is no input.

    In loopback mode, by which drivers recognize a UART, what the guest sends it receives.

    Args:
        output: Called on the guest's thread with each byte that the guest sends.
        base: The first of its eight I/O ports.

    >>> sent = []
    >>> serial = SerialPort(sent.append)
    >>> serial.write(0, ord("A"))
    >>> sent, serial.transmitted_bytes
    ([b'A'], 1)
    """

    def __init__(
        self, output: Callable[[bytes], object], *, base: int = 0x3F8, id: str = "serial"
    ) -> None:
        self._id = id
        self._output = output
        self._state = SerialState()
        self.ports = range(base, base + 8)

    @property
    def transmitted_bytes(self) -> int:
        """How many bytes the guest has sent, over all its life."""
        return self._state.transmitted_bytes

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Nothing: the port works only while the vCPU runs."""

    def resume(self) -> None:
        """Nothing: the port works only while the vCPU runs."""

    def snapshot(self) -> Snapshot:
        """One section: the registers, what waits to be received, how many bytes were sent."""
        return save_state(self._id, self._state)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the state.

        Raises:
            RestoreError: The snapshot does not fit.
        """
        self._state = load_state(snapshot, SerialState)

    def read(self, offset: int) -> int:
        """The register at ``offset``, as the guest reads it."""
        state = self._state
        if offset <= 1 and state.lcr & _LCR_DLAB:
            return state.divisor >> 8 * offset & 0xFF
        if offset == 0:
            return state.received.pop(0) if state.received else 0
        if offset == 2:
            return 0xC1 if state.fcr & _FCR_ENABLE else 0x01
        if offset == 5:
            return 0x60 | bool(state.received)
        if offset == 6:
            if not state.mcr & _MCR_LOOP:
                return 0xB0
            dtr, rts, outs = state.mcr & 1, state.mcr >> 1 & 1, state.mcr >> 2 & 3
            return rts << 4 | dtr << 5 | outs << 6
        return int(getattr(state, _SERIAL_REGISTERS[offset]))

    def write(self, offset: int, value: int) -> None:
        """The register at ``offset``, as the guest writes it.

        Raises:
            MigratableError: ``output`` failed; the byte counts as sent.
        """
        state = self._state
        value &= 0xFF
        if offset <= 1 and state.lcr & _LCR_DLAB:
            shift = 8 * offset
            state.divisor = state.divisor & ~(0xFF << shift) | value << shift
        elif offset == 0 and state.mcr & _MCR_LOOP:
            state.received = [*state.received, value][-_FIFO_BYTES:]
        elif offset == 0:
            state.transmitted_bytes += 1
            try:
                self._output(bytes([value]))
            except Exception as error:
                raise MigratableError(f"the serial port's output failed: {error!r}") from error
        elif offset in _SERIAL_REGISTERS:
            if offset == 2 and value & _FCR_CLEAR:
                state.received = []
            setattr(state, _SERIAL_REGISTERS[offset], value)


class PmTimer:
    """The ACPI power-management timer: 32 bits, 3.579545 MHz; it stands still while paused.

    Args:
        port: Its I/O port.
        clock_ns: The host's clock, in nanoseconds.

    >>> host_ns = 5_000_000_000
    >>> timer = PmTimer(clock_ns=lambda: host_ns)
    >>> timer.resume()
    >>> host_ns += 1_000_000_000
    >>> timer.read(0)
    3579545
    >>> timer.pause()
    >>> host_ns += 1_000_000_000
    >>> timer.read(0), timer.elapsed_s
    (3579545, 1.0)
    """

    def __init__(
        self,
        *,
        port: int = 0x608,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        id: str = "timer",
    ) -> None:
        self._id = id
        self._clock_ns = clock_ns
        self._started_ns: int | None = None
        self._state = TimerState()
        self.ports = range(port, port + 1)

    @property
    def elapsed_s(self) -> float:
        """How long the machine has run, over all its life, in seconds."""
        return self._elapsed_ns() / 1e9

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Stop the time."""
        self._state = TimerState(self._elapsed_ns())
        self._started_ns = None

    def resume(self) -> None:
        """Let the time go on."""
        if self._started_ns is None:
            self._started_ns = self._clock_ns()

    def snapshot(self) -> Snapshot:
        """One section: for how long the timer has run."""
        return save_state(self._id, TimerState(self._elapsed_ns()))

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the time.

        Raises:
            RestoreError: The snapshot does not fit.
        """
        self._state = load_state(snapshot, TimerState)
        self._started_ns = None if self._started_ns is None else self._clock_ns()

    def read(self, offset: int) -> int:
        """The counter, as the guest reads it."""
        return self._elapsed_ns() * _PM_TIMER_HZ // 10**9 & 0xFFFFFFFF

    def write(self, offset: int, value: int) -> None:
        """Nothing: the counter is read-only."""

    def _elapsed_ns(self) -> int:
        running = 0 if self._started_ns is None else self._clock_ns() - self._started_ns
        return self._state.elapsed_ns + running


class PowerSwitch:
    """The ACPI PM1a control register, of which one bit counts: SLP_EN switches the power off.

    Args:
        switched_off: Called on the guest's thread when it has switched off.
        port: Its I/O port.

    >>> power = PowerSwitch()
    >>> power.write(0, 1 << 13)
    >>> power.is_off
    True
    """

    def __init__(
        self,
        switched_off: Callable[[], object] = lambda: None,
        *,
        port: int = 0x604,
        id: str = "power",
    ) -> None:
        self._id = id
        self._switched_off = switched_off
        self._state = PowerState()
        self.ports = range(port, port + 1)

    @property
    def is_off(self) -> bool:
        """Whether the guest has switched the power off."""
        return self._state.is_off

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Nothing: only the vCPU switches."""

    def resume(self) -> None:
        """Nothing: only the vCPU switches."""

    def snapshot(self) -> Snapshot:
        """One section: whether the power is off."""
        return save_state(self._id, self._state)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the state.

        Raises:
            RestoreError: The snapshot does not fit.
        """
        self._state = load_state(snapshot, PowerState)

    def read(self, offset: int) -> int:
        """Zero: SLP_EN is write-only."""
        return 0

    def write(self, offset: int, value: int) -> None:
        """Switch off, if SLP_EN (bit 13) is set."""
        if value & _SLP_EN:
            self._state.is_off = True
            self._switched_off()
