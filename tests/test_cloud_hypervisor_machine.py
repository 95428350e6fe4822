"""A running Cloud Hypervisor as a component, and `vmmig offload`, against the simulated one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import cloud_hypervisor_peer as peer
from tests.cloud_hypervisor_peer import Vm
from tests.http_peers import ROOT, serving
from tests.leaks import nothing_leaks
from vmmig import recv
from vmmig.adapters.cloud_hypervisor import CloudHypervisor, offload_snapshot
from vmmig.adapters.cloud_hypervisor.api import Api, ApiError
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.formats import cloud_hypervisor as formats
from vmmig.traits import Migratable
from vmmig.verify import verify


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    with nothing_leaks():
        yield


@pytest.fixture
def there(tmp_path: Path) -> Iterator[peer.CloudHypervisor]:
    """One with a VM that runs."""
    with peer.CloudHypervisor(str(tmp_path / "api"), Vm.new()) as simulated:
        yield simulated


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[peer.CloudHypervisor]:
    """One without a VM."""
    with peer.CloudHypervisor(str(tmp_path / "api2")) as simulated:
        yield simulated


def machine_of(simulated: peer.CloudHypervisor, **options: Any) -> CloudHypervisor:
    return CloudHypervisor(simulated.path, timeout_s=20, transfer_timeout_s=20, **options)


def vm_of(simulated: peer.CloudHypervisor) -> Vm:
    assert simulated.vm is not None
    return simulated.vm


def test_it_is_a_component(there: peer.CloudHypervisor) -> None:
    machine = machine_of(there, id="vm7")
    assert verify(machine, Migratable) == ()
    assert machine.id() == "vm7"
    assert machine.ping()["version"] == "53.0.0"
    assert machine.info()["state"] == "Running"


def test_pause_and_resume_also_repeated(there: peer.CloudHypervisor) -> None:
    machine = machine_of(there)
    for _ in range(2):
        machine.pause()
        assert not vm_of(there).running
    for _ in range(2):
        machine.resume()
        assert vm_of(there).running
    assert [name for name, _ in there.asked if name != "vm.info"] == [
        *["vm.pause"] * 2,
        *["vm.resume"] * 2,
    ]


def test_a_snapshot_and_a_restore_by_a_folder(
    there: peer.CloudHypervisor, empty: peer.CloudHypervisor, tmp_path: Path
) -> None:
    folder = tmp_path / "a folder with ü"
    folder.mkdir()
    machine, other = machine_of(there, folder=folder), machine_of(empty, folder=folder)
    vm_of(there).step()
    machine.pause()
    snapshot = machine.snapshot()
    machine.resume()
    at_pause = vm_of(there).ram()
    assert vm_of(there).step() == 2
    assert not [*folder.iterdir()]
    assert machine_of(there).info()["state"] == "Running"

    machine.send(snapshot, str(tmp_path / "vm.vmsnap"))
    other.restore(other.recv(str(tmp_path / "vm.vmsnap")), prefault=True)
    assert not [*folder.iterdir()]
    assert vm_of(empty).ram() == at_pause
    assert vm_of(empty).vm_config == vm_of(there).vm_config
    assert empty.asked[-1][1]["prefault"] is True
    assert other.info()["state"] == "Paused"
    other.resume()
    assert vm_of(empty).step() == 2


def test_a_snapshot_and_a_restore_by_offload(
    there: peer.CloudHypervisor, empty: peer.CloudHypervisor, tmp_path: Path
) -> None:
    machine, other = machine_of(there, by_offload=True), machine_of(empty)
    machine.pause()
    config, ram = vm_of(there).config(), vm_of(there).ram()
    snapshot = machine.snapshot()
    assert there.vm is None
    assert formats.to_parts(snapshot).config == config
    other.restore(snapshot)
    assert vm_of(empty).ram() == ram
    assert [name for name, _ in empty.asked] == ["vm.receive-migration"]
    assert other.info()["state"] == "Paused"


@pytest.mark.parametrize("local", [True, False])
def test_two_cloud_hypervisors_migrate(
    local: bool, there: peer.CloudHypervisor, empty: peer.CloudHypervisor, tmp_path: Path
) -> None:
    source, destination = machine_of(there), machine_of(empty)
    url = f"unix:{tmp_path}/m"
    waiting = threading.Thread(target=destination.receive, args=(url,))
    waiting.start()
    vm_of(there).step()
    source.migrate(url, local=local, downtime_ms=300)
    waiting.join()
    assert there.asked[-1] == (
        "vm.send-migration",
        {"destination_url": url, "downtime_ms": 300, **({"local": True} if local else {})},
    )
    assert there.vm is None
    assert vm_of(empty).running
    assert vm_of(empty).step() == (2 if local else 3)


CALLS: list[tuple[Callable[[CloudHypervisor], object], type[MigratableError], str]] = [
    (lambda m: m.pause(), PauseError, "The VM could not be paused: VM is not created (500)"),
    (lambda m: m.resume(), ResumeError, "The VM could not resume: VM is not created (500)"),
    (lambda m: m.snapshot(), SnapshotError, "The VM could not be snapshotted: VM is not created"),
    (lambda m: m.migrate("unix:/x"), MigrateSendError, "VM could not be sent: VM is not created"),
    (lambda m: m.info(), ApiError, "The VM info is not available: VM is not created (500)"),
]


@pytest.mark.parametrize(("call", "error", "said"), CALLS)
def test_cloud_hypervisors_words_are_the_errors(
    call: Callable[[CloudHypervisor], object],
    error: type[MigratableError],
    said: str,
    empty: peer.CloudHypervisor,
) -> None:
    with pytest.raises(error) as caught:
        call(machine_of(empty))
    assert said in str(caught.value)
    assert type(caught.value) is error


def test_what_a_running_vm_refuses(there: peer.CloudHypervisor, tmp_path: Path) -> None:
    machine = machine_of(there, folder=tmp_path)
    with pytest.raises(SnapshotError, match="VM is running"):
        machine.snapshot()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api"]
    with pytest.raises(MigrateReceiveError, match="VM is already created"):
        machine.receive("unix:/x")
    machine.pause()
    with pytest.raises(RestoreError, match="VM is already created"):
        machine.restore(machine.snapshot())
    with pytest.raises(SnapshotError, match="No such file or directory"):
        machine_of(there, folder=tmp_path / "nowhere").snapshot()


def test_an_offload_that_fails_says_why_on_both_sides(
    there: peer.CloudHypervisor, empty: peer.CloudHypervisor, tmp_path: Path
) -> None:
    machine = machine_of(there, by_offload=True)
    with pytest.raises(SnapshotError, match="VM could not be sent: VM is not created"):
        machine_of(empty, by_offload=True).snapshot()
    vm_of(there).mappings[0]["zone_id"] = "nowhere"
    with pytest.raises(SnapshotError, match=r"memory zone 'nowhere'.*Config was refused \(500\)"):
        machine.snapshot()
    vm_of(there).mappings[0]["zone_id"] = "mem0"
    assert vm_of(there).running
    snapshot = machine.snapshot()
    machine_of(empty).restore(snapshot)
    with pytest.raises(RestoreError, match=r"VM is already created \(500\)"):
        machine_of(empty).restore(snapshot)
    assert vm_of(empty).ram()


ANSWERS = [
    (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 7\r\n\r\nno room", "no room (500)"),
    (b'HTTP/1.1 429 Too Many\r\nContent-Length: 6\r\n\r\n"busy"', "busy (429)"),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "Oh (500)"),
    (b'HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\n[1, "a"]\n', '[1, "a"] (400)'),
    (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n\xff\xfe", "(500)"),
    (b"HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\n\r\n[\"Not Found\"]", "Not Found (404)"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "is no JSON"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n5", "no JSON object"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "ended the connection"),
    (b"GARBAGE\r\n\r\n", "ended the connection"),
    (b"HTTP/1.1 200 " + b"x" * 70000, "ended the connection"),
    (b"", "ended the connection"),
    (b"silence", "no answer came within 0.2 s"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "said"), ANSWERS, ids=range(len(ANSWERS)))
def test_answers_of_all_kinds(answer: bytes, said: str, there: peer.CloudHypervisor) -> None:
    there.answers["vm.info"] = answer
    with pytest.raises(ApiError) as caught:
        CloudHypervisor(there.path, timeout_s=0.2).info()
    assert said in str(caught.value)
    assert f"'unix:{there.path}': vm.info: " in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_what_is_not_known_there(there: peer.CloudHypervisor) -> None:
    api = Api(there.path)
    with pytest.raises(ApiError, match=r"vm.dance: Not Found \(404\)") as caught:
        api.put("vm.dance")
    assert caught.value.status == 404
    with pytest.raises(ApiError, match=r"Bad Request \(400\)"):
        api.get("vm.pause")
    assert api.put("vm.pause") is None


def test_nobody_is_at_the_socket(tmp_path: Path) -> None:
    with pytest.raises(PauseError, match="nobody listened there within 0 s"):
        CloudHypervisor(tmp_path / "nobody", timeout_s=0).pause()
    with pytest.raises(PauseError, match="the path has"):
        CloudHypervisor("/" + "x" * 200, timeout_s=0).pause()


# The command line


class Process:
    """A program of ours in a process of its own."""

    def __init__(self, module: str, *arguments: object, stdin: Any = subprocess.DEVNULL) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@contextlib.contextmanager
def simulated_process(path: Path, *options: str) -> Iterator[Api]:
    process = Process("tests.cloud_hypervisor_peer", path, *options, stdin=subprocess.PIPE)
    try:
        assert process.line() == "ready\n"
        yield Api(path)
    finally:
        _, _, err = process.ended()
        assert err == ""


def test_offload_by_the_command_line_between_processes(tmp_path: Path) -> None:
    socket_path = tmp_path / "s"
    path = tmp_path / "vm.vmsnap"
    with (
        simulated_process(tmp_path / "a", "--vm") as source,
        simulated_process(tmp_path / "b") as destination,
    ):
        steps = [source.get("vm.counters")["vcpu"]["steps"] for _ in range(3)]
        daemon = Process("vmmig.cli", "offload", "snapshot", "--socket", socket_path,
                         "--output", path, "--compress", "zstd", "--json")  # fmt: skip
        assert json.loads(daemon.line())["stage"] == "connecting"
        source.put("vm.pause")
        body = {"destination_url": f"unix:{socket_path}", "local": True}
        source.put("vm.send-migration", body)
        status, out, err = daemon.ended()
        assert (status, err) == (0, "")
        assert json.loads(out.splitlines()[-1])["stage"] == "done"
        with pytest.raises(ApiError, match="VM is not created"):
            source.get("vm.info")

        body = {"receiver_url": f"unix:{socket_path}"}
        receiving = threading.Thread(target=destination.put, args=("vm.receive-migration", body))
        receiving.start()
        daemon = Process("vmmig.cli", "offload", "restore", "--socket", socket_path,
                         "--input", path, "--resume")  # fmt: skip
        assert daemon.ended() == (0, "", "")
        receiving.join()
        assert destination.get("vm.counters")["vcpu"]["steps"] == steps[-1] + 1
    assert path.stat().st_size < 1 << 20


CH_REMOTE = """#!{python}
import json, sys
from vmmig.adapters.cloud_hypervisor.api import Api

_, _, path, name, *rest = sys.argv
key = {{"send-migration": "destination_url", "receive-migration": "receiver_url"}}.get(name)
fields = dict(part.split("=") for part in rest[0].split(",") if "=" in part) if rest else {{}}
body = {{key: fields.get(key) or rest[0]}} if key else None
if "local" in fields:
    body["local"] = fields["local"] == "on"
Api(path).put("vm." + name, body)
"""


def test_the_readmes_recipe(tmp_path: Path) -> None:
    """Its very commands; ``ch-remote`` does what that of Cloud Hypervisor does."""
    readme = (ROOT / "README.md").read_text()
    recipe = readme.split("<!-- offload -->\n```sh\n")[1].split("```")[0]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ch-remote").write_text(CH_REMOTE.format(python=sys.executable))
    (programs / "vmmig").write_text(f'#!/bin/sh\nexec {sys.executable} -m vmmig.cli "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    store = tmp_path / "store"
    store.mkdir()
    with (
        serving(store) as (url, _),
        simulated_process(tmp_path / "api.sock", "--vm") as source,
        simulated_process(tmp_path / "other-api.sock") as destination,
    ):
        steps = source.get("vm.counters")["vcpu"]["steps"]
        done = subprocess.run(
            ["bash", "-euc", recipe],
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "URL": f"{url}vm.vmsnap",
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert destination.get("vm.info")["state"] == "Running"
        assert destination.get("vm.counters")["vcpu"]["steps"] == steps + 1
    assert recv(store / "vm.vmsnap").id == formats.NAME


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_waiting(number: int, tmp_path: Path) -> None:
    daemon = Process("vmmig.cli", "offload", "snapshot", "--socket", tmp_path / "s",
                     "--output", tmp_path / "vm.vmsnap", "--json")  # fmt: skip
    assert json.loads(daemon.line())["stage"] == "connecting"
    daemon.process.send_signal(number)
    status, _, err = daemon.ended()
    assert status == 128 + number
    assert "cancelled" in err
    assert not [*tmp_path.iterdir()]


def test_a_failure_is_one_line_and_a_status(tmp_path: Path) -> None:
    daemon = Process("vmmig.cli", "offload", "restore", "--socket", tmp_path / "s",
                     "--input", tmp_path / "vm.vmsnap", "--timeout", "0.1")  # fmt: skip
    status, out, err = daemon.ended()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "No such file or directory" in err
    assert Process("vmmig.cli", "offload", "snapshot").ended()[0] == 2


def test_the_copy_of_a_vm_whose_ram_is_not_shared(
    there: peer.CloudHypervisor, empty: peer.CloudHypervisor, tmp_path: Path
) -> None:
    ram = vm_of(there).ram()
    saving = threading.Thread(
        target=offload_snapshot, args=(tmp_path / "s", tmp_path / "vm.vmsnap")
    )
    saving.start()
    machine = machine_of(there)
    machine.pause()
    machine.migrate(f"unix:{tmp_path}/s")
    saving.join()
    assert recv(tmp_path / "vm.vmsnap").id == formats.NAME
    receiving = threading.Thread(target=machine_of(empty).receive, args=(f"unix:{tmp_path}/d",))
    receiving.start()
    daemon = Process("vmmig.cli", "offload", "restore", "--socket", tmp_path / "d",
                     "--input", tmp_path / "vm.vmsnap", "--copy")  # fmt: skip
    assert daemon.ended() == (0, "", "")
    receiving.join()
    assert vm_of(empty).ram() == ram
    assert not vm_of(empty).running
