from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import SkipTest

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from tests.broken_components import BROKEN, OPERATIONS, SOUND, Sound, look
from vmmig import Snapshot
from vmmig.testing.attempts import BrokenLawError
from vmmig.testing.contracts import contract, state_machine


def laws_of(cls: type) -> Iterator[tuple[str, Any]]:
    for name, function in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("test_"):
            yield function.vmmig_law, function


def broken_laws(error: BaseException) -> Iterator[BrokenLawError]:
    if isinstance(error, BrokenLawError):
        yield error
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from broken_laws(inner)


@contextmanager
def profile(**options: Any) -> Iterator[None]:
    """Other settings for a while: shrinking what is found takes most of the time."""
    settings.register_profile("for a while", settings(), **options)
    settings.load_profile("for a while")
    try:
        yield
    finally:
        settings.load_profile("vmmig")


@pytest.mark.parametrize("component", BROKEN, ids=lambda component: component.__name__)
def test_each_mistake_is_found_by_its_law(component: Any) -> None:
    law, options, text = BROKEN[component]
    with profile(phases=[Phase.explicit, Phase.generate], derandomize=True):
        tests = dict(laws_of(contract(component, **options)))
    with pytest.raises((BrokenLawError, BaseExceptionGroup)) as info:
        tests[law](None)
    (error, *_) = [*broken_laws(info.value)]
    assert error.law == law
    assert text in str(error)
    assert f"The law: {law}." in str(error)
    assert error.script[0].endswith(" = factory()")


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_keeps_every_law(name: str) -> None:
    component, options = SOUND[name]
    laws = 0
    with profile(max_examples=40):
        tests = [*laws_of(contract(component, **options))]
    for _, test in tests:
        with suppress(SkipTest):
            test(None)
        laws += 1
    assert laws >= 12


def test_every_mistake_is_named_once() -> None:
    assert len(BROKEN) >= 30
    assert len({component.__name__ for component in BROKEN}) == len(BROKEN)


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            {"operations": {"push": 7}},
            {"operations": {"push": "abc"}},
            {"operations": {"push": [7]}},
            {"operations": {"push": [st.integers(), 7]}},
            {"observe": 7},
        ],
    )
    def test_bad_ones_are_refused(self, options: dict[str, Any]) -> None:
        for make in (contract, state_machine):
            with pytest.raises(InvalidArgument):
                make(Sound, **options)

    def test_a_factory_must_be_callable(self) -> None:
        with pytest.raises(InvalidArgument, match="factory"):
            contract(Sound())  # type: ignore[arg-type]

    def test_a_single_strategy_or_function_needs_no_list(self) -> None:
        cls = contract(
            Sound, operations={"push": st.integers(0, 3), "clear": lambda d: d.queue.clear()}
        )
        for _, test in laws_of(cls):
            test(None)


class TestStateMachine:
    def test_a_failure_shows_a_script_that_runs(self) -> None:
        class Forgetful(Sound):
            def state(self) -> dict[str, Any]:
                return super().state() | {"total": 0}

        machine = state_machine(Forgetful, operations=OPERATIONS, observe=look)
        from hypothesis.stateful import run_state_machine_as_test

        with pytest.raises(BrokenLawError) as info:
            run_state_machine_as_test(machine, settings=settings(max_examples=200, deadline=None))
        names = {"factory": Forgetful, "observe": look}
        exec("\n".join(info.value.script), names)
        assert any(isinstance(value, Snapshot) for value in names.values())
        assert len(info.value.script) < 20
