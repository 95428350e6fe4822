"""Cloud Hypervisor's snapshot folders: today's; `FOLDER_2020`; and of that its JSON alone.

The module itself reads and writes today's, `FOLDER_2020` and `SEED_JSON` the others. See
`vmmig.formats.cloud_hypervisor.today`, `folder_2020` and `seed_json`.
"""

from vmmig.formats.cloud_hypervisor import folder_2020, seed_json
from vmmig.formats.cloud_hypervisor.today import CONFIG as CONFIG
from vmmig.formats.cloud_hypervisor.today import NAME as NAME
from vmmig.formats.cloud_hypervisor.today import Parts as Parts
from vmmig.formats.cloud_hypervisor.today import from_parts as from_parts
from vmmig.formats.cloud_hypervisor.today import read as read
from vmmig.formats.cloud_hypervisor.today import sniff as sniff
from vmmig.formats.cloud_hypervisor.today import to_parts as to_parts
from vmmig.formats.cloud_hypervisor.today import write as write
from vmmig.formats.cloud_hypervisor.trees import MEMORY as MEMORY

FOLDER_2020 = folder_2020
"""The format of the snapshot folder of 2020: `sniff`, `read` and `write`."""

SEED_JSON = seed_json
"""The format of a tree's JSON of 2020, a single file: `sniff`, `read` and `write`."""
