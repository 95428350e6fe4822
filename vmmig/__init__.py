"""vmmig: pause, snapshot, save, move and restore machines, by duck-typed components.

Any object with the right methods is a component: `verify` checks it, `Composite` makes one of
many, `send` and `recv` bring its `Snapshot` to a URL and back.

A name is loaded when it is first asked for, so that vmmig's pytest plugin costs those nothing who
do not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmig._lazy import load_lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmmig.codec import Limits as Limits
    from vmmig.codec import configure_converter as configure_converter
    from vmmig.codec import dump as dump
    from vmmig.codec import dumps as dumps
    from vmmig.codec import load as load
    from vmmig.codec import loads as loads
    from vmmig.codec import make_converter as make_converter
    from vmmig.composite import Composite as Composite
    from vmmig.composite import RestoreReport as RestoreReport
    from vmmig.errors import ContractError as ContractError
    from vmmig.errors import DecodeError as DecodeError
    from vmmig.errors import MigratableError as MigratableError
    from vmmig.errors import MigratableErrorGroup as MigratableErrorGroup
    from vmmig.errors import MigrateReceiveError as MigrateReceiveError
    from vmmig.errors import MigrateSendError as MigrateSendError
    from vmmig.errors import MissingExtraError as MissingExtraError
    from vmmig.errors import PauseError as PauseError
    from vmmig.errors import RestoreError as RestoreError
    from vmmig.errors import ResumeError as ResumeError
    from vmmig.errors import SnapshotError as SnapshotError
    from vmmig.memory import MemoryRange as MemoryRange
    from vmmig.memory import MemoryRangeTable as MemoryRangeTable
    from vmmig.migration import UrlTransport as UrlTransport
    from vmmig.migration import recv as recv
    from vmmig.migration import send as send
    from vmmig.snapshot import Difference as Difference
    from vmmig.snapshot import Snapshot as Snapshot
    from vmmig.snapshot import SnapshotDataSection as SnapshotDataSection
    from vmmig.snapshot import SnapshotPath as SnapshotPath
    from vmmig.snapshot import diff as diff
    from vmmig.traits import LiveMigratable as LiveMigratable
    from vmmig.traits import Migratable as Migratable
    from vmmig.traits import Pausable as Pausable
    from vmmig.traits import Snapshottable as Snapshottable
    from vmmig.traits import Transportable as Transportable
    from vmmig.verify import DefaultMethodWarning as DefaultMethodWarning
    from vmmig.verify import verify as verify

_HOMES = load_lazily(
    __name__,
    {
        "codec": "Limits configure_converter dump dumps load loads make_converter",
        "composite": "Composite RestoreReport",
        "errors": "ContractError DecodeError MigratableError MigratableErrorGroup "
        "MigrateReceiveError MigrateSendError MissingExtraError PauseError RestoreError "
        "ResumeError SnapshotError",
        "memory": "MemoryRange MemoryRangeTable",
        "migration": "UrlTransport recv send",
        "snapshot": "Difference Snapshot SnapshotDataSection SnapshotPath diff",
        "traits": "LiveMigratable Migratable Pausable Snapshottable Transportable",
        "verify": "DefaultMethodWarning verify",
    },
)

__all__ = [*sorted(_HOMES), "__version__"]
