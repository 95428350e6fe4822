from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vmmig import MissingExtraError

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
# By its module, whether vmmig is installed, and so loaded by its entry point, or not.
PLUGIN = ("-p", "no:vmmig", "-p", "vmmig.testing.plugin")

# Laws as `contract` marks them, without hypothesis, so that each outcome is wanted.
LAWS = """
import pytest

def law(name):
    def mark(function):
        function.vmmig_law = name
        return function
    return mark

class TestDisk:
    vmmig_component = "Disk"
    vmmig_notes = ("no operations", "nothing observed")

    @law("structure")
    def test_structure(self):
        pass

    @law("a snapshot is a value")
    def test_value(self):
        assert False

class TestClock:
    vmmig_component = "Clock"
    vmmig_notes = ()

    @law("structure")
    def test_structure(self):
        pass

    @law("time")
    @pytest.mark.parametrize("hour", range(3))
    def test_time(self, hour):
        if hour == 1:
            pytest.skip("no such hour")

def test_other():
    pass
"""

SUMMARY = [
    "1 2 3",
    "Clock . 1 2+1s",
    "Disk 1F 1 . weak: no operations, nothing observed",
    "tests passed of each law; F: failed, s: skipped, .: not run",
    "1 a snapshot is a value",
    "2 structure",
    "3 time",
]

# A whole component, with what is needed to compare it.
COUNTER = """
from hypothesis import strategies as st

from vmmig import RestoreError, Snapshot, SnapshotDataSection
from vmmig.testing import contract

class Counter:
    def __init__(self):
        self.n = 0

    def id(self):
        return "counter"

    def pause(self):
        pass

    def resume(self):
        pass

    def add(self, k):
        self.n += k

    def snapshot(self):
        return Snapshot("counter", {}, {"n": SnapshotDataSection("n", b"%d" % self.n)})

    def restore(self, snapshot):
        (n,) = snapshot.take("n")
        if not bytes(n).isdigit():
            raise RestoreError("not a number")
        self.n = int(bytes(n))

class Forgetful(Counter):
    def restore(self, snapshot):
        super().restore(snapshot)
        self.n = 0

OPERATIONS = {"add": [st.integers(0, 9)]}
TestCounter = contract(Counter, operations=OPERATIONS, observe=vars)
TestForgetful = contract(Forgetful)
"""


@pytest.fixture(autouse=True)
def vmmig_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def lines_of(result: pytest.RunResult) -> list[str]:
    """The lines of the plugin's summary, without the spaces that make columns of it."""
    (start,) = [at for at, line in enumerate(result.outlines) if " vmmig " in line]
    section = []
    for line in result.outlines[start + 1 :]:
        if line.startswith("="):
            break
        section.append(" ".join(line.split()))
    return section


class TestSummary:
    def test_says_which_laws_ran_on_which_components(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(LAWS)
        result = pytester.runpytest_inprocess(*PLUGIN)
        result.assert_outcomes(passed=5, failed=1, skipped=1)
        assert lines_of(result) == SUMMARY

    def test_a_broken_fixture_counts_as_a_failure(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile("""
            import pytest

            @pytest.fixture
            def disk():
                raise OSError("no disk")

            class TestDisk:
                vmmig_component = "Disk"

                def test_structure(self, disk):
                    pass

                test_structure.vmmig_law = "structure"
        """)
        assert "Disk 1F" in lines_of(pytester.runpytest_inprocess(*PLUGIN))

    def test_is_about_laws_only(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(test_laws=LAWS, test_broken="1 / 0", other='""" >>> 1 / 0 """')
        options = ("--doctest-modules", "--continue-on-collection-errors")
        result = pytester.runpytest_inprocess(*PLUGIN, *options)
        result.assert_outcomes(passed=5, failed=2, skipped=1, errors=2)
        assert lines_of(result) == SUMMARY

    def test_is_silent_when_no_law_ran(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile("def test_nothing(): pass")
        result = pytester.runpytest_inprocess(*PLUGIN)
        result.assert_outcomes(passed=1)
        result.stdout.no_fnmatch_line("*vmmig*")

    def test_laws_that_were_not_chosen_are_not_shown(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(LAWS)
        result = pytester.runpytest_inprocess(*PLUGIN, "-k", "Clock")
        lines = lines_of(result)
        assert lines[:2] == ["1 2", "Clock 1 2+1s"]
        assert lines[3:] == ["1 structure", "2 time"]

    def test_contracts_are_in_it(self, pytester: pytest.Pytester) -> None:
        pytester.makepyfile(COUNTER)
        result = pytester.runpytest_inprocess(*PLUGIN, "-k", "encoded or structure")
        result.assert_outcomes(passed=4)
        lines = lines_of(result)
        assert "Counter 1 1" in lines
        # Nothing is wrong with it, as far as can be seen: and how far that is, is said.
        (forgetful,) = [line for line in lines if line.startswith("Forgetful")]
        assert forgetful.startswith("Forgetful 1 1 weak: no operations, ")

    def test_it_is_the_same_when_workers_run_the_tests(self, pytester: pytest.Pytester) -> None:
        if find_spec("xdist") is None:
            absent = pytest.fail if os.environ.get("CI") else pytest.skip
            absent("pytest-xdist is not installed")
        pytester.makepyfile(LAWS)
        result = pytester.runpytest_subprocess(*PLUGIN, "-n", "2")
        assert lines_of(result) == SUMMARY


def test_it_loads_nothing_that_a_test_does_not_use(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_nothing_is_loaded(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("vmmig.testing.plugin")
            loaded = {name.partition(".")[0] for name in sys.modules}
            assert not loaded & {"hypothesis", "msgpack", "cattrs", "xxhash"}
            assert "vmmig.errors" not in sys.modules
    """)
    # Not hypothesis' own plugin either, which would load it for itself.
    result = pytester.runpytest_subprocess(*PLUGIN, "-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1)


class TestNames:
    def run(self, code: str) -> str:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def test_the_package_loads_nothing_before_it_is_asked(self) -> None:
        loaded = set(self.run("import sys, vmmig.testing; print(*sys.modules)").split())
        assert "vmmig.testing" in loaded
        assert not loaded & {"hypothesis", "msgpack", "pytest", "vmmig.errors"}

    def test_every_name_is_there(self) -> None:
        self.run("from vmmig import testing; [getattr(testing, name) for name in testing.__all__]")

    @pytest.mark.parametrize("missing", ["hypothesis", "hypothesis.stateful"])
    def test_a_missing_extra_is_named(self, missing: str) -> None:
        said = self.run(f"""
import sys
from vmmig import MissingExtraError

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
import vmmig.testing
try:
    vmmig.testing.contract
except MissingExtraError as error:
    print(error)
""")
        assert said == "hypothesis is not installed; pip install 'vmmig[testing]' adds it\n"

    @pytest.mark.parametrize(
        ("imports", "extra", "error"),
        [
            ("no_such_library.part", "kit", "no_such_library is not installed; pip install"),
            ("no_such_library.part", None, "No module named 'no_such_library'"),
            ("vmmig.no_such_module", "kit", "No module named 'vmmig.no_such_module'"),
        ],
    )
    def test_only_what_an_extra_adds_is_called_missing(
        self,
        pytester: pytest.Pytester,
        imports: str,
        extra: str | None,
        error: str,
    ) -> None:
        package = pytester.mkpydir("lazy_kit")
        (package / "part.py").write_text(f"import {imports}")
        (package / "__init__.py").write_text(
            "from vmmig._lazy import load_lazily\n"
            f"load_lazily(__name__, {{'part': 'thing'}}, extra={extra!r})"
        )
        pytester.syspathinsert()
        kit = importlib.import_module("lazy_kit")
        with pytest.raises(ModuleNotFoundError if "No" in error else MissingExtraError) as info:
            _ = kit.thing
        assert str(info.value).startswith(error)

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        import vmmig.testing

        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = vmmig.testing.nothing
        assert set(vmmig.testing.__all__) <= set(dir(vmmig.testing))
