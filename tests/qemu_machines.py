"""Real machines: QEMU, by its monitor's protocol."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tests.http_peers import needed

_TIMEOUT_S = 120

_DIRTYING = bytes.fromhex(
    "b80020 8ec0 31ff"  # es = 0x2000; di = 0
    "26ff05 81c70010 ebf7"  # forever: increment the word at es:di, go to the next page
)
_RESET = (0xFFF0, bytes.fromhex("e90d00"))  # jump to the firmware's first byte


def dirtying_firmware(folder: Path) -> Path:
    """Firmware that does nothing but write to 16 pages of memory, from 0x20000 on, for ever."""
    rom = bytearray(1 << 16)
    rom[: len(_DIRTYING)] = _DIRTYING
    rom[_RESET[0] : _RESET[0] + 3] = _RESET[1]
    path = folder / "firmware.bin"
    path.write_bytes(rom)
    return path


class Machine:
    """A QEMU that runs."""

    def __init__(self, sock: socket.socket, lines: TextIO) -> None:
        self._sock = sock
        self._lines = lines
        self._events: list[dict[str, Any]] = []
        json.loads(self._lines.readline())
        self.ask("qmp_capabilities")
        self.switch_on("events")

    def ask(self, command: str, **arguments: object) -> Any:
        """What a command returns."""
        return self._ask(command, arguments, [])

    def _ask(self, command: str, arguments: dict[str, object], fds: list[int]) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._sock, [message], fds)
        while True:
            message = json.loads(self._lines.readline())
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise AssertionError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def switch_on(self, *capabilities: str) -> None:
        self.ask(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in capabilities],
        )

    def monitor(self, line: str) -> str:
        """What the monitor for people says."""
        return str(self.ask("human-monitor-command", **{"command-line": line}))

    def save(self, path: Path) -> Path:
        """Write the migration stream to a file."""
        # Not through ``exec:cat``, which may still be writing when the migration is complete.
        with path.open("wb") as file:
            self._ask("getfd", {"fdname": "file"}, [file.fileno()])
        self.ask("migrate", uri="fd:file")
        self._migrated()
        return path

    def load(self, path: Path) -> None:
        """Take over a stream from a file; the machine was started with ``-incoming defer``."""
        self.ask("migrate-incoming", uri=f"exec:cat {path}")
        self._migrated()

    def _migrated(self) -> None:
        while True:
            message = self._events.pop(0) if self._events else json.loads(self._lines.readline())
            status = message.get("data", {}).get("status")
            if message.get("event") == "MIGRATION" and status in ("completed", "failed"):
                assert status == "completed"
                return


@contextmanager
def machine(folder: Path, *arguments: str) -> Iterator[Machine]:
    """A machine under software emulation, of Debian's QEMU."""
    program = needed("qemu-system-x86_64", "qemu-system-x86")
    path = folder / "monitor.sock"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.settimeout(_TIMEOUT_S)
        listening.bind(str(path))
        listening.listen(1)
        common = ["-nodefaults", "-display", "none", "-accel", "tcg", "-qmp", f"unix:{path}"]
        process = subprocess.Popen([program, *common, *arguments], stdin=subprocess.DEVNULL)
        with process:
            try:
                sock, _ = listening.accept()
                sock.settimeout(_TIMEOUT_S)
                with sock, sock.makefile("r") as lines:
                    yield Machine(sock, lines)
            finally:
                process.kill()


def set_register(path: Path, number: int, value: int) -> None:
    """Set a register of a machine's first processor, by the debugger's protocol on a socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect(str(path))
        # Registers can be named only by those who have read what there is.
        _command(sock, b"qXfer:features:read:target.xml:0,fff")
        assert _command(sock, b"P%x=%s" % (number, value.to_bytes(8, "little").hex().encode())) == (
            b"OK"
        )


def _command(sock: socket.socket, content: bytes) -> bytes:
    sock.sendall(b"$%s#%02x" % (content, sum(content) % 256))
    answer = b""
    while len(answer.partition(b"#")[2]) < 2:
        answer += sock.recv(1 << 16)
    sock.sendall(b"+")
    return answer.partition(b"$")[2].partition(b"#")[0]
