"""Ready components, for tests of what works with any."""

from __future__ import annotations

from vmmig.errors import RestoreError
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
