"""vmmig: pause, snapshot, save, move and restore machines, by duck-typed components.

Any object with the right methods is a component: `verify` checks it, `Composite` makes one of
many, `send` and `recv` bring its `Snapshot` to a URL and back, `migrate` and `receive` move it
while it runs.

A name is loaded when it is first asked for, so that vmmig's pytest plugin costs those nothing who
do not use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmig._lazy import load_lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vmmig.codec import Limits as Limits
    from vmmig.codec import RangeReader as RangeReader
    from vmmig.codec import configure_converter as configure_converter
    from vmmig.codec import dump as dump
    from vmmig.codec import dumps as dumps
    from vmmig.codec import load as load
    from vmmig.codec import loads as loads
    from vmmig.codec import make_converter as make_converter
    from vmmig.codec import open_ranges as open_ranges
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
    from vmmig.errors import ProtocolError as ProtocolError
    from vmmig.errors import RestoreError as RestoreError
    from vmmig.errors import ResumeError as ResumeError
    from vmmig.errors import SnapshotError as SnapshotError
    from vmmig.guest_memory import GuestMemory as GuestMemory
    from vmmig.guest_memory import MemoryRegion as MemoryRegion
    from vmmig.live import Downtime as Downtime
    from vmmig.live import MigrationAborted as MigrationAborted
    from vmmig.live import MigrationInDoubt as MigrationInDoubt
    from vmmig.live import MigrationProgress as MigrationProgress
    from vmmig.live import MigrationReport as MigrationReport
    from vmmig.live import Outcome as Outcome
    from vmmig.live import SessionKey as SessionKey
    from vmmig.live import migrate as migrate
    from vmmig.live import receive as receive
    from vmmig.memory import MemoryRange as MemoryRange
    from vmmig.memory import MemoryRangeTable as MemoryRangeTable
    from vmmig.migration import UrlTransport as UrlTransport
    from vmmig.migration import recv as recv
    from vmmig.migration import send as send
    from vmmig.precopy import Decision as Decision
    from vmmig.precopy import Forecast as Forecast
    from vmmig.precopy import IterationStatistics as IterationStatistics
    from vmmig.precopy import PrecopyPolicy as PrecopyPolicy
    from vmmig.sealed import sealed_copy as sealed_copy
    from vmmig.simulation import Simulation as Simulation
    from vmmig.simulation import TracePhase as TracePhase
    from vmmig.simulation import parse_trace as parse_trace
    from vmmig.simulation import simulate as simulate
    from vmmig.snapshot import Difference as Difference
    from vmmig.snapshot import Snapshot as Snapshot
    from vmmig.snapshot import SnapshotDataSection as SnapshotDataSection
    from vmmig.snapshot import SnapshotPath as SnapshotPath
    from vmmig.snapshot import diff as diff
    from vmmig.state import Added as Added
    from vmmig.state import Changed as Changed
    from vmmig.state import Length as Length
    from vmmig.state import Range as Range
    from vmmig.state import Removed as Removed
    from vmmig.state import Renamed as Renamed
    from vmmig.state import get_state as get_state
    from vmmig.state import load_state as load_state
    from vmmig.state import put_state as put_state
    from vmmig.state import save_state as save_state
    from vmmig.state import subsection as subsection
    from vmmig.state import versioned as versioned
    from vmmig.state import writing_versions as writing_versions
    from vmmig.traits import LiveMigratable as LiveMigratable
    from vmmig.traits import Migratable as Migratable
    from vmmig.traits import Pausable as Pausable
    from vmmig.traits import PrecopyMigratable as PrecopyMigratable
    from vmmig.traits import Snapshottable as Snapshottable
    from vmmig.traits import Transportable as Transportable
    from vmmig.transfer import CancelToken as CancelToken
    from vmmig.transfer import Options as Options
    from vmmig.transfer import Progress as Progress
    from vmmig.verify import DefaultMethodWarning as DefaultMethodWarning
    from vmmig.verify import verify as verify

_HOMES = load_lazily(
    __name__,
    {
        "codec": "Limits RangeReader configure_converter dump dumps load loads "
        "make_converter open_ranges",
        "composite": "Composite RestoreReport",
        "errors": "ContractError DecodeError MigratableError MigratableErrorGroup "
        "MigrateReceiveError MigrateSendError MissingExtraError PauseError "
        "ProtocolError RestoreError ResumeError SnapshotError",
        "guest_memory": "GuestMemory MemoryRegion",
        "live": "Downtime MigrationAborted MigrationInDoubt MigrationProgress "
        "MigrationReport Outcome SessionKey migrate receive",
        "memory": "MemoryRange MemoryRangeTable",
        "migration": "UrlTransport recv send",
        "precopy": "Decision Forecast IterationStatistics PrecopyPolicy",
        "sealed": "sealed_copy",
        "simulation": "Simulation TracePhase parse_trace simulate",
        "snapshot": "Difference Snapshot SnapshotDataSection SnapshotPath diff",
        "state": "Added Changed Length Range Removed Renamed get_state load_state put_state "
        "save_state subsection versioned writing_versions",
        "traits": "LiveMigratable Migratable Pausable PrecopyMigratable Snapshottable "
        "Transportable",
        "transfer": "CancelToken Options Progress",
        "verify": "DefaultMethodWarning verify",
    },
)

__all__ = [*sorted(_HOMES), "__version__"]
