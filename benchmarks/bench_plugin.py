"""What vmmig's pytest plugin adds to the start of a pytest that does not use it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import medians_s, ms, table

ROOT = Path(__file__).parent.parent


def main(*, quick: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_empty.py").touch()
        # As where it is installed: compiled once; and no other plugin, whose time varies.
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONPYCACHEPREFIX": f"{folder}/cache",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)

        def run(*options: str) -> None:
            command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", folder]
            ended = subprocess.run(
                [*command, *options, "test_empty.py"],
                cwd=folder,
                env=env,
                check=False,
                capture_output=True,
            )
            if ended.returncode != 5:  # no tests collected
                raise subprocess.CalledProcessError(ended.returncode, command, ended.stderr)

        times = medians_s(
            {
                "pytest alone": run,
                "with -p vmmig.testing.plugin": lambda: run("-p", "vmmig.testing.plugin"),
                "with -p hypothesis": lambda: run("-p", "hypothesis"),
            },
            rounds=1 if quick else 41,
        )
    alone = times["pytest alone"]
    rows: list[tuple[object, ...]] = [
        (name, ms(time), ms(time - alone), f"{time / alone:.3f}") for name, time in times.items()
    ]
    head = ("an empty test file", "ms", "ms added", "x pytest alone")
    print(table("The pytest plugin's start", head, rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
