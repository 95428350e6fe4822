"""vmmig as Cloud Hypervisor's offload daemon: the peer of a local migration.

To save a VM, it is the destination: Cloud Hypervisor hands over the descriptors of the VM's RAM,
its configuration and its state, and waits in Complete until they are stored, durably, at any URL.
To restore one, it is the source: it hands over memfds with the RAM, the configuration and the
state. Every byte to Cloud Hypervisor is of its own protocol (`vmmig.protocol`).

Nobody may write to the RAM while it is stored. The protocol sees to that: the VM is paused before
its state is taken, and goes on only if Complete fails, or the connection ends. So a source that
hangs up, or says anything, before it was answered ends the saving, and nothing is at the URL. One
that writes all the same makes a snapshot that is torn, and still undamaged: each byte is read
once, and its checksum is that of what was read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import attrs

from vmmig import migration
from vmmig.adapters.cloud_hypervisor.receiving import Received, receive_vm
from vmmig.adapters.cloud_hypervisor.sending import send_vm
from vmmig.codec import Limits
from vmmig.codec.compression import level_of, zstd
from vmmig.errors import MigrateReceiveError, MigrateSendError
from vmmig.protocol import MessageLimits
from vmmig.transfer import CancelToken, Options, Progress, Transfer


@attrs.frozen
class OffloadReport:
    """What was done for a VM.

    Attributes:
        url: Where its snapshot is, without credentials.
        ram_bytes: How much RAM it has.
        handed_over: Whether the RAM went as descriptors; else it went over the socket.
        resumed: Whether the VM is to run on at once where it is restored: as its Complete said, or
            as the caller did.
        total_s: How long all of it took, in seconds.

    >>> OffloadReport("vm.vmsnap", 4096, True, False, 0.5).ram_bytes
    4096
    """

    url: str
    ram_bytes: int
    handed_over: bool
    resumed: bool
    total_s: float


def offload_snapshot(
    socket_path: str | os.PathLike[str],
    destination_url: str | os.PathLike[str],
    *,
    compression: str | None = None,
    max_memory_bytes: int | None = None,
    limits: MessageLimits | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
    options: Options | None = None,
) -> OffloadReport:
    """Listen at a unix socket for a VM that Cloud Hypervisor sends, and store it at a URL.

    Cloud Hypervisor sends it by ``vm.send-migration``, with ``local`` for a VM with shared memory,
    whose RAM then is read where it is; the RAM of another comes over the socket, and is held in
    memory. Cloud Hypervisor hears that the migration is complete only when the snapshot is at the
    URL to stay; then the VM is gone there. Whatever fails, Cloud Hypervisor is told so, the VM runs
    on, and nothing is at the URL that was not there before.

    Args:
        socket_path: Where to listen.
        destination_url: As for `vmmig.send`.
        compression: As for `vmmig.send`.
        max_memory_bytes: Refuse a VM with more RAM; by default, than this host has.
        limits: What to refuse of the peer's messages.
        progress: Is called with a `Progress`, of the socket when it is listened at, then of the
            URL.
        cancel: Ends it with an error, until the snapshot is stored.
        timeout_s: How long to wait for Cloud Hypervisor to come, and then for each message.
        options: For the URL; see `vmmig.transfer.Options`.

    Raises:
        MigrateReceiveError: The VM is not stored, and runs on. Or, and the error says so, the
            snapshot is stored but the VM runs on too, because it had hung up just before.
        MissingExtraError: The library for the compression is not installed.

    >>> offload_snapshot("/no/such/folder/socket", "vm.vmsnap")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...
    """
    began_s = time.monotonic()

    def note(event: Progress) -> None:
        if progress is not None and event.stage != "done":
            progress(event)

    def keep(received: Received, token: CancelToken) -> None:
        migration.send(
            received.snapshot,
            destination_url,
            compression=compression,
            progress=note,
            cancel=token,
            **(options or Options()),
        )

    shown = Transfer(destination_url, MigrateReceiveError, progress=progress)
    if compression is not None:
        # What is missing is better known before a VM is paused for it.
        level_of(compression)
        zstd()
    received = receive_vm(
        socket_path,
        keep,
        max_memory_bytes=max_memory_bytes,
        limits=limits,
        progress=note,
        cancel=cancel,
        timeout_s=timeout_s,
    )
    shown.total_bytes = shown.done_bytes = received.ram_bytes
    shown.finish()
    return OffloadReport(
        shown.shown_url,
        received.ram_bytes,
        received.handed_over,
        received.resume,
        time.monotonic() - began_s,
    )


def offload_restore(
    socket_path: str | os.PathLike[str],
    source_url: str | os.PathLike[str],
    *,
    resume: bool = False,
    hand_over: bool = True,
    limits: Limits | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
    options: Options | None = None,
) -> OffloadReport:
    """Give a VM that `offload_snapshot` stored to a Cloud Hypervisor that waits for it.

    It waits by ``vm.receive-migration``, at the socket. All of the snapshot is fetched and checked
    before the first message.

    Args:
        socket_path: Where Cloud Hypervisor listens.
        source_url: As for `vmmig.recv`.
        resume: Whether the VM runs on at once; else it is restored paused.
        hand_over: Give the RAM as descriptors, which become the VM's shared memory; else send it
            over the socket.
        limits: What to refuse of the container before memory is spent on it.
        progress: Is called with a `Progress`, of the URL, then of the socket.
        cancel: Ends it with an error, until the last message is sent.
        timeout_s: How long to wait for Cloud Hypervisor to listen, and then for each answer.
        options: For the URL; see `vmmig.transfer.Options`.

    Raises:
        MigrateReceiveError: The snapshot could not be fetched.
        MigrateSendError: It is none of a Cloud Hypervisor, or Cloud Hypervisor refused it.
        MigrationInDoubt: The answer to the last message is lost: the VM may be restored, or not.

    >>> offload_restore("/no/such/socket", "no-such-file.vmsnap")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...
    """
    began_s = time.monotonic()

    def note(event: Progress) -> None:
        if progress is not None and event.stage != "done":
            progress(event)

    snapshot = migration.recv(
        source_url,
        lazily=True,
        limits=limits,
        progress=note,
        cancel=cancel,
        **(options or Options()),
    )
    ram_bytes = send_vm(
        snapshot,
        socket_path,
        resume=resume,
        hand_over=hand_over,
        forget=True,
        progress=progress,
        cancel=cancel,
        timeout_s=timeout_s,
    )
    shown = Transfer(source_url, MigrateSendError).shown_url
    return OffloadReport(shown, ram_bytes, hand_over, resume, time.monotonic() - began_s)
