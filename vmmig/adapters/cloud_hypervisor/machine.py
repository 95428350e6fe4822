"""A running Cloud Hypervisor as a component."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmmig.adapters.cloud_hypervisor.api import Api, ApiError
from vmmig.adapters.cloud_hypervisor.receiving import Received, cause_of, receive_vm
from vmmig.adapters.cloud_hypervisor.sending import is_of_migration, send_vm
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.formats import cloud_hypervisor as formats
from vmmig.migration import UrlTransport
from vmmig.snapshot import Snapshot
from vmmig.transfer import CancelToken, Progress


class CloudHypervisor(UrlTransport):
    """A running Cloud Hypervisor, by its API's socket, as one `vmmig.traits.Migratable`.

    It moves itself by `migrate` and `receive`, which let two Cloud Hypervisors speak to each other,
    or one to ``vmmig offload``.

    Args:
        api_socket: What it was given as ``--api-socket``.
        id: The component's id.
        folder: Where `snapshot` and `restore` have a temporary folder, with room for the RAM; by
            default that of tempfile. It is this user's alone, so Cloud Hypervisor must be the
            same user's, or root's.
        by_offload: Take snapshots without a folder: the VM hands over its RAM, which must be
            shared (``--memory shared=on``), and is gone then, as after any local migration.
        timeout_s: How long to wait for the socket, and for answers that take no time.
        transfer_timeout_s: How long to wait for what moves a whole VM.

    >>> machine = CloudHypervisor("/run/no-such.sock", timeout_s=0)
    >>> machine.pause()
    Traceback (most recent call last):
    vmmig.errors.PauseError: Failed to pause migratable component: 'unix:/run/no-such.sock': \
vm.pause: nobody listened there within 0 s ...
    """

    def __init__(
        self,
        api_socket: str | os.PathLike[str],
        *,
        id: str = formats.NAME,
        folder: str | os.PathLike[str] | None = None,
        by_offload: bool = False,
        timeout_s: float = 60.0,
        transfer_timeout_s: float = 3600.0,
    ) -> None:
        self._id = id
        self._api = Api(api_socket, timeout_s=timeout_s)
        self._folder = folder
        self._by_offload = by_offload
        self._transfer_timeout_s = transfer_timeout_s

    def id(self) -> str:
        """The component's id."""
        return self._id

    def info(self) -> dict[str, Any]:
        """What ``vm.info`` says: ``config``, ``state`` (``Running``, ``Paused``) and more.

        Raises:
            ApiError: There is no VM, or Cloud Hypervisor could not be asked.
        """
        return _object(self._api, "vm.info")

    def ping(self) -> dict[str, Any]:
        """What ``vmm.ping`` says: the ``version`` of Cloud Hypervisor, and more.

        Raises:
            ApiError: Cloud Hypervisor could not be asked.
        """
        return _object(self._api, "vmm.ping")

    def pause(self) -> None:
        """Pause the VM; nothing happens if it is paused.

        Raises:
            PauseError: It could not be paused, and Cloud Hypervisor's words.
        """
        self._move("vm.pause", "Paused", PauseError)

    def resume(self) -> None:
        """Let the VM run on; nothing happens if it runs.

        Raises:
            ResumeError: It could not be resumed, and Cloud Hypervisor's words.
        """
        self._move("vm.resume", "Running", ResumeError)

    def snapshot(self) -> Snapshot:
        """All of the paused VM. Its RAM is mapped, and takes memory only where it is read.

        Raises:
            SnapshotError: It could not be taken, and Cloud Hypervisor's words.
        """
        with _as(SnapshotError), self._temporary_folder() as folder:
            if self._by_offload:
                return self._handed_over(os.path.join(folder, "s"))
            self._transfer("vm.snapshot", {"destination_url": Path(folder).as_uri()})
            return formats.read(folder)

    def restore(self, snapshot: Snapshot, *, prefault: bool = False) -> None:
        """Make the VM of a snapshot, paused, in a Cloud Hypervisor that has none.

        Args:
            snapshot: Of `snapshot`, or of `vmmig.recv` from where ``vmmig offload`` put it.
            prefault: Let all RAM be allocated at once; for a snapshot that came by a folder.

        Raises:
            RestoreError: It could not be restored, and Cloud Hypervisor's words.
        """
        with _as(RestoreError), self._temporary_folder() as folder:
            if is_of_migration(snapshot):
                self._hand_over(snapshot, os.path.join(folder, "s"))
                return
            path = os.path.join(folder, "snapshot")
            formats.write(snapshot, path)
            body: dict[str, object] = {"source_url": Path(path).as_uri()}
            if prefault:
                body["prefault"] = True
            self._transfer("vm.restore", body)

    def migrate(self, destination_url: str, *, local: bool = False, **options: object) -> None:
        """Let Cloud Hypervisor send the VM to who receives it there; the VM is gone then.

        Args:
            destination_url: ``tcp:host:port`` or ``unix:/path``, where a Cloud Hypervisor or
                ``vmmig offload snapshot`` waits.
            local: Hand the RAM over instead of copying it; it must be shared, the socket a unix
                one.
            options: More of ``vm.send-migration``'s, by its names: ``downtime_ms``, say.

        Raises:
            MigrateSendError: The VM runs on here, and Cloud Hypervisor's words.
        """
        body: dict[str, object] = {"destination_url": destination_url, **options}
        if local:
            body["local"] = True
        with _as(MigrateSendError):
            self._transfer("vm.send-migration", body)

    def receive(self, receiver_url: str, **options: object) -> None:
        """Let a Cloud Hypervisor without a VM wait for one that is sent there, and take it.

        Args:
            receiver_url: ``tcp:host:port`` or ``unix:/path``, at which it listens.
            options: More of ``vm.receive-migration``'s, by its names.

        Raises:
            MigrateReceiveError: No VM came, and Cloud Hypervisor's words.
        """
        with _as(MigrateReceiveError):
            self._transfer("vm.receive-migration", {"receiver_url": receiver_url, **options})

    def _move(self, name: str, wanted: str, error: type[MigratableError]) -> None:
        with _as(error):
            try:
                self._api.put(name)
            except ApiError as refused:
                # It also refuses to pause what is paused.
                if refused.status is None or self._state() != wanted:
                    raise

    def _state(self) -> object:
        try:
            return self.info().get("state")
        except ApiError:
            return None

    def _transfer(self, name: str, body: dict[str, object]) -> None:
        self._api.put(name, body, timeout_s=self._transfer_timeout_s)

    def _temporary_folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="vmmig-", dir=self._folder)

    def _handed_over(self, path: str) -> Snapshot:
        """The VM, of which we are the migration's destination."""
        body: dict[str, object] = {"destination_url": f"unix:{path}", "local": True}
        call = _Call(lambda: self._transfer("vm.send-migration", body))

        def listening(_: Progress) -> None:
            call.start()

        with call:
            received = receive_vm(
                path,
                _nothing,
                progress=listening,
                cancel=call.failed,
                timeout_s=self._transfer_timeout_s,
            )
        return received.snapshot

    def _hand_over(self, snapshot: Snapshot, path: str) -> None:
        """Be the source of a migration to it."""
        body: dict[str, object] = {"receiver_url": f"unix:{path}"}
        call = _Call(lambda: self._transfer("vm.receive-migration", body))
        with call:
            call.start()
            send_vm(
                snapshot,
                path,
                resume=False,
                cancel=call.failed,
                timeout_s=self._transfer_timeout_s,
            )


class _Call:
    """A request that takes as long as what is done meanwhile in the context.

    Attributes:
        failed: Is cancelled when the request fails; its error is that of the context then.
    """

    def __init__(self, ask: Callable[[], object]) -> None:
        self.failed = CancelToken()
        self._ask = ask
        self._error: MigratableError | None = None
        self._thread = threading.Thread(target=self._run, name="vmmig-cloud-hypervisor")
        self._has_begun = False

    def start(self) -> None:
        """Ask, in a thread; nothing happens the next time."""
        if not self._has_begun:
            self._has_begun = True
            self._thread.start()

    def _run(self) -> None:
        try:
            self._ask()
        except MigratableError as error:
            self._error = error
            self.failed.cancel()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._has_begun:
            return
        self._thread.join()
        if self._error is None:
            return
        if not isinstance(error, MigratableError) or str(error).endswith("cancelled"):
            raise self._error from error
        raise MigratableError(f"{error.cause}; {self._error.cause}") from error


@contextmanager
def _as(error_type: type[MigratableError]) -> Iterator[None]:
    """Whatever fails in the context is an error of this class."""
    try:
        yield
    except (MigratableError, OSError) as error:
        if type(error) is error_type:
            raise
        raise error_type(cause_of(error)) from error


def _nothing(_: Received, __: CancelToken) -> None:
    """What the VM has handed over is here."""


def _object(api: Api, name: str) -> dict[str, Any]:
    value = api.get(name)
    if not isinstance(value, dict):
        raise ApiError(f"{api.url!r}: {name}: it answers with no JSON object")
    return value
