"""The RAM of a Cloud Hypervisor VM: what its Config says of it, and memfds with its bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from vmmig._native import (
    F_ADD_SEALS,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    runs,
)
from vmmig.errors import MigratableError, MigrateReceiveError
from vmmig.foreign import map_foreign
from vmmig.live.payloads import MachineConfig, RamMapping
from vmmig.memory import PAGE_BYTES, MemoryRange, MemoryRangeTable

if TYPE_CHECKING:
    from typing import Self

_DEFAULT_ZONE = "mem0"
_PIECE_BYTES = 1 << 20


def ram_mappings(config: bytes) -> tuple[RamMapping, ...]:
    """Where the RAM of a Config is, sorted by address, one mapping for each slot.

    Raises:
        MigrateReceiveError: It is no such JSON, a slot is there twice, mappings overlap or are
            not made of whole pages, or a memory zone is none of the VM's.

    >>> ram = '[{"slot": 3, "gpa": 0, "size": 4096, "zone_id": "mem0", "file_offset": 0}]'
    >>> ram_mappings(b'{"memory_manager_data": {"guest_ram_mappings": %s}}' % ram.encode())
    (RamMapping(slot=3, range=MemoryRange(gpa=0, length=4096), file_offset=0),)
    """
    mappings = sorted(MachineConfig.from_json(config).mappings, key=lambda each: each.range)
    if not mappings:
        raise MigrateReceiveError("Config says nothing of where RAM is")
    if len({each.slot for each in mappings}) < len(mappings):
        slots = sorted(each.slot for each in mappings)
        raise MigrateReceiveError(f"Config has two mappings of RAM with the same slot: {slots}")
    for each in mappings:
        where = each.range
        if not where.length or (where.length | where.gpa | each.file_offset) % PAGE_BYTES:
            raise MigrateReceiveError(
                f"slot {each.slot} of Config, {where.length} bytes at {where.gpa:#x}, from byte "
                f"{each.file_offset} of its descriptor, is not made of whole pages"
            )
    for a, b in pairwise(mappings):
        if b.range.gpa < a.range.end:
            raise MigrateReceiveError(f"the slots {a.slot} and {b.slot} of Config overlap")
    _check_zones(config)
    return tuple(mappings)


def received_ram(
    mappings: Sequence[RamMapping],
    descriptors: Mapping[int, int],
    *,
    check: Callable[[], object] = bool,
) -> list[memoryview]:
    """The bytes of each mapping, in the descriptors that came for the slots; nothing is copied.

    Args:
        mappings: As `ram_mappings` gives them.
        descriptors: By slot. They stay the caller's.
        check: See `vmmig.foreign.map_foreign`.

    Raises:
        MigrateReceiveError: A slot has no descriptor, a descriptor no slot, or one has less bytes
            than its slot needs.

    >>> received_ram([RamMapping(0, MemoryRange(0, 4096))], {})
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...descriptors came for the slots [], but the RAM has [0]
    """
    slots = {each.slot for each in mappings}
    if slots != descriptors.keys():
        raise MigrateReceiveError(
            f"descriptors came for the slots {sorted(descriptors)}, but the RAM has {sorted(slots)}"
        )
    views = []
    for each in mappings:
        fd, length = descriptors[each.slot], each.range.length
        try:
            views.append(map_foreign(fd, each.file_offset, length, check=check))
        except MigratableError as error:
            raise MigrateReceiveError(f"slot {each.slot}: {error}") from error
    return views


class RamFiles:
    """A memfd for each slot, to be filled and then handed over; `close` closes them.

    They cannot be resized by whoever gets them.

    Args:
        mappings: As `ram_mappings` gives them.

    Raises:
        MigratableError: There is no room for them.

    >>> with RamFiles([RamMapping(3, MemoryRange(0x1000, 0x1000), file_offset=0x2000)]) as files:
    ...     files.write(0x1004, memoryview(b"code"))
    ...     os.pread(files.descriptors[3], 4, 0x2004)
    b'code'
    """

    def __init__(self, mappings: Sequence[RamMapping]) -> None:
        self._mappings = mappings
        self.descriptors: dict[int, int] = {}
        try:
            import fcntl

            for each in mappings:
                fd = os.memfd_create(f"slot-{each.slot}", MFD_CLOEXEC | MFD_ALLOW_SEALING)
                self.descriptors[each.slot] = fd
                os.ftruncate(fd, each.file_offset + each.range.length)
                fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
        except (OSError, OverflowError, ImportError, AttributeError) as error:
            self.close()
            raise MigratableError(f"there are no descriptors for the RAM: {error}") from error

    def write(self, gpa: int, data: memoryview, wrote: Callable[[int], object] = bool) -> None:
        """Put bytes where they belong; what is all zeros is left out.

        Args:
            gpa: The address of the first; all must be RAM.
            data: The bytes.
            wrote: Is told how many are there, piece by piece.

        Raises:
            MigratableError: There is no memory for them.
        """
        end = gpa + len(data)
        for each in self._mappings:
            first, last = max(gpa, each.range.gpa), min(end, each.range.end)
            if first >= last:
                continue
            part = data[first - gpa : last - gpa]
            offset = each.file_offset + first - each.range.gpa
            for start, stop, is_zero in runs(part):
                if is_zero:
                    wrote(stop - start)
                    continue
                for at in range(start, stop, _PIECE_BYTES):
                    piece = part[at : min(at + _PIECE_BYTES, stop)]
                    self._write(each.slot, piece, offset + at)
                    wrote(len(piece))

    def _write(self, slot: int, piece: memoryview, offset: int) -> None:
        try:
            while piece:
                written = os.pwrite(self.descriptors[slot], piece, offset)
                piece, offset = piece[written:], offset + written
        except OSError as error:
            raise MigratableError(f"there is no memory for slot {slot}: {error}") from error

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_covered(mappings: Iterable[RamMapping], parts: Iterable[MemoryRange]) -> None:
    """Nothing, if the parts are exactly the RAM.

    Raises:
        MigratableError: They are not; says what differs.

    >>> check_covered([RamMapping(0, MemoryRange(0, 8192))], [MemoryRange(4096, 4096)])
    Traceback (most recent call last):
    vmmig.errors.MigratableError: the snapshot has no bytes of the RAM at 0x0 to 0xfff
    """
    listed = MemoryRangeTable(sorted(parts))
    saved = MemoryRangeTable.merge([listed])
    ram = MemoryRangeTable.merge([MemoryRangeTable(each.range for each in mappings)])
    if absent := [*(ram - saved)]:
        raise MigratableError(f"the snapshot has no bytes of the RAM at {_shown(absent[0])}")
    if excess := [*(saved - ram)]:
        raise MigratableError(f"the snapshot has bytes where there is no RAM: {_shown(excess[0])}")
    if listed.total_bytes != saved.total_bytes:
        raise MigratableError("the snapshot has some bytes of the RAM more than once")


def _check_zones(config: bytes) -> None:
    """A mapping of a zone that the VM does not have could never be restored: better said now."""
    value = json.loads(config)
    zones = _at(_at(_at(value, "vm_config"), "memory"), "zones")
    if not isinstance(zones, list) or not zones:
        return
    known = [_DEFAULT_ZONE, *(_at(zone, "id") for zone in zones)]
    for mapping in value["memory_manager_data"].get("guest_ram_mappings") or ():
        zone = mapping.get("zone_id", _DEFAULT_ZONE)
        if zone not in known:
            raise MigrateReceiveError(
                f"slot {mapping.get('slot')} of Config is in the memory zone {zone!r}, "
                "which the VM does not have"
            )


def _at(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _shown(where: MemoryRange) -> str:
    return f"{where.gpa:#x} to {where.end - 1:#x}"
