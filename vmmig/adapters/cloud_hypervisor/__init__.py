"""Cloud Hypervisor: a running one as a component, and vmmig as its offload daemon.

`CloudHypervisor` drives one by its API's socket. `offload_snapshot` and `offload_restore` are the
peer of its migrations: a VM is stored at any URL, and restored from there, with no folder between.
"""

from vmmig.adapters.cloud_hypervisor.api import ApiError as ApiError
from vmmig.adapters.cloud_hypervisor.machine import CloudHypervisor as CloudHypervisor
from vmmig.adapters.cloud_hypervisor.offload import OffloadReport as OffloadReport
from vmmig.adapters.cloud_hypervisor.offload import offload_restore as offload_restore
from vmmig.adapters.cloud_hypervisor.offload import offload_snapshot as offload_snapshot
