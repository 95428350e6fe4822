"""The machine on the Unicorn engine: whatever happens to it, its guest must not notice."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc

from vmmig.adapters import guest, unicorn
from vmmig.errors import MigratableError, PauseError, RestoreError, SnapshotError
from vmmig.guest_memory import GuestMemory
from vmmig.sealed import descriptor_of, map_sealed
from vmmig.snapshot import Snapshot, SnapshotDataSection, diff
from vmmig.traits import LiveMigratable, Migratable, Snapshottable

KIB = 1 << 10
POWER_OFF = bytes.fromhex("66ba0406 66b80020 66ef f4")  # mov dx, 0x604; mov ax, 1 << 13; out; hlt
FOREVER = bytes.fromhex("ffc0 ebfc")  # inc eax; jmp to it
PATIENCE_S = 60.0


def started(
    code: bytes,
    *,
    ram_bytes: int = 64 * KIB,
    output: Callable[[bytes], object] = id,
    **registers: int,
) -> unicorn.Machine:
    machine = unicorn.Machine(ram_bytes, output=output)
    machine.boot(code, gpa=0x1000, **registers)
    machine.resume()
    return machine


def sha_machine(console: bytearray, ram_bytes: int = 256 * KIB, rounds: int = 2) -> unicorn.Machine:
    machine = unicorn.Machine(ram_bytes, output=console.extend)
    machine.boot(guest.code(), gpa=guest.ENTRY, rdi=ram_bytes, rsi=rounds)
    return machine


def finished(machine: unicorn.Machine) -> unicorn.Machine:
    machine.resume()
    assert machine.wait(PATIENCE_S)
    machine.pause()
    return machine


# --- the guest ---------------------------------------------------------------------------------


def test_the_guests_bytes_are_those_of_its_source(tmp_path):
    nasm = shutil.which("nasm")
    if nasm is None and not os.environ.get("CI"):
        pytest.skip("nasm is not installed")
    source = os.path.join(os.path.dirname(guest.__file__), "guest.asm")
    built = tmp_path / "guest.bin"
    subprocess.run([nasm, "-Wall", "-Werror", "-f", "bin", "-o", built, source], check=True)
    assert built.read_bytes() == guest.code()


@pytest.mark.parametrize(("ram_kib", "rounds"), [(128, 1), (128, 3), (192, 2), (1280, 1)])
def test_the_guest_computes_what_hashlib_computes(ram_kib, rounds):
    console = bytearray()
    machine = finished(sha_machine(console, ram_kib * KIB, rounds))
    lines = console.decode().splitlines()
    digest = guest.expected_digest(ram_kib * KIB, rounds)
    assert lines[0] == f"vmmig guest: {ram_kib} KiB of RAM, {rounds} rounds"
    assert lines[-2:] == [f"digest {digest}", "power off"]
    assert machine.serial.transmitted_bytes == len(console)


@pytest.mark.parametrize(("ram_bytes", "rounds"), [(64 * KIB, 1), (200 * KIB, 1), (128 * KIB, 0)])
def test_what_the_guest_does_not_run_with_has_no_digest(ram_bytes, rounds):
    with pytest.raises(MigratableError, match="64 KiB"):
        guest.expected_digest(ram_bytes, rounds)


# --- pause anywhere, lose nothing --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_guest_that_moves_hundreds_of_times_gives_the_same_console_and_digest(seed):
    whole = bytearray()
    finished(sha_machine(whole, rounds=6))
    rng = random.Random(seed)
    console = bytearray()
    machine = sha_machine(console, rounds=6)
    moves = 0
    done = False
    while not done:
        machine.resume()
        done = machine.wait(rng.random() ** 4 * 0.002)
        machine.pause()
        saved = machine.snapshot()
        if rng.random() < 0.5:
            machine = unicorn.Machine.from_snapshot(saved, output=console.extend)
        else:
            machine.restore(saved)
        moves += 1
    assert console == whole
    assert machine.serial.transmitted_bytes == len(whole)
    assert moves > 10


READ_MODIFY_WRITE = (
    bytes.fromhex(
        "b9400d0300 41b800900000"  # mov ecx, 200000; mov r8d, 0x9000
        "490108 49ff4008"  # next: add [r8], rcx; inc qword [r8 + 8]
        "f0490fc14810 498b08"  # lock xadd [r8 + 16], rcx; mov rcx, [r8]
        "49874818 49c1402003"  # xchg [r8 + 24], rcx; rol qword [r8 + 32], 3
        "49314820 51 58 49114028"  # xor [r8 + 32], rcx; push rcx; pop rax; adc [r8 + 40], rax
        "be00900000 bf40900000 b906000000 f348a5"  # rep movsq of 6 words from 0x9000 to 0x9040
        "498b4808 4881f940420f00 72be"  # mov rcx, [r8 + 8]; cmp rcx, 1000000; jb next
    )
    + POWER_OFF
)


def test_no_instruction_runs_twice_or_half_when_it_is_paused():
    def registers_and_ram(machine: unicorn.Machine) -> tuple[object, bytes]:
        return machine.vcpu.registers(), machine.ram.memory[:]

    whole = started(READ_MODIFY_WRITE, rsp=0x8000)
    assert whole.wait(PATIENCE_S)
    whole.pause()
    machine = started(READ_MODIFY_WRITE, rsp=0x8000)
    pauses = 0
    while not machine.wait(0.0001):
        machine.pause()
        machine.resume()
        pauses += 1
    machine.pause()
    assert registers_and_ram(machine) == registers_and_ram(whole)
    assert pauses > 10


def test_a_pause_right_after_the_start_is_not_lost():
    machine = started(FOREVER)
    for _ in range(300):
        machine.pause()
        before = machine.vcpu.registers()
        assert machine.vcpu.registers() == before
        machine.resume()
    machine.pause()


def test_while_paused_nothing_changes():
    machine = sha_machine(bytearray())
    machine.resume()
    machine.wait(0.005)
    machine.pause()
    assert not [*map(str, diff(machine.snapshot(), machine.snapshot()))]


# --- snapshots ---------------------------------------------------------------------------------


def test_every_part_and_the_whole_fulfil_the_traits():
    machine = unicorn.Machine(64 * KIB, output=id)
    assert isinstance(machine, Migratable)
    assert [*machine.components] == ["power", "serial", "timer", "vcpu", "ram"]
    assert all(isinstance(part, Snapshottable) for part in machine.components.values())


def test_a_snapshot_is_a_value():
    machine = started(bytes.fromhex("ff042500900000 ebf7"))  # inc dword [0x9000]; jmp to it
    machine.pause()
    saved = machine.snapshot()
    copy = bytes(saved.find("ram").section("0x0").snapshot)
    machine.resume()
    while machine.ram.memory[:] == copy:
        machine.wait(0.001)
    machine.pause()
    assert saved.find("ram").section("0x0").snapshot == copy


def test_a_running_machine_is_neither_snapshotted_nor_restored():
    machine = started(FOREVER)
    saved = unicorn.Machine(64 * KIB, output=id).snapshot()
    for act, error in [
        (machine.snapshot, SnapshotError),
        (lambda: machine.restore(saved), RestoreError),
    ]:
        with pytest.raises(error, match="running"):
            act()
    vcpu = machine.vcpu
    vcpu.resume()
    with pytest.raises(SnapshotError, match="running"):
        vcpu.snapshot()
    with pytest.raises(RestoreError, match="running"):
        vcpu.restore(saved.find("vcpu"))
    assert not machine.wait(0)
    machine.pause()


def test_a_restore_replaces_code_that_has_run():
    console = SimpleQueue()
    hello = bytes.fromhex(
        "66baf803 b041 ee ebfb"
    )  # mov dx, 0x3f8; next: mov al, 'A'; out; jmp next
    machine = started(hello, output=console.put)
    assert console.get(timeout=PATIENCE_S) == b"A"
    machine.pause()
    saved = machine.snapshot()
    ram = bytearray(saved.find("ram").section("0x0").snapshot)
    ram[0x1005] = ord("B")
    saved.find("ram").add_data_section(SnapshotDataSection("0x0", ram))
    machine.restore(saved)
    while not console.empty():
        console.get()
    machine.resume()
    assert b"B" in (console.get(timeout=PATIENCE_S), console.get(timeout=PATIENCE_S))
    machine.pause()


PAGED = bytes.fromhex(
    "b800000200 0f22d8"  # mov eax, 0x20000; mov cr3, rax
    "0f20e0 0c20 0f22e0"  # mov rax, cr4; or al, 0x20 (PAE); mov cr4, rax
    "0f20c0 480fbae81f 0f22c0"  # mov rax, cr0; bts rax, 31 (PG); mov cr0, rax
    "baf8030000"  # mov edx, 0x3f8
    "8a042500004000 ee ebf6"  # next: mov al, [0x400000]; out dx, al; jmp next
)


def page_tables(ram: memoryview | bytearray, page_of_4_mib: int) -> None:
    """Addresses below 2 MiB stay; those from 4 MiB on are at ``page_of_4_mib``."""
    for gpa, entry in [(0x20000, 0x21003), (0x21000, 0x22003), (0x22000, 0x83)]:
        struct.pack_into("<Q", ram, gpa, entry)
    struct.pack_into("<Q", ram, 0x22010, page_of_4_mib | 0x83)


def test_a_restore_replaces_page_tables_that_have_been_used():
    console = SimpleQueue()
    machine = unicorn.Machine(4096 * KIB, output=console.put)
    machine.boot(PAGED, gpa=0x1000)
    unpaged = machine.snapshot()
    ram = machine.ram.memory
    page_tables(ram, 0)
    ram[0], ram[2 << 20] = ord("A"), ord("B")
    machine.resume()
    assert console.get(timeout=PATIENCE_S) == b"A"
    machine.pause()
    saved = machine.snapshot()
    moved = bytearray(saved.find("ram").section("0x0").snapshot)
    page_tables(moved, 2 << 20)
    saved.find("ram").add_data_section(SnapshotDataSection("0x0", moved))
    machine.restore(unpaged)
    assert machine.vcpu.registers() == unicorn.Machine(64 * KIB, output=id).vcpu.registers() | {
        "rip": 0x1000
    }
    machine.restore(saved)
    while not console.empty():
        console.get()
    machine.resume()
    assert b"B" in (console.get(timeout=PATIENCE_S), console.get(timeout=PATIENCE_S))
    machine.pause()


WORDS = st.integers(0, 2**64 - 1)
XMM = st.integers(0, 2**128 - 1)
GENERAL = [f"r{i}" for i in range(8, 16)] + [
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    "rip",
]
MACHINES = [unicorn.Machine(64 * KIB, output=id) for _ in range(2)]


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(GENERAL, WORDS),
            **{f"xmm{i}": XMM for i in range(16)},
            **{f"fp{i}": st.tuples(WORDS, st.integers(0, 0xFFFF)) for i in range(8)},
            "rflags": st.integers(0, 0xFFF).map(lambda bits: bits & 0xCD5 | 2),
            "fs_base": WORDS,
            "gs_base": WORDS,
            "kernel_gs_base": WORDS,
            "lstar": WORDS,
            "fs": st.integers(0, 0xFFFF),
            "gs": st.integers(0, 0xFFFF),
            "gdtr": st.tuples(
                st.just(0), st.integers(0, 2**32 - 1), st.integers(0, 0xFFFF), st.just(0)
            ),
            "cr2": WORDS,
            "fpsw": st.integers(0, 0xFFFF),
            "fpcw": st.sampled_from([0x37F, 0x27F, 0]),
            "mxcsr": st.sampled_from([0x1F80, 0x1FA0, 0]),
        },
    )
)
@settings(max_examples=60, deadline=None)
def test_registers_survive_into_another_engine(registers):
    source, destination = (machine.vcpu for machine in MACHINES)
    source.set_registers(**registers)
    destination.restore(source.snapshot())
    held = destination.registers()
    assert held == source.registers()
    assert {name: held[name] for name in registers} == registers


@pytest.mark.parametrize(
    "change",
    [
        {"cs": 1 << 20},
        {"rax": -1},
        {"rax": "1"},
        {"gdtr": [0, 0, 1 << 20, 0]},
        {"fp0": [1]},
        {"rip": 1.0},
        {"eax": 1},
    ],
)
def test_registers_that_the_engine_cannot_hold_change_nothing(change):
    vcpu = MACHINES[0].vcpu
    before = vcpu.registers()
    with pytest.raises(RestoreError):
        vcpu.set_registers(**change)
    assert vcpu.registers() == before


def test_a_vcpu_whose_state_the_engine_hides_is_not_snapshotted():
    vcpu = unicorn.Machine(64 * KIB, output=id).vcpu
    vcpu.set_registers(cs=0x33)
    with pytest.raises(SnapshotError, match="ring 0"):
        vcpu.snapshot()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b'{"version": 1}',
        b"vmst\x01",
        b"vmst\x01\x95\xa0\x01\xa0\x80\x80",
        b"vmst\x01\x95\xabvmmig.power\x01\xa0\x81\xa6is_off\x01\x80",
        b"vmst\x01\x95\xaevmmig.pm-timer\x01\xa0\x81\xaaelapsed_ns\xff\x80",
        b"vmst\x01\x95\xafvmmig.x86-vcpu\x01\xa0\x80\x80",
        b"vmst\x01" + b"\x91" * 100_000,
    ],
)
@pytest.mark.parametrize("part", ["power", "serial", "timer", "vcpu"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(part, text):
    component = MACHINES[0].components[part]
    before = component.snapshot()
    snapshot = Snapshot(part)
    snapshot.add_data_section(SnapshotDataSection("state", text))
    with pytest.raises(RestoreError):
        component.restore(snapshot)
    assert component.snapshot() == before


def test_ram_of_another_size_is_refused_and_the_machine_is_as_before():
    machine = sha_machine(bytearray(), 128 * KIB)
    before = machine.snapshot()
    other = sha_machine(bytearray(), 256 * KIB)
    with pytest.raises(RestoreError, match="262144 bytes of RAM, the machine 131072"):
        machine.restore(other.snapshot())
    assert machine.snapshot() == before


# --- the dirty log -----------------------------------------------------------------------------


def test_a_machine_logs_what_its_guest_writes_while_it_runs():
    # next: mov [rdi], rdi; add rdi, 0x3000; cmp rdi, rsi; jb next
    code = bytes.fromhex("48893f 4881c700300000 4839f7 72f1") + POWER_OFF
    machine = unicorn.Machine(4096 * KIB, output=id)
    assert isinstance(machine, LiveMigratable)
    machine.boot(code, gpa=0x1000, rdi=0x10010, rsi=0x3F0000)
    machine.start_migration()
    machine.start_dirty_log()
    machine.resume()
    assert machine.wait(PATIENCE_S)
    machine.pause()
    expected = [(gpa & -4096, 4096) for gpa in range(0x10010, 0x3F0000, 0x3000)]
    assert [*machine.dirty_log().pairs()] == expected
    assert len(machine.dirty_log()) == 0
    machine.complete_migration()
    assert machine.ram.guest_memory.dirty_log_backend is None


@pytest.mark.parametrize("backend", ["pagemap", "shadow"])
def test_ram_copied_by_the_dirty_log_from_a_guest_that_runs_is_its_ram(backend):
    machine = sha_machine(bytearray(), 1024 * KIB, 3)
    source = machine.ram.guest_memory
    if backend == "shadow":
        # Another mapping of the same memory: to compare, it need not be the one written to.
        parts = [(region.range, region.fd) for region in source.regions]
        source = GuestMemory.from_fds(parts, dirty_log_backend=backend)
    destination = GuestMemory(source.ranges)

    def copy(table):
        for view, new in zip(destination.views(table), source.views_to_send(table), strict=True):
            view[:] = new

    source.start_dirty_log()
    copy(source.nonzero())
    machine.resume()
    while not machine.wait(0):
        copy(source.dirty_log())
    machine.pause()
    copy(source.dirty_log())
    assert bytes(destination.regions[0].memory) == bytes(machine.ram.memory)


def test_a_snapshot_of_ram_can_be_handed_over_by_its_descriptor():
    machine = sha_machine(bytearray())
    saved = machine.snapshot().find("ram").section("0x0").snapshot
    fd, offset, length = descriptor_of(saved)
    assert (offset, length) == (0, 256 * KIB)
    assert bytes(map_sealed(fd, length)) == bytes(machine.ram.memory)


# --- the end, and failures ---------------------------------------------------------------------


def test_a_machine_that_has_powered_off_stays_off():
    machine = started(POWER_OFF)
    assert machine.wait(PATIENCE_S)
    machine.pause()
    saved = machine.snapshot()
    machine.resume()
    machine.pause()
    assert machine.snapshot().find("vcpu") == saved.find("vcpu")
    other = unicorn.Machine(64 * KIB, output=id)
    other.restore(saved)
    other.resume()
    assert other.wait(0)
    assert other.power.is_off


def test_a_snapshot_of_before_the_end_runs_again():
    console = bytearray()
    machine = sha_machine(console, 128 * KIB, 1)
    start = machine.snapshot()
    finished(machine)
    machine.restore(start)
    assert not machine.wait(0)
    finished(machine)
    half = len(console) // 2
    assert console[:half] == console[half:]


FAILURES = [
    ("488b042500000005", 0x1000, "read of no memory at 0x5000000"),  # mov rax, [0x5000000]
    ("48890425 00000005", 0x1000, "write of no memory at 0x5000000"),  # mov [0x5000000], rax
    ("e9fbffff04", 0x5001000, "fetch of no memory at 0x5001000"),  # jmp 0x5001000
    ("0f0b", 0x1000, "(?i)invalid instruction|invalid opcode"),  # ud2
    ("31c9 f7f1", 0x1002, r"exception 0 \(divide error\)"),  # xor ecx, ecx; div ecx
    ("cc", 0x1001, r"exception 3 \(breakpoint\)"),  # int3
    ("f4", 0x1001, "halted"),  # hlt
]


@pytest.mark.parametrize(("code", "rip", "what"), FAILURES)
def test_what_the_guest_does_wrong_reaches_who_waits(code, rip, what):
    machine = started(bytes.fromhex(code))
    with pytest.raises(unicorn.GuestError, match=what) as raised:
        machine.wait(PATIENCE_S)
    assert raised.value.rip == rip
    assert f"{rip:#x}" in str(pickle.loads(pickle.dumps(raised.value)))
    machine.resume()
    machine.pause()
    other = unicorn.Machine(64 * KIB, output=id)
    other.restore(machine.snapshot())
    other.resume()
    with pytest.raises(unicorn.GuestError, match=what):
        other.wait(0)


def test_a_console_that_fails_reaches_who_waits():
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    machine = started(bytes.fromhex("66baf803 ee") + FOREVER, output=full)
    with pytest.raises(unicorn.GuestError, match="No space left on device"):
        machine.wait(PATIENCE_S)


def test_the_guests_own_thread_cannot_pause_it():
    answers: SimpleQueue[Exception] = SimpleQueue()

    def pause(_: bytes) -> None:
        try:
            machine.vcpu.pause()
        except PauseError as error:
            answers.put(error)

    machine = unicorn.Machine(64 * KIB, output=pause)
    machine.boot(bytes.fromhex("66baf803 ee") + FOREVER, gpa=0x1000)
    machine.resume()
    assert "another thread" in str(answers.get(timeout=PATIENCE_S))
    machine.pause()


def test_a_program_that_does_not_fit_is_refused():
    machine = unicorn.Machine(64 * KIB, output=id)
    with pytest.raises(MigratableError, match="does not fit"):
        machine.boot(bytes(64 * KIB), gpa=0x1000)


@pytest.mark.parametrize(
    ("ram_bytes", "what"),
    [(0, "whole pages"), (1000, "whole pages"), (-4096, "64 bits"), (1 << 62, "no room")],
)
def test_ram_that_cannot_be_is_refused(ram_bytes, what):
    with pytest.raises(MigratableError, match=what):
        unicorn.Machine(ram_bytes, output=id)


# --- devices -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 255)), max_size=60))
def test_a_restored_serial_port_reads_the_same(writes):
    sent = bytearray()
    serial = unicorn.SerialPort(sent.extend)
    for offset, value in writes:
        serial.write(offset, value)
    twin = unicorn.SerialPort(sent.extend)
    twin.restore(serial.snapshot())
    assert twin.snapshot() == serial.snapshot()
    everything = [offset for _ in range(17) for offset in range(8)]
    assert [*map(twin.read, everything)] == [*map(serial.read, everything)]
    assert serial.transmitted_bytes == len(sent)


def test_the_serial_port_is_what_a_16550_driver_expects():
    sent = bytearray()
    serial = unicorn.SerialPort(sent.extend)
    serial.write(3, 0x83)
    serial.write(0, 0x34)
    serial.write(1, 0x12)
    assert (serial.read(0), serial.read(1)) == (0x34, 0x12)
    serial.write(3, 0x03)
    serial.write(7, 0xA5)
    assert (serial.read(0), serial.read(1), serial.read(7)) == (0, 0, 0xA5)
    serial.write(4, 0x1F)
    assert serial.read(6) == 0xF0
    serial.write(0, 0x55)
    assert serial.read(5) == 0x61
    assert (serial.read(0), serial.read(5), sent) == (0x55, 0x60, b"")
    serial.write(2, 0x01)
    assert serial.read(2) == 0xC1
    for value in range(20):
        serial.write(0, value)
    assert [serial.read(0) for _ in range(17)] == [*range(4, 20), 0]
    serial.write(4, 0x03)
    serial.write(0, 0x1AA)
    assert (serial.read(6), sent) == (0xB0, b"\xaa")


@given(
    st.lists(st.tuples(st.sampled_from(["pause", "resume", "move"]), st.integers(0, 10**10))),
)
def test_the_timer_counts_the_time_it_runs_and_no_other(steps):
    host = {"ns": 7}

    def clock_ns() -> int:
        return host["ns"]

    timer = unicorn.PmTimer(clock_ns=clock_ns)
    running, expected_ns = False, 0
    for step, passed_ns in steps:
        if step == "move":
            timer.pause()
            saved = timer.snapshot()
            host["ns"] = 10**15
            timer = unicorn.PmTimer(clock_ns=clock_ns)
            timer.restore(saved)
            running = False
        else:
            getattr(timer, step)()
            running = step == "resume"
        host["ns"] += passed_ns
        expected_ns += passed_ns if running else 0
        assert timer.read(0) == expected_ns * 3_579_545 // 10**9 % 2**32


def test_ports_of_nobody_read_as_ones():
    # mov edx, 0x80; in eax, dx; mov ebx, eax; in ax, dx; mov ecx, eax; out dx, eax
    machine = started(bytes.fromhex("ba80000000 ed 89c3 31c0 66ed 89c1 ef") + POWER_OFF)
    assert machine.wait(PATIENCE_S)
    machine.pause()
    registers = machine.vcpu.registers()
    assert (registers["rbx"], registers["rcx"]) == (0xFFFFFFFF, 0xFFFF)


def test_a_machine_that_is_dropped_while_it_runs_crashes_nothing() -> None:
    code = """
import gc
from vmmig.adapters.unicorn import Machine
machine = Machine(1 << 24, output=lambda _: None)
# lea rdi, [0x2000]; mov rcx, 0xff000; rep stosb; jmp back to the start
machine.boot(bytes.fromhex("488d3c2500200000 48c7c100f00f00 f3aa ebed"), gpa=0x1000)
machine.resume()
vcpu = machine.vcpu
del machine
gc.collect()
for _ in range(100):
    vcpu.pause()
    vcpu.resume()
vcpu.pause()
print("alive", vcpu.registers()["rip"] >= 0x1000)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "alive True\n"), run.stderr


@pytest.mark.parametrize("id", ["\0", "../../ram", "r" * 300, "\ud800"])
def test_any_text_is_an_id_of_ram(id: str) -> None:
    engine = Uc(UC_ARCH_X86, UC_MODE_64)
    assert unicorn.Ram(engine, 64 * KIB, id=id).id() == id
