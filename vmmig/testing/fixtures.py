"""The pytest fixtures of the testing kit; the plugin makes them known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def vmmig_failing() -> Callable[..., Any]:
    """`vmmig.testing.failing`."""
    from vmmig.testing.faults import failing

    return failing


@pytest.fixture
def vmmig_faulty_stream() -> Callable[..., Any]:
    """`vmmig.testing.FaultyStream`."""
    from vmmig.testing.faults import FaultyStream

    return FaultyStream


@pytest.fixture
def vmmig_full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a real file system of its own with 64 KiB of space; skips where none can be
    mounted.
    """
    import subprocess

    folder = tmp_path / "full-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
