"""A running QEMU, by its QMP socket: paused, snapshotted, restored and moved like any component.

QEMU needs a monitor for it, ``-qmp unix:vm.qmp,server=on,wait=off``; one that shall be restored,
or receive a machine, is started with the same devices and ``-incoming defer``. What a snapshot
holds is QEMU's own migration stream: see `vmmig.formats.qemu`. Disks are not in it.
"""

from vmmig.errors import MissingExtraError

try:
    import qemu.qmp as _qmp  # noqa: F401
except ImportError as error:
    raise MissingExtraError("qemu.qmp, which speaks to QEMU,", extra="qemu") from error

from vmmig.adapters.qemu.machine import Machine
from vmmig.adapters.qemu.statistics import MigrationStatistics

__all__ = ["Machine", "MigrationStatistics"]
