from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = [path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_benchmark_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("msgspec", reason="the benchmarks compare with msgspec (extra dev)")
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", name],
        cwd=ROOT,
        env={**os.environ, "VMMIG_BENCHMARK_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("|") > 8


def test_an_unknown_benchmark_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "there are cloud_hypervisor, codec" in run.stderr
