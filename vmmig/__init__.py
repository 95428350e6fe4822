"""vmmig: pause, snapshot, save, move and restore machines, by duck-typed components.

Any object with the right methods is a component: `verify` checks it, `Composite` makes one of
many, `send` and `recv` bring its `Snapshot` to a URL and back.
"""

__version__ = "0.1.0"

from vmmig.codec import Limits, configure_converter, dump, dumps, load, loads, make_converter
from vmmig.composite import Composite, RestoreReport
from vmmig.errors import (
    ContractError,
    DecodeError,
    MigratableError,
    MigratableErrorGroup,
    MigrateReceiveError,
    MigrateSendError,
    MissingExtraError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.migration import UrlTransport, recv, send
from vmmig.snapshot import Difference, Snapshot, SnapshotDataSection, SnapshotPath, diff
from vmmig.traits import LiveMigratable, Migratable, Pausable, Snapshottable, Transportable
from vmmig.verify import DefaultMethodWarning, verify

__all__ = [
    "Composite",
    "ContractError",
    "DecodeError",
    "DefaultMethodWarning",
    "Difference",
    "Limits",
    "LiveMigratable",
    "MemoryRange",
    "MemoryRangeTable",
    "Migratable",
    "MigratableError",
    "MigratableErrorGroup",
    "MigrateReceiveError",
    "MigrateSendError",
    "MissingExtraError",
    "Pausable",
    "PauseError",
    "RestoreError",
    "RestoreReport",
    "ResumeError",
    "Snapshot",
    "SnapshotDataSection",
    "SnapshotError",
    "SnapshotPath",
    "Snapshottable",
    "Transportable",
    "UrlTransport",
    "__version__",
    "configure_converter",
    "diff",
    "dump",
    "dumps",
    "load",
    "loads",
    "make_converter",
    "recv",
    "send",
    "verify",
]
