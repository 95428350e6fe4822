"""Random trees, for vmmig's own tests."""

from __future__ import annotations

from hypothesis import strategies as st

from vmmig.snapshot import Snapshot, SnapshotDataSection

IDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\0", "../../x", "/", "a/b", "ä", "\U0001d53e", "cpu0", "'", "\\"]),
)
PAYLOADS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda size, byte: bytes([byte]) * size,
        st.sampled_from([65535, 65536, 65537, 1 << 20, (1 << 20) + 1, 3 << 20]),
        st.integers(0, 255),
    ),
)


@st.composite
def snapshots(
    draw: st.DrawFn, *, max_nodes: int = 12, payloads: st.SearchStrategy[bytes] = PAYLOADS
):
    """Trees of any shape: each node hangs below one that was drawn before it."""
    root = Snapshot(draw(IDS))
    nodes = [root]
    for _ in range(draw(st.integers(0, max_nodes - 1))):
        parent = nodes[draw(st.integers(0, len(nodes) - 1))]
        child = Snapshot(draw(IDS))
        if child.id not in parent.snapshots:
            parent.add_snapshot(child)
            nodes.append(child)
    for node in nodes:
        for id in draw(st.lists(IDS, max_size=3, unique=True)):
            node.add_data_section(SnapshotDataSection(id, draw(payloads)))
    return root


def chain(depth: int) -> Snapshot:
    """A tree that is one path, ``depth`` nodes deep."""
    root = at = Snapshot("0")
    for i in range(1, depth):
        child = Snapshot(str(i))
        at.add_snapshot(child)
        at = child
    at.add_data_section(SnapshotDataSection("end", b"here"))
    return root
