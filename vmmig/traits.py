"""The traits: what a component must be able to do to be paused, saved, moved and restored.

They are Cloud Hypervisor's ``vm-migration`` traits as `typing.Protocol` classes. A component
fulfils one by having its methods; it neither imports vmmig nor inherits from anything. One
that does inherit gets the crate's default bodies, which do nothing and succeed: `vmmig.verify`
names every default that a component still runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Snapshot

if TYPE_CHECKING:
    from vmmig.guest_memory import GuestMemory


@runtime_checkable
class Pausable(Protocol):
    """A component that can be paused and resumed.

    >>> class Clock:
    ...     def pause(self): self.running = False
    ...     def resume(self): self.running = True
    >>> isinstance(Clock(), Pausable), isinstance(object(), Pausable)
    (True, False)
    """

    def pause(self) -> None:
        """Stop changing state; return once nothing changes any more.

        Raises:
            PauseError: The component could not be paused and runs on.
        """

    def resume(self) -> None:
        """Go on from where `pause` stopped.

        Raises:
            ResumeError: The component could not be resumed and stays paused.
        """


@runtime_checkable
class Snapshottable(Pausable, Protocol):
    """A component whose state can be taken as a `Snapshot` and set from one.

    >>> from vmmig.snapshot import SnapshotDataSection
    >>> class Counter:
    ...     def __init__(self): self.n = 0
    ...     def pause(self): pass
    ...     def resume(self): pass
    ...     def id(self): return "counter"
    ...     def snapshot(self):
    ...         snapshot = Snapshot("counter")
    ...         snapshot.add_data_section(SnapshotDataSection("n", b"%d" % self.n))
    ...         return snapshot
    ...     def restore(self, snapshot):
    ...         self.n = int(snapshot.section("n").snapshot)
    >>> isinstance(Counter(), Snapshottable)
    True
    """

    def id(self) -> str:
        """The component's id, unique among its siblings."""
        return ""

    def snapshot(self) -> Snapshot:
        """The state of the paused component, as a value: later changes do not show in it.

        Raises:
            SnapshotError: The state could not be taken; the component is as it was.
        """
        return Snapshot("")

    def restore(self, snapshot: Snapshot) -> object:
        """Take over the state of ``snapshot``; what it returns is a report, if anything.

        Raises:
            RestoreError: The snapshot does not fit; the component is as it was.
        """


@runtime_checkable
class Transportable(Snapshottable, Protocol):
    """A component that brings its snapshot to a URL and back by itself.

    `vmmig.UrlTransport` is a mixin that does it for every URL that vmmig knows.

    >>> issubclass(Transportable, Snapshottable)
    True
    """

    def send(self, snapshot: Snapshot, destination_url: str) -> None:
        """Bring ``snapshot`` to ``destination_url``: an HTTP endpoint, a TCP address, a file.

        Raises:
            MigrateSendError: The snapshot is not there; what was there before still is.
        """

    def recv(self, source_url: str) -> Snapshot:
        """Fetch a snapshot from ``source_url``.

        Raises:
            MigrateReceiveError: No whole, undamaged snapshot could be had from there.
        """
        return Snapshot("")


@runtime_checkable
class Migratable(Transportable, Protocol):
    """Any part of a machine that can be migrated: vCPU, RAM, disk, NIC, or all of them.

    >>> class Disk:
    ...     def pause(self): ...
    ...     def resume(self): ...
    ...     def id(self): ...
    ...     def snapshot(self): ...
    ...     def restore(self, snapshot): ...
    ...     def send(self, snapshot, destination_url): ...
    ...     def recv(self, source_url): ...
    >>> isinstance(Disk(), Migratable)
    True
    """


@runtime_checkable
class LiveMigratable(Migratable, Protocol):
    """A component that can be migrated while it runs, because it knows what it changed.

    >>> issubclass(LiveMigratable, Migratable)
    True
    """

    def start_dirty_log(self) -> None:
        """Start to record which memory changes."""

    def stop_dirty_log(self) -> None:
        """Stop recording."""

    def dirty_log(self) -> MemoryRangeTable:
        """The memory that changed since the last call, or since `start_dirty_log`."""
        return MemoryRangeTable()

    def start_migration(self) -> None:
        """A live migration of this component begins."""

    def complete_migration(self) -> None:
        """The live migration is over and the destination runs."""


@runtime_checkable
class PrecopyMigratable(LiveMigratable, Protocol):
    """A machine whose memory is moved page by page, while it runs, and its state after that.

    >>> issubclass(PrecopyMigratable, LiveMigratable)
    True
    """

    def guest_memory(self) -> GuestMemory:
        """The memory that the dirty log speaks of; always the same one."""
        raise NotImplementedError

    def snapshot_state(self) -> Snapshot:
        """As `snapshot`, without the contents of the guest's memory.

        Raises:
            SnapshotError: The state could not be taken; the component is as it was.
        """
        return Snapshot("")

    def restore_state(self, snapshot: Snapshot) -> object:
        """As `restore`, of what `snapshot_state` gave; the memory's contents are there already.

        Raises:
            RestoreError: The snapshot does not fit.
        """
