"""Live migration: a machine moves to another process while it runs.

`migrate` drives the source, `receive` the destination, over Cloud Hypervisor's protocol
(`vmmig.protocol`); `vmmig.precopy` decides when to stop and copy.
"""

from vmmig.live.destination import receive as receive
from vmmig.live.handover import Outcome as Outcome
from vmmig.live.handover import SessionKey as SessionKey
from vmmig.live.report import Downtime as Downtime
from vmmig.live.report import MigrationProgress as MigrationProgress
from vmmig.live.report import MigrationReport as MigrationReport
from vmmig.live.source import MigrationAborted as MigrationAborted
from vmmig.live.source import MigrationInDoubt as MigrationInDoubt
from vmmig.live.source import ask as ask
from vmmig.live.source import migrate as migrate
