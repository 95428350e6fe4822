"""QEMU's migration stream, with QEMU: what it writes is read, and what we write it takes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import vmmig
from tests.qemu_machines import dirtying_firmware, machine, set_register
from tests.test_fuzz import changed
from vmmig.cli.commands import vmmig as command
from vmmig.errors import DecodeError
from vmmig.formats import qemu
from vmmig.snapshot import Snapshot, diff, raw_view

MACHINES = {
    "pc": "-machine pc -m 32 -vga std -serial null -device e1000 -device piix3-usb-uhci "
    "-device usb-tablet -blockdev null-co,node-name=d -device virtio-blk-pci,drive=d",
    "q35": "-machine q35 -m 48 -smp 2 -device virtio-net-pci -device qemu-xhci -device usb-kbd "
    "-device pcie-root-port,id=slot1,slot=1 -device virtio-rng-pci,bus=slot1 "
    "-audiodev none,id=a -device intel-hda -device hda-duplex,audiodev=a",
    "microvm": "-machine microvm -m 16 -serial null -device virtio-rng-device",
    "no description": "-machine pc,suppress-vmdesc=on -m 16",
    "no footers": "-machine pc-i440fx-2.3 -m 16",
    "neither": "-machine pc-i440fx-2.2 -m 16",
}


def described(snapshot: Snapshot) -> list[str]:
    """The devices of QEMU's own description."""
    devices = json.loads(bytes(raw_view(snapshot.section("vmdesc").snapshot)))["devices"]
    return [
        f"{device['name']}/{device['instance_id']}" if device["instance_id"] else device["name"]
        for device in devices
    ]


def fields_of(snapshot: Snapshot, device: str) -> dict[str, object]:
    decoded = qemu.decode(snapshot, (device,), "state")
    assert decoded is not None
    return dict(decoded.fields)


def changes(before: Snapshot, after: Snapshot) -> set[tuple[str, str]]:
    """The devices and fields that differ."""
    found = set()
    for difference in diff(before, after):
        for device in difference.path.ids[:1]:
            if device != "ram":
                old, new = fields_of(before, device), fields_of(after, device)
                found |= {(device, name) for name in old | new if old.get(name) != new.get(name)}
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_goes_through(name: str, tmp_path: Path) -> None:
    arguments = MACHINES[name].split()
    saved = tmp_path / "saved.qemu"
    with machine(tmp_path, *arguments) as running:
        running.ask("stop")
        running.save(saved)
    snapshot = qemu.read(saved)
    with saved.open("rb", buffering=0) as stream:
        assert qemu.read_stream(stream) == snapshot

    if "vmdesc" in snapshot.snapshot_data:
        for device in described(snapshot):
            fields = fields_of(snapshot, device)
            assert "undescribed" not in fields, device
            if "virtio" in fields:
                virtio = fields["virtio"]
                assert isinstance(virtio, dict), device
                assert all(8 <= queue["num"] <= 1024 for queue in virtio["queues"])
    if name == "neither":
        assert sorted(snapshot.snapshots) == ["devices", "ram"]
    else:
        assert {"cpu", "timer", "i8259/1", "ram"} <= set(snapshot.snapshots)

    vmmig.send(snapshot, tmp_path / "vm.vmsnap")
    written = tmp_path / "written.qemu"
    qemu.write(vmmig.recv(tmp_path / "vm.vmsnap", lazily=True), written)
    assert written.read_bytes() == saved.read_bytes()

    with machine(tmp_path, *arguments, "-S", "-incoming", "defer") as second:
        second.load(written)
        # A machine that did not run since says the same as the one before it.
        again = qemu.read(second.save(tmp_path / "again.qemu"))
    assert again.snapshots.keys() == snapshot.snapshots.keys()
    assert again.snapshots["ram"] == snapshot.snapshots["ram"]
    if "cpu" in snapshot.snapshots and "vmdesc" in snapshot.snapshot_data:
        assert fields_of(again, "cpu") == fields_of(snapshot, "cpu")


def test_a_machine_that_runs_meanwhile(tmp_path: Path) -> None:
    """Its pages come more than once; what holds in the end is what QEMU makes of them."""
    firmware = dirtying_firmware(tmp_path)
    arguments = ("-machine", "pc", "-m", "16", "-bios", str(firmware))
    with machine(tmp_path, *arguments) as running:
        while running.monitor("xp /1hx 0x2f000").split()[-1] == "0x0000":
            pass
        running.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 20, "downtime-limit": 1})
        saved = running.save(tmp_path / "saved.qemu")
    snapshot = qemu.read(saved)
    assert raw_view(snapshot.section("stream-earlier-pages").snapshot).nbytes >= 4096
    assert b"".join(qemu.chunks(snapshot)) == saved.read_bytes()
    memory = tmp_path / "memory"
    with machine(tmp_path, *arguments, "-S", "-incoming", "defer") as second:
        second.load(saved)
        second.ask("pmemsave", val=1 << 17, size=1 << 16, filename=str(memory))
    ram = raw_view(snapshot.find("ram").section("pc.ram").snapshot)
    assert ram[1 << 17 : 3 << 16] == memory.read_bytes()


def test_shared_memory_stays_where_it_is(tmp_path: Path) -> None:
    memory = f"memory-backend-file,id=m,size=16M,mem-path={tmp_path}/ram,share=on"
    arguments = ("-machine", "pc,memory-backend=m", "-m", "16", "-object", memory)
    with machine(tmp_path, *arguments, "-S") as running:
        running.switch_on("x-ignore-shared")
        saved = running.save(tmp_path / "saved.qemu")
    snapshot = qemu.read(saved)
    assert fields_of(snapshot, "configuration")["capabilities"] == ["x-ignore-shared"]
    assert "m" not in snapshot.snapshots["ram"].snapshot_data
    assert "pc.bios" in snapshot.snapshots["ram"].snapshot_data
    assert b"".join(qemu.chunks(snapshot)) == saved.read_bytes()


def test_bitmaps_and_an_identity(tmp_path: Path) -> None:
    identity = "12345678-9abc-def0-1234-56789abcdef0"
    disk = ("-blockdev", "null-co,node-name=d,size=65536", "-device", "virtio-blk,drive=d")
    with machine(tmp_path, "-machine", "pc", "-m", "16", "-S", "-uuid", identity, *disk) as running:
        running.switch_on("dirty-bitmaps", "validate-uuid")
        running.ask("block-dirty-bitmap-add", node="d", name="since-noon")
        saved = running.save(tmp_path / "saved.qemu")
    snapshot = qemu.read(saved)
    assert fields_of(snapshot, "configuration")["uuid"] == identity.replace("-", "")
    bitmaps = raw_view(snapshot.find("dirty-bitmap").section("state").snapshot)
    assert b"since-noon" in bytes(bitmaps)
    assert b"".join(qemu.chunks(snapshot)) == saved.read_bytes()


def test_the_register_that_changed_is_named(tmp_path: Path) -> None:
    debugger = tmp_path / "debugger.sock"
    arguments = ("-machine", "pc", "-m", "16", "-S", "-rtc", "base=2020-01-01")
    with machine(tmp_path, *arguments) as one:
        one.monitor("o /b 0x70 0x0f")
        before = qemu.read(one.save(tmp_path / "before.qemu"))
    with machine(tmp_path, *arguments, "-gdb", f"unix:{debugger},server=on,wait=off") as other:
        other.monitor("o /b 0x70 0x0e")
        set_register(debugger, 1, 0xBEEF)
        after = qemu.read(other.save(tmp_path / "after.qemu"))
    found = changes(before, after)
    assert ("mc146818rtc", "cmos_index") in found
    assert ("cpu", "env.regs") in found
    registers = fields_of(after, "cpu")["env.regs"]
    assert isinstance(registers, list)
    assert registers[3] == 0xBEEF
    assert fields_of(after, "mc146818rtc")["cmos_index"] == 0x0E
    assert {device for device, _ in found} <= {"cpu", "mc146818rtc", "timer", "globalstate"}
    files = [str(tmp_path / "before.qemu"), str(tmp_path / "after.qemu")]
    said = CliRunner().invoke(command, ["diff", *files])
    assert said.exit_code == 1
    assert "\n~ $.snapshots['cpu'].snapshot_data['state'].env.regs[3]: 0 -> 48879" in said.output
    assert ".snapshot_data['state'].cmos_index: 15 -> 14\n" in said.output


@pytest.fixture(scope="module")
def real_stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("real")
    with machine(folder, *MACHINES["microvm"].split(), "-S") as running:
        return running.save(folder / "vm.qemu").read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_real_streams(data: st.DataObject, real_stream: bytes) -> None:
    damaged = data.draw(changed([real_stream]))
    try:
        snapshot = qemu.read_stream(io.BytesIO(damaged))
    except DecodeError:
        return
    assert b"".join(qemu.chunks(snapshot)) == damaged
