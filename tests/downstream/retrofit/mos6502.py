"""A 6502 of py65, with its 64 KiB."""

from __future__ import annotations

import struct

from py65.devices.mpu6502 import MPU

from retrofit.still import Still, refusing
from vmmig import RestoreError, Snapshot

_REGISTERS = struct.Struct("<H5BQ")
_RAM_BYTES = 0x10000


class Mos6502(Still):
    def __init__(self) -> None:
        self.mpu = MPU()

    def step(self, instructions: int) -> None:
        for _ in range(instructions):
            self.mpu.step()

    def snapshot(self) -> Snapshot:
        mpu = self.mpu
        registers = mpu.pc, mpu.a, mpu.x, mpu.y, mpu.sp, mpu.p, mpu.processorCycles
        return self.snapshot_of(registers=_REGISTERS.pack(*registers), ram=bytes(mpu.memory))

    def restore(self, snapshot: Snapshot) -> None:
        registers, ram = snapshot.take("registers", "ram")
        if len(ram) != _RAM_BYTES:
            raise RestoreError(f"a 6502 has {_RAM_BYTES} bytes of RAM, not {len(ram)}")
        with refusing():
            values = _REGISTERS.unpack(registers)
        mpu = self.mpu
        mpu.pc, mpu.a, mpu.x, mpu.y, mpu.sp, mpu.p, mpu.processorCycles = values
        mpu.memory[:] = ram
