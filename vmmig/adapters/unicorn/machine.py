"""The parts put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import unicorn
from unicorn.unicorn_const import UC_HOOK_INSN
from unicorn.x86_const import UC_X86_INS_IN, UC_X86_INS_OUT

from vmmig.adapters.unicorn.devices import PmTimer, PowerSwitch, SerialPort
from vmmig.adapters.unicorn.ram import Ram
from vmmig.adapters.unicorn.vcpu import Vcpu
from vmmig.composite import Composite, RestoreReport
from vmmig.errors import MigratableError, RestoreError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Snapshot
from vmmig.traits import Snapshottable

MACHINE = "unicorn"
"""The name of this kind of machine in a configuration."""


class Machine(Composite):
    """A small PC: power switch, serial port, timer, vCPU and RAM from address 0 on.

    It is paused when it is made. Ports that belong to no device read as ones.

    Args:
        ram: Its size in bytes, a multiple of the page's; or the memory itself.
        output: Called on the guest's thread with each byte that the guest sends on its serial
            port.

    >>> console = bytearray()
    >>> machine = Machine(1 << 16, output=console.extend)
    >>> program = "66baf803 b021 ee"  # mov dx, 0x3f8; mov al, '!'; out dx, al
    >>> program += "66ba0406 66b80020 66ef f4"  # mov dx, 0x604; mov ax, 1 << 13; out dx, ax; hlt
    >>> machine.boot(bytes.fromhex(program), gpa=0x1000)
    >>> machine.resume()
    >>> machine.wait()
    True
    >>> console
    bytearray(b'!')
    """

    def __init__(
        self,
        ram: int | GuestMemory,
        *,
        output: Callable[[bytes], object],
        id: str = "machine",
    ) -> None:
        uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)  # type: ignore[attr-defined, no-untyped-call]
        self.power = PowerSwitch(uc.emu_stop)
        self.serial = SerialPort(output)
        self.timer = PmTimer()
        self.vcpu = Vcpu(uc, self.power)
        self.ram = Ram(uc, ram)
        _connect(uc, [self.power, self.serial, self.timer])
        # The vCPU starts after the devices; RAM, which does nothing by itself, is the last so
        # that a restore need not keep a second copy of it.
        devices: list[Snapshottable] = [self.power, self.serial, self.timer, self.vcpu]
        self._devices = [device.id() for device in devices]
        super().__init__(id, [*devices, self.ram])

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, *, output: Callable[[bytes], object]) -> Machine:
        """A machine of the size that ``snapshot`` asks for, restored from it, and paused.

        Raises:
            RestoreError: It is not the snapshot of such a machine.
        """
        ram_bytes = snapshot.find("ram").section("0x0").nbytes
        machine = cls(ram_bytes, output=output, id=snapshot.id)
        machine.restore(snapshot)
        return machine

    @classmethod
    def from_configuration(
        cls, configuration: object, memory: GuestMemory, *, output: Callable[[bytes], object]
    ) -> Machine:
        """A machine on memory that a migration brings: for `vmmig.receive`.

        Raises:
            MigratableError: The configuration, or the memory, is of another kind of machine.

        >>> from vmmig.memory import MemoryRange
        >>> memory = GuestMemory([MemoryRange(0, 1 << 16)])
        >>> source = Machine(1 << 16, output=print, id="pc")
        >>> Machine.from_configuration(source.configuration(), memory, output=print).id()
        'pc'
        """
        if not isinstance(configuration, dict) or configuration.get("machine") != MACHINE:
            raise MigratableError(f"this is no configuration of a {MACHINE!r} machine")
        more = sorted(map(repr, configuration.keys() - {"machine", "id"}))
        if more:
            raise MigratableError(
                f"the machine has {', '.join(more)}, which this version does not know"
            )
        id = configuration.get("id")
        if not isinstance(id, str):
            raise MigratableError(f"the machine's id is a text, not {id!r}")
        return cls(memory, output=output, id=id)

    def configuration(self) -> dict[str, str]:
        """What `from_configuration` needs to know, besides the memory."""
        return {"machine": MACHINE, "id": self.id()}

    def guest_memory(self) -> GuestMemory:
        """The RAM."""
        return self.ram.guest_memory

    def snapshot_state(self) -> Snapshot:
        """As `snapshot`, without the RAM."""
        return self._snapshot_of(self._devices)

    def restore_state(self, snapshot: Snapshot) -> RestoreReport:
        """As `restore`, of what `snapshot_state` gave; RAM has changed before.

        What belongs to no part is kept, as the source kept it.
        """
        missing = [name for name in self._devices if name not in snapshot.snapshots]
        if missing:
            raise RestoreError(f"there is no state of {', '.join(missing)}")
        report = self.restore(snapshot, missing="skip", unknown="keep")
        self.ram.changed_from_outside()
        return report

    def boot(self, program: bytes, *, gpa: int, **registers: int) -> None:
        """Load machine code at ``gpa`` and point the vCPU to its first byte; `resume` starts it.

        Args:
            registers: Further registers to set, by name.

        Raises:
            MigratableError: The program does not fit into RAM, or the machine runs.
        """
        if not 0 <= gpa <= len(self.ram.memory) - len(program):
            raise MigratableError(
                f"a program of {len(program)} bytes at {gpa:#x} does not fit into "
                f"{len(self.ram.memory)} bytes of RAM"
            )
        self.vcpu.set_registers(rip=gpa, **registers)
        self.ram.memory[gpa : gpa + len(program)] = program

    def wait(self, timeout_s: float | None = None) -> bool:
        """As `Vcpu.wait`."""
        return self.vcpu.wait(timeout_s)

    def start_dirty_log(self) -> None:
        """As `GuestMemory.start_dirty_log`, for the machine's RAM."""
        self.ram.start_dirty_log()

    def dirty_log(self) -> MemoryRangeTable:
        """As `GuestMemory.dirty_log`, for the machine's RAM."""
        return self.ram.dirty_log()

    def stop_dirty_log(self) -> None:
        """As `GuestMemory.stop_dirty_log`, for the machine's RAM."""
        self.ram.stop_dirty_log()

    def start_migration(self) -> None:
        """Nothing: a machine that is being migrated runs as any other."""

    def complete_migration(self) -> None:
        """End the dirty log, if there is one."""
        self.ram.stop_dirty_log()


class _Device(Protocol):
    ports: range

    def read(self, offset: int) -> int: ...

    def write(self, offset: int, value: int) -> None: ...


def _connect(uc: Any, devices: Iterable[_Device]) -> None:
    """Let the guest's IN and OUT reach the devices."""
    at = {port: (device, i) for device in devices for i, port in enumerate(device.ports)}

    def read(_: object, port: int, size_bytes: int, __: object) -> int:
        ones = (1 << 8 * size_bytes) - 1
        if port not in at:
            return ones
        device, offset = at[port]
        return device.read(offset) & ones

    def write(_: object, port: int, size_bytes: int, value: int, __: object) -> None:
        if port in at:
            device, offset = at[port]
            device.write(offset, value)

    uc.hook_add(UC_HOOK_INSN, read, None, 1, 0, UC_X86_INS_IN)
    uc.hook_add(UC_HOOK_INSN, write, None, 1, 0, UC_X86_INS_OUT)
