"""Lists of bytes as JSON has them, ``12,0,255``: decimal digits to bytes and back.

No step of these looks at one number at a time in Python: each works on all digits of a kind at
once, so that they take about half of what the json module takes for the list of numbers alone.
"""

from __future__ import annotations

_SPACES = (b" ", b"\n", b"\t", b"\r")
_SPACE = b"".join(_SPACES)
_DIGITS = b"0123456789"
_DIGITS_AND_COMMA = _DIGITS + b","
_WRONG = 128
"""What counts for a digit that cannot be there: half a number is above 127 with it."""


def _table(of: dict[int, int], other: int) -> bytes:
    return bytes(of.get(character, other) for character in range(256))


_TABS = _table({ord(","): ord("\t")} | {digit: digit for digit in _DIGITS}, ord("x"))
# From a digit's character, or the space where there is none, to half of what it counts.
_ONES = _table({48 + digit: digit // 2 for digit in range(10)}, _WRONG)
_TENS = _table({48 + digit: 5 * digit for digit in range(10)}, 0)
_HUNDREDS = _table({ord(" "): 0, ord("1"): 50, ord("2"): 100}, _WRONG)
_ODD = _table({48 + digit: digit % 2 for digit in range(10)}, 0)
_ZERO = _table({ord("0"): 1}, 0)
_NONE = _table({ord(" "): 1}, 0)

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
    if any(space in text for space in _SPACES):
        bare = _without_space(text)
        return None if bare is None else _decode_bare(bare)
    return _decode_bare(text)


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


def _decode_bare(text: bytes) -> bytes | None:
    # Backwards, each number begins with its ones; the tab stops put it into a cell of four:
    # "12,0,255" becomes "552\t0\t21\t", and that "552 0   21  ".
    cells = (text[::-1].translate(_TABS) + b"\t").expandtabs(4)
    ones, tens, hundreds = cells[-4::-4], cells[-3::-4], cells[-2::-4]
    if not (cells[3::4].isspace() and ones.isdigit() and not tens.translate(None, _DIGITS + b" ")):
        return None
    # A long number has one byte for each cell, so that one addition adds them all. It adds
    # halves, for what is above 255 would carry into its neighbour before it could be seen.
    half = (
        _number(ones.translate(_ONES))
        + _number(tens.translate(_TENS))
        + _number(hundreds.translate(_HUNDREDS))
    )
    leading_zeros = _number(tens.translate(_ZERO)) & _number(hundreds.translate(_NONE))
    if leading_zeros or not half.to_bytes(len(ones), "little").isascii():
        return None
    return (2 * half + _number(ones.translate(_ODD))).to_bytes(len(ones), "little")


def _number(lanes: bytes) -> int:
    return int.from_bytes(lanes, "little")


def _without_space(text: bytes) -> bytes | None:
    """The text without the white space beside its commas; None if there is some elsewhere.

    >>> _without_space(b" 1,\\n2 "), _without_space(b"1 2")
    (b'1,2', None)
    """
    bare = text.replace(b", ", b",").strip(_SPACE)
    if bare.translate(None, _DIGITS_AND_COMMA):
        bare = b",".join([part.strip(_SPACE) for part in bare.split(b",")])
    return None if bare.translate(None, _DIGITS_AND_COMMA) else bare
