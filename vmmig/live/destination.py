"""The destination of a live migration."""

from __future__ import annotations

import os
import selectors
import socket
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
from vmmig.live.payloads import MachineConfig, state_from_json, warm_up
from vmmig.memory import MemoryRangeTable
from vmmig.protocol import (
    ALL_FEATURES,
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
_FURTHER_S = 1.0
_MAX_FURTHER = 256

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
        cancel: Ends it, until the machine is complete; after that, only the wait for a source
            that has not heard so.
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
        self.askers: list[_Asker] = []
        self.prefault: threading.Thread | None = None
        self.last_stranger: Exception | None = None
        self.has_begun = False
        self.is_committed = False
        self.has_answered = False
        # An outcome is decided, and told, by one at a time.
        self.deciding = threading.Lock()
        self.source_knows = threading.Event()

    def run(self, listening: Callable[[str], object] | None) -> PrecopyMigratable:
        try:
            warm_up()
            self.record.abort_pending()
            self.listener = sockets.Listener(self.url, tls=self.tls)
        except (MigratableError, OSError) as error:
            raise self._failure(error) from error
        # A unix socket that listens does not wake who waits for it when it is shut down.
        self.woken, self.waker = socket.socketpair()
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
            assert self.main is not None
            try:
                self._converse()
            except Exception as error:
                in_doubt = self.is_committed or self._is_in_doubt()
                self.main.refuse(error)
                self.main.close()
                if not self.has_begun:
                    # Whoever that was, no migration came from there.
                    self.last_stranger = error
                    continue
                self._write_aborted()
                if in_doubt:
                    self._linger()
                if self.is_committed:
                    return
                raise
            self.main.close()
            if self.is_committed:
                self._linger()
                return

    def _is_in_doubt(self) -> bool:
        """Whether the source may have sent Complete, so that it will come and ask."""
        assert self.main is not None
        states = (ConnectionState.STATE_RECEIVED, ConnectionState.COMPLETED)
        return self.main.connection.state in states

    def _accept_main(self, timeout_s: float) -> None:
        try:
            # Read beside those of others: who comes and says nothing holds nobody up.
            sock, request = self.listener.accept_greeted(
                HEADER_BYTES, timeout_s=timeout_s, cancel=self.cancel
            )
            sockets.set_timeout(sock, self.timeout_s)
        except TimeoutError:
            last = self.last_stranger or self.listener.refusal
            who = f"; the last who came: {last}" if last else ""
            raise MigrateReceiveError(
                f"no source came within {self.timeout_s:g} s; start it, or allow a longer "
                f"timeout_s{who}"
            ) from None
        connection = Connection(Role.RECEIVER, limits=self.limits)
        connection.receive_data(request)
        self.main = Link(sock, connection)
        if self.cancel.cancelled:
            raise MigrateReceiveError("cancelled")

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
            self.has_answered = self.is_committed
            if isinstance(event, Abandon) and not self.is_committed:
                raise MigrateReceiveError("the source abandoned the migration")
            if isinstance(event, SessionStatus):
                if self.is_committed:
                    self.source_knows.set()
                return

    def _next_event(self, fds: list[int]) -> Event:
        """The main connection's next message; further connections are served meanwhile."""
        assert self.main is not None
        main = self.main
        began_s = time.monotonic()
        while main.connection.state in (
            ConnectionState.CONFIGURED,
            ConnectionState.STATE_RECEIVED,
            ConnectionState.COMPLETED,
        ):
            if main.is_readable():
                break
            # The main connection is silent while others carry the memory.
            last_s = max([began_s, *(worker.last_s for worker in self.workers)])
            left_s = last_s + self.timeout_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"the source did nothing for {self.timeout_s:g} s")
            ready = _readable(left_s, main.sock, self.listener)
            if self.listener in ready:
                self._accept_further()
            if main.sock in ready:
                break
        return main.event(fds)

    def _accept_further(self) -> None:
        assert self.main is not None
        try:
            sock = self.listener.accept(timeout_s=_FURTHER_S, cancel=self.cancel)
            sockets.set_timeout(sock, self.timeout_s)
        except (MigratableError, OSError):
            return
        self.workers = [each for each in self.workers if each.counts]
        self.askers = [each for each in self.askers if each.is_alive]
        if len(self.workers) + len(self.askers) >= _MAX_FURTHER:
            sock.close()
        elif self.main.connection.state is ConnectionState.CONFIGURED:
            assert self.memory is not None
            link = Link(sock, self.main.connection.auxiliary())
            self.workers.append(_Worker(link, self.memory))
        else:
            # Only a source that has sent Complete, and got no answer, comes now.
            link = Link(sock, Connection(Role.RECEIVER))
            self.askers.append(_Asker(link, self._answer_status))

    def _fulfil(self, event: Event, fds: list[int]) -> Ok:
        assert self.main is not None
        if self.main.connection.state is not ConnectionState.ESTABLISHED:
            self.has_begun |= not isinstance(event, SessionStatus)
        match event:
            case Start():
                return Ok(features=ALL_FEATURES)
            case Session(id, token):
                self.key = SessionKey(id, token)
                self.record.write(self.key, SessionOutcome.PENDING)
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
                self._write_aborted()
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
            if not worker.has_begun:
                worker.link.shut_down()
            worker.join(self.timeout_s)
        self._check_workers()
        if self.prefault is not None:
            self.prefault.join()
        if self.handed_over is not None:
            _copy(self.handed_over, self.memory)
        self.component.restore_state(state_from_json(state))

    def _complete(self, *, resume: bool) -> None:
        component = self._committed()
        with self.deciding:
            # Set before the token is looked at: whoever cancels looks the other way round.
            self.is_committed = True
            try:
                if self.cancel.cancelled:
                    raise MigrateReceiveError("cancelled")
                # First written down, then done: a destination that is killed in between has
                # resumed, as far as anybody will ever know.
                if self.key is not None:
                    if self.record.outcome(self.key) is not SessionOutcome.PENDING:
                        raise MigrateReceiveError("the source was told that it is aborted")
                    self.record.write(self.key, SessionOutcome.COMMITTED)
                if resume:
                    component.resume()
            except BaseException:
                self.is_committed = False
                if self.key is not None:
                    self.record.write(self.key, SessionOutcome.ABORTED)
                if resume:
                    with suppress(Exception):
                        component.pause()
                raise
        with suppress(Exception):
            component.complete_migration()

    # The outcome.

    def _write_aborted(self) -> None:
        with self.deciding:
            if self.key is not None and not self.is_committed:
                self.record.write(self.key, SessionOutcome.ABORTED)

    def _answer_status(self, link: Link) -> None:
        """Answer a source that asks over a new connection."""
        assert self.main is not None
        if not isinstance(link.event(), Start):
            return
        link.send(Ok(features=ALL_FEATURES))
        event = link.event()
        if not isinstance(event, SessionStatus):
            return
        key = SessionKey(event.id, event.token)
        with self.deciding:
            outcome = self.record.outcome(key)
            if outcome is SessionOutcome.PENDING:
                # The answer is a promise: from here on, Complete is refused.
                outcome = SessionOutcome.ABORTED
                self.record.write(key, outcome)
        link.send(Ok(outcome=outcome))
        if key == self.key and outcome is not SessionOutcome.UNKNOWN:
            self.source_knows.set()
            self.main.shut_down()
            self._wake()

    def _linger(self) -> None:
        """Wait for a source that has lost the answer to Complete, and asks."""
        self.has_answered = True
        end_s = time.monotonic() + self.timeout_s
        while self.key is not None and not self.source_knows.is_set():
            left_s = end_s - time.monotonic()
            if left_s <= 0 or self.cancel.cancelled:
                return
            if self.listener in _readable(left_s, self.listener, self.woken):
                self._accept_further()

    # The end.

    def _shut_down(self) -> None:
        if self.is_committed and not self.has_answered:
            return
        if self.main is not None:
            self.main.shut_down()
        for worker in self.workers:
            worker.link.shut_down()
        self._wake()

    def _wake(self) -> None:
        """Wake who waits for the listener, for good."""
        with suppress(OSError):
            self.waker.shutdown(socket.SHUT_WR)

    def _tear_down(self) -> None:
        self._shut_down()
        for worker in self.workers:
            worker.join(None)
        if self.is_factory and self.memory is not None:
            self.memory.close()

    def _close(self) -> None:
        self.listener.close()
        if self.prefault is not None:
            self.prefault.join()
        served: list[_Worker | _Asker] = [*self.workers, *self.askers]
        for further in served:
            further.link.shut_down()
            further.join(None)
        if self.main is not None:
            self.main.close()
        self.woken.close()
        self.waker.close()
        if self.handed_over is not None:
            self.handed_over.close()
        for fd in self.descriptors.values():
            os.close(fd)


class _Worker:
    """A further connection, which brings memory; a thread of its own serves it.

    Until it brings some, it may be anybody's, and its failure is nobody's.
    """

    def __init__(self, link: Link, memory: GuestMemory) -> None:
        self.link = link
        self.failure: Exception | None = None
        self.has_begun = False
        self.last_s = 0.0
        self._memory = memory
        self._thread = threading.Thread(target=self._run, name="vmmig-memory")
        self._thread.start()

    @property
    def counts(self) -> bool:
        """Whether it has brought memory, or may still."""
        return self.has_begun or self._thread.is_alive()

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
                views = self._memory.views(event.table)
                self.has_begun = True
                link.receive_memory(views, self._received)
                link.send(Ok())
        except Exception as error:
            link.refuse(error)
            if self.has_begun:
                self.failure = error
        finally:
            link.close()

    def _received(self, count_bytes: int) -> None:
        self.last_s = time.monotonic()


class _Asker:
    """A connection that asks for a session's outcome; a thread of its own answers."""

    def __init__(self, link: Link, answer: Callable[[Link], object]) -> None:
        self.link = link
        self._answer = answer
        self._thread = threading.Thread(target=self._run, name="vmmig-asker")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it is still being answered."""
        return self._thread.is_alive()

    def join(self, timeout_s: float | None) -> None:
        """Wait for its end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._answer(self.link)
        except Exception as error:
            self.link.refuse(error)
        finally:
            self.link.close()


def _readable(timeout_s: float, *watched: Any) -> list[Any]:
    with selectors.DefaultSelector() as selector:
        for each in watched:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(timeout_s, 0))]


def _copy(source: GuestMemory, destination: GuestMemory) -> None:
    for part in source.ranges.partition(_PIECE_BYTES):
        for to, of in zip(destination.views(part), source.views(part), strict=True):
            to[:] = of


def _host_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return (1 << 63) - 1
