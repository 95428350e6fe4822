"""The migration stream's bytes: what its parts are called, and a window that reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vmmig._native import address_of
from vmmig.errors import DecodeError

MAGIC = b"QEVM"
VERSION = 3

EOF, SECTION_START, SECTION_PART, SECTION_END, SECTION_FULL = range(5)
SUBSECTION, DESCRIPTION, CONFIGURATION, COMMAND = range(5, 9)
FOOTER = 0x7E

ZERO, MEM_SIZE, PAGE, END_OF_SECTION, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
DELTA, HOOK, COMPRESSED, MULTIFD_FLUSH = 0x40, 0x80, 0x100, 0x200

_WINDOW_BYTES = 1 << 20
MAX_KEPT_BYTES = 1 << 30
_NUMBERS = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}
_U64 = struct.Struct(">Q")


def damaged(offset: int, what: str) -> DecodeError:
    """The error for a stream that is wrong at a byte.

    >>> str(damaged(8, "no section begins with 0x9"))
    'Failed to restore migratable component: byte 8: no section begins with 0x9'
    """
    return DecodeError(what, where=f"byte {offset}")


class Window:
    """A part of the stream in memory, which moves on as it is read; or all of a mapped file.

    Args:
        view: All of the stream, where ``readinto`` is None.
        readinto: Fills a buffer as far as it can, and returns how many bytes it has got: 0 at
            the end only.

    Attributes:
        view: The bytes that are in memory, until the next call of a method that reads.
        at: Where in ``view`` the next byte is.

    >>> window = Window(memoryview(b"\\x02ab"))
    >>> window.text(), window.offset
    ('ab', 3)
    """

    def __init__(
        self, view: memoryview, readinto: Callable[[memoryview], int] | None = None
    ) -> None:
        self._readinto = readinto
        self._buffer = bytearray(_WINDOW_BYTES if readinto else 0)
        self._begin = 0
        self.view = view
        self.at = 0
        self.address = address_of(view) if view else 0

    @property
    def offset(self) -> int:
        """Where in the stream the next byte is."""
        return self._begin + self.at

    @property
    def in_memory(self) -> int:
        """How many bytes can be taken without reading more."""
        return len(self.view) - self.at

    def fill(self, count: int) -> bool:
        """Have ``count`` bytes in memory, if there are as many; False where the stream ends."""
        if self.in_memory >= count:
            return True
        if self._readinto is None:
            return False
        kept = bytes(self.view[self.at :])
        self._begin += self.at
        self.at = 0
        self.view.release()
        if count > len(self._buffer):
            self._buffer = bytearray(max(count, 2 * len(self._buffer)))
        self._buffer[: len(kept)] = kept
        room = memoryview(self._buffer)
        have = len(kept)
        while have < len(room):
            came = self._readinto(room[have:])
            if not came:
                self._readinto = None
                break
            have += came
        self.view = room[:have]
        self.address = address_of(self.view) if have else 0
        return have >= count

    def need(self, count: int, what: str) -> None:
        """Have ``count`` bytes in memory.

        Raises:
            DecodeError: The stream ends before.
        """
        if not self.fill(count):
            raise damaged(
                self._begin + len(self.view),
                f"the stream ends here, within {what} that begins at byte {self.offset}: "
                "it is cut off",
            )

    def number(self, size: int, what: str = "a number") -> int:
        """The next big-endian number of ``size`` bytes, at most 4."""
        self.need(size, what)
        (value,) = _NUMBERS[size].unpack_from(self.view, self.at)
        self.at += size
        return int(value)

    def u64(self, what: str = "a number") -> int:
        """The next big-endian number of 8 bytes."""
        self.need(8, what)
        (value,) = _U64.unpack_from(self.view, self.at)
        self.at += 8
        return int(value)

    def take(self, count: int, what: str) -> bytes:
        """A copy of the next ``count`` bytes."""
        self.need(min(count, MAX_KEPT_BYTES), what)
        if count > MAX_KEPT_BYTES:
            raise damaged(self.offset, f"{what} has {count} bytes: more than {MAX_KEPT_BYTES}")
        self.at += count
        return bytes(self.view[self.at - count : self.at])

    def text(self, what: str = "a name") -> str:
        """The next counted string."""
        begin = self.offset
        name = self.take(self.number(1, what), what)
        try:
            text = name.decode("ascii")
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            raise damaged(begin, f"{what} is {name!r}, and not printable text")
        return text

    def peek(self) -> int:
        """The next byte; -1 at the end."""
        return self.view[self.at] if self.fill(1) else -1

    def rest(self, what: str) -> bytes:
        """A copy of all the bytes up to the end."""
        while self.fill(self.in_memory + _WINDOW_BYTES):
            if self.in_memory > MAX_KEPT_BYTES:
                raise damaged(self.offset, f"{what} has more than {MAX_KEPT_BYTES} bytes")
        return self.take(self.in_memory, what)

    def hold_rest(self, what: str) -> bytes:
        """Have all the bytes up to the end in memory, to go back within them; they are returned."""
        begin = self.offset
        data = self.rest(what)
        self._begin, self._readinto, self._buffer, self.at = begin, None, bytearray(), 0
        self.view = memoryview(data)
        self.address = address_of(self.view) if data else 0
        return data

    def go_back(self, offset: int) -> None:
        """Read on at an earlier byte, which is still in memory."""
        self.at = offset - self._begin
