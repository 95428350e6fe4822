from __future__ import annotations

import enum

import attrs

from vmmig import Snapshot, save_state, versioned
from vmmig.state import U8, U16, U64


class Link(enum.Enum):
    DOWN = 0
    UP = 1


@versioned("serial", 1)
@attrs.define
class Serial:
    mode: U8 = 3
    ier: U8 = 1
    divisor: U16 = 0x10C
    spare: U8 = 0
    received: list[U8] = attrs.field(factory=lambda: [65, 66])


@versioned("timer", 1)
@attrs.define
class Timer:
    elapsed_s: float = 1.5


@versioned("net/queue", 1)
@attrs.define
class Queue:
    size: U16 = 256
    address: U64 = 0x1000


@versioned("net", 1)
@attrs.define
class Net:
    mac: bytes = b"\x52\x54\0\x12\x34\x56"
    link: Link = Link.UP
    features: int = 1 << 70
    queues: list[Queue] = attrs.field(factory=lambda: [Queue(), Queue(address=0x2000)])
    counters: dict[str, U64] = attrs.field(factory=lambda: {"rx": 7, "tx": 9})


STATES = (Serial, Timer, Net)


def machine() -> Snapshot:
    snapshot = Snapshot("machine")
    for cls in STATES:
        snapshot.add_snapshot(save_state(cls.__name__.lower(), cls()))
    return snapshot
