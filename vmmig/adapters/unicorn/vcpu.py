"""The virtual CPU: its registers, and the thread on which the guest's code runs."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from typing import Annotated, Any

import attrs
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from vmmig.adapters.unicorn.devices import PowerSwitch
from vmmig.adapters.unicorn.ram import forget_translations
from vmmig.errors import MigratableError, PauseError, RestoreError, ResumeError, SnapshotError
from vmmig.snapshot import Snapshot
from vmmig.state import U64, Range, load_state, save_state, versioned

_NOWHERE = (1 << 64) - 1
_MSR = x86.UC_X86_REG_MSR

# In the order in which they are written: what others depend on comes first.
_NAMES = """
    cs ds es ss gdtr idtr ldtr tr
    rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
    fpcw fpsw fptag fip fcs fdp fds fop fp0 fp1 fp2 fp3 fp4 fp5 fp6 fp7 mxcsr
    xmm0 xmm1 xmm2 xmm3 xmm4 xmm5 xmm6 xmm7 xmm8 xmm9 xmm10 xmm11 xmm12 xmm13 xmm14 xmm15
    dr0 dr1 dr2 dr3 dr6 dr7
"""
_REGISTERS: dict[str, Any] = {
    **{name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in _NAMES.split()},
    "sysenter_cs": (_MSR, 0x174),
    "sysenter_esp": (_MSR, 0x175),
    "sysenter_eip": (_MSR, 0x176),
    "pat": (_MSR, 0x277),
    "efer": (_MSR, 0xC0000080),
    "star": (_MSR, 0xC0000081),
    "lstar": (_MSR, 0xC0000082),
    "cstar": (_MSR, 0xC0000083),
    "fmask": (_MSR, 0xC0000084),
    "kernel_gs_base": (_MSR, 0xC0000102),
    "tsc_aux": (_MSR, 0xC0000103),
    "fs": x86.UC_X86_REG_FS,
    "gs": x86.UC_X86_REG_GS,
    "cr2": x86.UC_X86_REG_CR2,
    "cr3": x86.UC_X86_REG_CR3,
    "cr4": x86.UC_X86_REG_CR4,
    "cr0": x86.UC_X86_REG_CR0,
    "fs_base": x86.UC_X86_REG_FS_BASE,
    "gs_base": x86.UC_X86_REG_GS_BASE,
}

_EXCEPTIONS = {
    0: "divide error",
    1: "debug",
    3: "breakpoint",
    4: "overflow",
    6: "invalid opcode",
    7: "device not available",
    8: "double fault",
    10: "invalid TSS",
    11: "segment not present",
    12: "stack fault",
    13: "general protection",
    14: "page fault",
    16: "x87 floating-point error",
    17: "alignment check",
    19: "SIMD floating-point error",
}

_ACCESSES = {
    uc_const.UC_MEM_READ_UNMAPPED: "read",
    uc_const.UC_MEM_WRITE_UNMAPPED: "write",
    uc_const.UC_MEM_FETCH_UNMAPPED: "fetch",
}


_U128 = Annotated[int, Range(0, (1 << 128) - 1)]
_TEXT_OR_NONE: Any = str | None
_PAIRS = tuple[U64, U64]
_DESCRIPTORS = tuple[U64, U64, U64, U64]


def _type_of(register: str) -> Any:
    if register in ("gdtr", "idtr", "ldtr", "tr"):
        return _DESCRIPTORS
    return _PAIRS if register[:2] == "fp" and register[2:].isdigit() else _U128


VcpuState: Any = versioned("vmmig.x86-vcpu", 1)(
    attrs.make_class(
        "VcpuState",
        {
            **{name: attrs.field(type=_type_of(name)) for name in _REGISTERS},
            "failure": attrs.field(type=_TEXT_OR_NONE),
        },
    )
)


class GuestError(MigratableError):
    """The guest cannot go on: it did something that this machine does not do.

    Attributes:
        rip: Where the vCPU stopped: the instruction that failed, or the one behind it for an
            instruction that asks for an exception (``int3``) or halts.

    >>> str(GuestError("invalid instruction", rip=0x1000))
    'the guest failed at rip 0x1000: invalid instruction'
    """

    def __init__(self, cause: object, *, rip: int) -> None:
        super().__init__(cause)
        self.rip = rip

    def __str__(self) -> str:
        return f"the guest failed at rip {self.rip:#x}: {self.cause}"


class Vcpu:
    """The virtual CPU, x86-64 in ring 0; the guest's code runs on a thread of its own.

    Args:
        uc: The engine, as it was made: no register has been written.
        power: The machine's power switch; when it is off, the vCPU stays where it is.

    >>> import unicorn
    >>> uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    >>> vcpu = Vcpu(uc, PowerSwitch())
    >>> vcpu.set_registers(rip=0x1000, xmm3=1 << 100)
    >>> saved = vcpu.snapshot()
    >>> vcpu.set_registers(rip=0)
    >>> vcpu.restore(saved)
    >>> vcpu.registers()["rip"]
    4096
    """

    def __init__(self, uc: Any, power: PowerSwitch, *, id: str = "vcpu") -> None:
        self._id = id
        self._uc = uc
        self._power = power
        self._at_reset = uc.context_save()
        self._failure: str | None = None
        self._over = threading.Event()
        self._switching = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopper: int | None = None
        self._stopped = False
        self._bad_access: str | None = None
        _instrument(uc)
        uc.hook_add(uc_const.UC_HOOK_INTR, self._exception)
        uc.hook_add(uc_const.UC_HOOK_MEM_INVALID, self._refuse)

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Stop between two instructions.

        Raises:
            PauseError: It was called by the guest's own thread, from a device's callback.
        """
        if threading.current_thread() is self._thread:
            raise PauseError("a device of the guest cannot pause it; call from another thread")
        with self._switching:
            self._stop()

    def resume(self) -> None:
        """Go on; nothing happens once the power is off or the guest has failed."""
        with self._switching:
            if self._running() and self._stopper is None:
                return
            self._stop()
            if self._power.is_off or self._failure:
                return
            thread = threading.Thread(target=self._run, name=self._id, daemon=True)
            self._thread = thread
            try:
                thread.start()
            except RuntimeError as error:
                self._thread = None
                raise ResumeError(error) from error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the guest has powered the machine off; a pause does not end the wait.

        Returns:
            False if it had not after ``timeout_s`` seconds.

        Raises:
            GuestError: The guest failed.
        """
        over = self._over.wait(timeout_s)
        if self._failure:
            raise GuestError(self._failure, rip=self._rip())
        return over

    def registers(self) -> dict[str, Any]:
        """All registers by name; the vCPU must be paused.

        ``gdtr``, ``idtr``, ``ldtr`` and ``tr`` are (selector, base, limit, flags), ``fp0`` to
        ``fp7`` (mantissa, exponent with sign); all others are numbers. ``fptag`` has 3 for an
        empty register and 0 for any other.

        Raises:
            SnapshotError: The vCPU runs.
        """
        if self._running():
            raise SnapshotError("it is running; pause it first")
        values = self._uc.reg_read_batch([*_REGISTERS.values()])
        registers = dict(zip(_REGISTERS, values, strict=True))
        empty = registers["fptag"] & registers["fptag"] >> 1 & 0x5555
        return registers | {"fptag": 3 * empty}

    def set_registers(self, **registers: Any) -> None:
        """Set some registers, in the form in which `registers` gives them.

        Raises:
            RestoreError: The vCPU runs, or a register cannot hold its value; all are as before.
        """
        if self._running():
            raise RestoreError("it is running; pause it first")
        before = self.registers()
        strange = registers.keys() - _REGISTERS.keys()
        if strange:
            raise RestoreError(f"the vCPU has no registers {sorted(strange)}")
        try:
            self._write(before | registers)
        except Exception:
            self._write(before)
            raise

    def snapshot(self) -> Snapshot:
        """One section: the registers, and why the guest failed if it did.

        Raises:
            SnapshotError: The vCPU runs, or it is not in ring 0.
        """
        registers = self.registers()
        if registers["cs"] & 3:
            raise SnapshotError("the vCPU is not in ring 0; the engine cannot give all its state")
        return save_state(self._id, VcpuState(**registers, failure=self._failure))

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the registers.

        Raises:
            RestoreError: The vCPU runs, or the registers do not fit.
        """
        state = load_state(snapshot, VcpuState)
        self.set_registers(**{name: getattr(state, name) for name in _REGISTERS})
        self._failure = state.failure
        if self._failure or self._power.is_off:
            self._over.set()
        else:
            self._over.clear()

    def _write(self, registers: Mapping[str, Any]) -> None:
        """Bring the whole engine to ``registers``, whatever state it is in."""
        self._uc.context_restore(self._at_reset)
        # In real mode a selector is loaded without a look at its descriptor in guest RAM, which
        # is perhaps not restored yet; the base that belongs to it is written after.
        early = {"cr0": 0, "fs": registers["fs"], "gs": registers["gs"]}
        late = {name: registers[name] for name in _REGISTERS if name not in ("fs", "gs")}
        try:
            for part in (early, late):
                self._uc.reg_write_batch([_to_write(name, part[name]) for name in part])
        except Exception as error:
            raise RestoreError(f"the engine does not take the registers: {error}") from error
        forget_translations(self._uc)
        held = self.registers()
        lost = [name for name in _REGISTERS if held[name] != _plain(registers[name])]
        if lost:
            raise RestoreError(
                f"the engine cannot hold {', '.join(lost)}: {lost[0]} became {held[lost[0]]!r}, "
                f"not {registers[lost[0]]!r}"
            )

    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _stop(self) -> None:
        """End the thread at the next basic block; see `_instrument` for why there."""
        if self._thread is None:
            return
        if self._stopper is None:
            self._stopper = self._uc.hook_add(uc_const.UC_HOOK_BLOCK, self._at_block)
        self._thread.join()
        self._thread = None
        self._uc.hook_del(self._stopper)
        self._stopper = None

    def _at_block(self, uc: object, address: int, size_bytes: int, _: object) -> None:
        self._stopped = True
        self._uc.emu_stop()

    def _run(self) -> None:
        self._bad_access = None
        self._stopped = False
        try:
            self._uc.emu_start(self._rip(), _NOWHERE)
            if not self._power.is_off and not self._stopped:
                self._failure = "it halted, and without interrupts nothing wakes it"
        except Exception as error:
            self._failure = self._bad_access or str(error)
        if self._power.is_off or self._failure:
            self._over.set()

    def _rip(self) -> int:
        return int(self._uc.reg_read(x86.UC_X86_REG_RIP))

    def _exception(self, uc: object, vector: int, _: object) -> None:
        name = _EXCEPTIONS.get(vector)
        raise MigratableError(f"exception {vector}" + (f" ({name})" if name else ""))

    def _refuse(
        self, uc: object, access: int, address: int, size_bytes: int, value: int, _: object
    ) -> bool:
        self._bad_access = f"{_ACCESSES.get(access, 'access')} of no memory at {address:#x}"
        return False


def _instrument(uc: Any) -> None:
    """Make every basic block look for hooks that are added while it runs.

    ``emu_stop`` from another thread is not safe: the engine may stop between a store and the
    end of its instruction, which then runs a second time (``add [rdi], eax`` adds twice). A
    block's hooks are called before its first instruction; one that stops the engine there, on
    its own thread, loses and doubles nothing. A block calls a single hook directly and looks
    for others only if it had two when it was translated: so there are two that do nothing. They
    are not Python, which would be slow, but C's ``labs``.
    """
    nothing = ctypes.cast(ctypes.CDLL(None).labs, ctypes.CFUNCTYPE(None))
    try:
        for _ in range(2):
            uc._Uc__do_hook_add(uc_const.UC_HOOK_BLOCK, nothing, 1, 0)
    except AttributeError as error:
        raise MigratableError(
            f"this version of Unicorn hides how a native hook is added ({error}); 2.1.4 is "
            f"known to work"
        ) from error


def _to_write(name: str, value: Any) -> tuple[int, Any]:
    register = _REGISTERS[name]
    if isinstance(register, tuple):
        number, index = register
        return number, (index, value)
    return register, _plain(value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
