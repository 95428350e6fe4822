"""A RISC-V CPU of the Unicorn engine, with a program in ROM and 4 KiB of RAM."""

from __future__ import annotations

import struct

from unicorn import UC_ARCH_RISCV, UC_MODE_RISCV64, UC_PROT_EXEC, UC_PROT_READ, Uc
from unicorn import riscv_const as riscv

from retrofit.still import Still, refusing
from vmmig import RestoreError, Snapshot

ROM, RAM, PAGE_BYTES = 0x1000, 0x2000, 0x1000
REGISTERS = [riscv.UC_RISCV_REG_PC, *(riscv.UC_RISCV_REG_X1 + i for i in range(31))]
_WORDS = struct.Struct(f"<{len(REGISTERS)}Q")


class RiscV(Still):
    """State is the RAM, the program counter and the integer registers: all a program here uses."""

    def __init__(self, program: bytes) -> None:
        self.engine = Uc(UC_ARCH_RISCV, UC_MODE_RISCV64)
        self.engine.mem_map(ROM, PAGE_BYTES, UC_PROT_READ | UC_PROT_EXEC)
        self.engine.mem_map(RAM, PAGE_BYTES)
        self.engine.mem_write(ROM, program)
        self.engine.reg_write(riscv.UC_RISCV_REG_PC, ROM)

    def step(self, instructions: int) -> None:
        pc = self.engine.reg_read(riscv.UC_RISCV_REG_PC)
        self.engine.emu_start(pc, ROM + PAGE_BYTES, count=instructions)

    def snapshot(self) -> Snapshot:
        registers = _WORDS.pack(*map(self.engine.reg_read, REGISTERS))
        return self.snapshot_of(registers=registers, ram=self.engine.mem_read(RAM, PAGE_BYTES))

    def restore(self, snapshot: Snapshot) -> None:
        registers, ram = snapshot.take("registers", "ram")
        if len(ram) != PAGE_BYTES:
            raise RestoreError(f"there are {PAGE_BYTES} bytes of RAM, not {len(ram)}")
        with refusing():
            values = _WORDS.unpack(registers)
        for register, value in zip(REGISTERS, values, strict=True):
            self.engine.reg_write(register, value)
        self.engine.mem_write(RAM, bytes(ram))
