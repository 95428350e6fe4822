"""What ``format-1.vmsnap`` holds: every shape of format 1, and sections at its boundaries.

``python -m tests.golden.format_1`` wrote it, and refuses to overwrite it.
"""

from __future__ import annotations

from pathlib import Path

from vmmig.codec import dumps
from vmmig.snapshot import Snapshot, SnapshotDataSection


def node(id: str, *children: Snapshot, **sections: bytes) -> Snapshot:
    snapshot = Snapshot(id)
    for child in children:
        snapshot.add_snapshot(child)
    for name, payload in sections.items():
        snapshot.add_data_section(SnapshotDataSection(name, payload))
    return snapshot


def tree() -> Snapshot:
    deep = node("bottom", end=b"here")
    for level in range(40):
        deep = node(f"level-{level}", deep)
    return node(
        "vm",
        node("", node("", **{"": b""}), **{"": b"empty ids"}),
        node("cpu-manager", *[node(f"cpu{i}", regs=bytes([i]) * 128) for i in range(3)]),
        node(
            "\u00fcnic\u00f6de \U0001f980",
            **{"\0": b"\0", "../../x": b"/", "a/b": bytes(range(256))},
        ),
        node("ram", **{"largest small": b"s" * 65535, "smallest large": b"L" * 65536}),
        node("video", **{"one MiB and one byte": b"v" * (1 << 20) + b"!"}),
        deep,
        config=b"cpus=3",
    )


if __name__ == "__main__":
    with Path(__file__).with_name("format-1.vmsnap").open("xb") as file:
        file.write(dumps(tree()))
