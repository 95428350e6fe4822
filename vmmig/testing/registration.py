"""What hypothesis loads of vmmig: strategies by type, and the profile ``vmmig-ci``."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make `hypothesis.strategies.from_type` know vmmig's classes; hypothesis calls it.

    >>> from hypothesis import find, strategies as st
    >>> from vmmig import Snapshot
    >>> register()
    >>> find(st.from_type(Snapshot), lambda snapshot: True)
    Snapshot('')
    """

    # While hypothesis is being imported, it cannot be imported from here before this is called.
    from hypothesis import settings
    from hypothesis import strategies as st

    from vmmig.memory import MemoryRange, MemoryRangeTable
    from vmmig.snapshot import Snapshot, SnapshotDataSection

    def lazily(name: str) -> Any:
        # A function: of a strategy, hypothesis may look into what it is made of right away.
        def strategy(_: type) -> Any:
            from vmmig.testing import strategies

            return getattr(strategies, name)()

        return strategy

    st.register_type_strategy(Snapshot, lazily("snapshots"))
    st.register_type_strategy(SnapshotDataSection, lazily("snapshot_data_sections"))
    st.register_type_strategy(MemoryRange, lazily("memory_ranges"))
    st.register_type_strategy(MemoryRangeTable, lazily("memory_range_tables"))
    settings.register_profile("vmmig-ci", max_examples=1000, deadline=None)
