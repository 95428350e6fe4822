from __future__ import annotations

import os
import threading

import pytest
from hypothesis import HealthCheck, Phase, settings

# A project of its own, with its own tests, which test_downstream.py runs; and what needs atheris.
collect_ignore = ["downstream", "fuzz"]

# Nothing here is about time: a slow moment of the machine is no failure. To explain a failure
# takes hypothesis many times as long as to shrink it, and many tests here make it find one.
settings.register_profile(
    "vmmig",
    phases=[phase for phase in Phase if phase is not Phase.explain],
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("vmmig")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``VMMIG_TESTS=2/3`` runs the second of three parts of the tests."""
    part, _, parts = os.environ.get("VMMIG_TESTS", "1/1").partition("/")
    left_out = [item for i, item in enumerate(items) if i % int(parts) != int(part) - 1]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[int(part) - 1 :: int(parts)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail for threads that are left: they would keep the process from ever ending."""
    left = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not thread.daemon
    ]
    if left:
        print(f"\nthreads are left: {left}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
