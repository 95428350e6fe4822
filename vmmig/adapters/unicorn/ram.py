"""RAM: a mapping shared with the engine."""

from __future__ import annotations

from typing import Any

from unicorn import UC_PROT_ALL, UcError  # type: ignore[attr-defined]
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH

from vmmig.errors import MigratableError, RestoreError, SnapshotError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.sealed import sealed_copy
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view


class Ram:
    """RAM from guest-physical address ``gpa`` on, shared with the engine without a copy.

    Its dirty log has what the guest stores, and what is stored from outside.

    Args:
        uc: The engine, in which the RAM is mapped.
        size_bytes: A multiple of the page's size; or the memory itself, of one region.

    Attributes:
        guest_memory: The memory itself, for a migration to read and to write.
        memory: All its bytes, as a view.

    Raises:
        MigratableError: It is no such multiple, or the host or the engine has no room for it.

    >>> import unicorn
    >>> ram = Ram(unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64), 1 << 16)
    >>> ram.memory[0x1000:0x1004] = b"code"
    >>> saved = ram.snapshot()
    >>> ram.memory[0x1000:0x1004] = bytes(4)
    >>> ram.restore(saved)
    >>> bytes(ram.memory[0x1000:0x1004])
    b'code'
    """

    def __init__(
        self, uc: Any, size_bytes: int | GuestMemory, *, gpa: int = 0, id: str = "ram"
    ) -> None:
        self._id = id
        self._uc = uc
        if isinstance(size_bytes, GuestMemory):
            self.guest_memory = size_bytes
        else:
            self.guest_memory = GuestMemory([MemoryRange(gpa, size_bytes)])
        if [region.gpa for region in self.guest_memory.regions] != [gpa]:
            raise MigratableError(f"RAM is one region at {gpa:#x}, not {self.guest_memory.ranges}")
        (region,) = self.guest_memory.regions
        self._section = f"{gpa:#x}"
        self.memory = region.memory
        try:
            uc.mem_map_ptr(gpa, region.length, UC_PROT_ALL, region.address)
        except UcError as error:
            raise MigratableError(
                f"there is no room for {region.length} bytes of RAM at {gpa:#x}: {error}"
            ) from error
        # The engine's thread may outlive this object: the memory lives as long as the engine.
        uc.guest_memory = [*getattr(uc, "guest_memory", ()), region]

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Nothing: RAM changes only while the vCPU runs."""

    def resume(self) -> None:
        """Nothing: RAM changes only while the vCPU runs."""

    def snapshot(self) -> Snapshot:
        """One section, named by the address: a copy of all bytes.

        A copy, because nothing else is a value: the guest's next store must not show in it. It
        is sealed, so that another process can be given it by its descriptor.

        Raises:
            SnapshotError: The host has no memory for the copy.
        """
        try:
            copy = sealed_copy(self.memory)
        except MigratableError as error:
            raise SnapshotError(error) from error
        snapshot = Snapshot(self._id)
        snapshot.add_data_section(SnapshotDataSection(self._section, copy))
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the bytes.

        Raises:
            RestoreError: The snapshot is of RAM of another size or at another address.
        """
        (payload,) = snapshot.take(self._section)
        view = raw_view(payload)
        if view.nbytes != len(self.memory):
            raise RestoreError(
                f"the snapshot has {view.nbytes} bytes of RAM, the machine {len(self.memory)}"
            )
        self.memory[:] = view
        forget_translations(self._uc)

    def changed_from_outside(self) -> None:
        """Let the engine forget what it has made of code that was in RAM before."""
        forget_translations(self._uc)

    def start_dirty_log(self) -> None:
        """As `GuestMemory.start_dirty_log`."""
        self.guest_memory.start_dirty_log()

    def dirty_log(self) -> MemoryRangeTable:
        """As `GuestMemory.dirty_log`."""
        return self.guest_memory.dirty_log()

    def stop_dirty_log(self) -> None:
        """As `GuestMemory.stop_dirty_log`."""
        self.guest_memory.stop_dirty_log()


def forget_translations(uc: Any) -> None:
    """Drop what the engine has made of code and page tables that are no longer in RAM."""
    uc.ctl_flush_tb()
    uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
