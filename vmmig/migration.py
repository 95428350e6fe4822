"""The drivers: a component's state to a URL and back."""

from __future__ import annotations

import os

from vmmig import codec, transport
from vmmig.codec import Limits
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.snapshot import Snapshot


def send(snapshot: Snapshot, destination_url: str | os.PathLike[str]) -> None:
    """Bring a snapshot to a URL, whole and durably, or not at all.

    Args:
        snapshot: What to send.
        destination_url: A file, as a path or ``file:`` URL. A file that is there is replaced
            in one step; until then, and after any failure, it is what it was.

    Raises:
        MigrateSendError: The snapshot is not there; what was there before still is.

    >>> folder = getfixture("tmp_path")
    >>> send(Snapshot("vm"), folder / "vm.vmsnap")
    >>> recv(folder / "vm.vmsnap")
    Snapshot('vm')
    """
    try:
        encoding = codec.encode(snapshot)
        transport.send(encoding, destination_url, total_bytes=encoding.total_bytes)
    except MigrateSendError:
        raise
    except MigratableError as error:
        raise MigrateSendError(error) from error


def recv(
    source_url: str | os.PathLike[str], *, lazily: bool = False, limits: Limits | None = None
) -> Snapshot:
    """Fetch a snapshot from a URL.

    A file is mapped, not read: its large sections are views of the mapping, and stay valid when
    the file is replaced or removed.

    Args:
        source_url: A file, as a path or ``file:`` URL.
        lazily: Check a large section when it is first touched, not now. The tree and the small
            sections are checked in any case.
        limits: What to refuse before memory is spent on it.

    Raises:
        MigrateReceiveError: There is no whole, undamaged snapshot there.

    >>> recv("no-such-file.vmsnap")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: Failed to receive migratable component snapshot: ...
    """
    try:
        data = transport.recv(source_url)
        return codec.loads(data, lazily=lazily, limits=limits)
    except MigrateReceiveError:
        raise
    except MigratableError as error:
        raise MigrateReceiveError(f"{os.fspath(source_url)!r}: {error}") from error


class UrlTransport:
    """A mixin that makes a `Snapshottable` component `Transportable`, by `send` and `recv`.

    >>> from vmmig.traits import Migratable
    >>> class Disk(UrlTransport):
    ...     def pause(self): ...
    ...     def resume(self): ...
    ...     def id(self): return "disk"
    ...     def snapshot(self): return Snapshot("disk")
    ...     def restore(self, snapshot): ...
    >>> isinstance(Disk(), Migratable)
    True
    """

    def send(self, snapshot: Snapshot, destination_url: str) -> None:
        """As `vmmig.send`."""
        send(snapshot, destination_url)

    def recv(self, source_url: str) -> Snapshot:
        """As `vmmig.recv`."""
        return recv(source_url)
