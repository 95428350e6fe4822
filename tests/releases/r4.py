from __future__ import annotations

import enum
import math
from typing import Any

import attrs

from vmmig import Added, Changed, Renamed, Snapshot, save_state, subsection, versioned
from vmmig.state import U8, U16, U64


class Link(enum.Enum):
    DOWN = 0
    UP = 1


def _split(fields: dict[str, Any]) -> dict[str, Any]:
    divisor = fields.pop("divisor")
    return {**fields, "dll": divisor & 0xFF, "dlh": divisor >> 8}


def _join(fields: dict[str, Any]) -> dict[str, Any]:
    low, high = fields.pop("dll"), fields.pop("dlh")
    return {**fields, "divisor": high << 8 | low}


@versioned(
    "serial",
    4,
    history={2: Added("scr", 0), 3: Renamed("mode", "lcr"), 4: Changed(_split, _join)},
)
@attrs.define
class Serial:
    lcr: U8 = 3
    ier: U8 = 1
    dll: U8 = 0x0C
    dlh: U8 = 0x01
    spare: U8 = 0
    scr: U8 = 0
    received: list[U8] = attrs.field(factory=lambda: [65, 66])


def _to_ns(fields: dict[str, Any]) -> dict[str, Any]:
    seconds = fields.pop("elapsed_s")
    is_real = math.isfinite(seconds) and 0 <= seconds < 1 << 34
    return {"elapsed_ns": round(seconds * 1e9) if is_real else 0}


def _to_s(fields: dict[str, Any]) -> dict[str, Any]:
    return {"elapsed_s": fields["elapsed_ns"] / 1e9}


@versioned("timer", 3, history={2: Changed(_to_ns, _to_s), 3: Added("hz", 3_579_545)})
@attrs.define
class Timer:
    elapsed_ns: U64 = 1_500_000_000
    hz: U64 = 3_579_545


@versioned("net/queue", 2, history={2: Added("enabled", True)})
@attrs.define
class Queue:
    enabled: bool = True
    size: U16 = 256
    address: U64 = 0x1000


@versioned("net/filter", 1)
@attrs.define
class Filter:
    macs: set[bytes] = attrs.field(factory=set)


@versioned("net", 2, history={2: Added("mtu", 1500)})
@attrs.define
class Net:
    mac: bytes = b"\x52\x54\0\x12\x34\x56"
    link: Link = Link.UP
    mtu: U16 = 1500
    features: int = 1 << 70
    queues: list[Queue] = attrs.field(factory=lambda: [Queue(), Queue(address=0x2000)])
    counters: dict[str, U64] = attrs.field(factory=lambda: {"rx": 7, "tx": 9})
    filter: Filter = subsection(factory=Filter)


STATES = (Serial, Timer, Net)


def machine() -> Snapshot:
    snapshot = Snapshot("machine")
    for cls in STATES:
        snapshot.add_snapshot(save_state(cls.__name__.lower(), cls()))
    return snapshot
