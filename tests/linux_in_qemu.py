"""Real machines for the tests: Debian's Linux in QEMU, whose init counts on the console."""

from __future__ import annotations

import os
import re
import select
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Self

import pytest

RAM_MIB = 96

_QEMU = "qemu-system-x86_64"
_BUSYBOX = "/bin/busybox"
_KERNELS = "VMMIG_TEST_KERNELS"
_INIT = b"""#!/bin/busybox sh
n=0
while :; do n=$((n+1)); echo "count $n"; read -t 0.03 line; done
"""


def requirements() -> str | None:
    """What is missing to run such a machine, if anything."""
    if not shutil.which(_QEMU):
        return f"{_QEMU} is not installed (Debian's package qemu-system-x86)"
    if not Path(_BUSYBOX).exists():
        return "busybox is not installed (Debian's package busybox-static)"
    if kernel() is None:
        return f"there is no vmlinuz in the folder {_KERNELS} (.ci/run gets Debian's)"
    return None


def kernel() -> Path | None:
    folder = os.environ.get(_KERNELS)
    return next(iter(sorted(Path(folder).glob("vmlinuz*"))), None) if folder else None


def initramfs() -> bytes:
    """A root file system with busybox and an init that counts for ever, as a cpio archive."""
    number = 0

    def member(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
        nonlocal number
        number += 1
        path = name.encode() + b"\0"
        header = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        record = b"070701" + b"".join(b"%08X" % field for field in header) + path
        return record + bytes(-len(record) % 4) + data + bytes(-len(data) % 4)

    return (
        member("bin", 0o40755)
        + member("dev", 0o40755)
        + member("dev/console", 0o20600, device=(5, 1))
        + member("bin/busybox", 0o100755, Path(_BUSYBOX).read_bytes())
        + member("init", 0o100755, _INIT)
        + member("TRAILER!!!", 0)
    )


class Qemu:
    """A QEMU process.

    Attributes:
        qmp: Its monitor's socket.
        text: What its guest has written to the console, as far as it was read.
    """

    def __init__(self, qmp: Path, *arguments: str) -> None:
        self.qmp = qmp
        self.text = ""
        self._errors = qmp.with_suffix(".err").open("w+")
        self._output, output = os.pipe()
        os.set_blocking(self._output, False)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(qmp))
            listening.listen()
            fd = listening.fileno()
            command = f"""{_QEMU} -accel tcg -machine q35 -cpu qemu64 -m {RAM_MIB}
                -nodefaults -display none -no-reboot -serial stdio
                -chardev socket,id=qmp,fd={fd},server=on,wait=off -mon chardev=qmp,mode=control"""
            self.process = subprocess.Popen(
                [*command.split(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=self._errors,
                pass_fds=[fd],
            )
        os.close(output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._output)
        self._errors.close()

    def errors(self) -> str:
        """What QEMU wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def read(self) -> str:
        """All that the guest has written until now."""
        while True:
            try:
                data = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return self.text
            if not data:
                return self.text
            self.text += data.decode("ascii", "replace")

    def wait_for(self, number: int) -> None:
        """Return once the guest has counted so far."""
        while max(numbers(self.read()), default=0) < number:
            ended = self.process.poll() is not None
            assert not ended, f"QEMU has ended:\n{self.errors()}\n{self.text}"
            select.select([self._output], [], [], 1)

    def counts_on(self) -> None:
        """Return once the guest has counted on from where it is."""
        self.wait_for(max(numbers(self.read()), default=0) + 3)


def numbers(text: str) -> list[int]:
    """The numbers on whole lines of a console."""
    return [int(number) for number in re.findall(r"count (\d+)\r?\n", text)]


def linux(folder: Path) -> Qemu:
    """A machine that boots."""
    if missing := requirements():
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(missing)
    (folder / "initrd").write_bytes(initramfs())
    options = f"-kernel {kernel()} -initrd {folder}/initrd -append"
    return Qemu(folder / "vm.qmp", *options.split(), "console=ttyS0 quiet mitigations=off")


def waiting(qmp: Path, *arguments: str) -> Qemu:
    """A machine of the same devices that waits for its state."""
    return Qemu(qmp, "-incoming", "defer", *arguments)
