"""Peers that know nothing but the wire format, packed by hand, on either side of a migration."""

from __future__ import annotations

import array
import json
import os
import random
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.live_machines import PAGE, Guest, Receiving, connected, paused_guest, traces
from vmmig.errors import MigratableError
from vmmig.live import MigrationAborted, MigrationInDoubt, migrate
from vmmig.memory import MemoryRange
from vmmig.precopy import PrecopyPolicy
from vmmig.snapshot import Snapshot, SnapshotDataSection

OK = b"\1\0" + bytes(14)
ERROR = b"\2\0" + bytes(14)
START, CONFIG, STATE, MEMORY, COMPLETE, ABANDON, MEMORY_FD, COMPLETE_PAUSED, FAULT = range(1, 10)
RAM = ((0, 4 * PAGE), (1 << 32, 2 * PAGE))


def header(command: int, length: int = 0) -> bytes:
    return struct.pack("<H6xQ", command, length)


def memory(*parts: tuple[int, bytes]) -> bytes:
    table = b"".join(struct.pack("<QQ", gpa, len(data)) for gpa, data in parts)
    return header(MEMORY, len(table)) + table + b"".join(data for _, data in parts)


def config(ram: Any = RAM, **more: Any) -> bytes:
    mappings = [
        {
            "slot": slot,
            "gpa": gpa,
            "size": size,
            "zone_id": "mem0",
            "virtio_mem": False,
            "file_offset": 0,
        }
        for slot, (gpa, size) in enumerate(ram)
    ]
    value = {
        "vm_config": {"cpus": {"boot_vcpus": 1}},
        "common_cpuid": [],
        "memory_manager_data": {
            "memory_ranges": {"data": [{"gpa": gpa, "length": size} for gpa, size in ram]},
            "guest_ram_mappings": mappings,
        },
    }
    return framed(CONFIG, json.dumps(value | more).encode())


def framed(command: int, payload: bytes) -> bytes:
    return header(command, len(payload)) + payload


TREE = {
    "snapshots": {
        "cpu-manager": {
            "snapshots": {"cpu0": {"snapshots": {}, "snapshot_data": {"state": '{"rip":1}'}}},
            "snapshot_data": None,
        },
        "device-manager": {"snapshots": {}, "snapshot_data": {"state": "{}"}},
    },
    "snapshot_data": None,
}
STATE_MESSAGE = framed(STATE, json.dumps(TREE).encode())


class Foreign(Guest):
    """A machine that takes any state, as it came."""

    state: Snapshot | None = None

    def restore_state(self, snapshot: Snapshot) -> None:
        self.state = snapshot


def expected_tree() -> Snapshot:
    root = Snapshot("vm")
    manager, devices, cpu = Snapshot("cpu-manager"), Snapshot("device-manager"), Snapshot("cpu0")
    cpu.add_data_section(SnapshotDataSection("state", b'{"rip":1}'))
    devices.add_data_section(SnapshotDataSection("state", b"{}"))
    manager.add_snapshot(cpu)
    root.add_snapshot(manager)
    root.add_snapshot(devices)
    return root


def answer(sock: socket.socket) -> bytes:
    data = b""
    while len(data) < 16 and (part := sock.recv(16 - len(data))):
        data += part
    return data


def asked(sock: socket.socket, request: bytes, response: bytes = OK) -> None:
    sock.sendall(request)
    assert answer(sock) == response


@pytest.mark.parametrize("last", [COMPLETE, COMPLETE_PAUSED])
def test_a_foreign_sender_to_the_letter(last: int) -> None:
    receiving = Receiving(Foreign.made)
    with connected(receiving.url) as main:
        asked(main, header(START))
        asked(main, config())
        asked(main, memory((0, b"a" * PAGE), (1 << 32, b"b" * PAGE), (PAGE, b"c" * 16)))
        asked(main, memory((0, b"d" * PAGE), (0, b"e" * 100), (0, b"f" * 8)))
        asked(main, STATE_MESSAGE)
        asked(main, header(last))
    machine = receiving.result()
    assert machine.paused == (last == COMPLETE_PAUSED)
    assert machine.configuration == {"cpus": {"boot_vcpus": 1}}
    assert machine.state == expected_tree()
    ram = machine.guest_memory()
    assert ram.read(0, PAGE) == b"f" * 8 + b"e" * 92 + b"d" * (PAGE - 100)
    assert ram.read(PAGE, 3 * PAGE) == b"c" * 16 + bytes(3 * PAGE - 16)
    assert ram.read(1 << 32, 2 * PAGE) == b"b" * PAGE + bytes(PAGE)


@pytest.mark.parametrize("count", [1, 8])
def test_a_foreign_sender_with_further_connections(count: int) -> None:
    receiving = Receiving(Foreign.made)
    rng = random.Random(count)
    pages = [rng.randbytes(PAGE) for _ in range(4)]
    with connected(receiving.url) as main:
        asked(main, header(START))
        asked(main, config())
        further = [connected(receiving.url) for _ in range(count)]
        for sock in further:
            sock.sendall(b"\1\0")
        for i, page in enumerate(pages):
            further[i % count].sendall(memory((i * PAGE, page)))
            if count == 1:
                assert answer(further[0]) == OK
        if count > 1:
            for i in range(4):
                assert answer(further[i]) == OK
        for sock in further:
            sock.close()
        asked(main, memory((0, b"last")))
        asked(main, STATE_MESSAGE)
        asked(main, header(COMPLETE))
    machine = receiving.result()
    assert machine.guest_memory().read(0, 4 * PAGE) == b"last" + b"".join(pages)[4:]


def test_a_chunk_of_64_mib_and_not_a_byte_more() -> None:
    ram = ((0, 65 << 20),)
    for size, is_right in (((64 << 20), True), ((64 << 20) + 1, False)):
        receiving = Receiving(Foreign.made)
        with connected(receiving.url) as main:
            asked(main, header(START))
            asked(main, config(ram))
            with connected(receiving.url) as further:
                further.sendall(b"\1\0")
                if not is_right:
                    further.sendall(header(MEMORY, 16) + struct.pack("<QQ", 0, size))
                    assert answer(further) == ERROR
                    receiving.drop()
                    continue
                asked(further, memory((0, b"x" * size)))
            asked(main, STATE_MESSAGE)
            asked(main, header(COMPLETE))
        assert receiving.result().guest_memory().read(size - 1, 2) == b"x\0"


def memfd(size: int, data: bytes) -> int:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    os.pwrite(fd, data, 0)
    return fd


def send_fd(sock: socket.socket, slot: int, fds: list[int]) -> None:
    sock.sendall(header(MEMORY_FD, 4))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([struct.pack("<I", slot)], rights)


@pytest.mark.parametrize("made", [True, False])
def test_a_foreign_sender_hands_descriptors_over(made: bool, tmp_path: Path) -> None:
    given = Foreign(MemoryRange(*each) for each in RAM)
    given.paused = True
    before = traces()
    receiving = Receiving(Foreign.made if made else given, f"unix:{tmp_path}/m")
    fds = [memfd(size, b"ram%d" % i) for i, (_, size) in enumerate(RAM)]
    with connected(receiving.url) as main:
        asked(main, header(START))
        for slot, fd in enumerate(fds):
            send_fd(main, slot, [fd])
            assert answer(main) == OK
        asked(main, config())
        os.pwrite(fds[1], b"late", 0)
        asked(main, STATE_MESSAGE)
        asked(main, header(COMPLETE))
    machine = receiving.result()
    assert machine.guest_memory().read(0, 4) == b"ram0"
    assert machine.guest_memory().read(1 << 32, 4) == b"late"
    for fd in fds:
        os.close(fd)
    del machine
    receiving.machine = None
    assert traces() == before


@pytest.mark.parametrize("bad", ["none", "two", "twice", "small", "pipe", "slot", "too few"])
def test_bad_descriptors_are_refused_and_closed(bad: str, tmp_path: Path) -> None:
    before = traces()
    receiving = Receiving(Foreign.made, f"unix:{tmp_path}/m")
    fds = [memfd(size, b"") for _, size in RAM]
    reading, writing = os.pipe()
    with connected(receiving.url) as main:
        asked(main, header(START))
        first: list[int] = {"none": [], "two": fds, "small": fds[1:], "pipe": [reading]}.get(
            bad, fds[:1]
        )
        send_fd(main, 7 if bad == "slot" else 0, first)
        got = answer(main)
        if got == OK and bad != "too few":
            send_fd(main, 0 if bad == "twice" else 1, fds[1:])
            got = answer(main)
        if got == OK:
            main.sendall(config())
            got = answer(main)
        assert got == ERROR
    assert isinstance(receiving.drop(), MigratableError)
    receiving.error = None
    for fd in (*fds, reading, writing):
        os.close(fd)
    assert traces() == before


STEPS = [header(START), config(), memory((0, b"a" * PAGE)), STATE_MESSAGE]


@pytest.mark.parametrize("steps", range(5))
def test_abandon_in_every_state(steps: int) -> None:
    receiving = Receiving(Foreign.made)
    with connected(receiving.url) as main:
        for request in STEPS[:steps]:
            asked(main, request)
        asked(main, header(ABANDON))
    if not steps:
        # Nothing had begun: the destination goes on waiting.
        receiving.drop()
        return
    assert receiving.result() is None
    assert "abandoned" in str(receiving.error)


BAD = [
    (0, header(0)), (0, header(77)), (0, header(0x7600, 32) + bytes(32)), (0, config()),
    (0, header(COMPLETE)), (0, header(START, 1)), (0, b"\1\0\7\0" + bytes(12)),
    (1, header(START)), (1, header(0x7600, 32) + bytes(32)), (1, header(0x7601, 32) + bytes(32)),
    (1, memory((0, b"x"))), (1, STATE_MESSAGE), (1, header(CONFIG, 1 << 63)),
    (1, header(MEMORY_FD, 5)), (1, header(COMPLETE)),
    (2, config()), (2, header(START)), (2, header(COMPLETE)), (2, header(STATE, (1 << 64) - 1)),
    (2, header(MEMORY, 15)), (2, header(MEMORY, 1 << 60)), (2, memory((5 * PAGE, b"x"))),
    (2, memory((4 * PAGE - 1, b"xx"))), (2, header(MEMORY, 16) + b"\xff" * 16),
    (2, header(MEMORY, 16) + struct.pack("<QQ", 0, 1 << 63)),
    (2, header(FAULT, 16) + struct.pack("<QQ", 0, PAGE)), (2, framed(STATE, b"")),
    (2, framed(STATE, b"[]")), (2, framed(STATE, b'{"snapshots": 1}')),
    (2, framed(STATE, b'{"snapshot_data": {"state": 1}}')),
    (2, framed(STATE, b'{"snapshots": {"a": {"snapshots":' * 30000)),
    (2, framed(STATE, b'{"snapshot_data": {"state": "{\\"vmmig_snapshot\\": \\"AAAA\\"}"}}')),
    (2, framed(STATE, b'{"snapshot_data": {"state": "\\ud800"}}')),
    (2, framed(STATE, b"\xff\xfe")),
    (4, memory((0, b"x"))), (4, STATE_MESSAGE), (4, header(COMPLETE, 1)), (4, header(START)),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "request_"), BAD)
def test_what_breaks_the_protocol_is_answered_with_error(steps: int, request_: bytes) -> None:
    receiving = Receiving(Foreign.made, timeout_s=20)
    with connected(receiving.url) as main:
        for each in STEPS[:steps]:
            asked(main, each)
        main.sendall(request_)
        with suppress(ConnectionResetError):
            assert answer(main) in (ERROR, b"")
    assert isinstance(receiving.drop(), MigratableError)
    assert receiving.machine is None


HOSTILE = [
    config(((0, PAGE + 1),)), config(((1, PAGE),)), config(((0, 0),)), config(()),
    config(((0, 2 * PAGE), (PAGE, PAGE))), config(((0, 1 << 62),)), config(((0, -PAGE),)),
    config((((1 << 64) - PAGE, 2 * PAGE),)), config(((1 << 70, PAGE),)), config(((0.0, PAGE),)),
    config(((True, PAGE),)), config((("0", PAGE),)), config(((None, PAGE),)),
    config(memory_manager_data=None), config(memory_manager_data={}),
    config(memory_manager_data={"guest_ram_mappings": {}}),
    config(memory_manager_data={"guest_ram_mappings": [1]}),
    framed(CONFIG, b""), framed(CONFIG, b"NaN"), framed(CONFIG, b"{"), framed(CONFIG, b"[" * 10**6),
    framed(CONFIG, b"9" * 10**5), framed(CONFIG, b"\xff"), framed(CONFIG, b"null"),
]  # fmt: skip


@pytest.mark.parametrize("request_", HOSTILE)
def test_a_hostile_configuration_is_refused(request_: bytes) -> None:
    receiving = Receiving(Foreign.made, timeout_s=20)
    with connected(receiving.url) as main:
        asked(main, header(START))
        asked(main, request_, ERROR)
    assert isinstance(receiving.drop(), MigratableError)


@pytest.mark.parametrize("seed", range(40))
def test_arbitrary_bytes_end_in_an_error_and_leave_nothing(seed: int) -> None:
    rng = random.Random(seed)
    good = b"".join(STEPS) + header(COMPLETE)
    before = traces()
    receiving = Receiving(Foreign.made, timeout_s=5)
    with connected(receiving.url) as main:
        for _ in range(5):
            data = bytearray(good)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(len(data))
                end = at + rng.choice([0, 1, 1, 2, 100])
                data[at:end] = rng.randbytes(rng.choice([0, 1, 1, 2, 8]))
            try:
                main.sendall(bytes(data))
            except OSError:
                break
    receiving.drop()
    if receiving.error is not None:
        assert isinstance(receiving.error, MigratableError)
    receiving.error = receiving.machine = None
    assert traces() == before


class Receiver:
    """A destination to the letter: it announces nothing, and keeps every request."""

    def __init__(self, *, refusing: int = 0, silent_at: int = 0) -> None:
        self.refusing, self.silent_at = refusing, silent_at
        self.requests: list[tuple[bytes, bytes]] = []
        self.ram = {gpa: bytearray(size) for gpa, size in RAM}
        self.roles: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._last: object = None
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket() as last:
            last.bind(("127.0.0.1", 0))
            self._last = last.getsockname()
            last.connect(self._listener.getsockname())
            self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        is_main = True
        while True:
            sock, peer = self._listener.accept()
            if peer == self._last:  # so that all who came before have been heard
                sock.close()
                return
            self._threads.append(threading.Thread(target=self._serve, args=(sock, is_main)))
            self._threads[-1].start()
            is_main = False

    def _serve(self, sock: socket.socket, is_main: bool) -> None:
        with sock, sock.makefile("rb") as stream:
            if not is_main:
                self.roles.append(stream.read(2))
            while head := stream.read(16):
                command, length = struct.unpack("<H6xQ", head)
                payload = stream.read(length)
                if command == MEMORY:
                    for gpa, size in struct.iter_unpack("<QQ", payload):
                        data = stream.read(size)
                        base = max(start for start, _ in RAM if start <= gpa)
                        with self._lock:
                            self.ram[base][gpa - base : gpa - base + size] = data
                with self._lock:
                    self.requests.append((head, payload))
                if command == self.silent_at:
                    return
                sock.sendall(ERROR if command == self.refusing else OK)


def looking_guest() -> Guest:
    source = Guest(MemoryRange(*each) for each in RAM)
    source.store(PAGE, b"one")
    source.store(1 << 32, b"two")
    source.before_look = lambda: source.store(0, b"at a look")
    return source


@pytest.mark.parametrize(("resume", "connections"), [(True, 1), (False, 1), (True, 4)])
def test_a_foreign_receiver_sees_no_byte_that_is_not_in_the_format(
    resume: bool, connections: int
) -> None:
    source = looking_guest()
    source.paused = not resume
    policy = PrecopyPolicy(max_iterations=1, downtime_limit_s=0)
    with Receiver() as receiver:
        migrate(
            source,
            receiver.url,
            resume=resume,
            connections=connections,
            policy=policy,
            configuration={"cpus": 1},
        )
    start, configured, *memories, state, complete = receiver.requests
    # Ignored by a receiver: what the header of Start has after the version.
    assert start[0][:4] == b"\1\0\0\0"
    assert start[0][8:] == bytes(8)
    assert configured[0] == header(CONFIG, len(configured[1]))
    assert json.loads(configured[1]) == {
        "vm_config": {"cpus": 1},
        "common_cpuid": [],
        "memory_manager_data": {
            "memory_ranges": {"data": [{"gpa": gpa, "length": size} for gpa, size in RAM]},
            "guest_ram_mappings": json.loads(config()[16:])["memory_manager_data"][
                "guest_ram_mappings"
            ],
        },
    }
    for head, table in memories:
        assert head == header(MEMORY, len(table))
        assert table
    assert state[0] == header(STATE, len(state[1]))
    assert json.loads(state[1]).keys() == {"snapshots", "snapshot_data"}
    assert complete == (header(COMPLETE if resume else COMPLETE_PAUSED), b"")
    assert receiver.roles == [b"\1\0"] * (connections if connections > 1 else 0)
    assert tuple(map(bytes, receiver.ram.values())) == source.contents()[1:]
    assert source.paused


@pytest.mark.parametrize("command", [START, CONFIG, MEMORY, STATE, COMPLETE])
@pytest.mark.parametrize("how", ["refusing", "silent_at"])
def test_a_foreign_receiver_that_fails(command: int, how: str) -> None:
    source = looking_guest()
    with Receiver(**{how: command}) as receiver:
        policy = PrecopyPolicy(max_iterations=1, downtime_limit_s=0)
        in_doubt = command == COMPLETE and how == "silent_at"
        with pytest.raises(MigrationInDoubt if in_doubt else MigrationAborted) as caught:
            migrate(source, receiver.url, policy=policy, timeout_s=5)
        if in_doubt:
            assert isinstance(caught.value, MigrationInDoubt)
            assert caught.value.key is None
    assert source.paused == in_doubt


def test_a_destination_that_is_given_a_machine_of_a_foreign_sender_starts_from_zero() -> None:
    machine = paused_guest([MemoryRange(0, PAGE)])
    machine.guest_memory().write(5, b"old")
    receiving = Receiving(machine)
    with connected(receiving.url) as main:
        asked(main, header(START))
        asked(main, config(((0, PAGE),)))
        asked(main, memory((0, b"x")))
        asked(main, header(ABANDON))
    assert receiving.result() is None
    assert machine.paused
    assert machine.guest_memory().read(0, PAGE) == b"x" + bytes(PAGE - 1)
