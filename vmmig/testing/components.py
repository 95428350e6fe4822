"""Ready components, for tests of what works with any."""

from __future__ import annotations

from threading import Lock

from vmmig.errors import RestoreError
from vmmig.guest_memory import GuestMemory
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.migration import recv, send
from vmmig.sealed import sealed_copy
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view


class Counter:
    """A sound component: a number.

    >>> counter = Counter("ticks")
    >>> counter.add(2)
    2
    >>> other = Counter("ticks")
    >>> other.restore(counter.snapshot())
    >>> other.value
    2
    """

    def __init__(self, id: str = "counter") -> None:
        self._id = id
        self.value = 0
        self.paused = False

    def add(self, amount: int) -> int:
        """Count on; the new value."""
        self.value += amount
        return self.value

    def id(self) -> str:
        """The component's id."""
        return self._id

    def pause(self) -> None:
        """Note that it is paused."""
        self.paused = True

    def resume(self) -> None:
        """Note that it is not paused."""
        self.paused = False

    def snapshot(self) -> Snapshot:
        """One section: the value in decimal."""
        return Snapshot(self._id, {}, {"value": SnapshotDataSection("value", b"%d" % self.value)})

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the value.

        Raises:
            RestoreError: The snapshot is not of this counter.
        """
        if snapshot.id != self._id:
            raise RestoreError(f"the snapshot is of {snapshot.id!r}, not of {self._id!r}")
        (value,) = snapshot.take("value")
        try:
            self.value = int(bytes(raw_view(value)))
        except ValueError as error:
            raise RestoreError(error) from error


class LiveCounter(Counter):
    """A machine that can be migrated live: its value is in its RAM, what is more is its state.

    Args:
        id: The component's id.
        memory: Its RAM; by default 1 MiB of its own.

    >>> machine = LiveCounter()
    >>> machine.count(3)
    >>> machine.start_dirty_log()
    >>> machine.count(4)
    >>> machine.dirty_log(), machine.counted
    (MemoryRangeTable(ranges=(MemoryRange(gpa=0, length=4096),)), 7)
    """

    def __init__(self, id: str = "counter", memory: GuestMemory | None = None) -> None:
        super().__init__(id)
        self._memory = memory or GuestMemory([MemoryRange(0, 1 << 20)])
        self._lock = Lock()

    @classmethod
    def of(cls, configuration: object, memory: GuestMemory) -> LiveCounter:
        """What `vmmig.receive` can make one with."""
        return cls(memory=memory)

    @property
    def counted(self) -> int:
        """The number in its RAM."""
        return int.from_bytes(self._memory.read(0, 8), "little")

    def count(self, amount: int) -> None:
        """Count on in RAM, while it is not paused; from any thread."""
        with self._lock:
            if not self.paused:
                self._memory.write(0, (self.counted + amount).to_bytes(8, "little"))

    def pause(self) -> None:
        """Count no more."""
        with self._lock:
            super().pause()

    def guest_memory(self) -> GuestMemory:
        """Its RAM."""
        return self._memory

    def snapshot_state(self) -> Snapshot:
        """As `Counter.snapshot`."""
        return super().snapshot()

    def restore_state(self, snapshot: Snapshot) -> None:
        """As `Counter.restore`."""
        super().restore(snapshot)

    def snapshot(self) -> Snapshot:
        """The value, and the RAM."""
        saved = super().snapshot()
        for region in self._memory.regions:
            saved.add_data_section(
                SnapshotDataSection(f"ram-{region.gpa:#x}", sealed_copy(region.memory))
            )
        return saved

    def restore(self, snapshot: Snapshot) -> None:
        """Take over both.

        Raises:
            RestoreError: The snapshot is not of this counter.
        """
        names = [f"ram-{region.gpa:#x}" for region in self._memory.regions]
        value, *contents = snapshot.take("value", *names)
        for region, content in zip(self._memory.regions, contents, strict=True):
            if raw_view(content).nbytes != region.length:
                raise RestoreError(f"RAM of another size than {region.length} bytes")
        state = Snapshot(snapshot.id)
        state.add_data_section(SnapshotDataSection("value", value))
        super().restore(state)
        for region, content in zip(self._memory.regions, contents, strict=True):
            region.memory[:] = raw_view(content)

    def send(self, snapshot: Snapshot, destination_url: str) -> None:
        """As `vmmig.send`."""
        send(snapshot, destination_url)

    def recv(self, source_url: str) -> Snapshot:
        """As `vmmig.recv`."""
        return recv(source_url)

    def start_dirty_log(self) -> None:
        """Begin to note what changes in RAM."""
        self._memory.start_dirty_log()

    def stop_dirty_log(self) -> None:
        """Note it no longer."""
        self._memory.stop_dirty_log()

    def dirty_log(self) -> MemoryRangeTable:
        """What has changed in RAM."""
        return self._memory.dirty_log()

    def start_migration(self) -> None:
        """Nothing: it is always ready."""

    def complete_migration(self) -> None:
        """Nothing: it stays as it is."""
