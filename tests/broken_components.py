"""Components that are each wrong in one way, named after the mistake, and sound ones beside them.

All do what `Sound` does, a small device: it has registers, a bit of RAM, a queue and a total.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from typing import Any, ClassVar

from hypothesis import strategies as st

from vmmig import (
    Composite,
    RestoreError,
    ResumeError,
    Snapshot,
    SnapshotDataSection,
    UrlTransport,
)

RAM_BYTES = 16

OPERATIONS = {
    "set_register": [st.sampled_from("abc"), st.integers(-9, 9)],
    "write": [st.integers(0, RAM_BYTES - 1), st.integers(0, 255)],
    "push": [st.integers(0, 9)],
    "pop": [],
    "checksum": [],
}


def look(device: Any) -> object:
    return device.registers, bytes(device.ram), list(device.queue), device.total


class Sound:
    """Nothing is wrong with it."""

    def __init__(self) -> None:
        self.registers = {"a": 0, "b": 0, "c": 0}
        self.ram = bytearray(RAM_BYTES)
        self.queue: deque[int] = deque()
        self.total = 0

    # What it does.

    def set_register(self, name: str, value: int) -> int:
        old, self.registers[name] = self.registers[name], value
        return old

    def write(self, at: int, byte: int) -> None:
        self.ram[at] = byte

    def push(self, item: int) -> None:
        self.queue.append(item)
        self.total += item

    def pop(self) -> int:
        return self.queue.popleft()

    def checksum(self) -> int:
        return sum(self.ram) + self.total

    # The contract.

    def id(self) -> str:
        return "device"

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"registers": self.registers, "queue": [*self.queue], "total": self.total}

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot(self.id())
        for name, payload in (
            ("ram", bytes(self.ram)),
            ("state", json.dumps(self.state(), sort_keys=True).encode()),
        ):
            snapshot.add_data_section(SnapshotDataSection(name, payload))
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError(f"a snapshot of {snapshot.id!r}")
        ram, state = snapshot.take("ram", "state")
        self.apply(bytes(memoryview(ram)), parsed(state))

    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        if len(ram) != RAM_BYTES:
            raise RestoreError(f"RAM of {len(ram)} bytes, not {RAM_BYTES}")
        self.ram[:] = ram
        self.registers = dict(state["registers"])
        self.queue = deque(state["queue"])
        self.total = state["total"]


def parsed(payload: Any) -> dict[str, Any]:
    try:
        state = json.loads(bytes(memoryview(payload)))
        assert state.keys() == {"registers", "queue", "total"}
        assert state["registers"].keys() == {"a", "b", "c"}
        assert all(type(value) is int for value in state["registers"].values())
        assert all(type(value) is int for value in state["queue"])
        assert type(state["total"]) is int
    except Exception as error:
        raise RestoreError(f"not the state of a device: {error!r}") from error
    return state


# Sound in other ways.


class SoundKeepsUnknown(Sound):
    """Gives back what it does not know in the next snapshot."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown = Snapshot("")

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        snapshot.snapshots |= self.unknown.snapshots
        snapshot.snapshot_data |= self.unknown.snapshot_data
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        known = Snapshot(snapshot.id)
        unknown = Snapshot("", dict(snapshot.snapshots))
        for id, section in snapshot.snapshot_data.items():
            target = known if id in ("ram", "state") else unknown
            target.snapshot_data[id] = section
        super().restore(known)
        self.unknown = unknown


class SoundOptionalSection(Sound):
    """Writes its queue only when there is one; without it, the queue is empty."""

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        if self.queue:
            queue = json.dumps([*self.queue]).encode()
            snapshot.add_data_section(SnapshotDataSection("queue", queue))
        return snapshot

    def state(self) -> dict[str, Any]:
        return super().state() | {"queue": []}

    def restore(self, snapshot: Snapshot) -> None:
        known = Snapshot(snapshot.id, snapshot.snapshots, dict(snapshot.snapshot_data))
        section = known.snapshot_data.pop("queue", None)
        queue = []
        if section is not None:
            try:
                queue = json.loads(bytes(memoryview(section.snapshot)))
                assert queue
                assert all(type(item) is int for item in queue)
            except Exception as error:
                raise RestoreError(error) from error
        super().restore(known)
        self.queue = deque(queue)


class SoundStopwatch:
    """Its time stands still while it is paused."""

    def __init__(self) -> None:
        self.before = 0.0
        self.since: float | None = time.monotonic()

    def elapsed(self) -> float:
        return self.before + (time.monotonic() - self.since if self.since is not None else 0)

    def reset(self) -> None:
        self.before, self.since = 0.0, time.monotonic() if self.since is not None else None

    def id(self) -> str:
        return "stopwatch"

    def pause(self) -> None:
        self.before, self.since = self.elapsed(), None

    def resume(self) -> None:
        if self.since is None:
            self.since = time.monotonic()

    def snapshot(self) -> Snapshot:
        elapsed = SnapshotDataSection("elapsed", self.elapsed().hex().encode())
        return Snapshot(self.id(), {}, {"elapsed": elapsed})

    def restore(self, snapshot: Snapshot) -> None:
        (elapsed,) = snapshot.take("elapsed")
        try:
            before = float.fromhex(bytes(memoryview(elapsed)).decode())
        except (ValueError, OverflowError) as error:
            raise RestoreError(error) from error
        self.before = before
        if self.since is not None:
            self.since = time.monotonic()


class SoundRaw:
    """A few bytes, any of which are valid."""

    def __init__(self) -> None:
        self.data = b""

    def append(self, data: bytes) -> int:
        self.data += data
        return len(self.data)

    def id(self) -> str:
        return ""

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def snapshot(self) -> Snapshot:
        return Snapshot("", {}, {"": SnapshotDataSection("", self.data)})

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id:
            raise RestoreError("not mine")
        self.data = bytes(memoryview(snapshot.take("")[0]))


class SoundTransportable(Sound, UrlTransport):
    """Brings itself to a URL and back."""


class SoundWorker:
    """Has a thread that pause() stops and that works when it is told to."""

    def __init__(self) -> None:
        self.done = 0
        self.paused = False
        self.lock = threading.Lock()

    def work(self, amount: int) -> int:
        def run() -> None:
            with self.lock:
                self.done += amount

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return self.done

    def id(self) -> str:
        return "worker"

    def pause(self) -> None:
        if not self.paused:
            self.lock.acquire()
            self.paused = True

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.lock.release()

    def snapshot(self) -> Snapshot:
        return Snapshot("worker", {}, {"done": SnapshotDataSection("done", b"%d" % self.done)})

    def restore(self, snapshot: Snapshot) -> None:
        (done,) = snapshot.take("done")
        try:
            self.done = int(bytes(memoryview(done)))
        except ValueError as error:
            raise RestoreError(error) from error


class SoundStateless:
    """Has nothing to save."""

    def id(self) -> str:
        return "nothing"

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def snapshot(self) -> Snapshot:
        return Snapshot("nothing")

    def restore(self, snapshot: Snapshot) -> None:
        snapshot.take()


def sound_composite() -> Composite:
    class Named(Sound):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def id(self) -> str:
            return self.name

    return Composite("board", [Named("one"), Named("two")], depends_on={"one": ["two"]})


def look_at_board(board: Any) -> object:
    return {name: look(part) for name, part in board.components.items()}


def push_both(board: Any, item: int) -> None:
    for part in board.components.values():
        part.push(item)


SOUND: dict[str, tuple[Any, dict[str, Any]]] = {
    cls.__name__: (cls, {"operations": OPERATIONS, "observe": look})
    for cls in (Sound, SoundKeepsUnknown, SoundOptionalSection, SoundTransportable)
} | {
    "Sound, not observed": (Sound, {"operations": OPERATIONS}),
    "Sound, nothing known": (Sound, {}),
    "SoundStopwatch": (
        SoundStopwatch,
        {"operations": {"elapsed": [], "reset": []}, "observe": SoundStopwatch.elapsed},
    ),
    "SoundRaw": (SoundRaw, {"operations": {"append": [st.binary(max_size=4)]}}),
    "SoundWorker": (SoundWorker, {"operations": {"work": [st.integers(0, 9)]}}),
    "SoundStateless": (SoundStateless, {}),
    "sound_composite": (
        sound_composite,
        {"operations": {"push": (push_both, st.integers(0, 9))}, "observe": look_at_board},
    ),
}


# Broken, each in one way. The law that finds it is named beside it, at the end.


class ForgottenField(Sound):
    def state(self) -> dict[str, Any]:
        return super().state() | {"total": 0}


class ForgottenQueueItem(Sound):
    def state(self) -> dict[str, Any]:
        return super().state() | {"queue": [*self.queue][1:]}


class OffByOneRam(Sound):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        ram = bytes(self.ram[:-1]) + b"\0"
        snapshot.add_data_section(SnapshotDataSection("ram", ram))
        return snapshot


class RamRestoredOneByteLate(Sound):
    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        super().apply(ram[-1:] + ram[:-1], state)


class SnapshotAliasesRam(Sound):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        snapshot.add_data_section(SnapshotDataSection("ram", self.ram))
        return snapshot


class RestoreKeepsTheSnapshotsBuffer(SnapshotAliasesRam):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        snapshot.add_data_section(SnapshotDataSection("ram", bytearray(self.ram)))
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        ram = snapshot.section("ram").snapshot
        self.ram = ram if isinstance(ram, bytearray) else bytearray(memoryview(ram))


class SnapshotIsAlwaysTheSameObject(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Snapshot("device")

    def snapshot(self) -> Snapshot:
        self.kept.id = "device"
        self.kept.snapshot_data.update(super().snapshot().snapshot_data)
        return self.kept


class ResumeInsideSnapshot(Sound):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        self.resume()
        return snapshot


class ResumeInsideRestore(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.resume()


class SnapshotEmptiesTheQueue(Sound):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        self.queue.clear()
        return snapshot


class SnapshotCountsItself(Sound):
    def snapshot(self) -> Snapshot:
        self.total += 1
        return super().snapshot()


class NondeterministicBytes(Sound):
    counter = 0

    def snapshot(self) -> Snapshot:
        type(self).counter += 1
        snapshot = super().snapshot()
        name = SnapshotDataSection("state", snapshot.section("state").snapshot)
        name.snapshot = bytes(memoryview(name.snapshot)) + b" " * (self.counter % 3)
        snapshot.add_data_section(name)
        return snapshot


class OrderOfAttributesInTheBytes(Sound):
    def set_register(self, name: str, value: int) -> int:
        old = self.registers.pop(name)
        self.registers[name] = value
        return old

    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        state = json.dumps(self.state() | {"registers": self.registers}).encode()
        snapshot.add_data_section(SnapshotDataSection("state", state))
        return snapshot

    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        super().apply(ram, state)
        self.registers = {name: self.registers[name] for name in "abc"}


class StateInAClassAttribute(Sound):
    shared: ClassVar[deque[int]] = deque()

    def __init__(self) -> None:
        super().__init__()
        del self.queue
        self.shared.clear()

    @property
    def queue(self) -> deque[int]:
        return self.shared

    @queue.setter
    def queue(self, items: deque[int]) -> None:
        items = deque(items)
        self.shared.clear()
        self.shared.extend(items)

    @queue.deleter
    def queue(self) -> None: ...


class MutableDefaultArgument(Sound):
    def __init__(self, ram: bytearray = bytearray(RAM_BYTES)) -> None:  # noqa: B008
        super().__init__()
        self.ram = ram


class SwallowedError(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        with contextlib.suppress(Exception):
            super().restore(snapshot)


class KeyErrorInsteadOfRestoreError(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError("not mine")
        ram = bytes(memoryview(snapshot.snapshot_data["ram"].snapshot))
        state = parsed(snapshot.take("ram", "state")[1])
        self.apply(ram, state)


class JsonErrorInsteadOfRestoreError(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError("not mine")
        ram, state = snapshot.take("ram", "state")
        json.loads(bytes(memoryview(state)))
        self.apply(bytes(memoryview(ram)), parsed(state))


class RestoreRaisesHalfWay(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError("not mine")
        ram, state = snapshot.take("ram", "state")
        if len(memoryview(ram)) != RAM_BYTES:
            raise RestoreError("wrong size")
        self.ram[:] = ram
        self.apply(bytes(memoryview(ram)), parsed(state))


class RestoreTakesWhatThereIs(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError("not mine")
        if "ram" in snapshot.snapshot_data:
            ram = bytes(memoryview(snapshot.section("ram").snapshot))
        else:
            ram = bytes(self.ram)
        strange = {*snapshot.snapshot_data, *snapshot.snapshots} - {"ram", "state"}
        if strange:
            raise RestoreError(f"unknown: {strange}")
        self.apply(ram, parsed(snapshot.section("state").snapshot))


class ShortRamKeepsTheOldEnd(Sound):
    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        if len(ram) > RAM_BYTES:
            raise RestoreError("too long")
        super().apply(ram + bytes(self.ram[len(ram) :]), state)


class AcceptsAForeignSnapshot(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if "ram" in snapshot.snapshot_data or not snapshot.snapshot_data:
            super().restore(snapshot)
        else:
            self.__init__()  # type: ignore[misc]


class UnknownSectionIsLost(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        known = Snapshot(snapshot.id, dict(snapshot.snapshots))
        known.snapshot_data = {
            id: s for id, s in snapshot.snapshot_data.items() if id in ("ram", "state")
        }
        super().restore(known)


class UnknownChildIsLost(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(Snapshot(snapshot.id, {}, snapshot.snapshot_data))


class RestorePopsFromTheSnapshot(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.id != self.id():
            raise RestoreError("not mine")
        ram, state = snapshot.take("ram", "state")
        new = parsed(state)
        self.apply(bytes(memoryview(ram)), new)
        snapshot.snapshot_data.pop("ram")


class StaleCacheAfterRestore(Sound):
    cache: int | None = None

    def checksum(self) -> int:
        if self.cache is None:
            self.cache = super().checksum()
        return self.cache

    def write(self, at: int, byte: int) -> None:
        super().write(at, byte)
        self.cache = None

    def push(self, item: int) -> None:
        super().push(item)
        self.cache = None


class RestoreDependsOnTheOrder(Sound):
    def restore(self, snapshot: Snapshot) -> None:
        snapshot.take("ram", "state")
        sections = [bytes(memoryview(s.snapshot)) for s in snapshot.snapshot_data.values()]
        if len(sections[0]) != RAM_BYTES:
            sections[0] = bytes(RAM_BYTES)
        super().restore(snapshot)
        self.ram[:] = sections[0]


class RestoreAddsToWhatIsThere(Sound):
    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        super().apply(ram, state | {"queue": [*self.queue, *state["queue"]]})


class HiddenStateInAnAnswer(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def set_register(self, name: str, value: int) -> int:
        self.seen.add(value)
        return super().set_register(name, value) * 100 + len(self.seen)


class PauseLosesTheQueue(Sound):
    def pause(self) -> None:
        if self.queue:
            self.queue.pop()


class ResumeResetsTheTotal(Sound):
    def resume(self) -> None:
        self.total = 0


class SecondPauseFails(Sound):
    paused = False

    def pause(self) -> None:
        if self.paused:
            raise RuntimeError("paused already")
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class ResumeWithoutPauseFails(Sound):
    paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        if not self.paused:
            raise ResumeError("not paused")
        self.paused = False


class ClockJumpsOverThePause(SoundStopwatch):
    def pause(self) -> None:
        self.stopped = time.monotonic()

    def resume(self) -> None: ...

    def elapsed(self) -> float:
        return super().elapsed()


class AgeSinceTheStartOfTheProcess(SoundStopwatch):
    """Only what its operation returns shows that it does not stop."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def snapshot(self) -> Snapshot:
        assert self.since is not None
        section = SnapshotDataSection("elapsed", self.since.hex().encode())
        return Snapshot(self.id(), {}, {"elapsed": section})

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.since, self.before = self.before, 0.0


class ClockOfTheHostInTheSnapshot(SoundStopwatch):
    def snapshot(self) -> Snapshot:
        started = time.monotonic() - self.elapsed()
        section = SnapshotDataSection("elapsed", started.hex().encode())
        return Snapshot(self.id(), {}, {"elapsed": section})

    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.before = time.monotonic() - self.before


class PauseDoesNotStopTheThread(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while not self.stop.wait(0.0005) and self.total < 2000:
            self.total += 1


class IdChanges(Sound):
    def id(self) -> str:
        self.total += 1
        return f"device-{self.total}"


class SnapshotHasAnotherId(Sound):
    def snapshot(self) -> Snapshot:
        snapshot = super().snapshot()
        snapshot.id = "Device"
        return snapshot


class SnapshotNeedsAnArgument(Sound):
    def snapshot(self, full: bool) -> Snapshot:  # type: ignore[override]
        return super().snapshot()


class AsyncPause(Sound):
    async def pause(self) -> None:  # type: ignore[override]
        pass


class SendLosesTheSections(SoundTransportable):
    def send(self, snapshot: Snapshot, destination_url: str) -> None:
        super().send(Snapshot(snapshot.id), destination_url)


class HalfOfTheChildren:
    """A machine of two devices that saves both and restores one."""

    def __init__(self) -> None:
        self.one, self.two = Sound(), Sound()

    def push(self, item: int) -> None:
        self.one.push(item)
        self.two.push(item)

    def id(self) -> str:
        return "pair"

    def pause(self) -> None: ...
    def resume(self) -> None: ...

    def snapshot(self) -> Snapshot:
        snapshot = Snapshot("pair")
        for name, device in (("one", self.one), ("two", self.two)):
            child = device.snapshot()
            child.id = name
            snapshot.add_snapshot(child)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.snapshots.keys() != {"one", "two"} or snapshot.snapshot_data:
            raise RestoreError("not a pair")
        child = snapshot.find("one")
        self.one.restore(Snapshot("device", child.snapshots, child.snapshot_data))


class FlagLeftBehindByRestore(Sound):
    def apply(self, ram: bytes, state: dict[str, Any]) -> None:
        super().apply(ram, state)
        self.restored = True

    def pop(self) -> int:
        if getattr(self, "restored", False):
            raise IndexError("not after a restore")
        return super().pop()


def forgotten_snapshot() -> Any:
    from vmmig.traits import Snapshottable

    class Forgetful(Snapshottable):
        def __init__(self) -> None:
            self.n = 0

        def pause(self) -> None: ...
        def resume(self) -> None: ...
        def id(self) -> str:
            return "forgetful"

        def restore(self, snapshot: Snapshot) -> None: ...

    return Forgetful()


def same_object_each_time(_made: list[Sound] = []) -> Sound:  # noqa: B006
    if not _made:
        _made.append(Sound())
    return _made[0]


STATE = "restore gives the same state"
VALUE = "a snapshot is a value"
NOTHING = "a snapshot changes nothing"
BEHAVES = "a restored component behaves like the one that was saved"
DAMAGED = "a foreign, truncated or altered snapshot is refused or taken whole"
UNKNOWN = "what restore does not know is refused or kept"
PAUSES = "pausing and resuming is safe, also repeated"
TIME = "time that passes while it is paused does not show"
BYTES = "equal states give equal bytes"
SHARE = "components share nothing"
ENCODED = "a snapshot survives being encoded and decoded"
STRUCTURE = "structure"
SENT = "what is sent can be received"

_DEVICE = {"operations": OPERATIONS, "observe": look}
_WATCH = {"operations": {"elapsed": [], "reset": []}, "observe": SoundStopwatch.elapsed}

BROKEN: dict[Any, tuple[str, dict[str, Any], str]] = {
    ForgottenField: (STATE, _DEVICE, "a fresh component is not what was saved"),
    ForgottenQueueItem: (STATE, _DEVICE, "is not what was saved"),
    OffByOneRam: (STATE, _DEVICE, "is not what was saved"),
    RamRestoredOneByteLate: (STATE, _DEVICE, "is not what was saved"),
    SnapshotAliasesRam: (VALUE, _DEVICE, "the component changed when its snapshot was changed"),
    RestoreKeepsTheSnapshotsBuffer: (VALUE, _DEVICE, "restored from"),
    SnapshotIsAlwaysTheSameObject: (VALUE, _DEVICE, "changed when the component went on"),
    ResumeInsideSnapshot: (NOTHING, _DEVICE, "snapshot() resumed the component"),
    ResumeInsideRestore: (STATE, _DEVICE, "restore() resumed the component"),
    SnapshotEmptiesTheQueue: (NOTHING, _DEVICE, "snapshot() changed what is observed"),
    SnapshotCountsItself: (NOTHING, _DEVICE, "snapshot() changed what is observed"),
    NondeterministicBytes: (BYTES, _DEVICE, "two snapshots of the same state differ"),
    OrderOfAttributesInTheBytes: (STATE, _DEVICE, "snapshot is not what it restored"),
    StateInAClassAttribute: (SHARE, _DEVICE, "changed when another one did"),
    MutableDefaultArgument: (SHARE, _DEVICE, "changed when another one did"),
    SwallowedError: (DAMAGED, _DEVICE, "accepted a snapshot that cannot be its own"),
    KeyErrorInsteadOfRestoreError: (DAMAGED, _DEVICE, "KeyError: 'ram', not a RestoreError"),
    JsonErrorInsteadOfRestoreError: (DAMAGED, _DEVICE, "not a RestoreError"),
    RestoreRaisesHalfWay: (DAMAGED, _DEVICE, "but changed the component"),
    RestoreTakesWhatThereIs: (DAMAGED, _DEVICE, "took over only a part of it"),
    ShortRamKeepsTheOldEnd: (DAMAGED, _DEVICE, "took over only a part of it"),
    AcceptsAForeignSnapshot: (DAMAGED, _DEVICE, "cannot be its own: another component's"),
    UnknownSectionIsLost: (UNKNOWN, _DEVICE, "lost a section that it does not know"),
    UnknownChildIsLost: (UNKNOWN, _DEVICE, "lost a child that it does not know"),
    RestorePopsFromTheSnapshot: (VALUE, _DEVICE, "restore() changed the snapshot it was given"),
    StaleCacheAfterRestore: (BEHAVES, _DEVICE, "the used component behaves in another way"),
    RestoreDependsOnTheOrder: (ENCODED, _DEVICE, "saved_in_reverse_order is not what was saved"),
    RestoreAddsToWhatIsThere: (STATE, _DEVICE, "what was saved"),
    HiddenStateInAnAnswer: (BEHAVES, _DEVICE, "behaves in another way"),
    PauseLosesTheQueue: (PAUSES, _DEVICE, ""),
    ResumeResetsTheTotal: (PAUSES, _DEVICE, ""),
    SecondPauseFails: (PAUSES, _DEVICE, "pause() raised RuntimeError: paused already"),
    ResumeWithoutPauseFails: (PAUSES, _DEVICE, "resume() raised ResumeError"),
    ClockJumpsOverThePause: (TIME, _WATCH, "noticed that time passed"),
    AgeSinceTheStartOfTheProcess: (TIME, {"operations": {"elapsed": []}}, "what it does later"),
    ClockOfTheHostInTheSnapshot: (TIME, _WATCH, "restored an hour later"),
    PauseDoesNotStopTheThread: (PAUSES, _DEVICE, "changed while it was paused"),
    IdChanges: (STRUCTURE, _DEVICE, "id() is not always the same: 'device-1', 'device-2'"),
    SnapshotHasAnotherId: (STRUCTURE, _DEVICE, "has the id 'Device', but id() is 'device'"),
    SnapshotNeedsAnArgument: (STRUCTURE, _DEVICE, "snapshot: requires full"),
    AsyncPause: (STRUCTURE, _DEVICE, "pause: is an async function"),
    forgotten_snapshot: (STRUCTURE, {}, "snapshot: is the default of Snapshottable"),
    same_object_each_time: (STRUCTURE, {}, "the factory gave the same object twice"),
    SendLosesTheSections: (SENT, _DEVICE, "what was received is not what was sent"),
    HalfOfTheChildren: (
        STATE,
        {
            "operations": {"push": [st.integers(0, 9)]},
            "observe": lambda pair: (pair.one.total, pair.two.total),
        },
        "is not what it restored",
    ),
    FlagLeftBehindByRestore: (BEHAVES, _DEVICE, "behaves in another way"),
}
