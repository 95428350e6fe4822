"""The command line as its users run it: real processes, with a small guest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmmig.adapters import guest

MIB = 1 << 20
SMALL = ["--ram-mib", "1", "--rounds", "2"]
DIGEST = guest.expected_digest(MIB, 2)


def vmmig(*arguments: str | os.PathLike[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a vmmig command in a process; ``before`` is Python code that runs first in it."""
    command = [sys.executable, "-m", "vmmig.cli", *arguments]
    if before:
        code = f"{before}\nfrom vmmig.cli import main\nmain()"
        command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("demo") / "machine.vmsnap"
    result = vmmig("demo", *SMALL, "--json", "--keep", path)
    assert result.returncode == 0, result.stderr
    assert f"digest {DIGEST}" in result.stderr
    return path, json.loads(result.stdout)


def test_the_demo_proves_that_nothing_was_lost(kept):
    path, facts = kept
    assert facts["ok"]
    assert facts["consoles_agree"]
    assert {*facts["digests"].values()} == {DIGEST}
    assert facts["resumed_by_pid"] != facts["pid"]
    assert facts["snapshot_bytes"] == path.stat().st_size > MIB
    assert all(seconds >= 0 for seconds in facts["times_s"].values())


def test_what_the_demo_kept_runs_on_as_often_as_one_likes(kept):
    path, _ = kept
    once, again = vmmig("run", path), vmmig("run", path)
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert f"digest {DIGEST}\npower off\n" in once.stdout
    assert not once.stdout.startswith("vmmig guest")


def test_the_demo_tells_what_it_does_without_colours_in_a_pipe():
    result = vmmig("demo", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    for words in ("    | vmmig guest: 1024 KiB of RAM, 2 rounds", "Paused in", "digests agree"):
        assert words in result.stdout
    assert result.stdout.count(DIGEST) == 4


def test_the_demo_fails_when_a_digest_differs():
    wrong = "from vmmig.adapters import guest\nguest.expected_digest = lambda *_: '0' * 64"
    result = vmmig("demo", *SMALL, "--json", before=wrong)
    assert result.returncode == 1
    assert not json.loads(result.stdout)["ok"]
    assert "DIFFER" in result.stderr


def test_a_damaged_snapshot_is_one_line_and_status_1(kept, tmp_path):
    damaged = tmp_path / "damaged.vmsnap"
    data = bytearray(kept[0].read_bytes())
    data[-1000] ^= 1
    damaged.write_bytes(data)
    result = vmmig("run", damaged)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("vmmig: Failed to receive migratable component snapshot: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "extra"), [("click", "vmmig[cli]"), ("unicorn", "vmmig[unicorn]")]
)
def test_a_missing_extra_is_one_line_and_status_2(module, extra):
    result = vmmig("demo", before=f"import sys\nsys.modules[{module!r}] = None")
    assert (result.returncode, result.stdout) == (2, "")
    assert extra in result.stderr
    assert result.stderr.count("\n") == 1


def test_misuse_is_status_2():
    result = vmmig("demo", "--rounds", "0")
    assert result.returncode == 2
    assert "--rounds" in result.stderr
