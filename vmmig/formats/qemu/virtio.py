"""A virtio device's state, which QEMU's description of the devices shows as one field of bytes.

All of it is of one layout, but for the device's own part, which is kept as bytes: first what its
bus has, PCI or ``virtio-mmio``, then the registers, the queues, the device's own, subsections.
"""

from __future__ import annotations

import re
import struct
from typing import Any

_CONFIG_BYTES = 256
_EXPRESS_CONFIG_BYTES = 4096
_CAPABILITIES, _EXPRESS, _MSIX = 0x34, 0x10, 0x11
_MAX_QUEUES = 1024
_SUBSECTION = re.compile(rb"\x05([\x08-\x40])(virtio/[a-z0-9_]+)(\x00\x00\x00.)", re.DOTALL)
_BOOLEANS = ("virtio/broken", "virtio/started", "virtio/start_on_kick", "virtio/disabled")


def decode(state: bytes, *, mmio: bool) -> dict[str, Any] | None:
    """The fields of a state, all of its bytes among them; None where it is not of this layout.

    Args:
        state: The bytes.
        mmio: The device is on ``virtio-mmio``, not on PCI.

    >>> bus, registers = bytes(12), bytes.fromhex("0f 01 0000 00000003 00000000 00000001")
    >>> queue = bytes.fromhex("00000008 00001000 0000000000002000 0007")
    >>> fields = decode(bus + registers + queue, mmio=True)
    >>> fields["status"], fields["queues"][0]["last_avail_idx"], fields["device"]
    (15, 7, b'')
    """
    try:
        return _Decoding(state).all(mmio)
    except (struct.error, ValueError, IndexError):
        return None


class _Decoding:
    def __init__(self, state: bytes) -> None:
        self._state = state
        self._at = 0

    def all(self, mmio: bool) -> dict[str, Any]:
        fields, vectors = (self._mmio(), False) if mmio else self._pci()
        status, isr, queue_sel, features = self._numbers(">BBHI")
        fields |= {"status": status, "isr": isr, "queue_sel": queue_sel}
        fields["guest_features_lo"] = features
        fields["config"] = self._take(*self._numbers(">I"))
        (count,) = self._numbers(">I")
        if count > _MAX_QUEUES:
            raise ValueError(count)
        fields["queues"] = [self._queue(mmio, vectors) for _ in range(count)]
        found = [
            match
            for match in _SUBSECTION.finditer(self._state, self._at)
            if match[1][0] == len(match[2])
        ]
        ends = [*(match.start() for match in found), len(self._state)]
        fields["device"] = self._take(ends[0] - self._at)
        for match, end in zip(found, ends[1:], strict=True):
            data = self._state[match.end() : end]
            fields[match[2].decode()] = _subsection(match[2].decode(), data, count)
        return fields

    def _mmio(self) -> dict[str, Any]:
        names = ("host_features_sel", "guest_features_sel", "guest_page_shift")
        return dict(zip(names, self._numbers(">III"), strict=True))

    def _pci(self) -> tuple[dict[str, Any], bool]:
        """What PCI has of it, and whether it has interrupt vectors."""
        if self._numbers(">i") != (2,):
            raise ValueError("not a PCI device's version")
        config = self._state[self._at : self._at + _CONFIG_BYTES]
        express, entries = False, 0
        place, left = config[_CAPABILITIES], _CONFIG_BYTES // 4
        while place and left:
            left -= 1
            if config[place] == _EXPRESS:
                express = True
            elif config[place] == _MSIX:
                entries = 1 + (int.from_bytes(config[place + 2 : place + 4], "little") & 0x7FF)
            place = config[place + 1]
        fields: dict[str, Any] = {
            "pci_config": self._take(_EXPRESS_CONFIG_BYTES if express else _CONFIG_BYTES),
            "irq_state": list(self._numbers(">4I")),
        }
        if entries:
            fields["msix_table"] = self._take(16 * entries)
            fields["msix_pba"] = self._take((entries + 7) // 8)
            (fields["config_vector"],) = self._numbers(">H")
        return fields, bool(entries)

    def _queue(self, mmio: bool, vectors: bool) -> dict[str, int]:
        (num,) = self._numbers(">I")
        queue = {"num": num}
        if mmio:
            (queue["align"],) = self._numbers(">I")
        queue["desc"], queue["last_avail_idx"] = self._numbers(">QH")
        if vectors:
            (queue["vector"],) = self._numbers(">H")
        return queue

    def _numbers(self, format: str) -> tuple[int, ...]:
        values = struct.unpack_from(format, self._state, self._at)
        self._at += struct.calcsize(format)
        return values

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._state):
            raise ValueError(count)
        self._at += count
        return self._state[self._at - count : self._at]


def _subsection(name: str, data: bytes, queues: int) -> object:
    if name in _BOOLEANS and len(data) == 1:
        return data != b"\0"
    if name == "virtio/64bit_features" and len(data) == 8:
        return {"guest_features": int.from_bytes(data, "big")}
    if name == "virtio/virtqueues" and len(data) == 16 * _MAX_QUEUES:
        rings = struct.iter_unpack(">QQ", data[: 16 * queues])
        return {
            "vring": [{"avail": avail, "used": used} for avail, used in rings],
            "unused": data[16 * queues :],
        }
    return data
