"""RAM: a mapping shared with the engine."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from typing import Any

from unicorn import UC_PROT_ALL, UcError  # type: ignore[attr-defined]
from unicorn.unicorn_const import UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH

from vmmig.errors import MigratableError, RestoreError, SnapshotError
from vmmig.memory import PAGE_BYTES
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view


class Ram:
    """RAM from guest-physical address ``gpa`` on, shared with the engine without a copy.

    Args:
        uc: The engine, in which the RAM is mapped.
        size_bytes: A multiple of the page's size.

    Raises:
        MigratableError: It is no such multiple, or the host or the engine has no room for it.

    >>> import unicorn
    >>> ram = Ram(unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64), 1 << 16)
    >>> ram.memory[0x1000:0x1004] = b"code"
    >>> saved = ram.snapshot()
    >>> ram.memory[0x1000:0x1004] = bytes(4)
    >>> ram.restore(saved)
    >>> ram.memory[0x1000:0x1004]
    b'code'
    """

    def __init__(self, uc: Any, size_bytes: int, *, gpa: int = 0, id: str = "ram") -> None:
        if size_bytes <= 0 or size_bytes % PAGE_BYTES or gpa % PAGE_BYTES:
            raise MigratableError(
                f"RAM of {size_bytes} bytes at {gpa:#x} is not made of whole pages "
                f"of {PAGE_BYTES} bytes"
            )
        self._id = id
        self._section = f"{gpa:#x}"
        self._uc = uc
        try:
            self.memory = _shareable(size_bytes)
            self._shared = (ctypes.c_char * size_bytes).from_buffer(self.memory)
            uc.mem_map_ptr(gpa, size_bytes, UC_PROT_ALL, ctypes.addressof(self._shared))
            # The engine's thread may outlive this object: the memory lives as long as the engine.
            uc.guest_memory = [*getattr(uc, "guest_memory", ()), self._shared]
        except (OSError, OverflowError, UcError) as error:
            raise MigratableError(
                f"there is no room for {size_bytes} bytes of RAM at {gpa:#x}: {error}"
            ) from error

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
        is made into huge pages, which takes a third of the time of making a `bytes`.

        Raises:
            SnapshotError: The host has no memory for the copy.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            copy = mmap.mmap(-1, len(self.memory), flags=flags)
        except OSError as error:
            raise SnapshotError(error) from error
        with suppress(OSError):
            copy.madvise(mmap.MADV_HUGEPAGE)
        copy[:] = self.memory
        snapshot = Snapshot(self._id)
        snapshot.add_data_section(SnapshotDataSection(self._section, memoryview(copy).toreadonly()))
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


def _shareable(size_bytes: int) -> mmap.mmap:
    """Memory that another process can be given, as a file descriptor."""
    descriptor = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
        return mmap.mmap(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def forget_translations(uc: Any) -> None:
    """Drop what the engine has made of code and page tables that are no longer in RAM."""
    uc.ctl_flush_tb()
    uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)
