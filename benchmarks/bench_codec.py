"""The codec on five trees, against what else Python offers for the same classes."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
from cattrs.preconf.msgpack import make_converter

from benchmarks.timing import medians_s, ms, table
from vmmig.codec import dumps, encode, loads
from vmmig.snapshot import Snapshot, SnapshotDataSection

MIB = 1 << 20


@attrs.define
class PlainSection:
    """The same fields as an attrs class that does nothing special to be pickled."""

    id: str = ""
    snapshot: bytes = b""


@attrs.define
class PlainSnapshot:
    id: str = ""
    snapshots: dict[str, PlainSnapshot] = attrs.field(factory=dict)
    snapshot_data: dict[str, PlainSection] = attrs.field(factory=dict)


class StructSection(msgspec.Struct, array_like=True):
    id: str = ""
    snapshot: bytes = b""


class StructSnapshot(msgspec.Struct, array_like=True):
    id: str
    snapshots: dict[str, StructSnapshot]
    snapshot_data: dict[str, StructSection]


def node(id: str, payload: bytes | None = None, section: str = "state") -> Snapshot:
    snapshot = Snapshot(id)
    if payload is not None:
        snapshot.add_data_section(SnapshotDataSection(section, payload))
    return snapshot


def vm() -> Snapshot:
    """45 nodes as in a small VM, 140 KB: managers with devices of about 3.4 KB."""
    root = node("vm")
    for manager in ("cpu-manager", "memory-manager", "device-manager", "interrupt-controller"):
        child = node(manager)
        for i in range(10):
            child.add_snapshot(node(f"{manager}-{i}", os.urandom(3500)))
        root.add_snapshot(child)
    return root


def wide(leaves: int = 10_000) -> Snapshot:
    root = node("root")
    for i in range(leaves):
        root.add_snapshot(node(f"leaf-{i:05d}", bytes([i % 256]) * 100))
    return root


def deep(depth: int = 500) -> Snapshot:
    root = at = node("n0")
    for i in range(1, depth):
        child = node(f"n{i}", b"x" * 16)
        at.add_snapshot(child)
        at = child
    return root


def one_big(mib: int = 256) -> Snapshot:
    return node("ram", os.urandom(MIB) * mib)


def many_big(count: int = 256) -> Snapshot:
    root = node("ram")
    for i in range(count):
        root.add_snapshot(node(f"region-{i:03d}", os.urandom(MIB)))
    return root


def converted(snapshot: Snapshot, make: Any, section: Any, wrap: Any = bytes) -> Any:
    """The same tree in other classes."""
    made: dict[int, Any] = {}
    for _, each in reversed([*snapshot.walk()]):
        made[id(each)] = make(
            each.id,
            {name: made[id(child)] for name, child in each.snapshots.items()},
            {name: section(s.id, wrap(s.snapshot)) for name, s in each.snapshot_data.items()},
        )
    return made[id(snapshot)]


def as_json(snapshot: PlainSnapshot) -> str:
    """The form of the crate's day: each byte an integer of a list."""
    return json.dumps(
        snapshot,
        default=lambda o: list(o) if isinstance(o, bytes) else attrs.asdict(o, recurse=False),
    )


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def peers(tree: Snapshot, payload_bytes: int) -> dict[str, Pair]:
    """What to measure: for each way, one call that encodes and one that decodes."""
    plain = converted(tree, PlainSnapshot, PlainSection)
    struct = converted(tree, StructSnapshot, StructSection)
    pickled = pickle.dumps(plain, 5)
    own = pickle.dumps(tree, 5)
    container = dumps(tree)
    ways: dict[str, Pair] = {
        "pickle 5": (lambda: pickle.dumps(plain, 5), lambda: pickle.loads(pickled)),
        "vmmig dumps / loads": (lambda: dumps(tree), lambda: loads(container)),
        "pickle 5 of vmmig's classes": (
            lambda: pickle.dumps(tree, 5),
            lambda: pickle.loads(own),
        ),
    }
    if payload_bytes >= MIB * 16:
        in_buffers = converted(tree, PlainSnapshot, PlainSection, pickle.PickleBuffer)

        def out_of_band() -> tuple[bytes, list[pickle.PickleBuffer]]:
            buffers: list[pickle.PickleBuffer] = []
            return pickle.dumps(in_buffers, 5, buffer_callback=buffers.append), buffers

        stream, buffers = out_of_band()
        mapping = mmap.mmap(-1, len(container))
        mapping[:] = container
        ways |= {
            "pickle 5 out of band": (out_of_band, lambda: pickle.loads(stream, buffers=buffers)),
            "vmmig encode / loads lazily from a mapping": (
                lambda: encode(tree),
                lambda: loads(mapping, lazily=True),
            ),
            "vmmig encode, checksums computed / loads, all checked": (
                lambda: [*encode(tree)],
                lambda: loads(mapping),
            ),
        }
    converter = make_converter()
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(StructSnapshot)
    others: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "cattrs msgpack preconf": (
            lambda: converter.dumps(plain),
            lambda data: converter.loads(data, PlainSnapshot),
        ),
        "msgspec": (lambda: encoder.encode(struct), decoder.decode),
    }
    if payload_bytes < MIB * 16:
        others["json, lists of integers"] = (lambda: as_json(plain), json.loads)
    for name, (write, read) in others.items():
        try:
            data = write()
            read(data)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error!s:.80}", file=sys.stderr)
        else:
            ways[name] = (write, lambda read=read, data=data: read(data))
    return ways


def main(*, quick: bool = False) -> None:
    sys.setrecursionlimit(20_000)
    scale = 16 if quick else 1
    trees: dict[str, tuple[Callable[[], Snapshot], int, int]] = {
        "VM-like tree, 45 nodes, 140 KB": (vm, 21, 100),
        "10,000 leaves of 100 bytes": (lambda: wide(10_000 // scale), 11, 2),
        "chain, 500 deep": (lambda: deep(500 // scale), 21, 50),
        f"one section of {256 // scale} MiB": (lambda: one_big(256 // scale), 5, 1),
        f"{256 // scale} sections of 1 MiB": (lambda: many_big(256 // scale), 5, 1),
        "16 MiB as the crate wrote it": (lambda: one_big(16 // scale), 3, 1),
    }
    for title, (make, rounds, number) in trees.items():
        tree = make()
        size = sum(s.nbytes for _, each in tree.walk() for s in each.snapshot_data.values())
        ways = peers(tree, size if "crate" not in title else 0)
        rounds, number = (1, 1) if quick else (rounds, number)
        times = [
            medians_s({name: pair[i] for name, pair in ways.items()}, rounds=rounds, number=number)
            for i in (0, 1)
        ]
        base = [times[i]["pickle 5"] for i in (0, 1)]
        rows = [
            (
                name,
                ms(times[0][name]),
                ms(times[1][name]),
                f"{base[0] / times[0][name]:.2f}",
                f"{base[1] / times[1][name]:.2f}",
            )
            for name in ways
        ]
        head = ("codec", "encode ms", "decode ms", "x pickle 5", "x pickle 5")
        print(table(title, head, rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
