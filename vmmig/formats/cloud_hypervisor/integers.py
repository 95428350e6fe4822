"""Lists of bytes as JSON has them, ``12,0,255``: decimal digits to bytes and back.

No step of these looks at one number at a time in Python: each works on all digits of a kind at
once, so that they take about half of what the json module takes for the list of numbers alone.
"""

from __future__ import annotations

_DIGITS_AND_COMMA = b"0123456789,"
_SPACE = b" \t\n\r"
_BELOW_10, _BELOW_100 = bytes(range(10)), bytes(range(100))

_WRONG = 128
"""What stands for a digit that cannot be there: with it, half a number is above 127."""


def _halves(of: dict[int, int], other: int) -> bytes:
    """A table from a digit's character, or a space, to half of what it counts."""
    return bytes(of.get(character, other) for character in range(256))


_ONES = _halves({48 + digit: digit // 2 for digit in range(10)}, _WRONG)
_TENS = _halves({48 + digit: 5 * digit for digit in range(10)}, 0)
_HUNDREDS = _halves({ord(" "): 0, ord("1"): 50, ord("2"): 100}, _WRONG)
_ODD = _halves({48 + digit: digit % 2 for digit in range(10)}, 0)

_ONE = bytes(48 + byte % 10 for byte in range(256))
_TEN = bytes(48 + byte // 10 % 10 if byte > 9 else 32 for byte in range(256))
_HUNDRED = bytes(48 + byte // 100 if byte > 99 else 32 for byte in range(256))


def decode_integers(text: bytes) -> bytes | None:
    """The bytes of integers from 0 to 255 with commas between; None if it is anything else.

    Args:
        text: At least one integer; white space may stand where JSON lets it.

    >>> decode_integers(b"12,0, 255"), decode_integers(b"256"), decode_integers(b"1,,2")
    (b'\\x0c\\x00\\xff', None, None)
    """
    if text.translate(None, _DIGITS_AND_COMMA):
        stripped = _without_space(text)
        if stripped is None:
            return None
        text = stripped
    # Backwards, each number begins with its ones; the tab stops put it into a cell of four:
    # "12,0,255" becomes "552\t0\t21\t", and that "552 0   21  ".
    cells = (text[::-1].replace(b",", b"\t") + b"\t").expandtabs(4)
    if not cells[3::4].isspace():
        return None
    count = len(cells) // 4
    ones, tens, hundreds = cells[-4::-4], cells[-3::-4], cells[-2::-4]
    # A long number has one byte for each cell, so that one addition adds them all. It adds
    # halves, for what is above 255 would carry into its neighbour before it could be seen.
    half = (
        _number(ones.translate(_ONES))
        + _number(tens.translate(_TENS))
        + _number(hundreds.translate(_HUNDREDS))
    )
    if not half.to_bytes(count, "little").isascii():
        return None
    data = (2 * half + _number(ones.translate(_ODD))).to_bytes(count, "little")
    digits = count + len(data.translate(None, _BELOW_10)) + len(data.translate(None, _BELOW_100))
    if digits + count - 1 != len(text):
        return None  # A leading zero.
    return data


def encode_integers(data: bytes) -> bytes:
    """The bytes' integers with commas between.

    >>> encode_integers(bytes([12, 0, 255]))
    b'12,0,255'
    """
    cells = bytearray(b",") * (4 * len(data))
    cells[0::4] = data.translate(_HUNDRED)
    cells[1::4] = data.translate(_TEN)
    cells[2::4] = data.translate(_ONE)
    return bytes(cells.translate(None, b" ")[:-1])


def _number(lanes: bytes) -> int:
    return int.from_bytes(lanes, "little")


def _without_space(text: bytes) -> bytes | None:
    text = text.replace(b", ", b",").strip(_SPACE)
    if not text.translate(None, _DIGITS_AND_COMMA):
        return text
    # Where white space stands between digits, it joins two numbers that were apart.
    parts = [part.strip(_SPACE) for part in text.split(b",")]
    text = b",".join(parts)
    return None if text.translate(None, _DIGITS_AND_COMMA) else text
