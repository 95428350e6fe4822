from __future__ import annotations

import errno
import io
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import find, given
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from vmmig import Composite, Migratable, Snapshottable, UrlTransport, recv, send, verify
from vmmig.codec import dump, dumps, load
from vmmig.errors import DecodeError, MigratableError, MigrateSendError, RestoreError
from vmmig.snapshot import Snapshot, SnapshotDataSection
from vmmig.testing.components import Counter
from vmmig.testing.faults import (
    CallFault,
    Cut,
    FaultyStream,
    FlipBit,
    NoSpace,
    Reorder,
    Stall,
    StreamFault,
    Trickle,
    call_faults,
    failing,
    stream_faults,
)
from vmmig.testing.strategies import snapshots


class TestFailing:
    def test_it_is_what_the_component_is(self) -> None:
        class Sendable(Counter, UrlTransport):
            pass

        for component, protocol in ((Counter(), Snapshottable), (Sendable(), Migratable)):
            proxy = failing(component, CallFault("pause"))
            assert isinstance(proxy, protocol)
            assert verify(proxy, protocol, defaults="error") == ()
        assert not isinstance(failing(Counter(), CallFault("pause")), Migratable)

    def test_only_the_nth_call_fails(self) -> None:
        counter = Counter()
        proxy = failing(counter, CallFault("add", at=2, error=ValueError("no")))
        proxy.add(1)
        with pytest.raises(ValueError, match="no"):
            proxy.add(1)
        proxy.add(1)
        assert counter.value == proxy.value == 2
        assert "CallFault(method='add', at=2" in repr(proxy)

    def test_attributes_are_those_of_the_component(self) -> None:
        counter = Counter()
        proxy = failing(counter, CallFault("pause"))
        proxy.value = 7
        proxy.note = "new"
        assert (counter.value, counter.add(1), proxy.value) == (7, 8, 8)
        del proxy.note
        assert not hasattr(counter, "note")

    def test_a_method_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(MigratableError, match="no method 'send'"):
            failing(Counter(), CallFault("send"))

    @given(st.lists(call_faults(max_at=2), min_size=1, max_size=3), st.data())
    def test_a_composite_of_failing_parts_is_all_or_none(
        self, faults: list[CallFault], data: st.DataObject
    ) -> None:
        parts = [Counter(str(i)) for i in range(3)]
        at = [data.draw(st.integers(0, 2)) for _ in faults]
        wrapped: list[Any] = [*parts]
        for i, fault in zip(at, faults, strict=True):
            wrapped[i] = failing(wrapped[i], fault)
        machine = Composite("vm", wrapped)
        for action in ("pause", "resume", "pause", "snapshot"):
            before = [part.paused for part in parts]
            try:
                getattr(machine, action)()
            except MigratableError as error:
                states = error.component_states
                for part, was in zip(parts, before, strict=True):
                    state = states.get(f"vm/{part.id()}", "as before")
                    known = {"running": False, "paused": True, "as before": was}
                    assert state == "unknown" or part.paused == known[state]
            else:
                assert action == "snapshot" or len({part.paused for part in parts}) == 1


DATA = dumps(Snapshot("vm", {}, {"ram": SnapshotDataSection("ram", bytes(range(200)))}))


class Gate(threading.Event):
    """An event that tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(timeout)


class TestStreams:
    @given(snapshots(max_nodes=6), stream_faults(max_bytes=800))
    def test_whatever_happens_nothing_half_read_comes_out(
        self, snapshot: Snapshot, fault: StreamFault
    ) -> None:
        stream = FaultyStream(io.BytesIO(dumps(snapshot)), fault)
        try:
            back = load(stream)
        except DecodeError:
            assert not isinstance(fault, (Trickle, NoSpace)), stream
        else:
            assert back == snapshot

    @given(snapshots(max_nodes=6), stream_faults(max_bytes=800))
    def test_what_is_written_is_whole_or_the_writer_hears_of_it(
        self, snapshot: Snapshot, fault: StreamFault
    ) -> None:
        sink = io.BytesIO()
        stream = FaultyStream(sink, fault)
        data = dumps(snapshot)
        try:
            dump(snapshot, stream)
        except MigratableError:
            assert isinstance(fault, (Cut, Stall, NoSpace))
            assert sink.getvalue() == data[: fault.at]
        else:
            stream.flush()
            assert len(sink.getvalue()) == len(data)
            if isinstance(fault, (Trickle, Cut, Stall, NoSpace)):
                assert sink.getvalue() == data

    @pytest.mark.parametrize(
        ("fault", "read"),
        [
            (Cut(3), b"abc"),
            (Trickle(), b"abcdefgh"),
            (FlipBit(0, 5), b"Abcdefgh"),
            (Reorder(2, 2), b"abefcdgh"),
            (Reorder(6, 2), b"abcdefgh"),
            (NoSpace(0), b"abcdefgh"),
        ],
    )
    def test_reading(self, fault: StreamFault, read: bytes) -> None:
        assert FaultyStream(io.BytesIO(b"abcdefgh"), fault).read() == read
        buffered = io.BufferedReader(FaultyStream(io.BytesIO(b"abcdefgh"), fault))
        assert buffered.read(5) == read[:5]
        assert buffered.read() == read[5:]

    def test_writing(self) -> None:
        sink = io.BytesIO()
        stream = FaultyStream(sink, Reorder(1, 2))
        for piece in (b"ab", b"cde", b"fg"):
            rest = memoryview(piece)
            while rest:
                rest = rest[stream.write(rest) :]
        assert sink.getvalue() == b"adebcfg"
        full = FaultyStream(io.BytesIO(), NoSpace(2))
        assert full.write(b"abc") == 2
        with pytest.raises(OSError, match="No space left") as info:
            full.write(b"c")
        assert info.value.errno == errno.ENOSPC
        with pytest.raises(BrokenPipeError):
            FaultyStream(io.BytesIO(), Cut(0)).write(b"a")
        with pytest.raises(TimeoutError):
            FaultyStream(io.BytesIO(), Stall(0)).write(b"a")

    @pytest.mark.parametrize(
        "fault",
        [Cut(150), Cut(0), Stall(150), Trickle(), FlipBit(150), Reorder(150, 9), NoSpace(150)],
        ids=repr,
    )
    def test_a_connection_counts_each_direction_by_itself(self, fault: StreamFault) -> None:
        snapshot = load(io.BytesIO(DATA))
        ours, theirs = socket.socketpair()
        with (
            ours,
            theirs,
            ours.makefile("rwb", 0) as raw,
            theirs.makefile("rwb", 0) as far,
            ThreadPoolExecutor(1) as pool,
        ):
            received = pool.submit(far.readall)
            stream = FaultyStream(raw, fault)
            try:
                dump(snapshot, stream)
            except MigratableError:
                assert isinstance(fault, (Cut, Stall, NoSpace))
            finally:
                ours.shutdown(socket.SHUT_WR)
            ends = isinstance(fault, (Cut, Stall, NoSpace))
            harmed = isinstance(fault, (FlipBit, Reorder))
            sent = received.result()
            assert sent == DATA[: fault.at] if ends else (sent == DATA) != harmed
            far.write(DATA)
            theirs.shutdown(socket.SHUT_WR)
            if isinstance(fault, (Trickle, NoSpace)):
                assert load(stream) == snapshot
            else:
                with pytest.raises(DecodeError):
                    load(stream)

    def test_a_stall_lasts_until_it_is_released(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            release = Gate()
            stream = FaultyStream(ours.makefile("rwb", 0), Stall(100, release))
            theirs.sendall(DATA)
            found: list[Snapshot] = []
            thread = threading.Thread(target=lambda: found.append(load(stream)))
            thread.start()
            assert release.reached.wait(60)
            assert not found
            release.set()
            thread.join()
            assert dumps(found[0]) == DATA


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (call_faults, {"max_at": 0}),
        (call_faults, {"max_at": None}),
        (stream_faults, {"max_bytes": -1}),
    ],
)
def test_bad_bounds_are_refused(strategy: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        strategy(**options)


def test_calls_fail_as_promised_and_otherwise() -> None:
    for kind in (OSError, RestoreError):
        find(call_faults(), lambda f: f.method == "restore" and isinstance(f.error, kind))  # noqa: B023


class TestFullDisk:
    def test_a_full_disk_keeps_the_old_snapshot(self, vmmig_full_disk: Path) -> None:
        path = vmmig_full_disk / "vm.vmsnap"
        small = Snapshot("small")
        send(small, path)
        big = Snapshot("big", {}, {"ram": SnapshotDataSection("ram", os.urandom(1 << 17))})
        with pytest.raises(MigrateSendError, match="No space left"):
            send(big, path)
        assert recv(path) == small
        assert [*vmmig_full_disk.iterdir()] == [path]

    def test_fixtures_give_the_kit(self, vmmig_failing: Any, vmmig_faulty_stream: Any) -> None:
        assert vmmig_failing is failing
        assert vmmig_faulty_stream is FaultyStream
