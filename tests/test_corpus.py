from __future__ import annotations

import hashlib
import json
import shutil
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis.errors import InvalidArgument

import vmmig
from vmmig.testing import corpus

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
PLUGIN = ("-p", "no:vmmig", "-p", "vmmig.testing.plugin")

# A disk of a project, and its corpus. What a later release does is put into the braces.
DISK = """
from vmmig import RestoreError, Snapshot, SnapshotDataSection
from vmmig.testing import corpus

class Disk:
    def __init__(self, spinning=False, sectors=()):
        self.spinning = spinning
        self.sectors = set(sectors)
        self.paused = False

    def id(self):
        return "../../disk"

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def snapshot(self):
        assert self.paused
        sectors = ",".join(map(str, sorted(self.sectors)))
        section = SnapshotDataSection("state", f"{self.spinning:d} {sectors}".encode())
        return Snapshot(self.id(), {}, {"state": section})

    def restore(self, snapshot):
        assert self.paused
        (state,) = snapshot.take("state")
        spinning, sectors = bytes(state).decode().split(" ")
        self.spinning = spinning == "1"
        self.sectors = {int(sector) for sector in sectors.split(",") if sector}

def look(disk):
    return {"spinning": disk.spinning, "sectors": disk.sectors}

EXAMPLES = {"idle": Disk, "spinning": lambda: Disk(True, range(3))}
RELEASE = "1.0"
OBSERVE = look
"""
CORPUS = """
TestDiskCorpus = corpus(Disk, "golden", EXAMPLES, observe=OBSERVE, release=RELEASE)
"""


class Project:
    """A project with a component and its corpus, whose tests are run by pytest."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.golden = pytester.path / "tests" / "golden"
        self.golden.parent.mkdir()
        self.write()

    def write(self, later: str = "") -> None:
        """The project at a later release, where that is given."""
        test = self.golden.parent / "test_disk.py"
        test.write_text(DISK + later + CORPUS)
        shutil.rmtree(test.parent / "__pycache__", ignore_errors=True)

    def test(self, *options: str) -> pytest.RunResult:
        return self.pytester.runpytest_inprocess(*PLUGIN, *options)

    def record(self) -> pytest.RunResult:
        return self.test("--vmmig-record")

    def provenance(self, release: str = "1.0") -> Any:
        return json.loads((self.golden / release / "provenance.json").read_text())

    def fails(self, *texts: str, failed: int = 1, passed: int = 0) -> None:
        result = self.test()
        result.assert_outcomes(failed=failed, passed=passed)
        for text in texts:
            assert text in result.stdout.str()


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Project(pytester)


@pytest.fixture
def recorded(project: Project) -> Project:
    project.record().assert_outcomes(passed=1)
    return project


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestRecording:
    def test_writes_each_example_and_where_it_comes_from(self, project: Project) -> None:
        result = project.record()
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines(["recorded 2 of Disk in */tests/golden/1.0"])
        names = {path.name for path in (project.golden / "1.0").iterdir()}
        assert names == {"idle.vmsnap", "spinning.vmsnap", "provenance.json"}
        assert [path.name for path in project.golden.iterdir()] == ["1.0"]
        said = project.provenance()
        assert said["release"] == "1.0"
        assert said["vmmig"] == vmmig.__version__
        assert said["format"] == 1
        assert said["python"].split()[1] == ".".join(map(str, sys.version_info[:3]))
        assert sys.platform in said["platform"].lower()
        assert datetime.fromisoformat(said["recorded_at"]).utcoffset() == timedelta(0)
        for name, entry in said["files"].items():
            data = (project.golden / "1.0" / name).read_bytes()
            assert entry["size_bytes"] == len(data)
            assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert said["files"]["spinning.vmsnap"]["observed"] == {
            "sectors": "{0, 1, 2}",
            "spinning": "True",
        }

    def test_never_changes_what_exists(self, recorded: Project) -> None:
        before = content(recorded.golden)
        recorded.write("EXAMPLES['new'] = lambda: Disk(True, [7])")
        result = recorded.record()
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*release 1.0 is recorded already*raise the version*"])
        assert content(recorded.golden) == before

    def test_adds_the_next_release(self, recorded: Project) -> None:
        before = content(recorded.golden)
        recorded.write("RELEASE = '1.1'; EXAMPLES['new'] = lambda: Disk(True, [7])")
        recorded.record().assert_outcomes(passed=1)
        assert before.items() <= content(recorded.golden).items()
        recorded.test().assert_outcomes(passed=5)

    @pytest.mark.parametrize(
        ("mistake", "text"),
        [
            ("EXAMPLES['z'] = lambda: 1 / 0", "'z': ZeroDivisionError"),
            ("EXAMPLES['z'] = object", "'z': AttributeError"),
            ("OBSERVE = lambda disk: object()", "another text in every process"),
            ("Disk.restore = lambda self, snapshot: None", "is not what was saved"),
            ("Disk.snapshot = lambda self: 'disk'", "'idle': MigrateSendError"),
            ("EXAMPLES = {}", "there are no examples"),
            ("RELEASE = None", "give its version to corpus(..., release=...)"),
        ],
    )
    def test_writes_nothing_that_proves_nothing(
        self, project: Project, mistake: str, text: str
    ) -> None:
        project.write(mistake)
        result = project.record()
        result.assert_outcomes(failed=1)
        assert text in result.stdout.str()
        assert not project.golden.exists() or not [*project.golden.iterdir()]

    def test_a_folder_that_cannot_be_made_is_named(self, project: Project) -> None:
        project.golden.write_text("a file")
        result = project.record()
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*golden/1.0: it could not be recorded:*"])
        assert project.golden.read_text() == "a file"

    def test_finds_the_version_of_the_distribution(self, project: Project) -> None:
        package = project.pytester.path / "disks"
        package.mkdir()
        (package / "__init__.py").write_text(DISK)
        facts = project.pytester.path / "acme_disks-2.5.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-disks\nVersion: 2.5\n")
        (facts / "top_level.txt").write_text("disks\n")
        test = project.golden.parent / "test_disk.py"
        test.write_text("from disks import *\nRELEASE = None\n" + CORPUS)
        project.pytester.makeini("[pytest]\npythonpath = .")
        project.record().assert_outcomes(passed=1)
        assert project.provenance("2.5")["release"] == "2.5"

    def test_leaves_nothing_behind_when_it_is_killed_between(self, project: Project) -> None:
        project.write("import os\nEXAMPLES['z'] = lambda: os._exit(9)")
        project.pytester.runpytest_subprocess(*PLUGIN, "--vmmig-record")
        assert [path.name[:7] for path in project.golden.iterdir()] == [".vmmig-"]
        project.fails("nothing was ever recorded here")


class TestChecking:
    def test_each_file_is_a_test_of_its_own(self, recorded: Project) -> None:
        result = recorded.test("-v")
        result.assert_outcomes(passed=2)
        result.stdout.fnmatch_lines(
            [
                "*::TestDiskCorpus::test_golden[[]1.0/idle.vmsnap[]] PASSED*",
                "*::TestDiskCorpus::test_golden[[]1.0/spinning.vmsnap[]] PASSED*",
                "Disk 2",
                " 1 what a release saved can be restored",
            ]
        )

    def test_what_is_observed_is_the_same_text_in_every_process(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.write("""
import array, collections, dataclasses, enum

class Color(enum.IntEnum):
    RED = 1

class Plain:
    def __init__(self):
        self.names = {"a", "b"}

@dataclasses.dataclass
class Record:
    names: frozenset

class Whole(int):
    pass

def observe(disk):
    names = frozenset("abcdefgh")
    return {
        "enum": Color.RED,
        "numbers": [True, Whole(1), 0.1, float("nan"), None],
        "texts": ("a'b", "\\udc80"),
        "bytes": bytearray(b"ab"),
        "many": array.array("B", bytes(65)),
        "names": names,
        "by_key": {2: names, 1: collections.deque([1])},
        "objects": [Plain(), Record(names)],
        "type": int,
    }

OBSERVE = observe
""")
        project.record().assert_outcomes(passed=1)
        for seed in ("1", "2"):
            monkeypatch.setenv("PYTHONHASHSEED", seed)
            project.pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=2)
        names = "{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}"
        sha256 = hashlib.sha256(bytes(65)).hexdigest()
        assert project.provenance()["files"]["idle.vmsnap"]["observed"] == {
            "enum": "Color.RED",
            "numbers": "[True, 1, 0.1, nan, None]",
            "texts": """["a'b", '\\udc80']""",
            "bytes": "b'ab'",
            "many": f"65 bytes with the sha256 {sha256}",
            "names": names,
            "by_key": f"{{1: [1], 2: {names}}}",
            "objects": f"[Plain({{'names': {{'a', 'b'}}}}), Record({{'names': {names}}})]",
            "type": "<class 'int'>",
        }

    def test_one_value_may_be_observed(self, project: Project) -> None:
        project.write("OBSERVE = lambda disk: disk.sectors")
        project.record().assert_outcomes(passed=1)
        project.write("OBSERVE = lambda disk: [*disk.sectors]")
        project.fails("recorded: {0, 1, 2}", "today:    [0, 1, 2]", failed=2)

    def test_a_long_difference_is_shown_where_it_begins(self, project: Project) -> None:
        project.write("OBSERVE = lambda disk: 'x' * 1000 + 'old' + 'y' * 1000")
        project.record().assert_outcomes(passed=1)
        project.write("OBSERVE = lambda disk: 'x' * 1000 + 'new' + 'y' * 1000")
        project.fails(f"recorded: ...{'x' * 60}old{'y' * 237}", failed=2)

    def test_needs_no_plugin(self, recorded: Project) -> None:
        result = recorded.pytester.runpytest_inprocess("-p", "no:vmmig")
        result.assert_outcomes(passed=2)

    def test_fails_when_nothing_was_recorded(self, project: Project) -> None:
        project.fails("test_golden[empty]", "record the current release with pytest --vmmig-record")

    def test_writes_nothing(self, recorded: Project) -> None:
        before = content(recorded.golden)
        recorded.test().assert_outcomes(passed=2)
        assert content(recorded.golden) == before

    def test_a_release_that_forgets_a_field_is_found(self, recorded: Project) -> None:
        recorded.write("""
def restore(self, snapshot, whole=Disk.restore):
    whole(self, snapshot)
    self.sectors = set()

Disk.restore = restore
RELEASE = "1.1"
""")
        recorded.fails(
            "1.0/spinning.vmsnap: a component restored from it is not what was saved",
            "'sectors': recorded: {0, 1, 2}",
            "'sectors': today:    {}",
            "component.restore(saved)",
            passed=1,
        )

    def test_a_release_that_cannot_load_what_is_old_is_found(self, recorded: Project) -> None:
        recorded.write("""
def restore(self, snapshot):
    snapshot.take("state", "firmware")

Disk.restore = restore
""")
        recorded.fails("it cannot be restored today: RestoreError:", "firmware", failed=2)

    def test_a_release_may_show_more(self, recorded: Project) -> None:
        recorded.write("OBSERVE = lambda disk: look(disk) | {'speed': 7200}")
        recorded.test().assert_outcomes(passed=2)

    def test_a_release_may_not_show_less(self, recorded: Project) -> None:
        recorded.write("OBSERVE = lambda disk: {'spinning': disk.spinning}")
        recorded.fails("'sectors': today:    None", failed=2)

    def test_what_was_observed_must_be_observed(self, recorded: Project) -> None:
        recorded.write("OBSERVE = None")
        recorded.fails("recorded with an observe function", failed=2)

    def test_without_observations_it_says_how_little_it_proves(self, project: Project) -> None:
        project.write("OBSERVE = None")
        project.record().assert_outcomes(passed=1)
        assert project.provenance()["files"]["idle.vmsnap"]["observed"] is None
        project.write()
        project.test().assert_outcomes(passed=2)
        project.write("OBSERVE = None")
        result = project.test()
        result.assert_outcomes(passed=2)
        result.stdout.fnmatch_lines(["Disk 2  weak: nothing observed of what is restored"])


class TestDamage:
    def test_a_file_that_was_changed_is_found(self, recorded: Project) -> None:
        release = recorded.golden / "1.0"
        shutil.copy(release / "idle.vmsnap", release / "spinning.vmsnap")
        recorded.fails("1.0/spinning.vmsnap: it is not what was recorded: its sha256", passed=1)

    def test_a_file_that_is_gone_is_found(self, recorded: Project) -> None:
        (recorded.golden / "1.0" / "idle.vmsnap").unlink()
        recorded.fails("1.0/idle.vmsnap: its provenance names it, but it is gone", passed=1)

    def test_a_file_that_nobody_recorded_is_found(self, recorded: Project) -> None:
        release = recorded.golden / "1.0"
        shutil.copy(release / "idle.vmsnap", release / "other.vmsnap")
        recorded.fails("1.0/other.vmsnap: its provenance does not name it", passed=2)

    def test_a_file_of_no_release_is_found(self, recorded: Project) -> None:
        shutil.copy(recorded.golden / "1.0" / "idle.vmsnap", recorded.golden)
        recorded.fails("golden: there is no provenance.json", passed=2)

    def test_a_provenance_that_is_gone_is_found(self, recorded: Project) -> None:
        (recorded.golden / "1.0" / "provenance.json").unlink()
        recorded.fails("1.0: there is no provenance.json", failed=2)

    @pytest.mark.parametrize(
        "damaged", ["", "[]", "{", '{"files": {}}', '{"files": {"a": 7}}', "[" * 100_000, "\xff"]
    )
    def test_a_damaged_provenance_is_found(self, recorded: Project, damaged: str) -> None:
        (recorded.golden / "1.0" / "provenance.json").write_text(damaged, "latin-1")
        recorded.fails("provenance.json: it is damaged", failed=2)

    def test_a_provenance_without_files_is_found(self, recorded: Project) -> None:
        release = recorded.golden / "1.0"
        for path in release.glob("*.vmsnap"):
            path.unlink()
        recorded.fails("1.0/idle.vmsnap: its provenance names it, but it is gone", failed=2)
        (release / "provenance.json").write_text('{"release": "1.0", "files": {}}')
        recorded.fails("1.0/provenance.json: it names no file")

    def test_a_release_under_another_name_is_found(self, recorded: Project) -> None:
        (recorded.golden / "1.0").rename(recorded.golden / "2.0")
        recorded.fails("it is of release '1.0', but its folder is '2.0'", failed=2)

    @pytest.mark.parametrize("name", ["../secret.vmsnap", "/etc/passwd", "a\0.vmsnap", "", "x"])
    def test_no_name_in_a_provenance_becomes_a_path(self, recorded: Project, name: str) -> None:
        shutil.copy(recorded.golden / "1.0" / "idle.vmsnap", recorded.golden / "secret.vmsnap")
        said = recorded.provenance()
        said["files"][name] = said["files"]["idle.vmsnap"]
        (recorded.golden / "1.0" / "provenance.json").write_text(json.dumps(said))
        (recorded.golden / "secret.vmsnap").unlink()
        recorded.fails("cannot be the file of an example", passed=2)


class TestArguments:
    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a b", "\0", "é", "x" * 101, 7])
    def test_a_name_that_could_be_a_path_is_refused(self, name: Any) -> None:
        with pytest.raises(InvalidArgument, match="examples has the name"):
            corpus(dict, "golden", {name: dict})

    @pytest.mark.parametrize("release", ["", "..", "1/2"])
    def test_so_is_such_a_release(self, release: str) -> None:
        with pytest.raises(InvalidArgument, match="release="):
            corpus(dict, "golden", {"empty": dict}, release=release)

    def test_an_example_must_be_callable(self) -> None:
        with pytest.raises(InvalidArgument, match="'full'"):
            corpus(dict, "golden", {"full": {}})  # type: ignore[dict-item]

    def test_a_version_may_be_any(self) -> None:
        for release in ("1!2.0a1.dev3+g1234abc", "2026.11", "v1"):
            corpus(dict, "golden", {"empty": dict}, release=release)
