"""What the components here have in common: they move only when they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmmig import RestoreError, Snapshot, SnapshotDataSection, UrlTransport


class Still(UrlTransport):
    """A component that does nothing between two calls, so that pausing it takes nothing."""

    def id(self) -> str:
        return type(self).__name__.lower()

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def snapshot_of(self, **sections: bytes | bytearray) -> Snapshot:
        snapshot = Snapshot(self.id())
        for id, payload in sections.items():
            snapshot.add_data_section(SnapshotDataSection(id, payload))
        return snapshot


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever a library says about bytes that it cannot take, the caller hears a RestoreError."""
    try:
        yield
    except RestoreError:
        raise
    except Exception as error:
        raise RestoreError(error) from error
