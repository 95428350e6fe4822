"""The machine that a QEMU runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import attrs

from vmmig.adapters.qemu.monitor import Disconnected, Monitor
from vmmig.adapters.qemu.statistics import MigrationStatistics
from vmmig.adapters.qemu.stream import Capture, Feed
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.live import MigrationAborted, MigrationInDoubt
from vmmig.migration import UrlTransport
from vmmig.snapshot import Snapshot, build, flatten
from vmmig.transfer import CancelToken

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

Watch = Callable[[MigrationStatistics], object]

_NO_LIMIT_BYTES_PER_S = 1 << 50
_LOOK_EACH_S = 0.05
_SETTLE_EACH_S = 0.005
_RETRY_EACH_S = 0.2
_FD = "vmmig-stream"
_OVER = ("completed", "failed", "cancelled")
_NOBODY = "Failed to connect"
_CONNECTED = ("tcp:", "unix:", "vsock:")
_SLACK_BYTES = 64 << 20


@attrs.define
class _Attempt:
    """What is known of a migration, whatever ends it.

    Attributes:
        begun: Whether QEMU was told to begin.
        switches: Whether, when the guest stands still and its state is about to be sent, QEMU
            waits for being told so here.
        switched: Whether it was told. From then on the destination may have the guest, and no
            cancellation could call it back.
        postcopy: Whether the guest may run at the destination without all of its RAM.
        statistics: What QEMU said last.
    """

    begun: bool = False
    switches: bool = False
    switched: bool = False
    postcopy: bool = False
    statistics: MigrationStatistics | None = None

    @property
    def committed(self) -> bool:
        """Whether all has been sent, and is at the destination."""
        return self.statistics is not None and self.statistics.status == "completed"

    @property
    def words(self) -> str:
        """Why QEMU failed."""
        if self.statistics is None:
            return "QEMU says nothing"
        status, details = self.statistics.status, self.statistics.details
        return str(details.get("error-desc", f"the migration is {status}"))


class Machine(UrlTransport):
    """A running QEMU as a component that is paused, snapshotted, restored, and moved live.

    Any number of times it is paused, snapshotted and resumed. It can be restored, or receive a
    machine, once, if it was started with ``-incoming defer``. It is used by ``with``, or closed
    by `close`; QEMU goes on.

    Args:
        path: The unix socket of its monitor, as in ``-qmp unix:PATH,server=on,wait=off``.
        id: The component's id.
        timeout_s: How long QEMU may take to answer a command, and how long `migrate` waits for
            the destination to listen, in seconds.

    Raises:
        MigratableError: No QEMU answers there.

    >>> Machine("no-such.qmp")
    Traceback (most recent call last):
    vmmig.errors.MigratableError: qemu: no QEMU answers at 'no-such.qmp' ...
    """

    def __init__(
        self, path: str | os.PathLike[str], *, id: str = "qemu", timeout_s: float = 60.0
    ) -> None:
        self._id = id
        self._timeout_s = timeout_s
        self._busy = threading.Lock()
        self._runs_after = False
        self._held: Snapshot | None = None
        self._moved_to: str | None = None
        with self._failing(MigratableError):
            self._monitor = Monitor(path, timeout_s=timeout_s)

    def close(self) -> None:
        """End the connection; QEMU goes on as it is. To close it again does nothing."""
        self._held = None
        self._monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Machine {self._id!r} at {self._monitor.path!r}>"

    def id(self) -> str:
        """The component's id."""
        return self._id

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """What QEMU answers to a QMP command; for what is not a method here.

        Args:
            command: Its name.
            arguments: Its arguments.
            fd: A descriptor that goes with it, for ``getfd`` and ``add-fd``.

        Raises:
            MigratableError: QEMU refuses it, in its own words, or does not answer.
        """
        with self._failing(MigratableError):
            return self._monitor.execute(command, arguments, fd=fd)

    def pause(self) -> None:
        """Stop the guest; return once it stands still.

        Raises:
            PauseError: QEMU refuses.
        """
        with self._failing(PauseError):
            self._runs_after = False
            self._monitor.execute("stop")

    def resume(self) -> None:
        """Let the guest go on.

        Raises:
            ResumeError: QEMU refuses, or the machine was moved away by `migrate`.
        """
        with self._failing(ResumeError):
            self._refuse_moved()
            self._held = None
            self._monitor.execute("cont")
            self._runs_after = True

    def snapshot(
        self, *, progress: Watch | None = None, cancel: CancelToken | None = None
    ) -> Snapshot:
        """The machine's state, RAM included, as a value.

        A paused guest stays paused. One that runs does so until nearly all of its RAM is copied,
        stands still for the rest, and runs on. As long as a guest stays paused it gives QEMU's
        stream only once: this object keeps it, and gives it again, until `resume` or `close`.

        Args:
            progress: Is called with `MigrationStatistics`, about 20 times a second.
            cancel: Ends it with an error.

        Raises:
            SnapshotError: There is none, in QEMU's words; the guest is as it was.
        """
        with self._alone(SnapshotError):
            state = self._state()
            self._refuse_moved()
            if state["status"] == "inmigrate":
                raise SnapshotError("it waits for a machine, and has none yet")
            if state["status"] == "postmigrate":
                if self._held is None:
                    raise SnapshotError(
                        "QEMU gives the state of a guest that stays paused only once, and did so "
                        "already; resume() it first"
                    )
                return _copy(self._held)
            self._runs_after = state["running"]
            limits = {"max-bandwidth": _NO_LIMIT_BYTES_PER_S, "tls-creds": ""}
            with self._configured(defaults=limits, only=True), Capture() as capture:
                try:
                    with self._handed_over(capture):
                        url = f"fd:{_FD}"
                        self._send(url, _Attempt(), progress, cancel, converge=self._runs_after)
                finally:
                    self._settle()
                capture.finish()
            snapshot = capture.snapshot
            snapshot.id = self._id
            if not self._runs_after:
                self._held = _copy(snapshot)
            return snapshot

    def restore(
        self,
        snapshot: Snapshot,
        *,
        progress: Watch | None = None,
    ) -> None:
        """Set a machine that waits (``-incoming defer``) to a snapshot; it is paused then.

        Args:
            snapshot: What `snapshot` gave, of a machine with the same devices.
            progress: Is called with `MigrationStatistics`, about 20 times a second.

        Raises:
            RestoreError: It could not. QEMU before 9.1 ends when it does not understand a
                stream, and says why on its standard error only.
        """
        with self._alone(RestoreError):
            self._must_wait()
            with self._configured(defaults={"tls-creds": ""}, only=True), Feed(snapshot) as feed:
                self._monitor.execute("stop")
                with self._handed_over(feed):
                    self._load(f"fd:{_FD}", progress, None)
                feed.finish()

    def migrate(
        self,
        destination_url: str,
        *,
        settings: Mapping[str, object] | None = None,
        progress: Watch | None = None,
        cancel: CancelToken | None = None,
    ) -> MigrationStatistics:
        """Move the guest, while it runs, to a QEMU that waits at a URL, in `receive` for instance.

        On return it is there, and stands still here for good.

        Args:
            destination_url: Where the other QEMU listens: ``tcp:host:port``, ``unix:/path``, or
                whatever else this QEMU knows.
            settings: QEMU's migration capabilities and parameters, by QEMU's names and in QEMU's
                units, such as ``{"multifd": True, "downtime-limit": 100}``. They are as before
                afterwards.
            progress: Is called with `MigrationStatistics`, about 20 times a second.
            cancel: Ends it with an error.

        Raises:
            MigrationAborted: It did not happen, in QEMU's words; the guest is here, as it was.
            MigrationInDoubt: QEMU does not answer any more.
        """
        defaults = {
            "return-path": destination_url.startswith(_CONNECTED),
            "pause-before-switchover": True,
        }
        with self._alone(MigrationAborted):
            state = self._state()
            self._refuse_moved()
            if state["status"] in ("inmigrate", "postmigrate"):
                raise MigrationAborted(
                    f"QEMU sends no machine that is in the state {state['status']!r}; resume() it"
                )
            self._runs_after = state["running"]
            attempt = _Attempt(switches="pause-before-switchover" not in (settings or {}))
            try:
                with self._configured(settings, defaults=defaults):
                    try:
                        self._send(destination_url, attempt, progress, cancel)
                    finally:
                        if attempt.committed:
                            self._moved_to = destination_url
                        elif not attempt.postcopy:
                            self._settle()
            except MigratableError as error:
                if attempt.begun and (attempt.postcopy or isinstance(error, Disconnected)):
                    doubt = MigrationInDoubt(error)
                    doubt.component_path = self._id
                    raise doubt from error
                raise
            assert attempt.statistics is not None
            return attempt.statistics

    def receive(
        self,
        source_url: str,
        *,
        settings: Mapping[str, object] | None = None,
        resume: bool = True,
        progress: Watch | None = None,
        cancel: CancelToken | None = None,
    ) -> MigrationStatistics:
        """Take a machine that another QEMU sends, by `migrate` for instance.

        This QEMU waits (``-incoming defer``).

        Args:
            source_url: Where to listen: ``tcp:host:port``, ``unix:/path``, or whatever else this
                QEMU knows.
            settings: As for `migrate`; both sides must agree.
            resume: Whether the guest runs on at once, if it ran at the source. If not, and
                `resume` is called once `migrate` has returned, it never runs in both places,
                even if the network fails in the very moment between.
            progress: Is called with `MigrationStatistics`, about 20 times a second.
            cancel: Ends the waiting with an error. QEMU still listens then, until it is ended.

        Raises:
            MigrateReceiveError: It did not come.
        """
        with self._alone(MigrateReceiveError):
            self._must_wait()
            with self._configured(settings):
                self._monitor.execute("cont" if resume else "stop")
                return self._load(source_url, progress, cancel)

    # --- what they have in common -----------------------------------------------------------------

    def _send(
        self,
        url: str,
        attempt: _Attempt,
        progress: Watch | None,
        cancel: CancelToken | None,
        *,
        converge: bool = False,
    ) -> None:
        """Let QEMU send its stream.

        Once QEMU has completed it, it is done, even if it is cancelled or ``progress`` fails then.

        Args:
            converge: Whether to pause a guest that writes to its RAM faster than it is sent.
        """
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            _refuse(cancel)
            attempt.begun = True
            self._monitor.execute("migrate", {"uri": url})
            try:
                self._watch(attempt, progress, cancel, converge=converge)
            except Disconnected:
                raise
            except BaseException as error:
                if not attempt.switched:
                    attempt.switches = False
                    self._monitor.execute("migrate_cancel")
                self._watch(attempt, None, None)
                if not attempt.committed or not isinstance(error, Exception):
                    raise
            if attempt.committed:
                return
            _refuse(cancel)
            if not attempt.words.startswith(_NOBODY) or time.monotonic() > deadline_s:
                raise MigratableError(attempt.words)
            self._monitor.wait(_RETRY_EACH_S)

    def _load(
        self, url: str, progress: Watch | None, cancel: CancelToken | None
    ) -> MigrationStatistics:
        """Let QEMU read a stream."""
        attempt = _Attempt()
        arguments = {"uri": url}
        try:
            try:
                self._monitor.execute("migrate-incoming", {**arguments, "exit-on-error": False})
            except Disconnected:
                raise
            except MigratableError as error:
                if "exit-on-error" not in str(error):
                    raise
                self._monitor.execute("migrate-incoming", arguments)
            self._watch(attempt, progress, cancel, incoming=True)
        except Disconnected as error:
            raise MigratableError(
                f"QEMU has ended while it loaded the stream ({error}); its standard error says why"
            ) from error
        if not attempt.committed:
            raise MigratableError(attempt.words)
        assert attempt.statistics is not None
        return attempt.statistics

    def _watch(
        self,
        attempt: _Attempt,
        progress: Watch | None,
        cancel: CancelToken | None,
        *,
        converge: bool = False,
        incoming: bool = False,
    ) -> None:
        """Wait until a migration is over."""
        asked = False
        while True:
            statistics = MigrationStatistics.of(self._monitor.execute("query-migrate"))
            attempt.statistics = statistics
            attempt.postcopy |= statistics.status.startswith("postcopy")
            over = statistics.status in _OVER
            if progress is not None:
                try:
                    progress(statistics)
                except Exception as error:
                    if not over and not attempt.switched:
                        raise MigratableError(f"the progress callback failed: {error!r}") from error
            if over:
                return
            if cancel is not None and cancel.cancelled and not asked and not attempt.switched:
                if incoming:
                    raise MigratableError("cancelled; QEMU still listens and can only be ended")
                self._monitor.execute("migrate_cancel")
                asked = True
            elif (
                statistics.status == "pre-switchover" and attempt.switches and not attempt.switched
            ):
                self._switch(attempt)
            limit_bytes = 2 * statistics.ram_bytes + _SLACK_BYTES
            if converge and statistics.transferred_bytes > limit_bytes:
                self._monitor.execute("stop")
                converge = False
            self._monitor.wait(_LOOK_EACH_S)

    def _switch(self, attempt: _Attempt) -> None:
        attempt.switched = True
        try:
            self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
        except Disconnected:
            raise
        except MigratableError:
            attempt.switched = False
            raise

    def _settle(self) -> None:
        """Once a migration is over: let the guest run, if it shall."""
        deadline_s = time.monotonic() + self._timeout_s
        while (state := self._state())["status"] == "finish-migrate":
            if time.monotonic() > deadline_s:
                raise MigratableError("QEMU does not come to the end of its migration")
            self._monitor.wait(_SETTLE_EACH_S)
        if self._runs_after and not state["running"]:
            self._monitor.execute("cont")

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._monitor.execute("query-status")
        return state

    def _left(self) -> str:
        """The state in which a failure has left the machine."""
        try:
            state = self._state()
        except MigratableError:
            return "unknown"
        if state["status"] == "inmigrate":
            return "as before"
        return "running" if state["running"] else "paused"

    def _refuse_moved(self) -> None:
        if self._moved_to is not None:
            raise MigratableError(
                f"it was moved to {self._moved_to!r} and must not run in both places; where it is "
                "certain that it is lost there, execute('cont') brings it back here"
            )

    def _must_wait(self) -> None:
        state = self._state()
        if state["status"] != "inmigrate":
            raise MigratableError(
                f"QEMU is in the state {state['status']!r}; only one that was started with "
                "-incoming defer, and has no machine yet, can take one"
            )

    @contextmanager
    def _handed_over(self, stream: Capture | Feed) -> Iterator[None]:
        """Within the context QEMU has its end of the stream under the name `_FD`."""
        try:
            self._monitor.execute("getfd", {"fdname": _FD}, fd=stream.fd)
            stream.handed_over()
            yield
        except MigratableError as error:
            with suppress(MigratableError):
                self._monitor.execute("closefd", {"fdname": _FD})
            raise stream.broken or error from error

    @contextmanager
    def _configured(
        self,
        settings: Mapping[str, object] | None = None,
        *,
        defaults: Mapping[str, object] | None = None,
        only: bool = False,
    ) -> Iterator[None]:
        """Within the context QEMU has these capabilities and parameters.

        Args:
            settings: What QEMU must know.
            defaults: What is set where this QEMU knows it.
            only: Whether all other capabilities are off.
        """
        capabilities = {
            each["capability"]: each["state"]
            for each in self._monitor.execute("query-migrate-capabilities")
        }
        parameters = self._monitor.execute("query-migrate-parameters")
        before = parameters | capabilities
        wanted: dict[str, object] = {name: False for name in capabilities if only}
        wanted |= {"events": True, **(defaults or {})}
        wanted = {name: value for name, value in wanted.items() if name in before}
        wanted |= settings or {}
        changed = {
            name: value
            for name, value in wanted.items()
            if name not in before or before[name] != value
        }
        try:
            self._set(changed, capabilities)
            yield
        finally:
            with suppress(MigratableError):
                self._set({n: before[n] for n in changed if n in before}, capabilities)

    def _set(self, values: Mapping[str, object], capabilities: Mapping[str, object]) -> None:
        states = [
            {"capability": name, "state": value}
            for name, value in values.items()
            if name in capabilities
        ]
        if states:
            self._monitor.execute("migrate-set-capabilities", {"capabilities": states})
        others = {name: value for name, value in values.items() if name not in capabilities}
        if others:
            self._monitor.execute("migrate-set-parameters", others)

    @contextmanager
    def _alone(self, kind: type[MigratableError]) -> Iterator[None]:
        with self._failing(kind):
            if not self._busy.acquire(blocking=False):
                raise kind("a migration or a snapshot of it is under way")
            try:
                yield
            except MigratableError as error:
                error.component_states = {self._id: self._left()}
                raise
            finally:
                self._busy.release()

    @contextmanager
    def _failing(self, kind: type[MigratableError]) -> Iterator[None]:
        """Every failure within is one of this kind, and says whose it is."""
        try:
            yield
        except MigrationInDoubt:
            raise
        except (MigratableError, OSError) as error:
            if isinstance(error, kind) and not isinstance(error, Disconnected):
                error.component_path = error.component_path or self._id
                raise
            states = error.component_states if isinstance(error, MigratableError) else None
            plain = type(error) in (MigratableError, Disconnected)
            cause = error.cause if plain and isinstance(error, MigratableError) else error
            raise kind(cause, component_path=self._id, component_states=states) from error


def _copy(snapshot: Snapshot) -> Snapshot:
    """Another tree of the same bytes."""
    return build(*flatten(snapshot))


def _refuse(cancel: CancelToken | None) -> None:
    if cancel is not None and cancel.cancelled:
        raise MigratableError("cancelled")
