"""A small machine that is moved, both sides of its way, and a wire that can be cut."""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.live import MigrationAborted, MigrationInDoubt, MigrationReport, migrate, receive
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view
from vmmig.testing.components import LiveCounter
from vmmig.transfer import CancelToken

PAGE = 4096
ONE_PAGE = (MemoryRange(0, PAGE),)


class Guest(LiveCounter):
    """A machine with registers, which remembers what it was when it was last paused."""

    def __init__(
        self, ranges: Iterable[MemoryRange] = ONE_PAGE, *, memory: GuestMemory | None = None
    ) -> None:
        super().__init__("guest", memory or GuestMemory(ranges))
        self.registers = bytes(32)
        self.at_pause: tuple[bytes, ...] = ()
        self.before_look: Callable[[], object] = bool
        self.failing: dict[str, BaseException] = {}
        self.calls: list[str] = []

    @classmethod
    def made(cls, configuration: object, memory: GuestMemory) -> Guest:
        guest = cls(memory=memory)
        guest.configuration = configuration
        guest.paused = True
        return guest

    configuration: object = None

    def contents(self) -> tuple[bytes, ...]:
        return (self.registers, *(bytes(region.memory) for region in self._memory.regions))

    def store(self, gpa: int, data: bytes) -> None:
        """What the guest does: write to RAM, and note it in its registers."""
        with self._lock:
            if not self.paused:
                self._memory.write(gpa, data)
                self.registers = (gpa.to_bytes(8, "little") + data).ljust(32, b"\0")[:32]

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failing[name]

    def pause(self) -> None:
        super().pause()
        self.at_pause = self.contents()
        self.called("pause")

    def resume(self) -> None:
        self.called("resume")
        super().resume()

    def guest_memory(self) -> GuestMemory:
        self.called("guest_memory")
        return super().guest_memory()

    def snapshot_state(self) -> Snapshot:
        self.called("snapshot_state")
        state = super().snapshot_state()
        state.add_data_section(SnapshotDataSection("registers", self.registers))
        return state

    def restore_state(self, snapshot: Snapshot) -> None:
        self.called("restore_state")
        value, registers = snapshot.take("value", "registers")
        alone = Snapshot(snapshot.id)
        alone.add_data_section(SnapshotDataSection("value", value))
        super().restore_state(alone)
        self.registers = bytes(raw_view(registers))

    def start_dirty_log(self) -> None:
        self.called("start_dirty_log")
        super().start_dirty_log()

    def stop_dirty_log(self) -> None:
        self.called("stop_dirty_log")
        super().stop_dirty_log()

    def dirty_log(self) -> MemoryRangeTable:
        self.called("dirty_log")
        self.before_look()
        return super().dirty_log()

    def start_migration(self) -> None:
        self.called("start_migration")

    def complete_migration(self) -> None:
        self.called("complete_migration")


def paused_guest(ranges: Iterable[MemoryRange] = ONE_PAGE) -> Guest:
    guest = Guest(ranges)
    guest.paused = True
    return guest


class Receiving:
    """`receive` in a thread of its own; ``url`` is where it waits."""

    def __init__(self, component: Any, url: str = "tcp:127.0.0.1:0", **options: Any) -> None:
        self.cancel = options.setdefault("cancel", CancelToken())
        self.url = url
        self.machine: Any = None
        self.error: BaseException | None = None
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(component, url, options))
        self._thread.start()
        self._listens.wait()

    def _run(self, component: Any, url: str, options: dict[str, Any]) -> None:
        def listening(where: str) -> None:
            self.url = where
            self._listens.set()

        try:
            self.machine = receive(component, url, listening=listening, **options)
        except BaseException as error:
            self.error = error
        finally:
            self._listens.set()

    def join(self, timeout_s: float = 60.0) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """The machine; None if there is none, and then `error` says why."""
        assert self.join(), "receive does not end"
        return self.machine

    def drop(self) -> BaseException | None:
        """End it, and its error."""
        self.cancel.cancel()
        self.result()
        return self.error


def outcome_of(source: Any, url: str, **options: Any) -> MigrationReport | MigratableError:
    try:
        return migrate(source, url, **options)
    except MigratableError as error:
        return error


def settled(source: Guest, outcome: MigrationReport | MigratableError, receiving: Receiving) -> str:
    """Assert that exactly one side can run, with what the machine was at its pause."""
    assert source.contents()[1:] == source.at_pause[1:] or not source.paused
    if isinstance(outcome, MigrationReport):
        receiving.cancel.cancel()
        machine = receiving.result()
        assert machine is not None, receiving.error
        assert source.paused
        assert not machine.paused
        assert machine.contents() == source.at_pause
        return "committed"
    if isinstance(outcome, MigrationAborted):
        assert not source.paused
        if source.at_pause:
            assert source.contents() == source.at_pause
        error = receiving.drop()
        assert receiving.machine is None
        assert isinstance(error, MigratableError), error
        return "aborted"
    assert isinstance(outcome, MigrationInDoubt), outcome
    assert source.paused
    machine = receiving.result()
    if machine is not None:
        assert not machine.paused
        assert machine.contents() == source.at_pause
    return "in doubt"


def traces() -> tuple[int, frozenset[str]]:
    """What may not grow: open descriptors, and threads."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), frozenset(
        thread.name for thread in threading.enumerate()
    )


class Wire:
    """A proxy to ``target``: records the first connection, and can cut or alter what passes.

    Args:
        target: The URL of who listens.
        url: Where the proxy listens.
        passing: Is given the direction (0 to the target, 1 back), how many bytes of it passed
            before, and the bytes; returns what passes, or None to cut. Asked about the first
            connection only.
        heals: Whether further connections get through after a cut.
    """

    def __init__(
        self,
        target: str,
        url: str = "tcp:127.0.0.1:0",
        *,
        passing: Callable[[int, int, bytes], bytes | None] = lambda way, at, data: data,
        heals: bool = True,
    ) -> None:
        self._target = target
        self._passing = passing
        self._heals = heals
        self.is_cut = False
        self.passed = (bytearray(), bytearray())
        if url.startswith("unix:"):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(url[5:])
            self.url = url
        else:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", 0))
            self.url = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.listen(200)
        self._end, self._ending = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()
        self._thread.join()
        self._end.close()

    def _run(self) -> None:
        ways: dict[socket.socket, tuple[socket.socket, int, bool]] = {}
        first = True
        with self._listener:
            while True:
                ready, _, _ = select.select([self._listener, self._end, *ways], [], [])
                if self._end in ready:
                    break
                for sock in ready:
                    if sock is self._listener:
                        here, _ = sock.accept()
                        if self.is_cut and not self._heals:
                            here.close()
                            continue
                        try:
                            there = connected(self._target)
                        except OSError:
                            here.close()
                            continue
                        ways[here] = (there, 0, first)
                        ways[there] = (here, 1, first)
                        first = False
                    elif sock in ways:
                        self._pass(sock, ways)
        for sock in ways:
            sock.close()

    def _pass(
        self, sock: socket.socket, ways: dict[socket.socket, tuple[socket.socket, int, bool]]
    ) -> None:
        to, way, is_first = ways[sock]
        try:
            data: bytes | None = sock.recv(1 << 16)
        except OSError:
            data = b""
        if data and is_first:
            before = len(self.passed[way])
            self.passed[way].extend(data)
            passing = self._passing(way, before, data)
            if passing is None or len(passing) < len(data):
                self.is_cut = True
            data = passing
            if data == b"" and not self.is_cut:
                return
            if self.is_cut and data:
                with suppress(OSError):
                    to.sendall(data)
                data = None
        if data:
            try:
                to.sendall(data)
                return
            except OSError:
                pass
        for each in (sock, to):
            del ways[each]
            each.close()


def connected(url: str) -> socket.socket:
    if url.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        address: Any = url[5:]
    else:
        sock = socket.socket()
        host, _, port = url[4:].rpartition(":")
        address = (host, int(port))
    try:
        sock.settimeout(30)
        sock.connect(address)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock
