from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vmmig

ROOT = Path(__file__).parent.parent
ALLOWED = {
    *("pyproject.toml", "vmmig", "tests", "benchmarks", "CHANGELOG.md", "README.md", "LICENSE"),
    "build",
}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_vmmig_loads_no_optional_part() -> None:
    loaded = loaded_by("import vmmig; [getattr(vmmig, name) for name in vmmig.__all__]")
    assert "vmmig.codec" in loaded
    optional = {"hypothesis", "pytest", "unicorn", "click", "rich", "pickle", "ssl", "asyncio"}
    assert not optional & loaded
    assert not {name for name in loaded if name.startswith(("vmmig.adapters", "vmmig.cli"))}


def test_a_name_is_loaded_when_asked_for() -> None:
    assert not {"attrs", "msgpack", "vmmig.errors"} & loaded_by("import vmmig")
    assert "msgpack" not in loaded_by("from vmmig import PauseError")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vmmig.nothing
    assert set(vmmig.__all__) <= set(dir(vmmig))


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    for first in ("import vmmig.verify", "from vmmig.verify import verify", "pass"):
        code = f"{first}; import vmmig; assert callable(vmmig.verify), vmmig.verify"
        assert "vmmig.verify" in loaded_by(code)


def test_type_checkers_see_the_names_that_are_there() -> None:
    source = ast.parse((ROOT / "vmmig" / "__init__.py").read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(source)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vmmig.")
        for alias in node.names
        if alias.name == alias.asname
    }
    assert seen == {name: f"vmmig.{home}" for name, home in vmmig._HOMES.items()}


def test_nothing_on_the_way_in_can_run_code() -> None:
    sources = [path.read_text() for path in (ROOT / "vmmig" / "codec").glob("*.py")]
    assert len(sources) > 1
    for word in ("pickle", "eval(", "exec(", "import_module", "__import__"):
        assert not any(word in source for source in sources)


def test_every_public_name_is_there() -> None:
    assert sorted(vmmig.__all__) == sorted(set(vmmig.__all__))
    assert all(hasattr(vmmig, name) for name in vmmig.__all__)


def test_every_module_can_be_imported_alone() -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(vmmig.__path__, "vmmig.")
        if not module.name.endswith("__main__")
    ]
    assert "vmmig.codec" in modules
    for name in modules:
        assert name in loaded_by(f"import {name}")


def test_only_the_command_line_prints() -> None:
    for path in (ROOT / "vmmig").rglob("*.py"):
        if "cli" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", (path, node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                stream = (node.value.id, node.attr)
                assert stream not in {("sys", "stdout"), ("sys", "stderr")}, (path, node.lineno)


def test_nothing_else_lies_at_the_top() -> None:
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert there - {name for name in there if name.endswith(".egg-info")} <= ALLOWED
