"""Saving is atomic and durable: crashes and errors at each system call of a send, by strace.

A traced run of a small program lists the system calls between two marks. Then, for each of them
in turn, the program runs again and is killed, interrupted or refused just there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import vmmig.transport.file  # what is imported here is compiled, so that all runs are alike

if not shutil.which("strace") and not os.environ.get("CI"):
    pytest.skip("strace is not installed: apt-get install strace", allow_module_level=True)

OLD = b"old" * 1000
# One write that is full, one that has its number of buffers, and a last one.
PARTS = [bytes(range(256)) * (8 << 12), *[b"new"] * 1500]
NEW = b"".join(PARTS)

PROGRAM = """
import os, sys
from vmmig.errors import MigrateSendError
from vmmig.transfer import Transfer
from vmmig.transport import file

parts = [bytes(range(256)) * (8 << 12), *[b"new"] * 1500]
total_bytes = sum(map(len, parts))
os.access("/vmmig-begin", os.F_OK)
try:
    file.send(parts, Transfer(sys.argv[1], MigrateSendError, total_bytes=total_bytes))
except MigrateSendError as error:
    os.access("/vmmig-end", os.F_OK)
    print(error)
    sys.exit(3)
except KeyboardInterrupt:
    sys.exit(4)
os.access("/vmmig-end", os.F_OK)
"""
SAVED, FAILED, INTERRUPTED = 0, 3, 4

# The others are of no account to a file, and how often they are called depends on the allocator.
IGNORED = {"mmap", "munmap"}


class Call(NamedTuple):
    """One system call: the ``nth`` of its name in the life of the program."""

    name: str
    nth: int
    text: str

    def inject(self, what: str) -> str:
        return f"--inject={self.name}:{what}:when={self.nth}"


class Run(NamedTuple):
    status: int
    stdout: str
    calls: list[Call]
    """Those between the marks."""
    ended: bool
    """Whether the end mark was reached, and not only begun."""
    injected: list[str]
    """The calls between the marks that got an injected error."""


def run(target: Path, *options: str, trace: str = "%file,%desc") -> Run:
    log = target.parent.parent / "trace"
    # Without --seccomp-bpf, which is faster: with it, strace 6.1 injects no signals.
    strace = ["strace", "-f", "-qq", "-y", f"--trace={trace}", *options, "-o", str(log)]
    done = subprocess.run(
        [*strace, sys.executable, "-c", PROGRAM, str(target)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(vmmig.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
        },
        capture_output=True,
        text=True,
    )
    seen: Counter[str] = Counter()
    calls: list[Call] = []
    begun, ended = False, False
    for text in log.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\(", text)
        if not match:
            continue
        seen[match[1]] += 1
        if "/vmmig-begin" in text:
            begun = True
            continue
        if begun and not ended and match[1] not in IGNORED:
            calls.append(Call(match[1], seen[match[1]], text))
        ended = ended or ("/vmmig-end" in text and " = -1 ENOENT" in text)
    assert begun, done.stderr
    injected = [call.text for call in calls if "(INJECTED)" in call.text]
    return Run(done.returncode, done.stdout, calls, ended, injected)


class Save:
    """A folder with or without an old file, and what a send of the new one calls."""

    def __init__(self, tmp_path: Path, old: bytes | None) -> None:
        self.old = old
        self.target = tmp_path / "folder" / "vm"
        self.target.parent.mkdir()
        self.reset()
        whole = run(self.target)
        assert whole.status == SAVED
        assert whole.ended
        assert self.content == NEW
        *self.calls, self.end = whole.calls
        assert "/vmmig-end" in self.end.text

    def reset(self) -> None:
        for path in self.target.parent.iterdir():
            path.unlink()
        if self.old is not None:
            self.target.write_bytes(self.old)

    @property
    def content(self) -> bytes | None:
        return self.target.read_bytes() if self.target.exists() else None

    @property
    def left(self) -> list[str]:
        return sorted(path.name for path in self.target.parent.iterdir() if path != self.target)

    def run(self, call: Call, *options: str) -> Run:
        """Run it with something injected at the call.

        Other processes that compile what is imported shift the calls' numbers: what met nothing
        is run again.
        """
        for _ in range(5):
            self.reset()
            result = run(self.target, *options, trace=f"%file,{call.name}")
            if result.status != SAVED or result.injected:
                break
        return result

    def named(self, *names: str) -> Iterable[Call]:
        found = [call for call in self.calls if call.name.startswith(names)]
        assert found
        return found

    def position(self, call: Call) -> int:
        return self.calls.index(call)

    @property
    def rename(self) -> int:
        (call,) = self.named("rename")
        return self.position(call)


@pytest.fixture(params=[OLD, None], ids=["replacing", "new"])
def saving(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    return Save(tmp_path, request.param)


def test_killed_at_each_call_the_old_or_the_new_file_is_there_whole(saving: Save) -> None:
    contents = []
    for call in [*saving.calls, saving.end]:
        crash = saving.run(call, call.inject("signal=SIGKILL"))
        assert crash.status < 0, call
        assert not crash.ended, call
        expected = saving.old if call in saving.calls[: saving.rename + 1] else NEW
        assert saving.content == expected, call
        for name in saving.left:
            assert re.fullmatch(r"\.vmmig-[0-9a-f]{16}\.part", name)
            assert (saving.target.parent / name).stat().st_mode & 0o077 == 0
        contents.append(saving.content)
    assert contents[0] == saving.old
    assert contents[-1] == NEW


def test_interrupted_at_each_call_nothing_half_done_is_left(saving: Save) -> None:
    for call in saving.calls:
        result = saving.run(call, call.inject("signal=SIGINT"))
        assert result.status == INTERRUPTED, call
        expected = saving.old if saving.position(call) < saving.rename else NEW
        assert saving.content == expected, call
        assert saving.left == [], call


def test_refused_at_each_call_the_old_file_stays_and_nothing_is_left(saving: Save) -> None:
    must_fail = {"openat", "fchmod", "writev", "fsync", "close", "renameat", "renameat2"}
    failed = Counter[str]()
    for call in saving.calls:
        result = saving.run(call, call.inject("error=EIO"))
        assert len(result.injected) == 1, call
        assert result.ended, call
        assert saving.left == [], call
        if result.status == SAVED:
            assert call.name not in must_fail, call
            assert saving.content == NEW, call
            continue
        assert result.status == FAILED, call
        assert result.stdout.startswith("Failed to send migratable component snapshot: "), call
        assert repr(str(saving.target)) in result.stdout, call
        expected = saving.old if saving.position(call) <= saving.rename else NEW
        assert saving.content == expected, call
        assert ("saved, but might not survive" in result.stdout) == (
            call.name == "fsync" and saving.position(call) > saving.rename
        )
        failed[call.name] += 1
    assert not {name for name in failed if name.startswith("fadvise")}
    assert failed["writev"] == 3
    assert failed["fsync"] == failed["close"] == failed["openat"] == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ENOSPC", "No space left on device; free some space there"),
        ("EDQUOT", "Disk quota exceeded; free some of the quota"),
        ("EIO", "Input/output error; the device fails"),
    ],
)
def test_a_disk_that_fills_while_it_is_written(tmp_path: Path, error: str, message: str) -> None:
    saving = Save(tmp_path, OLD)
    for call in saving.named("writev", "fsync"):
        result = saving.run(call, call.inject(f"error={error}"))
        if saving.position(call) < saving.rename:
            assert message in result.stdout
            assert saving.content == OLD
        assert result.status == FAILED
        assert saving.left == []


def test_a_part_file_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    saving = Save(tmp_path, OLD)
    call, *_ = saving.named("fsync")
    refused = saving.run(call, call.inject("error=EIO"), "--inject=unlinkat:error=EROFS")
    (left,) = saving.left
    assert f"{left!r} is left in the folder (Read-only file system); delete it" in refused.stdout
    assert saving.content == OLD


def test_the_file_is_fsynced_before_it_is_renamed_and_its_folder_after(saving: Save) -> None:
    """What a power failure leaves depends on this order, which a killed process cannot show."""
    folder = saving.target.parent.resolve()
    steps = []
    for call in saving.calls:
        if call.name == "writev":
            steps.append("write")
        elif re.search(rf"fsync\(\d+<{re.escape(str(folder))}/[^>]+\.part>\) += 0", call.text):
            steps.append("fsync file")
        elif re.search(rf"fsync\(\d+<{re.escape(str(folder))}>\) += 0", call.text):
            steps.append("fsync folder")
        elif call.name.startswith("rename"):
            steps.append("rename")
    assert steps == ["write", "write", "write", "fsync file", "rename", "fsync folder"]
