"""What ``format-1-compressed.vmsnap`` and ``format-1-detached.vmsnap`` hold: every feature.

``python -m tests.golden.format_1_features`` wrote them, and refuses to overwrite them.
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.golden.format_1 import node
from vmmig.codec import encode
from vmmig.snapshot import Snapshot

NOISE = random.Random(1).randbytes(65537)
VIDEO = bytes(range(256)) * 256
RAM = b"".join(b"line %d\n" % i for i in range(200_000))


def tree() -> Snapshot:
    return node(
        "vm",
        node("cpu", regs=b"0123456789"),
        node("disk", **{"does not shrink": NOISE, "largest small": b"s" * 65535}),
        node("ram", **{"several MiB": RAM, "": bytes(65536)}),
        node("video", first=VIDEO, second=VIDEO[::-1]),
    )


def is_apart(view: memoryview) -> bool:
    return view.nbytes == len(VIDEO) and view[0] in (VIDEO[0], VIDEO[-1]) and view[1] != view[0]


DETACHED = [VIDEO, VIDEO[::-1]]

if __name__ == "__main__":
    for name, detach in (("compressed", None), ("detached", is_apart)):
        with Path(__file__).with_name(f"format-1-{name}.vmsnap").open("xb") as file:
            file.writelines(encode(tree(), compression="zstd", detach=detach))
