from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Of several processes with the same folder ``VMMIG_TESTS``, each test is run by one."""
    folder = os.environ.get("VMMIG_TESTS")
    if folder is None:
        return None
    claim = hashlib.sha256(item.nodeid.encode()).hexdigest()
    try:
        Path(folder, claim).touch(exist_ok=False)
    except FileExistsError:
        item.session._setupstate.teardown_exact(nextitem)  # what the next one does not need
        return True
    return None


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
