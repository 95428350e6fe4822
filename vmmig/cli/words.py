"""How what is in a snapshot is written for people, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vmmig._units import format_bytes
from vmmig.formats import Decoded
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import SnapshotPath

_LONGEST = 120
DEEPEST = 64


def shown(text: str) -> str:
    """A text from a snapshot, with nothing in it that a terminal would obey.

    >>> shown("cpu 0"), shown("a\\x1b[31m")
    ('cpu 0', 'a\\\\x1b[31m')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def value_text(value: object) -> str:
    """A field's value, in one short line.

    >>> value_text(4096), value_text(b"\\x01\\x02"), value_text("on")
    ('4096 (0x1000)', '01 02', "'on'")
    """
    if type(value) is int:
        digits = str(value) if value.bit_length() < 1024 else f"{value.bit_length()}-bit number"
        return f"{digits} ({value:#x})" if 255 < abs(value) < 1 << 64 else digits
    if isinstance(value, (bytes, bytearray, memoryview)):
        head = bytes(value[:32]).hex(" ")
        return f"{head} ... ({len(value)} bytes)" if len(value) > 32 else head or "(no bytes)"
    text = shown(repr(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}... ({len(text)})"


def count_text(count: int, what: str) -> str:
    """A number of things.

    >>> count_text(1, "page"), count_text(2, "page")
    ('1 page', '2 pages')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def size_text(nbytes: int) -> str:
    """A size: exact where it is small.

    >>> size_text(136), size_text(8 << 30)
    ('136 B', '8 GiB')
    """
    return f"{nbytes} B" if nbytes < 1024 else format_bytes(nbytes)


def decoded_text(decoded: Decoded) -> str:
    """What a section holds, in a few words."""
    text = shown(decoded.kind)
    if decoded.version is not None:
        text += f" version {decoded.version}"
    return text + (f" by {shown(decoded.writer)}" if decoded.writer else "")


def ranges_text(ranges: MemoryRangeTable, unit: int, most: int = 12) -> str:
    """Ranges of bytes in pages, or whatever has ``unit`` bytes: ``3-4, 9``.

    >>> ranges_text(MemoryRangeTable.from_spans([12288, 36864], [20480, 40960]), 4096)
    '3-4, 9'
    """
    words: list[str] = []
    for first, length in ranges.pairs():
        if len(words) == most:
            words.append(f"... {len(ranges) - most} more")
            break
        begin, last = first // unit, (first + length - 1) // unit
        words.append(str(begin) if begin == last else f"{begin}-{last}")
    return ", ".join(words)


def hex_lines(data: bytes, offset: int = 0) -> Iterator[str]:
    """Bytes as hexadecimal and as characters, 16 a line.

    >>> print(*hex_lines(b"\\x00AB"))
    00000000  00 41 42                                         .AB
    """
    for at in range(0, len(data), 16):
        line = data[at : at + 16]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{offset + at:08x}  {line.hex(' '):47}  {letters}"


def plain(value: Any) -> Any:
    """A decoded value as JSON has it: bytes as ``{"hex": ...}``, and no NaN or infinity.

    >>> plain({"mac": b"\\x01", "rate": float("inf")})
    {'mac': {'hex': '01'}, 'rate': 'inf'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"hex": bytes(value).hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def decoded_json(decoded: Decoded) -> dict[str, Any]:
    """What a section holds, as JSON has it."""
    return {
        "kind": decoded.kind,
        "version": decoded.version,
        "writer": decoded.writer,
        "fields": plain(decoded.fields),
    }


def path_json(path: SnapshotPath) -> list[str] | None:
    """A node's ids as JSON has them; None where it is deeper than anything but an attack.

    >>> path_json(SnapshotPath().child("cpu-manager").child("cpu0"))
    ['cpu-manager', 'cpu0']
    """
    ids = path.ids
    return [*ids] if len(ids) <= DEEPEST else None
