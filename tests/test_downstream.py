"""A stranger's project, installed next to the built wheel and proven there by vmmig.testing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vmmig import Composite
from vmmig.testing import contract

SOURCE = Path(__file__).parent.parent
CONTRACTS = {
    "TestBank",
    "TestBench",
    "TestDatabase",
    "TestDice",
    "TestGame",
    "TestMos6502",
    "TestNoise",
    "TestRegulator",
    "TestRiscV",
}

pytestmark = pytest.mark.skipif(
    not os.environ.get("CI"), reason="downloads a project's dependencies: set CI to run it"
)


def run(*command: str | Path, cwd: Path) -> None:
    isolated = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=cwd, env=isolated, capture_output=True, text=True)
    assert process.returncode == 0, f"{command}:\n{process.stdout}\n{process.stderr}"


def test_every_law_holds_in_a_downstream_project(tmp_path: Path) -> None:
    project = shutil.copytree(
        SOURCE / "tests" / "downstream",
        tmp_path / "project",
        ignore=shutil.ignore_patterns(".*", "__pycache__"),
    )
    bin = tmp_path / "venv" / "bin"
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pip = (bin / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", SOURCE, "--no-deps", "--wheel-dir", tmp_path / "dist", cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("vmmig-*.whl")
    run(*pip, "install", wheel, f"{project}[test]", cwd=tmp_path)

    # The script, not `python -m pytest`, so that what is installed is tested and not the folder.
    report = tmp_path / "report.xml"
    run(bin / "pytest", f"--junit-xml={report}", cwd=project)

    laws = {name for name in vars(contract(lambda: Composite("empty", []))) if "test_" in name}
    held: dict[str, set[str]] = {name: set() for name in CONTRACTS}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].rpartition(".")[2]
        if name.startswith("Test") and not len(case):
            held.setdefault(name, set()).add(case.attrib["name"])
    golden = held.pop("TestBenchCorpus")
    assert held == dict.fromkeys(CONTRACTS, laws)
    assert len(golden) >= 2
