from __future__ import annotations

import inspect
import pickle

import pytest

from vmmig import errors
from vmmig.errors import (
    ContractError,
    DecodeError,
    MigratableError,
    MigratableErrorGroup,
    MigrateReceiveError,
    MigrateSendError,
    MissingExtraError,
    PauseError,
    PauseErrorGroup,
    ProtocolError,
    RestoreError,
    ResumeError,
    SnapshotError,
    relocated,
)

TEXTS = {
    PauseError: "Failed to pause migratable component: boom",
    ResumeError: "Failed to resume migratable component: boom",
    SnapshotError: "Failed to snapshot migratable component: boom",
    RestoreError: "Failed to restore migratable component: boom",
    MigrateSendError: "Failed to send migratable component snapshot: boom",
    MigrateReceiveError: "Failed to receive migratable component snapshot: boom",
}
CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, MigratableError)
]


def example(cls: type[MigratableError]) -> MigratableError:
    if issubclass(cls, MigratableErrorGroup):
        return cls("two", [PauseError("a", component_path="vm/cpu"), ResumeError("b")])
    if cls is MissingExtraError:
        return cls("x", extra="unicorn")
    return cls("boom")


@pytest.mark.parametrize(("cls", "text"), TEXTS.items())
def test_the_crates_texts(cls: type[MigratableError], text: str) -> None:
    assert str(cls("boom")) == text
    assert str(cls(ValueError("boom"))) == text


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_pickles_with_all_it_knows(cls: type[MigratableError]) -> None:
    error = example(cls)
    error.component_path = "vm/disk"
    error.component_states = {"vm/disk": "paused"}
    error.add_note("seen at night")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(error, protocol))
        assert type(copy) is cls
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


def test_extra_facts_survive_pickling() -> None:
    error = DecodeError("bad", where="$", version=2, writer="vmmig 9")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.where, copy.version, copy.writer) == ("$", 2, "vmmig 9")
    assert pickle.loads(pickle.dumps(ProtocolError("x", state="STARTED"))).state == "STARTED"
    assert pickle.loads(pickle.dumps(ContractError("x", problems=["a"]))).problems == ("a",)
    assert pickle.loads(pickle.dumps(MissingExtraError("x", extra="cli"))).extra == "cli"


def test_damage_that_a_component_finds_names_the_component_too() -> None:
    error = relocated(DecodeError("damaged", where="$.snapshot_data['s']"), "vm", "disk")
    assert str(error).endswith("component: vm/disk: $.snapshot_data['s']: damaged")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_cause_is_chained_and_survives_pickling() -> None:
    cause = OSError(28, "No space left on device")
    error = MigrateSendError(cause)
    assert error.__cause__ is cause
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy.__cause__, OSError)
    assert copy.__cause__.errno == 28


class Unpicklable(Exception):
    def __init__(self, text: str, lock: object) -> None:
        super().__init__(text)
        self.lock = lock


def test_a_cause_that_does_not_pickle_leaves_its_text() -> None:
    error = pickle.loads(pickle.dumps(PauseError(Unpicklable("held", lambda: None))))
    assert str(error) == "Failed to pause migratable component: held"


def test_a_cause_without_text_is_named() -> None:
    assert str(PauseError(KeyError("x"))).endswith("KeyError: 'x'")
    assert str(PauseError(TimeoutError())).endswith("TimeoutError")


def test_groups_split_like_exception_groups() -> None:
    group = PauseErrorGroup(
        "2 failed", [PauseError("a"), ResumeError("b")], component_states={"vm/a": "paused"}
    )
    rest, found = None, None
    try:
        try:
            raise group
        except* ResumeError as matched:
            found = matched
    except* PauseError as other:
        rest = other
    assert isinstance(found, PauseErrorGroup)
    assert [str(e.cause) for e in found.exceptions] == ["b"]
    assert found.component_states == {"vm/a": "paused"}
    assert rest is not None
    assert [str(e.cause) for e in rest.exceptions] == ["a"]
