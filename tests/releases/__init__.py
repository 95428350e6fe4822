"""Six releases of three devices, as a project that vmmig's users maintain would have had them.

Each module is what that release's source was. Their snapshots are ``tests/golden/states``.
"""

from __future__ import annotations

from importlib import import_module, reload
from types import ModuleType

RELEASES = range(1, 7)


def release(number: int) -> ModuleType:
    """The release's module, run again, so that its states are those that are declared."""
    return reload(import_module(f"tests.releases.r{number}"))
