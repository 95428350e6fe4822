"""What ``states/r1.vmsnap`` to ``r6.vmsnap`` hold: the machines of ``tests/releases``.

``python -m tests.golden.states`` wrote them, and refuses to overwrite them.
"""

from __future__ import annotations

from pathlib import Path

from tests.releases import RELEASES, release
from vmmig.codec import dumps

FOLDER = Path(__file__).with_name("states")

if __name__ == "__main__":
    FOLDER.mkdir()
    for number in RELEASES:
        with (FOLDER / f"r{number}.vmsnap").open("xb") as file:
            file.write(dumps(release(number).machine()))
