"""Sizes and times as people read them."""

from __future__ import annotations


def format_bytes(nbytes: float) -> str:
    """A number of bytes for people: three digits and a binary unit.

    >>> format_bytes(0), format_bytes(1536), format_bytes(5 << 30)
    ('0 B', '1.5 KiB', '5 GiB')
    """
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if nbytes < 999.5:
            break
        nbytes, unit = nbytes / 1024, larger
    return f"{nbytes:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """A time for people: at least three digits, in seconds or a unit below.

    >>> format_seconds(3600), format_seconds(0.3), format_seconds(0.0000125)
    ('3600 s', '300 ms', '12.5 us')
    """
    if seconds >= 999.5:
        return f"{seconds:.0f} s"
    if seconds >= 0.9995 or not seconds:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.9995e-3 else f"{seconds * 1e6:.3g} us"
