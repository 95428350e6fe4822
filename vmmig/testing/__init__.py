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
    from vmmig.testing.attempts import BrokenLawError as BrokenLawError
    from vmmig.testing.components import Counter as Counter
    from vmmig.testing.contracts import contract as contract
    from vmmig.testing.contracts import state_machine as state_machine
    from vmmig.testing.corpora import corpus as corpus
    from vmmig.testing.faults import CallFault as CallFault
    from vmmig.testing.faults import Cut as Cut
    from vmmig.testing.faults import FaultyStream as FaultyStream
    from vmmig.testing.faults import FlipBit as FlipBit
    from vmmig.testing.faults import NoSpace as NoSpace
    from vmmig.testing.faults import Reorder as Reorder
    from vmmig.testing.faults import Stall as Stall
    from vmmig.testing.faults import Trickle as Trickle
    from vmmig.testing.faults import call_faults as call_faults
    from vmmig.testing.faults import failing as failing
    from vmmig.testing.faults import stream_faults as stream_faults
    from vmmig.testing.states import corpus_breaks as corpus_breaks
    from vmmig.testing.states import states as states
    from vmmig.testing.states import upgrade_breaks as upgrade_breaks
    from vmmig.testing.strategies import component_trees as component_trees
    from vmmig.testing.strategies import corrupted_containers as corrupted_containers
    from vmmig.testing.strategies import memory_range_tables as memory_range_tables
    from vmmig.testing.strategies import memory_ranges as memory_ranges
    from vmmig.testing.strategies import snapshot_data_sections as snapshot_data_sections
    from vmmig.testing.strategies import snapshots as snapshots

_HOMES = load_lazily(
    __name__,
    {
        "attempts": "BrokenLawError",
        "components": "Counter",
        "contracts": "contract state_machine",
        "corpora": "corpus",
        "faults": "CallFault Cut FaultyStream FlipBit NoSpace Reorder Stall Trickle call_faults "
        "failing stream_faults",
        "states": "corpus_breaks states upgrade_breaks",
        "strategies": "component_trees corrupted_containers memory_range_tables memory_ranges "
        "snapshot_data_sections snapshots",
    },
    extra="testing",
)

__all__ = sorted(_HOMES)
