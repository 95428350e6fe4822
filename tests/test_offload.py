"""The offload daemon, against a Cloud Hypervisor that is written from the wire's format alone."""

from __future__ import annotations

import json
import os
import random
import resource
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cloud_hypervisor_peer as peer
from tests.cloud_hypervisor_peer import (
    ABANDON,
    COMPLETE,
    COMPLETE_PAUSED,
    CONFIG,
    ERROR,
    FAULT,
    MEMORY,
    MEMORY_FD,
    OK,
    PAGE,
    START,
    STATE,
    Destination,
    Refused,
    Vm,
    answered,
    connected,
    framed,
    header,
    memory_message,
    send_fd,
    send_vm,
)
from tests.leaks import nothing_leaks
from vmmig import foreign, recv, send
from vmmig.adapters.cloud_hypervisor import OffloadReport, offload_restore, offload_snapshot
from vmmig.adapters.cloud_hypervisor.receiving import Received, receive_vm
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError, SnapshotError
from vmmig.formats import cloud_hypervisor as formats
from vmmig.live import MigrationInDoubt, migrate, receive
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view
from vmmig.testing.components import LiveCounter
from vmmig.transfer import CancelToken, Progress


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with nothing_leaks():
        yield


@pytest.fixture
def vm() -> Iterator[Vm]:
    machine = Vm.new()
    yield machine
    machine.close()


class Saving:
    """`offload_snapshot` in a thread of its own, listening."""

    def __init__(self, folder: Path, url: object = None, **options: Any) -> None:
        self.path = str(folder / "socket")
        self.url = folder / "vm.vmsnap" if url is None else url
        self.cancel = options.setdefault("cancel", CancelToken())
        self.events: list[Progress] = []
        self.report: OffloadReport | None = None
        self.error: MigratableError | None = None
        self._note = options.pop("progress", bool)
        self._listens = threading.Event()
        self._options = options
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._listens.wait()

    def _run(self) -> None:
        def note(event: Progress) -> None:
            self.events.append(event)
            self._listens.set()
            self._note(event)

        try:
            self.report = offload_snapshot(
                self.path,
                self.url,  # type: ignore[arg-type]
                progress=note,
                **self._options,
            )
        except MigratableError as error:
            self.error = error
        finally:
            self._listens.set()

    def result(self) -> OffloadReport:
        self._thread.join()
        assert self.report is not None, self.error
        return self.report

    def failure(self) -> str:
        """Why it failed; there is nothing at the URL."""
        self._thread.join()
        assert isinstance(self.error, MigrateReceiveError), self.report
        assert not isinstance(self.url, Path) or not any(self.url.parent.glob("*vmsnap*"))
        assert not isinstance(self.url, Path) or not any(self.url.parent.glob(".*.part"))
        return str(self.error)

    def drop(self) -> str:
        self.cancel.cancel()
        return self.failure()


def sent(vm: Vm, saving: Saving, *, local: bool = True, last: int = COMPLETE) -> None:
    with connected(saving.path) as sock:
        send_vm(vm, sock, local=local, last=last)


class Receiving:
    """A `Destination` in a thread of its own."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.path = str(folder / "destination")
        Path(self.path).unlink(missing_ok=True)
        self.destination = Destination(self.path, **options)
        self.refused: Refused | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.destination.receive()
        except Refused as error:
            self.refused = error

    def vm(self) -> Vm:
        self._thread.join()
        assert self.destination.vm is not None, self.refused
        return self.destination.vm

    def close(self) -> None:
        self._thread.join()
        if self.destination.vm is not None:
            self.destination.vm.close()


def stored(folder: Path, vm: Vm, *, local: bool = True) -> Path:
    saving = Saving(folder)
    sent(vm, saving, local=local)
    saving.result()
    return folder / "vm.vmsnap"


# Whole VMs


@pytest.mark.parametrize("copies", [False, True], ids=["handed-over", "copied"])
@pytest.mark.parametrize("local", [True, False], ids=["memfds", "messages"])
@pytest.mark.parametrize("last", [COMPLETE, COMPLETE_PAUSED])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_vm_is_stored_and_restored(
    copies: bool, local: bool, last: int, compression: str | None, vm: Vm, tmp_path: Path
) -> None:
    saving = Saving(tmp_path, compression=compression)
    sent(vm, saving, local=local, last=last)
    report = saving.result()
    assert (report.ram_bytes, report.handed_over) == (770 * PAGE, local)
    assert report.resumed == (last == COMPLETE)
    assert not vm.running
    snapshot = recv(saving.url)  # type: ignore[arg-type]
    parts = formats.to_parts(snapshot)
    assert parts.config == vm.config()
    assert json.loads(parts.state) == json.loads(vm.state())
    assert {gpa: bytes(raw_view(data)) for gpa, data in parts.memory.items()} == vm.ram()

    receiving = Receiving(tmp_path)
    events: list[Progress] = []
    resume = last == COMPLETE
    restored = offload_restore(
        receiving.path,
        saving.url,  # type: ignore[arg-type]
        resume=resume,
        hand_over=not copies,
        progress=events.append,
    )
    other = receiving.vm()
    assert (restored.ram_bytes, restored.handed_over) == (770 * PAGE, not copies)
    assert other.ram() == vm.ram()
    assert (other.config(), other.state()) == (vm.config(), vm.state())
    assert other.running == resume
    assert receiving.destination.stray_fds == 0
    assert [event.stage for event in events][-2:] == ["confirming", "done"]
    assert events[-1].done_bytes == events[-1].total_bytes == 770 * PAGE
    receiving.close()


def test_what_is_zero_takes_no_room(tmp_path: Path) -> None:
    mappings = [{"slot": 1, "gpa": 0, "size": 64 << 20, "file_offset": 4096}]
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096 + (64 << 20))
    vm = Vm(mappings, {1: fd}, {})
    vm.write(40 << 20, b"code")
    path = stored(tmp_path, vm)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    assert path.stat().st_size > 64 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, path)
    other = receiving.vm()
    assert os.fstat(other.fds[1]).st_size == 4096 + (64 << 20)
    assert os.fstat(other.fds[1]).st_blocks * 512 < 1 << 20
    assert other.read(40 << 20, 4) == b"code"
    receiving.close()
    vm.close()


slots = st.lists(
    st.fixed_dictionaries(
        {
            "slot": st.integers(0, (1 << 32) - 1),
            "gap": st.sampled_from([0, 0, PAGE, PAGE << 20]),
            "size": st.integers(1, 40).map(lambda pages: pages * PAGE),
            "offset": st.integers(0, 2).map(lambda pages: pages * PAGE),
            "is_behind": st.booleans(),
            "writes": st.lists(st.integers(0, PAGE - 9), max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda each: each["slot"],
)


def vm_of(parts: list[dict[str, Any]]) -> Vm:
    """Slots of any number, each alone in a descriptor, or behind the one before in the same."""
    mappings: list[dict[str, int]] = []
    fds: dict[int, int] = {}
    gpa = 0
    for part in parts:
        gpa += part["gap"] if mappings else 0
        offset = part["offset"]
        if mappings and part["is_behind"]:
            fd = os.dup(fds[mappings[-1]["slot"]])
            offset += os.fstat(fd).st_size
        else:
            fd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(fd, offset + part["size"])
        fds[part["slot"]] = fd
        place = {"slot": part["slot"], "gpa": gpa, "size": part["size"], "file_offset": offset}
        mappings.append(place)
        gpa += part["size"]
    vm = Vm(sorted(mappings, key=lambda each: each["slot"]), fds, {})
    for part, each in zip(parts, mappings, strict=True):
        for at in part["writes"]:
            vm.write(each["gpa"] + each["size"] - PAGE + at, b"not zero")
    return vm


@settings(max_examples=25)
@given(slots, st.booleans(), st.booleans())
def test_any_ram_is_stored_and_restored(
    parts: list[dict[str, Any]], local: bool, copies: bool
) -> None:
    vm = vm_of(parts)
    with tempfile.TemporaryDirectory() as folder:
        path = stored(Path(folder), vm, local=local)
        receiving = Receiving(Path(folder))
        offload_restore(receiving.path, path, hand_over=not copies)
        assert receiving.vm().ram() == vm.ram()
        assert receiving.vm().config() == vm.config()
        receiving.close()
    vm.close()


def test_what_was_stored_is_a_folder_too(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    formats.write(recv(path), tmp_path / "folder")
    send(formats.read(tmp_path / "folder"), path)
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, path)
    assert receiving.vm().ram() == vm.ram()
    assert receiving.destination.requests[4][1] == vm.config()
    receiving.close()


def test_a_part_of_the_state_may_be_called_as_the_ram_is(vm: Vm, tmp_path: Path) -> None:
    leaf = {"snapshots": {}, "snapshot_data": {"state": "{}"}}
    state = {"snapshots": {"memory": {**leaf, "snapshots": {"0x0": leaf}}}, "snapshot_data": None}
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        began(vm, sock, 3)
        asked(sock, framed(STATE, json.dumps(state).encode()))
        asked(sock, header(COMPLETE))
    saving.result()
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, tmp_path / "vm.vmsnap")
    assert receiving.vm().ram() == vm.ram()
    assert json.loads(receiving.destination.requests[5][1]) == state
    receiving.close()


def test_to_an_object_store_and_from_there(vm: Vm, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    saving = Saving(tmp_path, "memory://offload/vm.vmsnap", compression="zstd:3")
    sent(vm, saving)
    assert saving.result().url == "memory://offload/vm.vmsnap"
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, "memory://offload/vm.vmsnap")
    assert receiving.vm().ram() == vm.ram()
    receiving.close()


def test_progress_tells_what_is_done_only_when_cloud_hypervisor_knows(
    vm: Vm, tmp_path: Path
) -> None:
    saving = Saving(tmp_path)
    sent(vm, saving)
    saving.result()
    stages = [(event.url, event.stage) for event in saving.events]
    assert stages[0] == (f"unix:{saving.path}", "connecting")
    assert stages[-2:] == [(str(saving.url), "confirming"), (str(saving.url), "done")]


def test_the_snapshot_is_durable_before_complete_is_answered(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        asked_up_to_state(vm, sock)
        assert not Path(str(saving.url)).exists()
        sock.sendall(header(COMPLETE))
        assert answered(sock) == OK
        assert recv(str(saving.url)).snapshots
    saving.result()


def asked(sock: socket.socket, request: bytes, response: bytes = OK) -> None:
    sock.sendall(request)
    assert answered(sock) == response


def asked_up_to_state(vm: Vm, sock: socket.socket) -> None:
    asked(sock, header(START))
    for slot, fd in vm.fds.items():
        send_fd(sock, slot, [fd])
        assert answered(sock) == OK
    asked(sock, framed(CONFIG, vm.config()))
    asked(sock, framed(STATE, vm.state()))


# The wire, to the letter


def test_what_is_sent_is_the_format_and_nothing_else(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, path)
    receiving.vm()
    requests = receiving.destination.requests
    assert requests == [
        (bytes.fromhex("01000000000000000000000000000000"), b""),
        (bytes.fromhex("07000000000000000400000000000000"), bytes.fromhex("00000000")),
        (bytes.fromhex("07000000000000000400000000000000"), bytes.fromhex("03000000")),
        (bytes.fromhex("07000000000000000400000000000000"), bytes.fromhex("07000000")),
        (header(CONFIG, len(vm.config())), vm.config()),
        (header(STATE, len(vm.state())), vm.state()),
        (bytes.fromhex("08000000000000000000000000000000"), b""),
    ]
    receiving.close()


def test_memory_messages_leave_zeros_out(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, path, resume=True, hand_over=False)
    assert receiving.vm().ram() == vm.ram()
    commands = [struct.unpack_from("<H", head)[0] for head, _ in receiving.destination.requests]
    assert commands == [START, CONFIG, MEMORY, MEMORY, MEMORY, STATE, COMPLETE]
    tables = [table for head, table in receiving.destination.requests if head[0] == MEMORY]
    lengths = [size for table in tables for _, size in struct.iter_unpack("<QQ", table)]
    assert 64 * PAGE < sum(lengths) < 200 * PAGE
    receiving.close()


@pytest.mark.parametrize("order", ["CSX", "CMSX", "CMMSP", "FCSX", "FCSP", "FFCSX"])
def test_every_order_that_is_allowed_in_golden_bytes(order: str, tmp_path: Path) -> None:
    """F is MemoryFd, for slot 3 and then 4, M Memory, S State, X Complete, P CompletePaused."""
    slots = [3, 4][: max(order.count("F"), 1)]
    mappings = [{"slot": slot, "gpa": slot << 20, "size": PAGE, "file_offset": 0} for slot in slots]
    mappings[0] |= {"gpa": 0x4000}
    fds = {slot: os.memfd_create("ram", os.MFD_CLOEXEC) for slot in slots}
    for fd in fds.values():
        os.pwrite(fd, bytes(range(256)) * 16, 0)
    vm = Vm(mappings, fds, {})
    payload = bytes(range(256)) * 16
    memory = "04000000000000001000000000000000 0040000000000000 0010000000000000"
    messages = {
        "C": framed(CONFIG, vm.config()),
        "M": bytes.fromhex(memory) + payload,
        "S": framed(STATE, vm.state()),
        "X": bytes.fromhex("05000000000000000000000000000000"),
        "P": bytes.fromhex("08000000000000000000000000000000"),
    }
    saving = Saving(tmp_path)
    ok = bytes.fromhex("0100" + 28 * "0")
    with connected(saving.path) as sock:
        asked(sock, bytes.fromhex("01000000000000000000000000000000"), ok)
        left = list(slots)
        for each in order:
            if each == "F":
                slot = left.pop(0)
                sock.sendall(bytes.fromhex("07000000000000000400000000000000"))
                sock.sendmsg([bytes([slot, 0, 0, 0])], rights_to([fds[slot]]))
                assert answered(sock) == ok
            else:
                asked(sock, messages[each], ok)
        assert sock.recv(1) == b""
    assert saving.result().resumed == (order[-1] == "X")
    memory_of = recv(str(saving.url)).snapshots["memory"]
    has_bytes = "F" in order or "M" in order
    expected = payload if has_bytes else bytes(PAGE)
    assert bytes(raw_view(memory_of.section("0x4000").snapshot)) == expected
    vm.close()


STEPS = ["Start", "MemoryFd", "Config", "State"]


def began(vm: Vm, sock: socket.socket, steps: int) -> None:
    """The first steps of a migration."""
    for step in STEPS[:steps]:
        if step == "MemoryFd":
            for slot, fd in vm.fds.items():
                send_fd(sock, slot, [fd])
                assert answered(sock) == OK
        else:
            payload = {"Start": None, "Config": vm.config(), "State": vm.state()}[step]
            asked(sock, header(START) if payload is None else framed(STEPS_IDS[step], payload))


STEPS_IDS = {"Config": CONFIG, "State": STATE}


@pytest.mark.parametrize("steps", range(5))
def test_abandon_in_every_state(steps: int, vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        began(vm, sock, steps)
        asked(sock, header(ABANDON))
    if steps:
        assert "abandoned" in saving.failure()
    else:
        # Nothing had begun: it goes on waiting for a VM.
        sent(vm, saving)
        saving.result()


def bad_requests(vm: Vm) -> list[tuple[int, bytes]]:
    page, fault = memory_message((0, b"x")), framed(FAULT, struct.pack("<QQ", 0, PAGE))
    config, state = framed(CONFIG, vm.config()), framed(STATE, vm.state())
    session = header(0x7600, 32) + bytes(32)
    return [
        (0, header(0)), (0, config), (0, state), (0, page), (0, header(COMPLETE)), (0, fault),
        (0, b"\1\0\1\0" + bytes(12)), (0, b"\1\0\xff\xff" + bytes(12)), (0, header(START, 1)),
        (0, header(MEMORY_FD, 4)), (0, header(10)), (0, session),
        (1, header(START)), (1, page), (1, state), (1, header(COMPLETE)), (1, fault),
        (1, header(COMPLETE_PAUSED)), (1, header(MEMORY_FD, 5)), (1, header(MEMORY_FD, 3)),
        (1, header(CONFIG, 1 << 63)), (1, framed(CONFIG, b"{")), (1, framed(CONFIG, b"")),
        (2, header(START)), (2, page), (2, state), (2, header(COMPLETE)),
        (2, header(CONFIG, (64 << 20) + 1)), (2, session),
        (3, config), (3, header(START)), (3, header(COMPLETE)), (3, page), (3, fault),
        (3, header(STATE, (1 << 64) - 1)), (3, header(MEMORY, 15)), (3, header(MEMORY, 1 << 60)),
        (3, framed(STATE, b"")), (3, framed(STATE, b"[]")), (3, framed(STATE, b"{}x")),
        (3, framed(STATE, b'{"snapshots": 1}')), (3, framed(STATE, b"\xff\xfe")),
        (3, framed(STATE, b'{"snapshots": {"a": {"snapshots":' * 30000)),
        (3, header(MEMORY_FD, 4) + bytes(4)),
        (4, state), (4, config), (4, page), (4, header(COMPLETE, 1)), (4, fault),
        (4, header(MEMORY_FD, 4) + bytes(4)), (4, header(0xFFFF)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(51))
def test_what_breaks_the_protocol_is_answered_with_error(
    number: int, vm: Vm, tmp_path: Path
) -> None:
    steps, request = bad_requests(vm)[number]
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        began(vm, sock, steps)
        sock.sendall(request)
        with suppress(ConnectionResetError):
            assert answered(sock) in (ERROR, b"")
    if steps:
        assert saving.failure()
    else:
        saving.drop()


def test_there_are_as_many_bad_requests_as_tested(vm: Vm) -> None:
    assert len(bad_requests(vm)) == 51


def small_vm() -> Vm:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    return Vm([{"slot": 0, "gpa": 0, "size": PAGE, "file_offset": 0}], {0: fd}, {"a": 1})


def conversation(vm: Vm, *, local: bool) -> list[tuple[bytes, list[int]]]:
    """All that a source sends: bytes, with the descriptors of their message."""
    parts: list[tuple[bytes, list[int]]] = [(header(START), [])]
    if local:
        parts += [(header(MEMORY_FD, 4), []), (bytes(4), [vm.fds[0]])]
    parts.append((framed(CONFIG, vm.config()), []))
    if not local:
        parts.append((memory_message((0, b"code")), []))
    return [*parts, (framed(STATE, b'{"snapshots":{},"snapshot_data":null}'), []),
            (header(COMPLETE), [])]  # fmt: skip


def rights_to(fds: list[int]) -> list[tuple[int, int, bytes]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)) for fd in fds]


@pytest.mark.parametrize("local", [True, False], ids=["memfds", "messages"])
def test_a_conversation_that_is_cut_after_any_byte_leaves_nothing(
    local: bool, tmp_path: Path
) -> None:
    vm = small_vm()
    parts = conversation(vm, local=local)
    total = sum(len(data) for data, _ in parts)
    for cut in range(total):
        saving = Saving(tmp_path)
        with connected(saving.path) as sock:
            left = cut
            for data, fds in parts:
                if not left:
                    break
                sock.sendmsg([data[:left]], rights_to(fds))
                left -= min(left, len(data))
        if cut < 16:
            saving.drop()
        else:
            saving.failure()
    vm.close()


@pytest.mark.parametrize("seed", range(30))
def test_arbitrary_bytes_end_in_an_error(seed: int, tmp_path: Path) -> None:
    vm = small_vm()
    rng = random.Random(seed)
    saving = Saving(tmp_path)
    with connected(saving.path) as sock, suppress(OSError):
        for data, fds in conversation(vm, local=bool(seed % 2)):
            altered = bytearray(data)
            if rng.random() < 0.4:
                at = rng.randrange(len(altered))
                altered[at : at + rng.choice([0, 1, 2, 9])] = rng.randbytes(rng.choice([0, 1, 8]))
            if altered:
                sock.sendmsg([bytes(altered)], rights_to(fds))
    saving.cancel.cancel()
    saving._thread.join()
    assert saving.report is not None or isinstance(saving.error, MigrateReceiveError)
    vm.close()


# Descriptors and configurations that lie


@pytest.mark.parametrize("bad", ["none", "two", "twice", "pipe", "socket", "small", "missing", "7"])
def test_bad_descriptors_are_refused_and_closed(bad: str, tmp_path: Path) -> None:
    vm = small_vm()
    reading, writing = os.pipe()
    small = os.memfd_create("small")
    os.ftruncate(small, PAGE - 1)
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        asked(sock, header(START))
        first = {
            "none": [],
            "two": [vm.fds[0], reading],
            "pipe": [reading],
            "socket": [sock.fileno()],
            "small": [small],
        }.get(bad, [vm.fds[0]])
        if bad != "missing":
            send_fd(sock, 7 if bad == "7" else 0, first)
            got = answered(sock)
        if bad == "missing" or got == OK:
            send_fd(sock, 0 if bad == "twice" else 1, [vm.fds[0]])
            got = answered(sock)
        if got == OK:
            sock.sendall(framed(CONFIG, vm.config()))
            got = answered(sock)
        assert got == ERROR
    saving.failure()
    for fd in (reading, writing, small):
        os.close(fd)
    vm.close()


def mapping(**more: Any) -> dict[str, Any]:
    return {"slot": 0, "gpa": 0, "size": PAGE, "file_offset": 0, **more}


HOSTILE: list[tuple[str, Any]] = [
    ("outside", [mapping(size=3 * PAGE)]),
    ("outside", [mapping(file_offset=2 * PAGE)]),
    ("outside", [mapping(file_offset=(1 << 64) - PAGE)]),
    ("outside", [mapping(size=1 << 40)]),
    ("overlap", [mapping(), mapping(slot=1)]),
    ("overlap", [mapping(size=2 * PAGE), mapping(slot=1, gpa=PAGE)]),
    ("same slot", [mapping(), mapping(gpa=PAGE)]),
    ("missing slot", [mapping(), mapping(slot=5, gpa=PAGE)]),
    ("zone", [mapping(zone_id="nowhere")]),
    ("zone", [mapping(zone_id=["mem0"])]),
    ("pages", [mapping(size=PAGE + 1)]),
    ("pages", [mapping(gpa=1)]),
    ("pages", [mapping(file_offset=1)]),
    ("pages", [mapping(size=0)]),
    ("beyond 64 bits", [mapping(gpa=(1 << 64) - PAGE, size=2 * PAGE)]),
    ("beyond 64 bits", [mapping(gpa=1 << 64)]),
    ("negative", [mapping(gpa=-PAGE)]),
    ("no number", [mapping(gpa="0")]),
    ("no number", [mapping(size=float(PAGE))]),
    ("no number", [mapping(slot=True)]),
    ("no mapping", [1]),
    ("no list", {}),
    ("none", []),
]


@pytest.mark.parametrize(("why", "mappings"), HOSTILE)
@pytest.mark.parametrize("local", [True, False], ids=["memfds", "messages"])
def test_a_hostile_configuration_is_refused(
    why: str, mappings: Any, local: bool, tmp_path: Path
) -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * PAGE)
    saving = Saving(tmp_path, max_memory_bytes=1 << 30)
    value = {
        "vm_config": {"memory": {"zones": [{"id": "mem0"}]}},
        "common_cpuid": [],
        "memory_manager_data": {"guest_ram_mappings": mappings},
    }
    is_bad = local or why not in ("outside", "missing slot") or mappings[0]["size"] > 1 << 30
    with connected(saving.path) as sock:
        asked(sock, header(START))
        for slot in (0, 1) if why == "overlap" else (0,):
            if local:
                send_fd(sock, slot, [fd])
                assert answered(sock) == OK
        asked(sock, framed(CONFIG, json.dumps(value).encode()), ERROR if is_bad else OK)
    saving.failure()
    os.close(fd)


NO_CONFIG = [b"", b"null", b"[]", b"NaN", b"{", b"\xff", b"9" * 10**5, b"[" * 10**6, b"{}",
             b'{"memory_manager_data": null}', b'{"memory_manager_data": []}',
             b'{"vm_config": 5, "memory_manager_data": {"guest_ram_mappings": 5}}']  # fmt: skip


@pytest.mark.parametrize("config", NO_CONFIG, ids=range(len(NO_CONFIG)))
def test_what_is_no_configuration_is_refused(config: bytes, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        asked(sock, header(START))
        asked(sock, framed(CONFIG, config), ERROR)
    saving.failure()


def test_more_memory_than_allowed_is_refused(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path, max_memory_bytes=769 * PAGE)
    with pytest.raises(Refused, match="Config was refused"):
        sent(vm, saving)
    assert "max_memory_bytes" in saving.failure()
    assert vm.running


def test_memory_messages_for_memory_that_was_handed_over_are_refused(
    vm: Vm, tmp_path: Path
) -> None:
    saving = Saving(tmp_path)
    before = vm.ram()
    with connected(saving.path) as sock:
        began(vm, sock, 3)
        sock.sendall(memory_message((0, b"x")))
        assert answered(sock) in (ERROR, b"")
    assert "handed over" in saving.failure()
    assert vm.ram() == before


def during(stage: str, act: Callable[[], object]) -> Callable[[Progress], None]:
    """Acts once, when the saving has come to this stage."""
    left = [act]

    def note(event: Progress) -> None:
        if event.stage == stage and not event.url.startswith("unix:") and left:
            left.pop()()

    return note


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_memory_that_is_cut_short_while_it_is_saved_ends_nobody(
    compression: str | None, vm: Vm, tmp_path: Path
) -> None:
    def cut() -> None:
        os.ftruncate(vm.fds[3], PAGE)

    saving = Saving(tmp_path, compression=compression, progress=during("transferring", cut))
    if compression is not None:
        # It is compressed before it goes anywhere.
        with connected(saving.path) as sock:
            asked_up_to_state(vm, sock)
            cut()
            asked(sock, header(COMPLETE), ERROR)
    else:
        with pytest.raises(Refused, match="Complete was refused"):
            sent(vm, saving)
        assert vm.running
    assert "cut it short" in saving.failure()


def test_memory_that_is_written_to_while_it_is_saved_is_torn_but_undamaged(
    vm: Vm, tmp_path: Path
) -> None:
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            vm.write((1 << 32) + 64 * PAGE, os.urandom(64 * PAGE))

    writing = threading.Thread(target=scribble)
    writing.start()
    try:
        for _ in range(5):
            saving = Saving(tmp_path)
            sent(vm, saving)
            saving.result()
            recv(saving.url)  # type: ignore[arg-type]
    finally:
        stop.set()
        writing.join()


# Failures on the way


def test_a_url_that_fails_is_told_and_the_vm_runs_on(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path, tmp_path / "no-such-folder" / "vm.vmsnap")
    with pytest.raises(Refused, match="Complete was refused"):
        sent(vm, saving)
    assert vm.running
    assert "No such file or directory" in saving.failure()


def test_a_progress_callback_that_fails_ends_the_saving(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path, progress=during("confirming", lambda: 1 / 0))
    with pytest.raises(Refused):
        sent(vm, saving)
    assert "ZeroDivisionError" in saving.failure()
    assert vm.running


@pytest.mark.parametrize("stage", ["transferring", "confirming"])
@pytest.mark.parametrize("how", ["hangs up", "abandons"])
def test_a_source_that_gives_up_meanwhile_ends_the_saving(
    stage: str, how: str, vm: Vm, tmp_path: Path
) -> None:
    def give_up() -> None:
        if how == "hangs up":
            sock.close()
        else:
            sock.sendall(header(ABANDON))
        while any(thread.name == "vmmig-offload" for thread in threading.enumerate()):
            threading.Event().wait(0.001)

    saving = Saving(tmp_path, progress=during(stage, give_up))
    with connected(saving.path) as sock:
        asked_up_to_state(vm, sock)
        sock.sendall(header(COMPLETE))
        assert "gave up" in saving.failure()


def test_a_source_that_hangs_up_when_all_is_stored_is_told_of(vm: Vm, tmp_path: Path) -> None:
    def keep(received: Received, token: CancelToken) -> None:
        sock.close()
        while not token.cancelled:
            threading.Event().wait(0.001)

    listens = threading.Event()
    errors: list[str] = []

    def run() -> None:
        with pytest.raises(MigrateReceiveError) as caught:
            receive_vm(tmp_path / "s", keep, progress=lambda _: listens.set())
        errors.append(str(caught.value))

    saving = threading.Thread(target=run)
    saving.start()
    listens.wait()
    with connected(str(tmp_path / "s")) as sock:
        asked_up_to_state(vm, sock)
        sock.sendall(header(COMPLETE))
        saving.join()
    assert "the snapshot is stored, but Cloud Hypervisor could not be told" in errors[0]
    assert "do not restore the snapshot" in errors[0]


@pytest.mark.parametrize("stage", ["transferring", "confirming"])
def test_a_cancellation_while_it_is_saved_leaves_nothing(
    stage: str, vm: Vm, tmp_path: Path
) -> None:
    cancel = CancelToken()
    saving = Saving(tmp_path, cancel=cancel, progress=during(stage, cancel.cancel))
    with pytest.raises(Refused):
        sent(vm, saving)
    assert vm.running
    assert saving.failure().endswith("cancelled")


@pytest.mark.parametrize("steps", range(5))
def test_a_cancellation_in_any_state_is_heard_at_once(steps: int, vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as sock:
        began(vm, sock, steps)
        assert saving.drop().endswith("cancelled")
        with suppress(ConnectionResetError):
            assert answered(sock) in (ERROR, b"")


def test_a_source_that_falls_silent_is_not_waited_for(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path, timeout_s=0.2)
    with connected(saving.path) as sock:
        asked(sock, header(START))
        assert "time limit" in saving.failure()


def test_nobody_comes(tmp_path: Path) -> None:
    assert "no VM came within 0 s" in Saving(tmp_path, timeout_s=0).failure()


def test_who_says_something_else_does_not_end_the_waiting(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as stranger:
        asked(stranger, b"GET / HTTP/1.1\r\n", ERROR)
    with connected(saving.path):
        sent(vm, saving)
    saving.result()


def test_a_peer_that_is_there_first_and_says_nothing_holds_nobody_up(
    vm: Vm, tmp_path: Path
) -> None:
    saving = Saving(tmp_path)
    with connected(saving.path) as silent:
        silent.sendall(b"\1")
        sent(vm, saving)
        saving.result()


def test_compression_that_does_not_exist_is_known_before_anybody_is_waited_for(
    tmp_path: Path,
) -> None:
    with pytest.raises(SnapshotError, match="zstd"):
        offload_snapshot(tmp_path / "socket", tmp_path / "vm.vmsnap", compression="lzma")


def test_a_socket_that_is_in_use_is_left_alone(vm: Vm, tmp_path: Path) -> None:
    saving = Saving(tmp_path)
    assert "in use" in Saving(tmp_path).failure()
    sent(vm, saving)
    saving.result()


def test_more_descriptors_than_can_be_open_are_refused_and_closed(tmp_path: Path) -> None:
    vm = small_vm()
    saving = Saving(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connected(saving.path) as sock:
        asked(sock, header(START))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            slot = 0
            got = OK
            while got == OK:
                send_fd(sock, slot, [vm.fds[0]])
                got = answered(sock)
                slot += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert got in (ERROR, b"")
        assert "raise the limit on open files" in saving.failure()
    vm.close()


# Restoring


@pytest.mark.parametrize("command", [START, MEMORY_FD, CONFIG, MEMORY, STATE, COMPLETE])
@pytest.mark.parametrize("answer", [ERROR, b"", OK[:7], b"\3\0" + bytes(14), OK[:8] + b"\1" * 8])
def test_a_destination_that_fails(command: int, answer: bytes, vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    receiving = Receiving(tmp_path, answers=lambda asked, _: answer if asked == command else OK)
    in_doubt = command == COMPLETE and answer != ERROR
    with pytest.raises(MigrationInDoubt if in_doubt else MigrateSendError) as caught:
        offload_restore(
            receiving.path, path, resume=True, hand_over=command != MEMORY, timeout_s=10
        )
    assert isinstance(caught.value, MigrationInDoubt) == in_doubt
    receiving.close()
    assert path.exists()


def test_page_faults_after_completion_are_refused(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    receiving = Receiving(tmp_path, page_fault=True)
    with pytest.raises(MigrateSendError, match="post-copy"):
        offload_restore(receiving.path, path)
    receiving.vm()
    assert receiving.destination.after == ERROR
    receiving.close()


@pytest.mark.parametrize("stage", ["transferring", "confirming"])
def test_a_restore_that_is_cancelled(stage: str, vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    receiving = Receiving(tmp_path)
    cancel = CancelToken()

    def note(event: Progress) -> None:
        if event.stage == stage and event.url.startswith("unix:"):
            cancel.cancel()

    with pytest.raises(MigrateSendError, match="cancelled"):
        offload_restore(receiving.path, path, cancel=cancel, progress=note)
    # In the first stage nobody has come yet.
    with socket.socket(socket.AF_UNIX) as nobody, suppress(OSError):
        nobody.connect(receiving.path)
    receiving.close()
    assert receiving.destination.vm is None


def test_nobody_waits_for_the_vm(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    with pytest.raises(MigrateSendError, match="nobody listened"):
        offload_restore(tmp_path / "nobody", path, timeout_s=0)


def test_a_damaged_snapshot_is_not_begun_with(vm: Vm, tmp_path: Path) -> None:
    path = stored(tmp_path, vm)
    data = bytearray(path.read_bytes())
    data[data.index(b"at 0x1000")] ^= 1
    path.write_bytes(data)
    with pytest.raises(MigratableError, match="damaged"):
        offload_restore(tmp_path / "nobody", path, timeout_s=0)


def changed(path: Path, change: Callable[[Snapshot], object]) -> Path:
    snapshot = recv(path)
    change(snapshot)
    send(snapshot, path)
    return path


def without_ram(snapshot: Snapshot) -> None:
    del snapshot.snapshots["memory"].snapshot_data["0x200000000"]


def more_ram(snapshot: Snapshot) -> None:
    snapshot.snapshots["memory"].add_data_section(SnapshotDataSection("0x300000000", bytes(PAGE)))


def short_ram(snapshot: Snapshot) -> None:
    snapshot.snapshots["memory"].add_data_section(SnapshotDataSection("0x200000000", bytes(PAGE)))


def overlapping_ram(snapshot: Snapshot) -> None:
    snapshot.snapshots["memory"].add_data_section(SnapshotDataSection("0x1000", bytes(PAGE)))


def config_of_a_folder(snapshot: Snapshot) -> None:
    snapshot.add_data_section(SnapshotDataSection("config", json.dumps(Vm.VM_CONFIG).encode()))


def no_config(snapshot: Snapshot) -> None:
    del snapshot.snapshot_data["config"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_ram, "has no bytes of the RAM at 0x200000000 to 0x200001fff"),
        (short_ram, "has no bytes of the RAM at 0x200001000 to 0x200001fff"),
        (more_ram, "where there is no RAM: 0x300000000"),
        (overlapping_ram, "more than once"),
        (config_of_a_folder, "give what vm.snapshot wrote to vm.restore"),
        (no_config, "'config'"),
    ],
)
def test_what_is_no_whole_vm_is_refused(
    change: Callable[[Snapshot], None], said: str, vm: Vm, tmp_path: Path
) -> None:
    path = changed(stored(tmp_path, vm), change)
    with pytest.raises(MigrateSendError, match=said):
        offload_restore(tmp_path / "nobody", path, timeout_s=0)


def test_ram_may_be_cut_elsewhere_than_the_slots(vm: Vm, tmp_path: Path) -> None:
    def cut(snapshot: Snapshot) -> None:
        memory = snapshot.snapshots["memory"]
        whole = raw_view(memory.section("0x100000000").snapshot)
        for start, end in ((0, 5 * PAGE), (5 * PAGE, 512 * PAGE)):
            id = f"{(1 << 32) + start:#x}"
            memory.add_data_section(SnapshotDataSection(id, whole[start:end]))

    path = changed(stored(tmp_path, vm), cut)
    receiving = Receiving(tmp_path)
    offload_restore(receiving.path, path)
    assert receiving.vm().ram() == vm.ram()
    receiving.close()


@pytest.mark.parametrize("copies", [False, True], ids=["handed-over", "copied"])
def test_a_machine_of_our_own_goes_through_it_too(copies: bool, tmp_path: Path) -> None:
    """The two ends of `vmmig.live`, which were written before it, and apart from it."""
    machine = LiveCounter()
    machine.count(1000)
    saving = Saving(tmp_path)
    migrate(machine, f"unix:{saving.path}", configuration={"cpus": 1})
    saving.result()
    there: list[LiveCounter] = []
    url = f"unix:{tmp_path}/live"
    waiting = threading.Thread(target=lambda: there.append(receive(LiveCounter.of, url)))
    waiting.start()
    offload_restore(f"{tmp_path}/live", saving.url, resume=True, hand_over=not copies)  # type: ignore[arg-type]
    waiting.join()
    assert there[0].counted == 1000
    assert not there[0].paused


# Memory of another process


def test_foreign_memory_is_read_by_its_descriptor() -> None:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.pwrite(fd, b"x" * (1 << 20), 3 << 20)
    os.ftruncate(fd, 8 << 20)
    calls: list[int] = []
    view = foreign.map_foreign(fd, 1 << 20, 6 << 20, check=lambda: calls.append(1))
    assert b"".join(foreign.pieces(view, 1 << 20)) == bytes(2 << 20) + b"x" * (1 << 20) + bytes(
        3 << 20
    )
    assert len(calls) == 6
    assert os.fstat(fd).st_blocks * 512 == 1 << 20
    assert bytes(foreign.piece(view, (2 << 20) - 1, (2 << 20) + 1)) == b"\0x"
    os.ftruncate(fd, 6 << 20)
    with pytest.raises(MigratableError, match="cut it short"):
        foreign.piece(view, 5 << 20, 6 << 20)
    os.close(fd)


def test_the_peer_is_written_from_the_format_alone() -> None:
    source = Path(peer.__file__).read_text()
    assert "import vmmig" not in source
    assert "from vmmig" not in source
