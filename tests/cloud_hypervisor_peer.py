"""A Cloud Hypervisor as far as its API and its migrations show: no vmmig in it, bytes by struct.

``python -m tests.cloud_hypervisor_peer SOCKET`` is one in a process of its own, with a VM that runs
if ``--vm`` is given.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

PAGE = 4096
OK = b"\1\0" + bytes(14)
ERROR = b"\2\0" + bytes(14)
START, CONFIG, STATE, MEMORY, COMPLETE, ABANDON, MEMORY_FD, COMPLETE_PAUSED, FAULT = range(1, 10)


def header(command: int, length: int = 0) -> bytes:
    return struct.pack("<H6xQ", command, length)


def framed(command: int, payload: bytes) -> bytes:
    return header(command, len(payload)) + payload


def memory_message(*parts: tuple[int, bytes]) -> bytes:
    table = b"".join(struct.pack("<QQ", gpa, len(data)) for gpa, data in parts)
    return framed(MEMORY, table) + b"".join(data for _, data in parts)


class Refused(Exception):
    """What Cloud Hypervisor says, from the outermost cause to the root."""

    def __init__(self, *words: str) -> None:
        super().__init__(*words)
        self.words = words


class Vm:
    """A VM: RAM in three slots, two of which are in one memfd, and a vCPU that counts in RAM.

    Args:
        mappings: Those of its Config; None for those of a new VM.
        fds: A descriptor for each slot, which becomes the VM's; None for those of a new VM.
    """

    MAPPINGS = (
        {"slot": 0, "gpa": 0, "size": 256 * PAGE, "file_offset": 0},
        {"slot": 3, "gpa": 1 << 32, "size": 512 * PAGE, "file_offset": 256 * PAGE},
        {"slot": 7, "gpa": 1 << 33, "size": 2 * PAGE, "file_offset": 0, "zone_id": "fast"},
    )
    VM_CONFIG: ClassVar[dict[str, Any]] = {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 0, "shared": True, "zones": [{"id": "mem0"}, {"id": "fast"}]},
        "nobody_knows_this": [1.5, None, "é"],
    }

    def __init__(
        self,
        mappings: Any = None,
        fds: dict[int, int] | None = None,
        vm_config: Any = None,
        *,
        running: bool = True,
    ) -> None:
        self.vm_config = vm_config or self.VM_CONFIG
        self.mappings = [
            {"zone_id": "mem0", "virtio_mem": False, **each} for each in mappings or self.MAPPINGS
        ]
        self.running = running
        self.lock = threading.Lock()
        if fds is None:
            boot = os.memfd_create("ch_ram", os.MFD_CLOEXEC)
            os.ftruncate(boot, 768 * PAGE)
            fast = os.memfd_create("ch_ram", os.MFD_CLOEXEC)
            os.ftruncate(fast, 2 * PAGE)
            fds = {0: boot, 3: os.dup(boot), 7: fast}
        self.fds = fds

    @classmethod
    def new(cls, **more: Any) -> Vm:
        """One whose RAM is not all zeros."""
        vm = cls(**more)
        for gpa in (0x1000, 0x5FF8, 1 << 32, (1 << 32) + 511 * PAGE, 1 << 33):
            vm.write(gpa, b"at %#x " % gpa)
        vm.write((1 << 32) + 64 * PAGE, os.urandom(64 * PAGE))
        return vm

    def _place(self, gpa: int) -> tuple[int, int, int]:
        """The descriptor, the offset in it, and how many bytes follow there."""
        for each in self.mappings:
            at = gpa - each["gpa"]
            if 0 <= at < each["size"]:
                return self.fds[each["slot"]], each["file_offset"] + at, each["size"] - at
        raise Refused("there is no RAM", hex(gpa))

    def write(self, gpa: int, data: bytes) -> None:
        fd, offset, _ = self._place(gpa)
        os.pwrite(fd, data, offset)

    def read(self, gpa: int, size: int) -> bytes:
        fd, offset, _ = self._place(gpa)
        return os.pread(fd, size, offset)

    def ram(self) -> dict[int, bytes]:
        return {each["gpa"]: self.read(each["gpa"], each["size"]) for each in self.mappings}

    def step(self) -> int:
        """What the vCPU does if it runs; what it has counted."""
        with self.lock:
            count = int.from_bytes(self.read(8, 8), "little") + self.running
            if self.running:
                self.write(8, count.to_bytes(8, "little"))
            return count

    def manager_data(self) -> dict[str, Any]:
        return {
            # As a VM has it that no folder was made of: only the mappings say where RAM is.
            "memory_ranges": {"data": []},
            "guest_ram_mappings": self.mappings,
            "boot_ram": 0,
        }

    def config(self) -> bytes:
        """Config, as serde writes it."""
        value = {
            "vm_config": self.vm_config,
            "common_cpuid": [{"function": 1, "eax": 0xFFFFFFFF}],
            "memory_manager_data": self.manager_data(),
        }
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()

    def state(self, *, ranges: bool = False) -> bytes:
        data = self.manager_data()
        if ranges:
            data["memory_ranges"]["data"] = [
                {"gpa": each["gpa"], "length": each["size"]} for each in self.mappings
            ]
        vcpu = {"snapshots": {}, "snapshot_data": {"state": '{"rip":18446744073709551615}'}}
        value = {
            "snapshots": {
                "cpu-manager": {"snapshots": {"0": vcpu}, "snapshot_data": None},
                "device-manager": {"snapshots": {}, "snapshot_data": {"state": '{"a":[1.0]}'}},
                "memory-manager": {
                    "snapshots": {},
                    "snapshot_data": {"state": json.dumps(data, separators=(",", ":"))},
                },
            },
            "snapshot_data": None,
        }
        return json.dumps(value, separators=(",", ":")).encode()

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    while True:
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            threading.Event().wait(0.002)
        except BaseException:
            sock.close()
            raise


def answered(sock: socket.socket) -> bytes:
    data = b""
    while len(data) < 16 and (part := sock.recv(16 - len(data))):
        data += part
    return data


def send_fd(sock: socket.socket, slot: int, fds: list[int]) -> None:
    """MemoryFd: the header, and apart the slot with the descriptor."""
    sock.sendall(header(MEMORY_FD, 4))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([struct.pack("<I", slot)], rights)


def send_vm(vm: Vm, sock: socket.socket, *, local: bool, last: int = COMPLETE) -> None:
    """What Cloud Hypervisor does to migrate a VM; whatever fails, it lets the VM run on."""

    def expect(what: str) -> None:
        if answered(sock) != OK:
            with suppress(OSError):
                sock.sendall(header(ABANDON))
                answered(sock)
            raise Refused("Error from API", "Failed to send migration", f"{what} was refused")

    try:
        sock.sendall(header(START))
        expect("Start")
        if local:
            for slot, fd in vm.fds.items():
                send_fd(sock, slot, [fd])
                expect("MemoryFd")
        sock.sendall(framed(CONFIG, vm.config()))
        expect("Config")
        if not local:
            # The first pass, while the VM runs; then what it wrote meanwhile, paused.
            sock.sendall(memory_message(*vm.ram().items()))
            expect("Memory")
            vm.step()
        with vm.lock:
            vm.running = False
        if not local:
            sock.sendall(memory_message((0, vm.read(0, PAGE)), (0, vm.read(0, 16))))
            expect("Memory")
        sock.sendall(framed(STATE, vm.state()))
        expect("State")
        sock.sendall(header(last))
        expect("Complete")
    except BaseException as error:
        vm.running = True
        if isinstance(error, OSError):
            raise Refused("Error from API", "Failed to send migration", str(error)) from error
        raise


class Destination:
    """Who listens for a VM, as Cloud Hypervisor does after ``vm.receive-migration``.

    Attributes:
        requests: Each request's header and payload.
        vm: The VM, when it is complete.
    """

    def __init__(self, path: str, *, answers: Any = None, page_fault: bool = False) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self.vm: Vm | None = None
        self.fds: dict[int, int] = {}
        self.stray_fds = 0
        self.after = b""
        self._answers = answers
        self._page_fault = page_fault
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(60)
        self._listener.bind(path)
        self._listener.listen()
        self._ram: dict[int, tuple[int, bytearray]] = {}

    def receive(self) -> None:
        """Take one VM; raises Refused if none comes, whole."""
        with self._listener:
            sock, _ = self._listener.accept()
        with sock:
            sock.settimeout(60)
            try:
                while self.vm is None:
                    self._one(sock)
            except (OSError, EOFError) as error:
                raise Refused("Error from API", "Failed to receive migration", str(error)) from None
            finally:
                if self.vm is None:
                    for fd in self.fds.values():
                        os.close(fd)
            if self._page_fault:
                sock.sendall(framed(FAULT, struct.pack("<QQ", 0, PAGE)))
                self.after = answered(sock)

    def _one(self, sock: socket.socket) -> None:
        head = self._read(sock, 16)
        command, length = struct.unpack("<H6xQ", head)
        payload = self._read(sock, length) if command != MEMORY_FD else self._take_fd(sock)
        self.requests.append((head, payload))
        if command == CONFIG:
            self._config = json.loads(payload)
            mappings = self._config["memory_manager_data"]["guest_ram_mappings"]
            for each in mappings if not self.fds else ():
                self._ram[each["gpa"]] = each["slot"], bytearray(each["size"])
        elif command == MEMORY:
            for gpa, size in struct.iter_unpack("<QQ", payload):
                base = max(start for start in self._ram if start <= gpa)
                at = gpa - base
                assert at + size <= len(self._ram[base][1])
                self._ram[base][1][at : at + size] = self._read(sock, size)
        elif command in (COMPLETE, COMPLETE_PAUSED):
            self._complete(running=command == COMPLETE)
        answer = OK if self._answers is None else self._answers(command, len(self.requests))
        if answer != OK:
            self.vm = None
        sock.sendall(answer)
        if answer != OK or command == ABANDON:
            raise EOFError(f"the migration ended in command {command}")

    def _complete(self, *, running: bool) -> None:
        mappings = self._config["memory_manager_data"]["guest_ram_mappings"]
        for each in mappings if self._ram else ():
            fd = os.memfd_create("ch_ram", os.MFD_CLOEXEC)
            os.pwrite(fd, self._ram[each["gpa"]][1], each["file_offset"])
            self.fds[each["slot"]] = fd
        self.vm = Vm(mappings, self.fds, self._config["vm_config"], running=running)

    def _take_fd(self, sock: socket.socket) -> bytes:
        data, rights, _, _ = sock.recvmsg(4, socket.CMSG_SPACE(64))
        fds = array.array("i")
        for _, _, content in rights:
            fds.frombytes(content)
        assert len(data) == 4
        assert len(fds) == 1
        self.fds[struct.unpack("<I", data)[0]] = fds[0]
        return data

    def _read(self, sock: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part, rights, _, _ = sock.recvmsg(min(count - len(data), 1 << 20), 1024)
            self.stray_fds += len(rights)
            if not part:
                raise EOFError("the connection ended")
            data += part
        return data


class CloudHypervisor:
    """The API's server, at a unix socket, and the VM behind it; within a context it serves."""

    def __init__(self, path: str, vm: Vm | None = None) -> None:
        self.path = path
        self.vm = vm
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, bytes] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._open: set[socket.socket] = set()

    def __enter__(self) -> CloudHypervisor:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        os.unlink(self.path)
        if self.vm is not None:
            self.vm.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, sock.makefile("rb") as stream:
            while line := stream.readline():
                method, target, version = line.decode().split()
                assert version == "HTTP/1.1"
                length = 0
                while (field := stream.readline().strip()) != b"":
                    name, _, value = field.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                    assert name.lower() != b"transfer-encoding"
                body = stream.read(length)
                name = target.removeprefix("/api/v1/")
                if name in self.answers:
                    if self.answers[name] != b"silence":
                        sock.sendall(self.answers[name])
                        return
                    stream.read(1)
                    return
                sock.sendall(self._answer(method, name, body))

    def _answer(self, method: str, name: str, body: bytes) -> bytes:
        known = {
            "vmm.ping": "GET", "vm.info": "GET", "vm.counters": "GET", "vm.pause": "PUT",
            "vm.resume": "PUT", "vm.snapshot": "PUT", "vm.restore": "PUT",
            "vm.send-migration": "PUT", "vm.receive-migration": "PUT",
        }  # fmt: skip
        status, answer = "204 No Content", b""
        try:
            if name not in known:
                return _response("404 Not Found", b'["Not Found"]')
            if known[name] != method:
                return _response("400 Bad Request", b'["Bad Request"]')
            try:
                asked = json.loads(body) if body else None
            except ValueError as error:
                said = json.dumps(["Failed to deserialize JSON", str(error)])
                return _response("400 Bad Request", said.encode())
            self.asked.append((name, asked))
            value = getattr(self, "_" + name.replace(".", "_").replace("-", "_"))(asked)
            if value is not None:
                status, answer = "200 OK", json.dumps(value).encode()
        except Refused as error:
            status, answer = "500 Internal Server Error", json.dumps(error.words).encode()
        return _response(status, answer)

    def _vmm_ping(self, _: Any) -> Any:
        return {"build_version": "v53.0", "version": "53.0.0", "pid": os.getpid(), "features": []}

    def _needed(self, what: str) -> Vm:
        if self.vm is None:
            raise Refused("Error from API", f"The VM {what}", "VM is not created")
        return self.vm

    def _vm_info(self, _: Any) -> Any:
        vm = self._needed("info is not available")
        return {"config": vm.vm_config, "state": "Running" if vm.running else "Paused"}

    def _vm_counters(self, _: Any) -> Any:
        return {"vcpu": {"steps": self._needed("counters are not available").step()}}

    def _vm_pause(self, _: Any) -> None:
        vm = self._needed("could not be paused")
        with vm.lock:
            if not vm.running:
                raise Refused("Error from API", "The VM could not be paused", "Paused to Paused")
            vm.running = False

    def _vm_resume(self, _: Any) -> None:
        vm = self._needed("could not resume")
        if vm.running:
            raise Refused("Error from API", "The VM could not resume", "Running to Running")
        vm.running = True

    def _vm_snapshot(self, asked: Any) -> None:
        vm = self._needed("could not be snapshotted")
        if vm.running:
            raise Refused("Error from API", "The VM could not be snapshotted", "VM is running")
        folder = _folder(asked["destination_url"])
        try:
            (folder / "config.json").write_text(json.dumps(vm.vm_config))
            (folder / "state.json").write_bytes(vm.state(ranges=True))
            (folder / "memory-ranges").write_bytes(b"".join(vm.ram().values()))
        except OSError as error:
            raise Refused("Error from API", "The VM could not be snapshotted", str(error)) from None

    def _vm_restore(self, asked: Any) -> None:
        if self.vm is not None:
            raise Refused("Error from API", "The VM could not be restored", "VM is already created")
        folder = _folder(asked["source_url"])
        try:
            state = json.loads((folder / "state.json").read_bytes())
            manager = state["snapshots"]["memory-manager"]["snapshot_data"]["state"]
            config = json.loads((folder / "config.json").read_bytes())
            ram = (folder / "memory-ranges").read_bytes()
        except (OSError, ValueError) as error:
            raise Refused("Error from API", "The VM could not be restored", str(error)) from None
        fds = {}
        for each in json.loads(manager)["guest_ram_mappings"]:
            fds[each["slot"]] = os.memfd_create("ch_ram", os.MFD_CLOEXEC)
            os.pwrite(fds[each["slot"]], ram[: each["size"]], each["file_offset"])
            ram = ram[each["size"] :]
        self.vm = Vm(json.loads(manager)["guest_ram_mappings"], fds, config, running=False)

    def _vm_send_migration(self, asked: Any) -> None:
        vm = self._needed("could not be sent")
        with connected(asked["destination_url"].removeprefix("unix:")) as sock:
            last = COMPLETE if vm.running else COMPLETE_PAUSED
            send_vm(vm, sock, local=asked.get("local", False), last=last)
        vm.close()
        self.vm = None

    def _vm_receive_migration(self, asked: Any) -> None:
        if self.vm is not None:
            raise Refused("Error from API", "Failed to receive migration", "VM is already created")
        destination = Destination(asked["receiver_url"].removeprefix("unix:"))
        destination.receive()
        self.vm = destination.vm


def _folder(url: str) -> Path:
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc) == ("file", "")
    return Path(unquote(parts.path))


def _response(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def main() -> None:
    vm = Vm.new() if "--vm" in sys.argv else None
    with ExitStack() as stack:
        stack.enter_context(CloudHypervisor(sys.argv[1], vm))
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
