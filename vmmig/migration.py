"""The drivers: a component's state to a URL and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmmig import codec, transport
from vmmig.codec import Limits
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    MissingExtraError,
)
from vmmig.sealed import descriptor_of
from vmmig.snapshot import Snapshot
from vmmig.transfer import CancelToken, Options, Progress, shown_url

if TYPE_CHECKING:
    from typing_extensions import Unpack


def send(
    snapshot: Snapshot,
    destination_url: str | os.PathLike[str],
    *,
    compression: str | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> None:
    """Bring a snapshot to a URL, whole and durably, or not at all.

    Args:
        snapshot: What to send.
        destination_url: A file, as a path or ``file:`` URL, is replaced in one step. At
            ``tcp:host:port`` and ``unix:/path``, somebody must `recv`, at once or within
            ``timeout_s``; over ``unix:``, sections that are a `vmmig.sealed_copy` are handed over
            without a copy. ``http:`` and ``https:`` PUT it. Every scheme of fsspec, ``s3:`` for
            instance, is known where that is installed.
        compression: ``zstd``, or ``zstd:1`` to ``zstd:19``, for large sections that shrink.
        progress: Is called with a `Progress` at each stage, and about 20 times a second.
        cancel: Ends it with an error, within 100 ms.
        options: See `vmmig.transfer.Options`.

    Raises:
        MigrateSendError: The snapshot is not there; what was there before still is.

    >>> folder = getfixture("tmp_path")
    >>> send(Snapshot("vm"), folder / "vm.vmsnap")
    >>> recv(folder / "vm.vmsnap")
    Snapshot('vm')
    """
    try:
        detach = _is_sealed if transport.hands_over(destination_url) else None
        encoding = codec.encode(snapshot, compression=compression, detach=detach)
        transport.send(
            encoding,
            destination_url,
            total_bytes=encoding.total_bytes,
            attached=encoding.detached,
            progress=progress,
            cancel=cancel,
            **options,
        )
    except (MigrateSendError, MissingExtraError):
        raise
    except MigratableError as error:
        raise MigrateSendError(error) from error


def recv(
    source_url: str | os.PathLike[str],
    *,
    lazily: bool = False,
    limits: Limits | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> Snapshot:
    """Fetch a snapshot from a URL.

    A file is mapped, not read: its large sections are views of the mapping, and stay valid when
    the file is replaced or removed.

    Args:
        source_url: What `send` knows; at ``tcp:host:port`` and ``unix:/path``, wait there for
            one who sends, for ``timeout_s`` at most.
        lazily: Check a large section when it is first touched, not now, and do not even fetch it
            before, where the URL allows that. The tree and the small sections are checked in any
            case.
        limits: What to refuse before memory is spent on it.
        progress: Is called with a `Progress` at each stage, and about 20 times a second.
        cancel: Ends it with an error, within 100 ms.
        options: See `vmmig.transfer.Options`.

    Raises:
        MigrateReceiveError: There is no whole, undamaged snapshot there.

    >>> recv("no-such-file.vmsnap")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: Failed to receive migratable component snapshot: ...
    """
    attached: list[memoryview] = []
    received: list[Snapshot] = []

    def accept(data: memoryview) -> None:
        received.append(codec.loads(data, detached=attached, lazily=lazily, limits=limits))

    try:
        data = transport.recv(
            source_url,
            lazily=lazily,
            max_bytes=(limits or Limits()).max_bytes,
            attached=attached,
            accept=accept,
            progress=progress,
            cancel=cancel,
            **options,
        )
        if not isinstance(data, memoryview):
            return codec.open_ranges(data, limits=limits)
        (snapshot,) = received
        return snapshot
    except (MigrateReceiveError, MissingExtraError):
        raise
    except MigratableError as error:
        raise MigrateReceiveError(f"{shown_url(source_url)!r}: {error}") from error


def _is_sealed(view: memoryview) -> bool:
    return descriptor_of(view) is not None


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
