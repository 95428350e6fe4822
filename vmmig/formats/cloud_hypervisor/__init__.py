"""Cloud Hypervisor's snapshot folders, of today and of 2020."""

from vmmig.formats.cloud_hypervisor.folders import FileMapping as FileMapping
from vmmig.formats.cloud_hypervisor.today import CONFIG as CONFIG
from vmmig.formats.cloud_hypervisor.today import MEMORY as MEMORY
from vmmig.formats.cloud_hypervisor.today import NAME as NAME
from vmmig.formats.cloud_hypervisor.today import Parts as Parts
from vmmig.formats.cloud_hypervisor.today import RamMapping as RamMapping
from vmmig.formats.cloud_hypervisor.today import from_parts as from_parts
from vmmig.formats.cloud_hypervisor.today import ram_mappings as ram_mappings
from vmmig.formats.cloud_hypervisor.today import read as read
from vmmig.formats.cloud_hypervisor.today import sniff as sniff
from vmmig.formats.cloud_hypervisor.today import to_parts as to_parts
from vmmig.formats.cloud_hypervisor.today import write as write
