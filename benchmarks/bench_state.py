"""Typed states against cattrs with hooks that are written by hand, with and without checks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import attrs
import cattrs
import msgpack

from benchmarks.timing import medians_s, table
from vmmig import get_state, save_state, versioned
from vmmig.state import U8, U16, U64

M8, M16, M64 = (1 << 8) - 1, (1 << 16) - 1, (1 << 64) - 1


@versioned("bench.serial", 1)
@attrs.define
class Serial:
    ier: U8 = 1
    fcr: U8 = 2
    lcr: U8 = 3
    mcr: U8 = 4
    scr: U8 = 5
    divisor: U16 = 12
    received: list[U8] = attrs.field(factory=lambda: [65] * 16)
    sent: U64 = 9


@attrs.define
class Queue:
    size: U16 = 256
    desc: U64 = 1 << 40
    avail: U64 = 1 << 41
    used: U64 = 1 << 42
    enabled: bool = True


@versioned("bench.net", 1)
@attrs.define
class Net:
    mac: bytes = b"123456"
    mtu: U16 = 1500
    name: str = "eth0"
    features: U64 = 1 << 33
    queues: list[Queue] = attrs.field(factory=lambda: [Queue() for _ in range(8)])
    counters: dict[str, int] = attrs.field(factory=lambda: {f"counter{i}": i for i in range(20)})
    link: Queue | None = None
    registers: list[U64] = attrs.field(factory=lambda: [*range(256)])


@versioned("bench.table", 1)
@attrs.define
class Table:
    queues: list[Queue] = attrs.field(factory=lambda: [Queue() for _ in range(1000)])


def number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(value)
    return value


def numbers(values: Any, most: int) -> list[int]:
    if type(values) is not list:
        raise ValueError(values)
    for value in values:
        number(value, most)
    return values


def of(value: Any, cls: type) -> Any:
    if type(value) is not cls:
        raise ValueError(value)
    return value


def fields(value: Any, count: int) -> Any:
    if type(value) is not dict or len(value) != count:
        raise ValueError(value)
    return value


def counters(value: Any) -> dict[str, int]:
    for key, count in of(value, dict).items():
        of(key, str)
        of(count, int)
    return value


def checking() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)

    def queue(d: Any, _: Any = None) -> Queue:
        fields(d, 5)
        return Queue(
            number(d["size"], M16),
            number(d["desc"], M64),
            number(d["avail"], M64),
            number(d["used"], M64),
            of(d["enabled"], bool),
        )

    def serial(d: Any, _: Any) -> Serial:
        fields(d, 8)
        return Serial(
            number(d["ier"], M8),
            number(d["fcr"], M8),
            number(d["lcr"], M8),
            number(d["mcr"], M8),
            number(d["scr"], M8),
            number(d["divisor"], M16),
            numbers(d["received"], M8),
            number(d["sent"], M64),
        )

    def net(d: Any, _: Any) -> Net:
        fields(d, 8)
        return Net(
            of(d["mac"], bytes),
            number(d["mtu"], M16),
            of(d["name"], str),
            number(d["features"], M64),
            [queue(q) for q in of(d["queues"], list)],
            counters(d["counters"]),
            None if d["link"] is None else queue(d["link"]),
            numbers(d["registers"], M64),
        )

    converter.register_structure_hook(Queue, queue)
    converter.register_structure_hook(Serial, serial)
    converter.register_structure_hook(Net, net)
    converter.register_structure_hook(
        Table, lambda d, _: Table([queue(q) for q in of(fields(d, 1)["queues"], list)])
    )
    return converter


def trusting() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=False)

    def queue(d: Any, _: Any = None) -> Queue:
        return Queue(d["size"], d["desc"], d["avail"], d["used"], d["enabled"])

    def serial(d: Any, _: Any) -> Serial:
        return Serial(
            d["ier"],
            d["fcr"],
            d["lcr"],
            d["mcr"],
            d["scr"],
            d["divisor"],
            d["received"],
            d["sent"],
        )

    def net(d: Any, _: Any) -> Net:
        return Net(
            d["mac"],
            d["mtu"],
            d["name"],
            d["features"],
            [queue(q) for q in d["queues"]],
            d["counters"],
            None if d["link"] is None else queue(d["link"]),
            d["registers"],
        )

    converter.register_structure_hook(Queue, queue)
    converter.register_structure_hook(Serial, serial)
    converter.register_structure_hook(Net, net)
    converter.register_structure_hook(Table, lambda d, _: Table([queue(q) for q in d["queues"]]))
    return converter


def main(*, quick: bool = False) -> None:
    rows: list[tuple[object, ...]] = []
    hands, trusts, bare = checking(), trusting(), cattrs.Converter(detailed_validation=False)
    for state, calls in ((Serial(), 2000), (Net(), 400), (Table(), 10)):
        cls: Any = type(state)
        snapshot = save_state("bench", state)
        raw = msgpack.packb(attrs.asdict(state))

        def many(decode: Callable[[], Any], count: int = 1 if quick else calls) -> Any:
            for _ in range(count):
                result = decode()
            return result

        ways: dict[str, Callable[[], Any]] = {
            "vmmig": lambda s=snapshot, c=cls: get_state(s, c),
            "checking hooks": lambda r=raw, c=cls: hands.structure(msgpack.unpackb(r), c),
            "trusting hooks": lambda r=raw, c=cls: trusts.structure(msgpack.unpackb(r), c),
            "cattrs alone": lambda r=raw, c=cls: bare.structure(msgpack.unpackb(r), c),
        }
        assert all(decode() == state for decode in ways.values())
        times = medians_s(
            {name: lambda d=decode, m=many: m(d) for name, decode in ways.items()},
            rounds=1 if quick else 21,
        )
        per_call = 1 if quick else calls
        rows.append(
            (
                f"{cls.__name__}, {len(raw)} bytes",
                f"{times['vmmig'] / per_call * 1e6:.1f}",
                *(f"{times['vmmig'] / times[name]:.2f}" for name in [*ways][1:]),
            )
        )
    head = ("decode a state", "us", "x checking hooks", "x trusting hooks", "x cattrs alone")
    print(table("Typed states against cattrs with hooks written by hand", head, rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
