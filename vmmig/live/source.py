"""The source of a live migration."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import attrs

from vmmig import sockets
from vmmig.errors import MigratableError, MigrateSendError
from vmmig.guest_memory import GuestMemory
from vmmig.live.handover import Outcome, SessionKey
from vmmig.live.link import Link, PeerError
from vmmig.live.payloads import MachineConfig, state_to_json, warm_up
from vmmig.live.report import Downtime, MigrationProgress, MigrationReport, Phase
from vmmig.memory import MemoryRangeTable
from vmmig.precopy import Decision, IterationStatistics, PrecopyPolicy, decide
from vmmig.protocol import (
    ALL_FEATURES,
    CHUNK_BYTES,
    Abandon,
    Channel,
    ChannelKind,
    Complete,
    CompletePaused,
    Config,
    Connection,
    Feature,
    MemoryFd,
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

_MAX_RANGES = 1 << 20
_SHARE_BYTES = 8 << 20
_REPORT_EACH_S = 0.05
_ASK_EACH_S = 0.2
_ABANDON_S = 5.0


class MigrationAborted(MigrateSendError):
    """The migration did not happen: the source has its machine, and the destination never will.

    The source runs, unless the text says that it could not be resumed.

    >>> MigrationAborted("connection refused").outcome
    <Outcome.ABORTED: 'aborted'>
    """

    outcome = Outcome.ABORTED


class MigrationInDoubt(MigrateSendError):
    """The answer to Complete is lost: the destination may run, so the source stays paused.

    `ask` asks the destination again. Who knows from elsewhere that it does not run, and never
    will, may resume the source; who knows that it runs, may dispose of the source.

    Attributes:
        key: What names the session; None where the peer knows no sessions.

    >>> MigrationInDoubt("no answer").outcome
    <Outcome.IN_DOUBT: 'in doubt'>
    """

    outcome = Outcome.IN_DOUBT

    def __init__(self, cause: object, *, key: SessionKey | None = None) -> None:
        super().__init__(cause)
        self.key = key


def migrate(
    component: PrecopyMigratable,
    destination_url: str,
    *,
    configuration: object = None,
    policy: PrecopyPolicy | None = None,
    connections: int = 1,
    resume: bool = True,
    progress: Callable[[MigrationProgress], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
    tls: str | os.PathLike[str] | None = None,
) -> MigrationReport:
    """Move a running machine to who waits at a URL with `receive`.

    The memory is sent while the machine runs, then again what it wrote meanwhile, until little
    enough is left; then the machine is paused, the rest and its state are sent, and the
    destination resumes it. Over a unix socket the memory itself is handed over instead, where
    both sides can.

    On return the destination has the machine, and the source is paused for good.

    Args:
        component: The machine. It runs, or is paused if not ``resume``.
        destination_url: ``tcp:host:port`` or ``unix:/path``.
        configuration: What the destination is told of the machine before its memory comes: any
            JSON value.
        policy: When to stop and copy, or to give up.
        connections: How many to use for the memory, 1 to 128.
        resume: Whether the destination resumes the machine. If not, pause it before: it stays
            paused on either side.
        progress: Is called with a `MigrationProgress` at each step, and about 20 times a second.
        cancel: Aborts it, until Complete is sent.
        timeout_s: How long the other side may do nothing; also how long it is asked for the
            outcome, if its answer to Complete is lost.
        tls: A folder with ``ca-cert.pem``, ``client-cert.pem``, ``client-key.pem``.

    Raises:
        MigrationAborted: It did not happen; the source runs on as if nothing had been.
        MigrationInDoubt: Complete was sent, but not answered, and the destination cannot be
            asked; the source is paused.
        ContractError: The component is not a `PrecopyMigratable`.

    >>> import threading
    >>> from vmmig.live import receive
    >>> from vmmig.testing.components import LiveCounter
    >>> source, destination = LiveCounter(), LiveCounter()
    >>> source.count(1000)
    >>> url = f"unix:{getfixture('tmp_path')}/migration"
    >>> other = threading.Thread(target=receive, args=(destination, url))
    >>> other.start()
    >>> report = migrate(source, url)
    >>> other.join()
    >>> destination.counted
    1000
    """
    verify(component, PrecopyMigratable)
    if type(connections) is not int or not 1 <= connections <= 128:
        raise MigrationAborted(f"a migration takes 1 to 128 connections, not {connections!r}")
    source = _Source(
        component,
        destination_url,
        policy=policy or PrecopyPolicy(),
        connections=connections,
        resume=resume,
        progress=progress,
        cancel=cancel or CancelToken(),
        timeout_s=timeout_s,
        tls=tls,
    )
    return source.run(configuration)


def ask(
    destination_url: str,
    key: SessionKey,
    *,
    timeout_s: float = 60.0,
    tls: str | os.PathLike[str] | None = None,
) -> Outcome:
    """Ask a destination what became of a session, over a new connection.

    Returns:
        IN_DOUBT where the destination does not know the session, or it is still under way.

    Raises:
        MigrateSendError: It could not be asked.

    >>> ask("unix:/nobody/is/here", SessionKey.new(), timeout_s=0)
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...
    """
    shown = shown_url(destination_url)
    try:
        sock = sockets.connect(destination_url, timeout_s=timeout_s, tls=tls)
        link = Link(sock, Connection(Role.SENDER))
        try:
            agreed = link.ask(Start(features=ALL_FEATURES)).features
            if Feature.SESSIONS not in agreed:
                raise MigrateSendError("it knows no sessions")
            answer = link.ask(SessionStatus(key.id, key.token))
        finally:
            link.close()
    except (MigratableError, OSError) as error:
        cause = error.cause if isinstance(error, MigratableError) else error
        raise MigrateSendError(f"{shown!r}: it could not be asked: {cause}") from error
    outcomes = {
        SessionOutcome.COMMITTED: Outcome.COMMITTED,
        SessionOutcome.ABORTED: Outcome.ABORTED,
    }
    return outcomes.get(answer.outcome or SessionOutcome.UNKNOWN, Outcome.IN_DOUBT)


class _Source:
    def __init__(
        self,
        component: PrecopyMigratable,
        url: str,
        *,
        policy: PrecopyPolicy,
        connections: int,
        resume: bool,
        progress: Callable[[MigrationProgress], object] | None,
        cancel: CancelToken,
        timeout_s: float,
        tls: str | os.PathLike[str] | None,
    ) -> None:
        self.component = component
        self.url = url
        self.shown_url = shown_url(url)
        self.policy = policy
        self.connections = connections
        self.resume = resume
        self.cancel = cancel
        self.timeout_s = timeout_s
        self.tls = tls
        self.key: SessionKey | None = None
        self.main: Link | None = None
        self.further: list[Link] = []
        self.is_logging = False
        self.is_paused = False
        self.handed_over = False
        self.meter = _Meter(progress, cancel)

    def run(self, configuration: object) -> MigrationReport:
        try:
            with self.cancel.calling(self._shut_down):
                memory = self.component.guest_memory()
                self._connect(memory, configuration)
                self.component.start_migration()
                decision, history = self._precopy(memory)
                downtime = self._stop_and_copy(memory)
            self.meter.check()
            self.meter.enter("handing over")
        except BaseException as error:
            self._abort(error)
            raise
        complete_s = self._hand_over()
        self.meter.enter("done")
        return MigrationReport(
            url=self.shown_url,
            ram_bytes=memory.total_bytes,
            sent_bytes=self.meter.sent_bytes,
            connections=self.connections,
            handed_over=self.handed_over,
            iterations=tuple(history),
            decision=decision,
            downtime=attrs.evolve(downtime, complete_s=complete_s),
            total_s=self.meter.elapsed_s,
        )

    def _connect(self, memory: GuestMemory, configuration: object) -> None:
        self.meter.enter("connecting")
        warm_up()
        config = MachineConfig.of(memory, configuration).to_json()
        self.main = main = self._link(Connection(Role.SENDER))
        agreed = main.ask(Start(features=ALL_FEATURES)).features
        if Feature.SESSIONS in agreed:
            key = SessionKey.new()
            main.ask(Session(key.id, key.token))
            self.key = key
        fds = [region.fd for region in memory.regions]
        if main.sock.family == socket.AF_UNIX and None not in fds:
            for slot, fd in enumerate(fds):
                main.ask(MemoryFd(slot), fd)
            self.handed_over = True
        main.ask(Config(config))
        if not self.handed_over and self.connections > 1:
            for _ in range(self.connections):
                link = self._link(main.connection.auxiliary())
                self.further.append(link)
                link.send(Channel(ChannelKind.MEMORY))

    def _link(self, connection: Connection) -> Link:
        self.meter.check()
        sock = sockets.connect(self.url, timeout_s=self.timeout_s, tls=self.tls, cancel=self.cancel)
        return Link(sock, connection)

    def _precopy(
        self, memory: GuestMemory
    ) -> tuple[Decision | None, Sequence[IterationStatistics]]:
        if self.handed_over:
            return None, ()
        self.component.start_dirty_log()
        self.is_logging = True
        dirty = memory.nonzero()
        meter = self.meter
        history = [
            IterationStatistics(
                iteration=0,
                sent_bytes=0,
                duration_s=0.0,
                dirty_bytes=dirty.total_bytes,
                elapsed_s=meter.elapsed_s,
            )
        ]
        while True:
            decision = decide(self.policy, history)
            if decision.action == "cancel":
                raise MigrateSendError(decision.reason)
            if decision.action == "stop_and_copy":
                self.rest = dirty
                return decision, history[1:]
            meter.begin_pass(len(history), dirty.total_bytes, decision)
            began_s = time.perf_counter()
            self._send_pass(memory, dirty)
            duration_s = time.perf_counter() - began_s
            sent_bytes = dirty.total_bytes
            dirty = self.component.dirty_log()
            history.append(
                IterationStatistics(
                    iteration=len(history),
                    sent_bytes=sent_bytes,
                    duration_s=duration_s,
                    dirty_bytes=dirty.total_bytes,
                    elapsed_s=meter.elapsed_s,
                )
            )

    def _send_pass(self, memory: GuestMemory, table: MemoryRangeTable) -> None:
        if not self.further:
            self._send_on_main(memory, table)
            return
        # Each connection takes the next share when it has sent the one before: so a slow one
        # holds nobody up.
        share_bytes = min(CHUNK_BYTES, max(_SHARE_BYTES, table.total_bytes // 512))
        shares: queue.SimpleQueue[MemoryRangeTable] = queue.SimpleQueue()
        for share in table.partition(share_bytes):
            shares.put(share)
        failures: list[BaseException] = []

        def work(link: Link) -> None:
            try:
                while not failures:
                    try:
                        share = shares.get_nowait()
                    except queue.Empty:
                        return
                    link.send_memory(share, memory.views_to_send(share), self.meter.advance)
            except BaseException as error:
                failures.append(error)
                self._shut_down()

        threads: list[threading.Thread] = []
        try:
            for link in self.further:
                threads.append(threading.Thread(target=work, args=(link,)))
                threads[-1].start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._shut_down()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if failures:
            raise failures[0]

    def _send_on_main(self, memory: GuestMemory, table: MemoryRangeTable) -> None:
        assert self.main is not None
        data = table.to_bytes()
        for start in range(0, len(data), 16 * _MAX_RANGES):
            part = MemoryRangeTable.from_bytes(data[start : start + 16 * _MAX_RANGES])
            self.main.send_memory(part, memory.views_to_send(part), self.meter.advance)

    def _stop_and_copy(self, memory: GuestMemory) -> Downtime:
        assert self.main is not None
        self.meter.check()
        for link in self.further:
            link.close()
        times = [time.perf_counter()]
        if self.resume:
            self.is_paused = True
            self.component.pause()
        times.append(time.perf_counter())
        state = state_to_json(self.component.snapshot_state())
        times.append(time.perf_counter())
        if not self.handed_over:
            last = self.rest | self.component.dirty_log()
            self.meter.begin_pass(0, last.total_bytes, None)
            if len(last):
                self._send_on_main(memory, last)
        times.append(time.perf_counter())
        self.main.ask(State(state))
        times.append(time.perf_counter())
        durations = [b - a for a, b in pairwise(times)]
        return Downtime(
            pause_s=durations[0],
            state_s=durations[1],
            final_memory_s=durations[2],
            send_state_s=durations[3],
            complete_s=0.0,
        )

    def _hand_over(self) -> float:
        """Send Complete; from here on only the destination's word counts."""
        assert self.main is not None
        began_s = time.perf_counter()
        main = self.main
        try:
            try:
                main.ask(Complete() if self.resume else CompletePaused())
            except PeerError as error:
                outcome: Outcome = Outcome.ABORTED
                cause: Exception = error
            except (MigratableError, OSError) as error:
                main.close()
                outcome, cause = self._asked(error)
            except BaseException as error:
                raise self._in_doubt(error) from error
            else:
                complete_s = time.perf_counter() - began_s
                if self.key is not None:
                    with suppress(MigratableError, OSError):
                        main.ask(SessionStatus(self.key.id, self.key.token))
                return self._finish(complete_s)
        finally:
            main.close()
        if outcome is Outcome.COMMITTED:
            return self._finish(time.perf_counter() - began_s)
        if outcome is Outcome.ABORTED:
            self._abort(cause)
        raise self._in_doubt(cause) from cause

    def _in_doubt(self, cause: BaseException) -> MigrationInDoubt:
        return MigrationInDoubt(
            f"{self.shown_url!r}: the answer to Complete is lost ({cause!r}), and the destination "
            "cannot be asked: the source stays paused; ask it again, or find out whether the "
            "machine runs there",
            key=self.key,
        )

    def _finish(self, complete_s: float) -> float:
        if self.is_logging:
            with suppress(Exception):
                self.component.stop_dirty_log()
        with suppress(Exception):
            self.component.complete_migration()
        return complete_s

    def _asked(self, error: Exception) -> tuple[Outcome, Exception]:
        """What became of it, asked until it is known or the time is over."""
        if self.key is None:
            return Outcome.IN_DOUBT, error
        self.meter.enter("asking")
        end_s = time.monotonic() + self.timeout_s
        # The user may end this with an interrupt, and then asks later.
        with suppress(KeyboardInterrupt):
            while (left_s := end_s - time.monotonic()) > 0:
                with suppress(MigrateSendError):
                    outcome = ask(self.url, self.key, timeout_s=left_s, tls=self.tls)
                    if outcome is not Outcome.IN_DOUBT:
                        return outcome, error
                threading.Event().wait(min(_ASK_EACH_S, left_s))
        return Outcome.IN_DOUBT, error

    def _abort(self, error: BaseException) -> None:
        """Let the source run on, tell the destination, and raise MigrationAborted."""
        left: list[str] = []
        if self.is_logging:
            try:
                self.component.stop_dirty_log()
            except Exception as second:
                left.append(f"its dirty log could not be stopped: {second!r}")
        if self.is_paused:
            try:
                self.component.resume()
            except Exception as second:
                left.append(f"the source could not be resumed and is paused: {second!r}")
        if self.main is not None and self.main.connection.request is None:
            with suppress(MigratableError, OSError):
                sockets.set_timeout(self.main.sock, min(self.timeout_s, _ABANDON_S))
                self.main.ask(Abandon())
        for link in (self.main, *self.further):
            if link is not None:
                link.close()
        if not isinstance(error, Exception):
            for text in left:
                error.add_note(text)
            return
        cause: object = error.cause if isinstance(error, MigratableError) else error
        if self.cancel.cancelled:
            cause = "cancelled"
        text = f"{self.shown_url!r}: {cause or repr(error)}"
        raise MigrationAborted("; ".join([text, *left])) from error

    def _shut_down(self) -> None:
        for link in (self.main, *self.further):
            if link is not None:
                link.shut_down()


class _Meter:
    """Counts what is sent, and tells the progress callback."""

    def __init__(
        self, progress: Callable[[MigrationProgress], object] | None, cancel: CancelToken
    ) -> None:
        self._progress = progress
        self._cancel = cancel
        self._lock = threading.Lock()
        self._began_s = time.perf_counter()
        self._pass_began_s = self._began_s
        self._next_report_s = 0.0
        self._now = MigrationProgress(
            phase="connecting",
            iteration=0,
            sent_bytes=0,
            pass_bytes=0,
            pass_sent_bytes=0,
            rate_bytes_per_s=0.0,
            elapsed_s=0.0,
        )
        self.sent_bytes = 0
        self._pass_sent_bytes = 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._began_s

    def check(self) -> None:
        if self._cancel.cancelled:
            raise MigrateSendError("cancelled")

    def enter(self, phase: Phase) -> None:
        self._now = attrs.evolve(self._now, phase=phase)
        self._report()

    def begin_pass(self, iteration: int, pass_bytes: int, decision: Decision | None) -> None:
        self._pass_sent_bytes = 0
        self._pass_began_s = time.perf_counter()
        self._now = attrs.evolve(
            self._now,
            phase="pre-copy" if decision else "stop-and-copy",
            iteration=iteration,
            pass_bytes=pass_bytes,
            forecast=decision.forecast if decision else None,
        )
        self._report()
        self.check()

    def advance(self, count_bytes: int) -> None:
        self.check()
        with self._lock:
            self.sent_bytes += count_bytes
            self._pass_sent_bytes += count_bytes
            if self._progress is None or time.perf_counter() < self._next_report_s:
                return
            self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        now_s = time.perf_counter()
        self._next_report_s = now_s + _REPORT_EACH_S
        pass_s = now_s - self._pass_began_s
        event = attrs.evolve(
            self._now,
            sent_bytes=self.sent_bytes,
            pass_sent_bytes=self._pass_sent_bytes,
            rate_bytes_per_s=self._pass_sent_bytes / pass_s if pass_s > 0 else 0.0,
            elapsed_s=now_s - self._began_s,
        )
        try:
            self._progress(event)
        except Exception as error:
            if event.phase in ("connecting", "pre-copy", "stop-and-copy"):
                raise MigrateSendError(f"the progress callback failed: {error!r}") from error
