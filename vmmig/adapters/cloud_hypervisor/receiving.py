"""The destination of a Cloud Hypervisor's migration: takes a whole VM, and keeps it."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from vmmig import sockets
from vmmig.adapters.cloud_hypervisor.ram import ram_mappings, received_ram
from vmmig.errors import (
    DecodeError,
    MigratableError,
    MigrateReceiveError,
    MissingExtraError,
    ProtocolError,
)
from vmmig.foreign import map_foreign
from vmmig.formats.cloud_hypervisor import from_parts
from vmmig.guest_memory import GuestMemory
from vmmig.live.link import Link
from vmmig.live.payloads import RamMapping
from vmmig.memory import MemoryRangeTable
from vmmig.protocol import (
    HEADER_BYTES,
    Abandon,
    Complete,
    CompletePaused,
    Config,
    Connection,
    Event,
    Feature,
    Memory,
    MemoryFd,
    MessageLimits,
    Ok,
    Role,
    Start,
    State,
)
from vmmig.snapshot import Snapshot
from vmmig.transfer import CancelToken, Progress, Transfer

_KNOWN = Feature.ERROR_TEXT | Feature.CHECKSUMS
_GAVE_UP = "Cloud Hypervisor gave up while the VM was being stored"


@attrs.frozen
class Received:
    """A VM that came.

    Attributes:
        snapshot: All of it, as `vmmig.formats.cloud_hypervisor` has it.
        ram_bytes: How much RAM there is.
        handed_over: Whether the RAM is in descriptors that came.
        resume: Whether the VM was sent to run on.
    """

    snapshot: Snapshot
    ram_bytes: int
    handed_over: bool
    resume: bool


def receive_vm(
    socket_path: str | os.PathLike[str],
    keep: Callable[[Received, CancelToken], object],
    *,
    max_memory_bytes: int | None = None,
    limits: MessageLimits | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
) -> Received:
    """Be the destination of one migration: `keep` it, and only then confirm it.

    Args:
        socket_path: Where to listen.
        keep: Is given what came, paused, and a token that is cancelled when the source gives up;
            once it returns, the source is told that the VM is here. If it raises, the source is
            told that the migration failed.
        max_memory_bytes: As for `offload_snapshot`; so are the others.

    Raises:
        MigrateReceiveError: See `offload_snapshot`.

    >>> receive_vm("/no/such/folder/socket", print)
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...
    """
    receiver = _Receiver(
        url_of(socket_path),
        keep,
        max_memory_bytes=_host_bytes() if max_memory_bytes is None else max_memory_bytes,
        limits=limits or MessageLimits(),
        progress=progress,
        cancel=cancel or CancelToken(),
        timeout_s=timeout_s,
    )
    return receiver.run()


class _Receiver:
    def __init__(
        self,
        url: str,
        keep: Callable[[Received, CancelToken], object],
        *,
        max_memory_bytes: int,
        limits: MessageLimits,
        progress: Callable[[Progress], object] | None,
        cancel: CancelToken,
        timeout_s: float,
    ) -> None:
        self.url = url
        self.keep = keep
        self.max_memory_bytes = max_memory_bytes
        self.limits = limits
        self.cancel = cancel
        self.timeout_s = timeout_s
        self.transfer = Transfer(url, MigrateReceiveError, progress=progress, cancel=cancel)
        self.saving = cancel
        self.has_begun = self.is_stored = False
        self.descriptors: dict[int, int] = {}
        self.config = b""
        self.mappings: tuple[RamMapping, ...] = ()
        self.ram: list[memoryview] = []
        self.memory: GuestMemory | None = None
        self.snapshot: Snapshot | None = None

    def run(self) -> Received:
        try:
            with sockets.Listener(self.url) as listener:
                self.transfer.enter("connecting")
                return self._accept_one(listener)
        except MissingExtraError:
            raise
        except Exception as error:
            raise MigrateReceiveError(f"{self.url!r}: {cause_of(error)}") from error
        finally:
            self._let_go()

    def _accept_one(self, listener: sockets.Listener) -> Received:
        end_s = time.monotonic() + self.timeout_s
        last = ""
        while True:
            try:
                # A header is read beside those of others; no descriptor comes with a Start.
                sock, request = listener.accept_greeted(
                    HEADER_BYTES, timeout_s=max(end_s - time.monotonic(), 0), cancel=self.cancel
                )
            except TimeoutError:
                last = last or listener.refusal or ""
                raise MigrateReceiveError(
                    f"no VM came within {self.timeout_s:g} s; let Cloud Hypervisor send it there, "
                    f"or wait longer{last and f'; the last who came: {last}'}"
                ) from None
            link = Link(sock, Connection(Role.RECEIVER, limits=self.limits))
            try:
                sockets.set_timeout(sock, self.timeout_s)
                link.connection.receive_data(request)
                with self.cancel.calling(link.shut_down):
                    return self._converse(link)
            except Exception as error:
                # Before the peer is told: whoever hears of that may cancel for it.
                is_cancelled = self.cancel.cancelled
                link.refuse(error)
                if is_cancelled and not self.is_stored:
                    raise MigrateReceiveError("cancelled") from error
                if self.has_begun:
                    raise
                # Whoever that was, no migration came from there.
                last = str(error)
            finally:
                link.close()

    def _converse(self, link: Link) -> Received:
        while True:
            fds: list[int] = []
            try:
                event = link.event(fds)
                if isinstance(event, Complete | CompletePaused):
                    return self._complete(link, resume=isinstance(event, Complete))
                answer = self._fulfil(link, event, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            link.send(answer)
            if isinstance(event, Abandon):
                raise MigrateReceiveError("Cloud Hypervisor abandoned the migration")

    def _fulfil(self, link: Link, event: Event, fds: list[int]) -> Ok:
        match event:
            case Start():
                self.has_begun = True
                return Ok(features=_KNOWN)
            case MemoryFd(slot):
                if len(fds) != 1 or slot in self.descriptors:
                    raise ProtocolError(
                        f"{len(fds)} descriptors came for slot {slot}, which needs one"
                    )
                self.descriptors[slot] = fds.pop()
            case Config(config):
                self._configure(config)
            case Memory(table):
                self._take_memory(link, table)
            case State(state):
                parts = {m.range.gpa: view for m, view in zip(self.mappings, self.ram, strict=True)}
                self.snapshot = from_parts(self.config, state, parts)
            case Abandon():
                pass
            case _:
                raise ProtocolError(f"{type(event).__name__} is nothing that is fulfilled here")
        return Ok()

    def _configure(self, config: bytes) -> None:
        self.config = config
        self.mappings = ram_mappings(config)
        ram_bytes = sum(each.range.length for each in self.mappings)
        if ram_bytes > self.max_memory_bytes:
            raise MigrateReceiveError(
                f"the VM has {ram_bytes} bytes of RAM, of {self.max_memory_bytes} allowed; "
                "max_memory_bytes allows more"
            )
        if self.descriptors:
            self.ram = received_ram(self.mappings, self.descriptors, check=self._check)
            return
        self.memory = GuestMemory(each.range for each in self.mappings)
        for region in self.memory.regions:
            assert region.fd is not None
            self.ram.append(map_foreign(region.fd, 0, region.length, check=self._check))

    def _check(self) -> None:
        """Called for each MiB of RAM that is read: compression takes its time, too."""
        if self.saving.cancelled:
            raise MigrateReceiveError("cancelled")

    def _take_memory(self, link: Link, table: MemoryRangeTable) -> None:
        if self.memory is None:
            raise ProtocolError("Memory came for RAM that was handed over")
        if self.transfer.stage != "transferring":
            self.transfer.enter("transferring")
        link.receive_memory(self.memory.views(table), self.transfer.advance)

    def _complete(self, link: Link, *, resume: bool) -> Received:
        assert self.snapshot is not None
        ram_bytes = sum(map(len, self.ram))
        received = Received(self.snapshot, ram_bytes, self.memory is None, resume)
        with _watched(link.sock, self.cancel) as (token, has_spoken):
            self.saving = token
            try:
                self.keep(received, token)
            except MigratableError as error:
                if has_spoken.is_set() and not self.cancel.cancelled:
                    raise MigrateReceiveError(_GAVE_UP) from error
                raise
        self.is_stored = True
        try:
            if has_spoken.is_set():
                raise ConnectionError(_GAVE_UP)
            link.send(Ok())
        except (MigratableError, OSError) as error:
            raise MigrateReceiveError(
                f"the snapshot is stored, but Cloud Hypervisor could not be told ({error}): the VM "
                "may have run on there while its RAM was read, so do not restore the snapshot"
            ) from error
        return received

    def _let_go(self) -> None:
        if self.memory is not None:
            self.memory.close()
        for fd in self.descriptors.values():
            os.close(fd)


@contextmanager
def _watched(
    sock: socket.socket, cancel: CancelToken
) -> Iterator[tuple[CancelToken, threading.Event]]:
    """A token that is cancelled with ``cancel``, and if the silent peer speaks or hangs up."""
    token, has_spoken = CancelToken(), threading.Event()
    here, there = socket.socketpair()

    def watch() -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(here, select.POLLIN)
        if sock.fileno() in {fd for fd, _ in poll.poll()}:
            has_spoken.set()
            token.cancel()

    thread = threading.Thread(target=watch, name="vmmig-offload")
    with here, there, cancel.calling(token.cancel):
        thread.start()
        try:
            yield token, has_spoken
        finally:
            there.shutdown(socket.SHUT_RDWR)
            thread.join()


def url_of(socket_path: str | os.PathLike[str]) -> str:
    """The URL of a unix socket, of which the path is given, or the URL.

    >>> url_of("/run/vm.sock"), url_of("unix:/run/vm.sock")
    ('unix:/run/vm.sock', 'unix:/run/vm.sock')
    """
    path = os.fsdecode(socket_path)
    return path if path.startswith("unix:") else f"unix:{path}"


def cause_of(error: Exception) -> str:
    """What an error says, without the name of what failed, for one that names it otherwise.

    >>> cause_of(DecodeError("it is no list", where="state.json, byte 5"))
    'state.json, byte 5: it is no list'
    """
    cause = error.cause if isinstance(error, MigratableError) else error
    text = str(cause) or repr(error)
    return f"{error.where}: {text}" if isinstance(error, DecodeError) and error.where else text


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
