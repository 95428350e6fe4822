from __future__ import annotations

import enum
import math
from typing import Any

import attrs

from vmmig import Added, Changed, Removed, Renamed, Snapshot, save_state, subsection, versioned
from vmmig.state import U8, U16, U64


class Link(enum.Enum):
    DOWN = 0
    UP = 1


@versioned("serial/fifo", 1)
@attrs.define
class Fifo:
    received: list[U8] = attrs.field(factory=list)


def _to_fifo(fields: dict[str, Any]) -> dict[str, Any]:
    received = fields.pop("received")
    return {**fields, "fifo": [1, {"received": received}, {}]} if received else fields


def _from_fifo(fields: dict[str, Any]) -> dict[str, Any]:
    _, fifo, _ = fields.pop("fifo", [1, {"received": []}, {}])
    return {**fields, "received": fifo["received"]}


def _split(fields: dict[str, Any]) -> dict[str, Any]:
    divisor = fields.pop("divisor")
    return {**fields, "dll": divisor & 0xFF, "dlh": divisor >> 8}


def _join(fields: dict[str, Any]) -> dict[str, Any]:
    low, high = fields.pop("dll"), fields.pop("dlh")
    return {**fields, "divisor": high << 8 | low}


@versioned(
    "serial",
    6,
    history={
        2: Added("scr", 0),
        3: Renamed("mode", "lcr"),
        4: Changed(_split, _join),
        5: Removed("spare", 0),
        6: Changed(_to_fifo, _from_fifo),
    },
)
@attrs.define
class Serial:
    lcr: U8 = 3
    ier: U8 = 1
    dll: U8 = 0x0C
    dlh: U8 = 0x01
    scr: U8 = 0
    fifo: Fifo = subsection(factory=Fifo)


def _to_ns(fields: dict[str, Any]) -> dict[str, Any]:
    seconds = fields.pop("elapsed_s")
    is_real = math.isfinite(seconds) and 0 <= seconds < 1 << 34
    return {"elapsed_ns": round(seconds * 1e9) if is_real else 0}


def _to_s(fields: dict[str, Any]) -> dict[str, Any]:
    return {"elapsed_s": fields["elapsed_ns"] / 1e9}


@versioned("timer/alarm", 1)
@attrs.define
class Alarm:
    at_ns: U64 = 0


@versioned(
    "timer",
    4,
    history={
        2: Changed(_to_ns, _to_s),
        3: Added("hz", 3_579_545),
        4: Renamed("hz", "frequency_hz"),
    },
)
@attrs.define
class Timer:
    elapsed_ns: U64 = 1_500_000_000
    frequency_hz: U64 = 3_579_545
    alarm: Alarm | None = subsection(default=None)


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


@attrs.define
class Counters:
    rx: U64 = 7
    tx: U64 = 9


def _count(fields: dict[str, Any]) -> dict[str, Any]:
    counters = fields["counters"]
    fields["counters"] = {key: counters.get(key, 0) for key in ("rx", "tx")}
    return fields


@versioned(
    "net",
    4,
    history={
        2: Added("mtu", 1500),
        3: Changed(_count, dict),
        4: [Renamed("link", "carrier"), Added("vlans", [])],
    },
)
@attrs.define
class Net:
    mac: bytes = b"\x52\x54\0\x12\x34\x56"
    carrier: Link = Link.UP
    vlans: list[U16] = attrs.field(factory=list)
    mtu: U16 = 1500
    features: int = 1 << 70
    queues: list[Queue] = attrs.field(factory=lambda: [Queue(), Queue(address=0x2000)])
    counters: Counters = attrs.field(factory=Counters)
    filter: Filter = subsection(factory=Filter)


STATES = (Serial, Timer, Net)


def machine() -> Snapshot:
    snapshot = Snapshot("machine")
    for cls in STATES:
        snapshot.add_snapshot(save_state(cls.__name__.lower(), cls()))
    return snapshot
