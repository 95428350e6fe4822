from __future__ import annotations

from hypothesis import HealthCheck, settings

# A project of its own, with its own tests: test_downstream.py runs them.
collect_ignore = ["downstream"]

# Nothing here is about time: a slow moment of the machine is no failure.
settings.register_profile(
    "vmmig",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("vmmig")
