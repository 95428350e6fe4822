"""QEMU's migration stream, made by hand from its layout; the other half of `vmmig.formats.qemu`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

PAGE = 4096
EOF = b"\x00"


def text(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def head(machine: str | None = "pc-1", subsections: bytes = b"") -> bytes:
    begin = b"QEVM" + struct.pack(">I", 3)
    if machine is None:
        return begin
    return begin + struct.pack(">BI", 7, len(machine)) + machine.encode() + subsections


def subsection(name: str, data: bytes) -> bytes:
    return b"\x05" + text(name) + struct.pack(">I", 1) + data


def capabilities(*names: str) -> bytes:
    data = struct.pack(">I", len(names)) + b"".join(map(text, names))
    return subsection("configuration/capabilities", data)


def footer(id: int, wanted: bool = True) -> bytes:
    return struct.pack(">BI", 0x7E, id) if wanted else b""


def section(
    kind: int, id: int, name: str, data: bytes, *, instance: int = 0, version: int = 1
) -> bytes:
    """The beginning of a section (1), or a whole one (4), without its footer."""
    return struct.pack(">BI", kind, id) + text(name) + struct.pack(">II", instance, version) + data


def blocks(lengths: dict[str, int], addresses: dict[str, int] | None = None) -> bytes:
    """What RAM begins with."""
    data = struct.pack(">Q", sum(lengths.values()) | 4)
    for name, length in lengths.items():
        data += text(name) + struct.pack(">Q", length)
        if addresses is not None:
            data += struct.pack(">Q", addresses[name])
    return data + struct.pack(">Q", 0x10)


def page(number: int, content: bytes | None, block: str | None = None) -> bytes:
    """One page's record; without a block, of the one before; without content, a zero page."""
    flags = (0x02 if content is None else 0x08) | (0x20 if block is None else 0)
    return (
        struct.pack(">Q", number * PAGE | flags)
        + (b"" if block is None else text(block))
        + (b"\0" if content is None else content)
    )


def part(kind: int, id: int, records: Iterable[bytes]) -> bytes:
    """More of RAM (2), or its end (3), without its footer."""
    return struct.pack(">BI", kind, id) + b"".join(records) + struct.pack(">Q", 0x10)


def description(devices: list[dict[str, Any]]) -> bytes:
    data = json.dumps({"page_size": PAGE, "devices": devices}).encode()
    return struct.pack(">BI", 6, len(data)) + data


def field(name: str, type: str, size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": type, "size": size, **more}


CLOCK = {
    "name": "clock",
    "instance_id": 0,
    "vmsd_name": "rtc",
    "version": 2,
    "fields": [
        field("ticks", "uint64", 8),
        field("offset", "int32 equal", 4),
        field("on", "bool", 1),
        field("cmos", "buffer", 3),
        field("regs", "uint16", 2, array_len=2),
        field(
            "timers",
            "struct",
            5,
            index=0,
            struct={
                "vmsd_name": "timer",
                "version": 1,
                "fields": [field("expire", "timer", 4), field("armed", "uint8", 1)],
            },
        ),
        field(
            "timers",
            "struct",
            1,
            index=1,
            struct={"vmsd_name": "timer", "version": 1, "fields": [field("armed", "uint8", 1)]},
        ),
        field("unused", "unused_buffer", 1),
        field("unused", "unused_buffer", 1),
    ],
    "subsections": [
        {"vmsd_name": "rtc/alarm", "version": 7, "fields": [field("hour", "int8", 1)]},
    ],
}
CLOCK_STATE = (
    struct.pack(">Qi?3s2H", 1 << 40, -5, True, b"abc", 1, 2)
    + struct.pack(">iBB2s", -1, 1, 0, b"xy")
    + subsection("rtc/alarm", b"")[:-4]
    + struct.pack(">Ib", 7, -3)
)
CLOCK_FIELDS = {
    "ticks": 1 << 40,
    "offset": -5,
    "on": True,
    "cmos": b"abc",
    "regs": [1, 2],
    "timers": [{"expire": -1, "armed": 1}, {"armed": 0}],
    "unused": b"x",
    "unused'": b"y",
    "rtc/alarm": {"hour": -3},
}

UART = {"name": "uart", "vmsd_name": "serial", "version": 3, "fields": [field("lcr", "uint8", 1)]}

TWICE = [1, 2]
"""Pages of the golden stream that come twice."""


def filled(byte: int) -> bytes:
    return bytes([byte]) * PAGE


def golden(*, footers: bool = True, described: bool = True) -> bytes:
    """A small whole stream: two blocks, pages that come again, devices with instances."""
    ram = [
        page(0, filled(1), "pc.ram"),
        page(1, filled(2)),
        page(2, None),
        page(3, None),
        page(0, filled(3), "pc.rom"),
        page(4, None, "pc.ram"),
    ]
    again = [page(1, None, "pc.ram"), page(2, filled(4)), page(0, filled(5))]
    last = [page(2, filled(6), "pc.ram"), page(3, filled(7))]
    parts = [
        head(),
        section(1, 2, "ram", blocks({"pc.ram": 5 * PAGE, "pc.rom": PAGE}), version=4),
        part(2, 2, ram),
        part(2, 2, again),
        part(3, 2, last),
    ]
    data = parts[0] + b"".join(each + footer(2, footers) for each in parts[1:])
    data += section(4, 5, "clock", CLOCK_STATE) + footer(5, footers)
    data += section(4, 6, "uart", b"\x1b", instance=0) + footer(6, footers)
    data += section(4, 7, "uart", b"\x1c", instance=1) + footer(7, footers)
    uarts = [{**UART, "instance_id": i} for i in range(2)]
    return data + EOF + (description([CLOCK, *uarts]) if described else b"")
