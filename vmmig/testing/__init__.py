"""Prove your own components: laws, state machines, strategies, faults, golden corpora.

A project that maintains a component adds ``vmmig[testing]`` and three lines::

    from vmmig.testing import contract
    from my_project import Disk

    TestDisk = contract(Disk)

and pytest tells whether the save states are sound, or shows the shortest sequence of calls that
breaks them. A name is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmig._lazy import load_lazily

if TYPE_CHECKING:
    from vmmig.testing.contracts import contract as contract
    from vmmig.testing.contracts import state_machine as state_machine
    from vmmig.testing.corpora import corpus as corpus

_HOMES = load_lazily(
    __name__,
    {
        "contracts": "contract state_machine",
        "corpora": "corpus",
    },
    extra="testing",
)

__all__ = sorted(_HOMES)
