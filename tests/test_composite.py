from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmmig.composite import Composite, RestoreReport
from vmmig.errors import (
    ContractError,
    MigratableError,
    PauseError,
    PauseErrorGroup,
    RestoreError,
    RestoreErrorGroup,
    ResumeError,
    ResumeErrorGroup,
    SnapshotError,
)
from vmmig.migration import recv, send
from vmmig.snapshot import Snapshot, SnapshotDataSection
from vmmig.traits import Migratable
from vmmig.verify import verify

PROMISED = {
    "pause": PauseError,
    "resume": ResumeError,
    "snapshot": SnapshotError,
    "restore": RestoreError,
}


class Counter:
    """A component with one number and a log; ``fail`` says which of its calls fail, and how."""

    def __init__(self, id: str, log: list[tuple[str, str]] | None = None) -> None:
        self._id = id
        self.running = True
        self.n = 0
        self.fail: dict[str, BaseException] = {}
        self.log = [] if log is None else log

    def _act(self, action: str) -> None:
        self.log.append((action, self._id))
        if action in self.fail:
            raise self.fail[action]

    def id(self) -> str:
        return self._id

    def pause(self) -> None:
        self._act("pause")
        self.running = False

    def resume(self) -> None:
        self._act("resume")
        self.running = True

    def snapshot(self) -> Snapshot:
        self._act("snapshot")
        snapshot = Snapshot(self._id)
        snapshot.add_data_section(SnapshotDataSection("n", b"%d" % self.n))
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        self._act("restore")
        self.n = int(bytes(memoryview(snapshot.section("n").snapshot)))


class Unfinished(PauseError):
    def __init__(self) -> None:
        pass


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def machine(*ids: str, **depends_on: list[str]) -> tuple[Composite, list[Counter], list[Any]]:
    log: list[tuple[str, str]] = []
    parts = [Counter(id, log) for id in ids]
    return Composite("vm", parts, depends_on=depends_on), parts, log


def states(error: MigratableError) -> dict[str, str]:
    return {path.removeprefix("vm/"): state for path, state in error.component_states.items()}


class TestOrder:
    def test_the_order_given(self) -> None:
        vm, _, log = machine("a", "b", "c")
        vm.pause()
        saved = vm.snapshot()
        vm.resume()
        vm.pause()
        del log[:]
        vm.restore(saved)
        assert [entry for entry in log if entry[0] == "restore"] == [
            ("restore", "a"),
            ("restore", "b"),
            ("restore", "c"),
        ]
        del log[:]
        vm.resume()
        vm.pause()
        vm.snapshot()
        assert log == [
            *[("resume", id) for id in "abc"],
            *[("pause", id) for id in "cba"],
            *[("snapshot", id) for id in "abc"],
        ]

    @given(st.data())
    def test_dependencies_come_first_and_else_the_order_given(self, data: st.DataObject) -> None:
        ids = [str(i) for i in range(data.draw(st.integers(1, 8)))]
        order = data.draw(st.permutations(ids))
        depends_on = {
            id: data.draw(st.lists(st.sampled_from(order[:i]), unique=True)) if i else []
            for i, id in enumerate(order)
        }
        vm = Composite("vm", [Counter(id) for id in ids], depends_on=depends_on)
        start = [*vm.components]
        assert sorted(start) == sorted(ids)
        for id, needs in depends_on.items():
            assert all(start.index(need) < start.index(id) for need in needs)
        if not any(depends_on.values()):
            assert start == ids

    def test_a_cycle_is_named(self) -> None:
        with pytest.raises(ContractError, match="form a cycle: a -> b -> c -> a"):
            machine("a", "b", "c", a=["b"], b=["c"], c=["a"])
        with pytest.raises(ContractError, match="form a cycle: a -> a"):
            machine("a", a=["a"])

    def test_strange_dependencies_and_equal_ids_are_refused(self) -> None:
        with pytest.raises(ContractError, match="names 'x', 'y'"):
            machine("a", a=["x"], y=["a"])
        with pytest.raises(ContractError, match="two parts with the id 'a'"):
            machine("a", "a")

    def test_parts_are_checked_at_once(self) -> None:
        with pytest.raises(ContractError, match="restore"):
            Composite("vm", [object()])  # type: ignore[list-item]

        class Numbered(Counter):
            def id(self) -> Any:
                return 7

        with pytest.raises(ContractError, match="is not a str: 7"):
            Composite("vm", [Numbered("x")])


class TestAllOrNone:
    @given(
        st.integers(1, 5),
        st.data(),
        st.sampled_from(["pause", "resume", "snapshot", "restore"]),
        st.booleans(),
    )
    def test_a_failure_leaves_each_part_as_it_was(
        self, count: int, data: st.DataObject, action: str, promised: bool
    ) -> None:
        """Law 5, for each action, whichever part fails, by its contract or not."""
        ids = [str(i) for i in range(count)]
        vm, parts, _ = machine(*ids)
        vm.pause()
        for part in parts:
            part.n = 1
        saved = vm.snapshot()
        for part in parts:
            part.n = 2
        if action == "pause":
            vm.resume()
        before = [(part.running, part.n) for part in parts]
        bad = parts[data.draw(st.integers(0, count - 1))]
        kind = PROMISED[action]
        bad.fail[action] = kind("no") if promised else OSError("no")
        with pytest.raises(kind) as info:
            getattr(vm, action)(*([saved] if action == "restore" else []))
        assert [(part.running, part.n) for part in parts] == before
        error = info.value
        assert error.component_path == f"vm/{bad.id()}"
        assert "no" in str(error)
        as_before = {"pause": "running", "resume": "paused"}.get(action, "as before")
        expected = dict.fromkeys(ids, as_before) | ({} if promised else {bad.id(): "unknown"})
        assert states(error) == expected
        if not promised:
            assert isinstance(error.__cause__, OSError)
        bad.fail.clear()
        assert getattr(vm, action)(*([saved] if action == "restore" else [])) is not NotImplemented

    def test_an_error_while_undoing_makes_a_group(self) -> None:
        vm, (a, b, c), _ = machine("a", "b", "c")
        a.fail["pause"] = PauseError("a is busy")
        b.fail["resume"] = ResumeError("b is stuck")
        c.fail["resume"] = OSError("c is on fire")
        with pytest.raises(PauseErrorGroup) as info:
            vm.pause()
        assert [e.component_path for e in info.value.exceptions] == ["vm/a", "vm/b", "vm/c"]  # type: ignore[attr-defined]
        assert states(info.value) == {"a": "as before", "b": "paused", "c": "unknown"}
        for action in (vm.snapshot, lambda: vm.restore(Snapshot("vm"))):
            with pytest.raises(MigratableError, match="neither running nor paused"):
                action()
        for part in (a, b, c):
            part.fail.clear()
        vm.pause()
        assert not any(part.running for part in (a, b, c))
        vm.snapshot()

    def test_a_failed_undoing_of_resume_and_of_restore(self) -> None:
        vm, (a, b), _ = machine("a", "b")
        vm.pause()
        saved = vm.snapshot()
        b.fail["resume"] = ResumeError("no")
        a.fail["pause"] = PauseError("no")
        with pytest.raises(ResumeErrorGroup) as info:
            vm.resume()
        assert states(info.value) == {"a": "running", "b": "paused"}

        class Once(Counter):
            def restore(self, snapshot: Snapshot) -> None:
                super().restore(snapshot)
                self.fail["restore"] = RestoreError("once only")

        once, other = Once("a"), Counter("b")
        vm = Composite("vm", [once, other])
        once.n = 5
        other.fail["restore"] = RestoreError("no")
        with pytest.raises(RestoreErrorGroup) as restored:
            vm.restore(saved)
        assert states(restored.value) == {"a": "restored", "b": "as before"}

    def test_what_could_not_be_undone_can_be_put_right_by_another_call(self) -> None:
        vm, (a, b), _ = machine("a", "b")
        vm.resume()
        a.fail["pause"] = PauseError("busy")
        b.fail["resume"] = ResumeError("stuck")
        with pytest.raises(PauseErrorGroup):
            vm.pause()
        a.fail.clear()
        b.fail.clear()
        assert (a.running, b.running) == (True, False)
        with pytest.raises(SnapshotError, match="neither running nor paused; pause it first"):
            vm.snapshot()
        vm.resume()
        assert (a.running, b.running) == (True, True)

    @pytest.mark.parametrize("problem", [OSError("after it stopped"), KeyboardInterrupt()])
    def test_a_part_in_an_unknown_state_is_asked_again(self, problem: BaseException) -> None:
        vm, (a, _b), log = machine("a", "b")
        vm.resume()
        a.fail["pause"] = problem
        with pytest.raises((PauseError, KeyboardInterrupt)):
            vm.pause()
        del log[:]
        vm.resume()
        assert log == [("resume", "a"), ("resume", "b")]

    def test_a_pause_undone_leaves_it_running(self) -> None:
        vm, (a, _b), log = machine("a", "b")
        vm.resume()
        a.fail["pause"] = PauseError("busy")
        with pytest.raises(PauseError):
            vm.pause()
        del log[:]
        vm.resume()
        assert log == []
        with pytest.raises(SnapshotError, match="it is running; pause it first"):
            vm.snapshot()

    def test_ctrl_c_undoes_too(self) -> None:
        vm, (a, b, c), _ = machine("a", "b", "c")
        a.fail["pause"] = KeyboardInterrupt()
        b.fail["resume"] = ResumeError("stuck")
        with pytest.raises(KeyboardInterrupt) as info:
            vm.pause()
        assert (b.running, c.running) == (False, True)
        assert info.value.__notes__ == [
            "while undoing: Failed to resume migratable component: vm/b: stuck"
        ]

    def test_repeated_calls_reach_nobody(self) -> None:
        vm, _, log = machine("a")
        vm.resume()
        vm.resume()
        vm.pause()
        vm.pause()
        assert log == [("resume", "a"), ("pause", "a")]

    def test_a_running_composite_is_neither_saved_nor_restored(self) -> None:
        vm, (a,), _ = machine("a")
        vm.pause()
        saved = vm.snapshot()
        vm.resume()
        a.n = 9
        with pytest.raises(SnapshotError, match="vm: it is running"):
            vm.snapshot()
        with pytest.raises(RestoreError, match="vm: it is running"):
            vm.restore(saved)
        assert a.n == 9

    def test_the_state_to_go_back_to_must_be_had(self) -> None:
        vm, (a, b), _ = machine("a", "b")
        saved = vm.snapshot()
        a.n = 3
        a.fail["snapshot"] = SnapshotError("cannot")
        with pytest.raises(RestoreError, match="vm/a: its present state could not be taken"):
            vm.restore(saved)
        assert a.n == 3
        a.fail.clear()
        b.fail["snapshot"] = SnapshotError("not needed for the last one")
        vm.restore(saved)
        assert a.n == 0


class TestSnapshots:
    def test_it_is_migratable_through_a_file(self, tmp_path: Any) -> None:
        vm, parts, _ = machine("a", "b")
        assert isinstance(vm, Migratable)
        verify(vm, Migratable, defaults="error")
        vm.pause()
        parts[1].n = 77
        vm.send(vm.snapshot(), str(tmp_path / "vm.vmsnap"))
        other, others, _ = machine("a", "b")
        report = other.restore(other.recv(f"file://{tmp_path}/vm.vmsnap"))
        assert report == RestoreReport(consumed=("vm/a", "vm/b"))
        assert others[1].n == 77

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (lambda: Snapshot("other"), "gave the id 'other', but id"),
            (lambda: Snapshot(""), "gave the id ''"),
            (lambda: None, "gave a NoneType, not a Snapshot"),
        ],
    )
    def test_a_part_must_give_its_own_snapshot(self, answer: Callable[[], Any], text: str) -> None:
        vm, (a,), _ = machine("a")
        a.snapshot = answer  # type: ignore[method-assign]
        with pytest.raises(SnapshotError, match=text):
            vm.snapshot()

    def test_what_does_not_fit_is_refused_before_anything_is_touched(self) -> None:
        vm, _, log = machine("a", "b")
        saved = vm.snapshot()
        del saved.snapshots["a"]
        saved.add_snapshot(Snapshot("tpm"))
        saved.add_data_section(SnapshotDataSection("new", b""))
        del log[:]
        with pytest.raises(RestoreError) as info:
            vm.restore(saved)
        assert str(info.value) == (
            "Failed to restore migratable component: vm: the snapshot does not fit: "
            "it has nothing for 'a' (missing='skip' allows it); no component knows its "
            "snapshots 'tpm' and sections 'new' (unknown='keep' allows it)"
        )
        with pytest.raises(RestoreError, match="of 'other', not of 'vm'"):
            vm.restore(Snapshot("other"))
        with pytest.raises(RestoreError, match="a Snapshot is needed, not NoneType"):
            vm.restore(None)  # type: ignore[arg-type]
        assert log == []

    def test_what_is_missing_may_be_skipped(self) -> None:
        vm, (a, b), _ = machine("a", "b")
        saved = vm.snapshot()
        del saved.snapshots["a"]
        a.n = b.n = 4
        report = vm.restore(saved, missing="skip")
        assert (a.n, b.n) == (4, 0)
        assert report == RestoreReport(consumed=("vm/b",), missing=("vm/a",))

    def test_what_is_unknown_may_be_kept(self) -> None:
        """Law 3: a newer version's parts survive being loaded and saved by an older one."""
        vm, (a,), _ = machine("a")
        newer = vm.snapshot()
        newer.add_snapshot(Snapshot("tpm", {}, {"s": SnapshotDataSection("s", b"secret")}))
        newer.add_data_section(SnapshotDataSection("new", b"too"))
        report = vm.restore(newer, unknown="keep")
        assert report.unknown == ("vm/tpm", "vm['new']")
        a.n = 3
        again = vm.snapshot()
        assert again.snapshots["tpm"] == newer.snapshots["tpm"]
        assert again.snapshot_data == newer.snapshot_data
        assert again.section("new").snapshot == b"too"
        vm.restore(machine("a")[0].snapshot())
        assert [*vm.snapshot().snapshots] == ["a"]

    def test_composites_nest(self) -> None:
        inner = Composite("board", [Counter("cpu"), Counter("nic")])
        vm = Composite("vm", [inner, Counter("disk")])
        vm.pause()
        saved = vm.snapshot()
        assert vm.restore(saved).consumed == ("vm/board", "vm/board/cpu", "vm/board/nic", "vm/disk")
        nic = inner.components["nic"]
        assert isinstance(nic, Counter)
        nic.fail["restore"] = OSError("no")
        with pytest.raises(RestoreError) as info:
            vm.restore(saved)
        assert info.value.component_path == "vm/board/nic"
        assert info.value.component_states["vm/board/nic"] == "unknown"
        assert info.value.component_states["vm/board/cpu"] == "as before"
        assert info.value.component_states["vm/disk"] == "as before"
        vm.resume()
        nic.fail["pause"] = PauseError("no")
        cpu = inner.components["cpu"]
        assert isinstance(cpu, Counter)
        cpu.fail["resume"] = ResumeError("stuck")
        del nic.fail["pause"]
        cpu.fail["pause"] = PauseError("busy")
        nic.fail["resume"] = ResumeError("stuck")
        with pytest.raises(PauseError) as paused:
            vm.pause()
        assert [e.component_path for e in paused.value.exceptions] == [  # type: ignore[attr-defined]
            "vm/board/cpu",
            "vm/board/nic",
        ]

    def test_what_is_unknown_to_a_nested_composite_may_be_kept_and_is_not_lost(self) -> None:
        inner, disk = Composite("board", [Counter("cpu")]), Counter("disk")
        vm = Composite("vm", [inner, disk])
        newer = vm.snapshot()
        newer.find("board").add_snapshot(Snapshot("tpm"))
        with pytest.raises(RestoreError, match=r"vm/board: .*'tpm'"):
            vm.restore(newer)
        assert vm.restore(newer, unknown="keep").unknown == ("vm/board/tpm",)
        assert vm.snapshot() == newer
        del newer.find("board").snapshots["cpu"]
        assert vm.restore(newer, missing="skip", unknown="keep").missing == ("vm/board/cpu",)

    def test_undoing_keeps_what_a_nested_composite_had_kept(self) -> None:
        inner, disk = Composite("board", [Counter("cpu")]), Counter("disk")
        vm = Composite("vm", [inner, disk])
        plain = vm.snapshot()
        newer = vm.snapshot()
        newer.find("board").add_snapshot(Snapshot("tpm"))
        vm.restore(newer, unknown="keep")
        disk.fail["restore"] = RestoreError("no")
        with pytest.raises(RestoreError) as info:
            vm.restore(plain)
        assert states(info.value) == {"board": "as before", "disk": "as before"}
        assert vm.snapshot() == newer

    @pytest.mark.parametrize("policy", [{"missing": "eror"}, {"unknown": "skip"}])
    def test_a_policy_that_is_none_is_refused(self, policy: Any) -> None:
        vm, _, _ = machine("a")
        with pytest.raises(RestoreError, match=f"{next(iter(policy))} must be 'error' or "):
            vm.restore(Snapshot("vm"), **policy)

    @pytest.mark.parametrize("error", [Unfinished(), Mute()])
    def test_errors_that_are_broken_themselves_stop_no_undoing(self, error: Exception) -> None:
        vm, (a, b), _ = machine("a", "b")
        a.fail["pause"] = error
        with pytest.raises(PauseError, match=f"vm/a: {type(error).__name__}"):
            vm.pause()
        assert b.running

    def test_a_part_without_an_id_is_refused(self) -> None:
        class Nameless(Counter):
            def id(self) -> str:
                raise OSError("no label")

        with pytest.raises(ContractError, match="the id of a part of 'vm' cannot be had: no label"):
            Composite("vm", [Nameless("a")])


def test_sending_needs_a_valid_tree(tmp_path: Any) -> None:
    with pytest.raises(MigratableError, match=r"send.*is needed, not NoneType"):
        send(None, tmp_path / "x")  # type: ignore[arg-type]
    (tmp_path / "x").write_bytes(b"hello")
    with pytest.raises(MigratableError, match=r"receive.*header: no vmmig container"):
        recv(tmp_path / "x")
