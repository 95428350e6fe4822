"""The destination of a live migration."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from vmmig import sockets
from vmmig.errors import MigratableError, MigrateReceiveError, ProtocolError
from vmmig.guest_memory import GuestMemory
from vmmig.live.handover import SessionKey, SessionRecord
from vmmig.live.link import Link
from vmmig.live.payloads import MachineConfig, state_from_json
from vmmig.memory import MemoryRangeTable
from vmmig.protocol import (
    ALL_FEATURES,
    CHANNEL_BYTES,
    HEADER_BYTES,
    Abandon,
    Channel,
    ChannelKind,
    Complete,
    CompletePaused,
    Config,
    Connection,
    ConnectionClosed,
    ConnectionState,
    Event,
    Memory,
    MemoryFd,
    MessageLimits,
    Ok,
    Role,
    Session,
    SessionOutcome,
    SessionStatus,
    Start,
    State,
)
from vmmig.traits import PrecopyMigratable
from vmmig.transfer import CancelToken, shown_url
from vmmig.verify import verify

_PIECE_BYTES = 64 << 20
_GREETING_S = 1.0

_C = TypeVar("_C", bound=PrecopyMigratable)


def receive(
    component: _C | Callable[[object, GuestMemory], _C],
    source_url: str,
    *,
    record: str | os.PathLike[str] | None = None,
    max_memory_bytes: int | None = None,
    limits: MessageLimits | None = None,
    listening: Callable[[str], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
    tls: str | os.PathLike[str] | None = None,
) -> _C:
    """Wait at a URL for a machine that `migrate` sends, and run it.

    Args:
        component: A paused machine of the same shape, whose memory and state are overwritten; or
            what makes one of its configuration and its memory, paused. Memory that is handed
            over becomes the memory of the one that is made; a given one copies it at the end.
        source_url: ``tcp:host:port`` or ``unix:/path``; port 0 is any that is free.
        record: A file of this destination's own, where it writes down what becomes of each
            migration, before it resumes the machine: so that it can tell the source even if it is
            killed and begins again. Without it, this is known as long as `receive` runs.
        max_memory_bytes: Refuse a machine with more RAM; by default, than this host has.
        limits: What to refuse of the peer's messages.
        listening: Is called with the URL once it is listened at.
        cancel: Ends it, until the machine is complete.
        timeout_s: How long to wait for a source to come, and then for each of its messages.
        tls: A folder with ``ca-cert.pem``, ``server-cert.pem``, ``server-key.pem``.

    Returns:
        The machine: resumed, unless the source wants it to stay paused.

    Raises:
        MigrateReceiveError: No machine came, whole; what was made of it is let go of, and a
            given component is paused, with contents that are not defined.
        ContractError: The component is not a `PrecopyMigratable`.

    >>> receive(lambda configuration, memory: None, "unix:/no/such/folder/x")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...
    """
    destination = _Destination(
        component,
        source_url,
        record=record,
        max_memory_bytes=_host_bytes() if max_memory_bytes is None else max_memory_bytes,
        limits=limits or MessageLimits(),
        cancel=cancel or CancelToken(),
        timeout_s=timeout_s,
        tls=tls,
    )
    return cast(_C, destination.run(listening))


class _Gone(MigratableError):
    """This connection is over; whether the migration is, is another question."""


class _Destination:
    def __init__(
        self,
        component: object,
        url: str,
        *,
        record: str | os.PathLike[str] | None,
        max_memory_bytes: int,
        limits: MessageLimits,
        cancel: CancelToken,
        timeout_s: float,
        tls: str | os.PathLike[str] | None,
    ) -> None:
        # A class has its instances' methods, and still makes them.
        self.is_factory = isinstance(component, type) or not hasattr(component, "pause")
        self.made_of = component
        self.component: PrecopyMigratable | None = None
        if not self.is_factory:
            verify(component, PrecopyMigratable)
            self.component = cast(PrecopyMigratable, component)
        self.url = url
        self.shown_url = shown_url(url)
        self.max_memory_bytes = max_memory_bytes
        self.limits = limits
        self.cancel = cancel
        self.timeout_s = timeout_s
        self.tls = tls
        self.record = SessionRecord(record)
        self.memory: GuestMemory | None = None
        self.handed_over: GuestMemory | None = None
        self.descriptors: dict[int, int] = {}
        self.key: SessionKey | None = None
        self.main: Link | None = None
        self.workers: list[_Worker] = []
        self.prefault: threading.Thread | None = None
        self.is_committed = False

    def run(self, listening: Callable[[str], object] | None) -> PrecopyMigratable:
        try:
            self.record.abort_pending()
            self.listener = sockets.Listener(self.url, tls=self.tls)
        except (MigratableError, OSError) as error:
            raise self._failure(error) from error
        try:
            with self.cancel.calling(self._shut_down):
                if listening is not None:
                    listening(self.listener.url)
                self._receive()
        except BaseException as error:
            if self.is_committed:
                return self._committed()
            self._tear_down()
            if not isinstance(error, Exception):
                raise
            raise self._failure(error) from error
        finally:
            self._close()
        return self._committed()

    def _committed(self) -> PrecopyMigratable:
        assert self.component is not None
        return self.component

    def _failure(self, error: Exception) -> MigrateReceiveError:
        cause: object = error.cause if isinstance(error, MigratableError) else error
        if self.cancel.cancelled:
            cause = "cancelled"
        return MigrateReceiveError(f"{self.shown_url!r}: {cause or repr(error)}")

    # The conversation.

    def _receive(self) -> None:
        end_s = time.monotonic() + self.timeout_s
        while True:
            self._accept_main(max(end_s - time.monotonic(), 0.0))
            try:
                self._converse()
            except (MigratableError, OSError) as error:
                assert self.main is not None
                self.main.refuse(error)
                self.main.close()
                if self.is_committed:
                    self._linger()
                    return
                if self.main.connection.state is ConnectionState.ESTABLISHED:
                    # Whoever that was, it was no source.
                    self.last_stranger = error
                    continue
                in_doubt = self._is_in_doubt()
                self._write_outcome(SessionOutcome.ABORTED)
                if in_doubt:
                    self._linger()
                raise
            return

    def _is_in_doubt(self) -> bool:
        """Whether the source may have sent Complete, so that it will come and ask."""
        assert self.main is not None
        states = (ConnectionState.STATE_RECEIVED, ConnectionState.COMPLETED)
        return self.key is not None and self.main.connection.state in states

    def _accept_main(self, timeout_s: float) -> None:
        try:
            sock, start = self.listener.accept_greeted(
                HEADER_BYTES, self._check_start, timeout_s=timeout_s, cancel=self.cancel
            )
            sockets.set_timeout(sock, self.timeout_s)
        except TimeoutError as error:
            raise MigrateReceiveError(
                f"no source came within {self.timeout_s:g} s ({error}); start it, or allow a "
                "longer timeout_s"
            ) from None
        connection = Connection(Role.RECEIVER, limits=self.limits)
        connection.receive_data(start)
        self.main = Link(sock, connection)
        if self.cancel.cancelled:
            raise MigrateReceiveError("cancelled")

    def _check_start(self, data: bytes) -> None:
        """Refuse who does not begin with Start: whoever that is, it is no source."""
        connection = Connection(Role.RECEIVER, limits=self.limits)
        connection.receive_data(data)
        if not isinstance(connection.next_event(), Start):
            raise ProtocolError("a source begins with Start")

    def _converse(self) -> None:
        assert self.main is not None
        main = self.main
        while True:
            fds: list[int] = []
            try:
                event = self._next_event(fds)
                self._check_workers()
                if isinstance(event, ConnectionClosed):
                    return
                answer = self._fulfil(event, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            main.send(answer)
            if isinstance(event, Abandon) and not self.is_committed:
                raise MigrateReceiveError("the source abandoned the migration")
            if isinstance(event, SessionStatus):
                if self.is_committed and main.connection.state is ConnectionState.COMPLETED:
                    return
                raise MigrateReceiveError("a source asked for another session's outcome, and left")

    def _next_event(self, fds: list[int]) -> Event:
        """The main connection's next message; further connections are served meanwhile."""
        assert self.main is not None
        main = self.main
        while main.connection.state in (
            ConnectionState.CONFIGURED,
            ConnectionState.STATE_RECEIVED,
        ):
            if main.is_readable():
                break
            watched: list[Any] = [main.sock, self.listener]
            ready, _, _ = select.select(watched, [], [], self.timeout_s)
            if not ready:
                raise TimeoutError(f"the source did nothing for {self.timeout_s:g} s")
            if self.listener in ready:
                self._accept_further()
            if main.sock in ready:
                break
        return main.event(fds)

    def _accept_further(self) -> None:
        assert self.main is not None
        try:
            sock, kind = self.listener.accept_greeted(
                CHANNEL_BYTES, timeout_s=_GREETING_S, cancel=self.cancel
            )
        except OSError:
            return
        sockets.set_timeout(sock, self.timeout_s)
        if self.main.connection.state is ConnectionState.CONFIGURED:
            link = Link(sock, self.main.connection.auxiliary())
            link.connection.receive_data(kind)
            assert self.memory is not None
            self.workers.append(_Worker(link, self.memory))
            return
        # Only a source that has sent Complete, and got no answer, comes now: it has given the
        # main connection up, and what comes there counts no more.
        link = Link(sock, Connection(Role.RECEIVER))
        link.connection.receive_data(kind)
        self._answer_status(link)

    def _fulfil(self, event: Event, fds: list[int]) -> Ok:
        match event:
            case Start():
                return Ok(features=ALL_FEATURES)
            case Session(id, token):
                self.key = SessionKey(id, token)
                self._write_outcome(SessionOutcome.PENDING)
            case SessionStatus(id, token):
                return Ok(outcome=self.record.outcome(SessionKey(id, token)))
            case MemoryFd(slot):
                self._take_descriptor(slot, fds)
            case Config(configuration):
                self._configure(MachineConfig.from_json(configuration))
            case Memory(table):
                self._take_memory(table)
            case State(state):
                self._restore(state)
            case Complete() | CompletePaused():
                self._complete(resume=isinstance(event, Complete))
            case Abandon():
                self._write_outcome(SessionOutcome.ABORTED)
            case _:
                raise ProtocolError(f"{type(event).__name__} is nothing a destination fulfils")
        return Ok()

    def _take_descriptor(self, slot: int, fds: list[int]) -> None:
        if len(fds) != 1 or slot in self.descriptors:
            raise ProtocolError(f"{len(fds)} descriptors came for slot {slot}, which needs one")
        self.descriptors[slot] = fds.pop()

    def _configure(self, config: MachineConfig) -> None:
        mappings = config.mappings
        total_bytes = sum(mapping.range.length for mapping in mappings)
        if total_bytes > self.max_memory_bytes:
            raise MigrateReceiveError(
                f"the machine has {total_bytes} bytes of RAM, of {self.max_memory_bytes} allowed; "
                "receive(max_memory_bytes=...) allows more"
            )
        if self.component is not None:
            self.memory = self.component.guest_memory()
            wanted = MemoryRangeTable.merge([MemoryRangeTable([m.range for m in mappings])])
            if wanted != MemoryRangeTable.merge([self.memory.ranges]):
                raise MigrateReceiveError(
                    f"the source's machine has its RAM at {wanted}, this one at "
                    f"{self.memory.ranges}"
                )
            if self.descriptors:
                self.handed_over = self._handed_over(config)
            else:
                self.memory.zero()
                self._begin_prefault()
            return
        if self.descriptors:
            self.memory = self._handed_over(config)
        else:
            self.memory = GuestMemory([m.range for m in mappings], shareable=False)
            self._begin_prefault()
        make = cast(Callable[[object, GuestMemory], PrecopyMigratable], self.made_of)
        component = make(config.configuration, self.memory)
        verify(component, PrecopyMigratable)
        self.component = component

    def _handed_over(self, config: MachineConfig) -> GuestMemory:
        slots = {mapping.slot for mapping in config.mappings}
        if slots != self.descriptors.keys() or len(slots) != len(config.mappings):
            raise ProtocolError(
                f"descriptors came for the slots {sorted(self.descriptors)}, but the RAM has "
                f"{sorted(slots)}"
            )
        if any(mapping.file_offset for mapping in config.mappings):
            raise ProtocolError("RAM that begins within its descriptor cannot be taken over")
        return GuestMemory.from_fds(
            (mapping.range, self.descriptors[mapping.slot]) for mapping in config.mappings
        )

    def _begin_prefault(self) -> None:
        assert self.memory is not None
        memory = self.memory

        def prefault() -> None:
            # Memory that is not there now will be missed when it is written to.
            with suppress(MigratableError):
                memory.prefault()

        self.prefault = threading.Thread(target=prefault, name="vmmig-prefault")
        self.prefault.start()

    def _take_memory(self, table: MemoryRangeTable) -> None:
        assert self.main is not None
        assert self.memory is not None
        self.main.receive_memory(self.memory.views(table), self._received)

    def _received(self, count_bytes: int) -> None:
        if self.cancel.cancelled:
            raise MigrateReceiveError("cancelled")

    def _check_workers(self) -> None:
        for worker in self.workers:
            if worker.failure is not None:
                raise worker.failure

    def _restore(self, state: bytes) -> None:
        assert self.component is not None
        assert self.memory is not None
        for worker in self.workers:
            worker.join(self.timeout_s)
        self._check_workers()
        if self.prefault is not None:
            self.prefault.join()
        if self.handed_over is not None:
            _copy(self.handed_over, self.memory)
        self.component.restore_state(state_from_json(state))

    def _complete(self, *, resume: bool) -> None:
        assert self.component is not None
        if self.cancel.cancelled:
            raise MigrateReceiveError("cancelled")
        # First written down, then done: a destination that is killed in between has resumed, as
        # far as anybody will ever know.
        self._write_outcome(SessionOutcome.COMMITTED)
        try:
            if resume:
                self.component.resume()
        except BaseException:
            self._write_outcome(SessionOutcome.ABORTED)
            raise
        self.is_committed = True
        with suppress(Exception):
            self.component.complete_migration()

    # The outcome.

    def _write_outcome(self, outcome: SessionOutcome) -> None:
        if self.key is not None and not self.is_committed:
            self.record.write(self.key, outcome)

    def _answer_status(self, link: Link) -> bool:
        """Answer a source that asks over a new connection; whether it knows the outcome now."""
        assert self.main is not None
        try:
            start = link.event()
            if not isinstance(start, Start):
                return False
            link.send(Ok(features=ALL_FEATURES))
            event = link.event()
            if not isinstance(event, SessionStatus):
                return False
            key = SessionKey(event.id, event.token)
            outcome = self.record.outcome(key)
            if outcome is SessionOutcome.PENDING:
                # The answer is a promise: from here on, Complete is refused.
                self._write_outcome(SessionOutcome.ABORTED)
                self.main.shut_down()
                outcome = self.record.outcome(key)
            link.send(Ok(outcome=outcome))
            return outcome is not SessionOutcome.UNKNOWN
        except (MigratableError, OSError):
            return False
        finally:
            link.close()

    def _linger(self) -> None:
        """Wait for a source that has lost the answer to Complete, and asks."""
        if self.key is None:
            return
        end_s = time.monotonic() + self.timeout_s
        while (left_s := end_s - time.monotonic()) > 0 and not self.cancel.cancelled:
            try:
                sock = self.listener.accept(timeout_s=left_s, cancel=self.cancel)
            except OSError:
                return
            link = Link(sock, Connection(Role.RECEIVER))
            if self._answer_status(link):
                return

    # The end.

    def _shut_down(self) -> None:
        if self.main is not None:
            self.main.shut_down()
        for worker in self.workers:
            worker.link.shut_down()

    def _tear_down(self) -> None:
        self._shut_down()
        for worker in self.workers:
            worker.join(None)
        if self.is_factory and self.memory is not None:
            self.memory.close()
        if self.handed_over is not None:
            self.handed_over.close()

    def _close(self) -> None:
        self.listener.close()
        if self.prefault is not None:
            self.prefault.join()
        for worker in self.workers:
            worker.link.close()
        if self.main is not None:
            self.main.close()
        for fd in self.descriptors.values():
            os.close(fd)


class _Worker:
    """A further connection, which brings memory; a thread of its own serves it."""

    def __init__(self, link: Link, memory: GuestMemory) -> None:
        self.link = link
        self.failure: Exception | None = None
        self._memory = memory
        self._thread = threading.Thread(target=self._run, name="vmmig-memory")
        self._thread.start()

    def join(self, timeout_s: float | None) -> None:
        """Wait for the connection's end.

        Raises:
            ProtocolError: It did not come.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise ProtocolError("a connection for memory is open, though State has come")

    def _run(self) -> None:
        link = self.link
        try:
            while not isinstance(event := link.event(), ConnectionClosed):
                if isinstance(event, Channel):
                    if event.kind is not ChannelKind.MEMORY:
                        raise ProtocolError("page faults are not served before the end")
                    continue
                assert isinstance(event, Memory)
                link.receive_memory(self._memory.views(event.table), int)
                link.send(Ok())
        except Exception as error:
            link.refuse(error)
            self.failure = error
        finally:
            link.close()


def _copy(source: GuestMemory, destination: GuestMemory) -> None:
    for part in source.ranges.partition(_PIECE_BYTES):
        for to, of in zip(destination.views(part), source.views(part), strict=True):
            to[:] = of


def _host_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return (1 << 63) - 1
