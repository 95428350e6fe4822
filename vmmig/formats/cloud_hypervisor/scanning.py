"""JSON text read piece by piece: what is known by name, what is not kept as the text it is.

The json module makes a list of numbers of a list of numbers, eight bytes and more for each of
them, and nothing at all before the last bracket. Here a list of bytes becomes bytes while it is
read, a piece at a time, and a value nobody knows stays text, so that its numbers keep their
digits.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections import Counter
from collections.abc import Set
from typing import Any, NoReturn

from vmmig.errors import DecodeError
from vmmig.formats.cloud_hypervisor.folders import bytes_at
from vmmig.formats.cloud_hypervisor.integers import decode_integers
from vmmig.snapshot import Buffer, raw_view

MAX_VALUE_BYTES = 16 << 20
"""The longest value that is parsed as a whole: parsed, it takes up to thirty times as much."""

_FIRST_BYTES = 1 << 12
_PIECE_BYTES = 1 << 16
# The longest piece of a value that can be cut off and is not a string: "\\ud83d\\ude00", -Infinity.
_CUT_CHARS = 16
_LAST_SPACE = ord(" ")
_SPACE = re.compile(rb"[ \t\n\r]*+")
# The possessive repeats keep nothing to come back to, so that a string of any length costs no
# memory besides itself.
_PLAIN_STRING = re.compile(rb'"([^"\\\x00-\x1f\x80-\xff]*+)"')
_PLAIN_KEY = re.compile(rb'(,?)[ \t\n\r]*+"([^"\\\x00-\x1f\x80-\xff]*+)"[ \t\n\r]*+:[ \t\n\r]*+')
_STRING = re.compile(rb'"(?:[^"\\]++|\\[\s\S])*+"')
_INTEGER = re.compile(
    rb"[ \t\n\r]*+(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])[ \t\n\r]*+(?:,|\Z)"
)


class JsonScanner:
    """A place in a JSON text that goes forward; every failure says the file and the byte.

    Args:
        text: The text, as UTF-8.
        name: What the file is called, for messages.

    >>> scanner = JsonScanner(b'{"a": [1, 2], "b": 1e400}', "vm.json")
    >>> scanner.begin("{")
    >>> scanner.key(set()), bytes(scanner.byte_list())
    ('a', b'\\x01\\x02')
    >>> scanner.key({"a"}), scanner.value()
    ('b', b'1e400')
    """

    def __init__(self, text: Buffer, name: str) -> None:
        self._text = raw_view(text)
        self._size = len(self._text)
        self._at = 0
        self.name = name

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        """Raise the error that ``what`` is wrong at this byte, or at byte ``at``."""
        raise DecodeError(what, where=f"{self.name}, byte {self._at if at is None else at}")

    @property
    def at(self) -> int:
        """The byte at which the next piece begins, white space skipped."""
        at = self._at
        if at < self._size and self._text[at] <= _LAST_SPACE:
            match = _SPACE.match(self._text, at)
            assert match is not None
            self._at = at = match.end()
        return at

    def begin(self, bracket: str) -> None:
        """Take the opening ``bracket`` of an object or a list."""
        if self._next() != bracket:
            kind = "an object" if bracket == "{" else "a list"
            self.fail(f"{kind} must stand here, not {self._shown()}")
        self._at += 1

    def key(self, seen: Set[str]) -> str | None:
        """The next key of the object that is being read, its colon taken; None at its end.

        Args:
            seen: The keys before it: there is a comma before the next one if there is any.
        """
        following = self._next()
        if following == "}":
            self._at += 1
            return None
        match = _PLAIN_KEY.match(self._text, self._at)
        if match is not None and bool(match[1]) == bool(seen):
            plain = match[2].decode()
            if plain not in seen:
                self._at = match.end()
                return plain
        if seen:
            if following != ",":
                self.fail(f"a comma or a closing brace must stand here, not {self._shown()}")
            self._at += 1
        at = self.at
        key = self.string()
        if key in seen:
            self.fail(f"the key {json.dumps(key)[:80]} is there more than once", at)
        if self._next() != ":":
            self.fail(f"a colon must stand here, not {self._shown()}")
        self._at += 1
        return key

    def string(self) -> str:
        """The string that stands here."""
        at = self.at
        match = _PLAIN_STRING.match(self._text, at)
        if match is not None:
            self._at = match.end()
            return match[1].decode()
        match = _STRING.match(self._text, at)
        if match is None:
            closed = self._next() == '"'
            self.fail(
                "the string that begins here does not end"
                if closed
                else f"a string must stand here, not {self._shown()}"
            )
        try:
            text: str = json.loads(str(match[0], "utf-8"))
            text.encode()
        except UnicodeDecodeError as error:
            self.fail("the text is not UTF-8", at + error.start)
        except UnicodeEncodeError:
            self.fail("the string has one half of a surrogate pair, which is no character")
        except json.JSONDecodeError as error:
            self.fail(f"in the string that begins here: {error.msg}")
        self._at = match.end()
        return text

    def is_null(self) -> bool:
        """Whether ``null`` stands here, which then is taken."""
        if self._next() != "n":
            return False
        if bytes(self._text[self._at : self._at + 4]) != b"null":
            self.fail(f"null must stand here, not {self._shown()}")
        self._at += 4
        return True

    def value(self) -> bytes:
        """Any value that stands here, as the text it is."""
        at = self.at
        window_bytes = _FIRST_BYTES
        while True:
            whole = at + window_bytes >= self._size
            piece = bytes(self._text[at : at + window_bytes])
            try:
                text, _ = utf_8_decode(piece, "strict", whole)
            except UnicodeDecodeError as error:
                self.fail("the text is not UTF-8", at + error.start)
            try:
                _, end = _parsed(text)
            except _NotJsonError as error:
                if whole or error.place < len(text) - _CUT_CHARS:
                    self.fail(error.what, at + len(text[: error.place].encode()))
            else:
                if whole or end < len(text) - _CUT_CHARS:
                    raw = text[:end].encode()
                    self._at = at + len(raw)
                    return raw
            if window_bytes >= MAX_VALUE_BYTES:
                self.fail(f"a value of more than {MAX_VALUE_BYTES} bytes is not read")
            window_bytes *= 4

    def byte_list(self) -> Buffer:
        """The bytes in the list of integers that stands here."""
        self.begin("[")
        if self._next() == "]":
            self._at += 1
            return b""
        data = bytearray()
        piece_bytes = _FIRST_BYTES
        while True:
            # To look at the mapping itself would bring it into memory, page by page.
            at = self._at
            piece = bytes_at(self._text, at, min(at + piece_bytes, self._size))
            end = piece.find(b"]")
            last = end >= 0
            if not last:
                end = piece.rfind(b",")
            if end < 0:
                if piece_bytes == _PIECE_BYTES or len(piece) < piece_bytes:
                    self._blame(piece, at)
                piece_bytes = _PIECE_BYTES
                continue
            decoded = decode_integers(piece[:end])
            if decoded is None:
                self._blame(piece[:end], at)
            self._at = at + end + 1
            if last and not data:
                return decoded
            data += decoded
            if last:
                return memoryview(data).toreadonly()
            piece_bytes = _PIECE_BYTES

    def end(self) -> None:
        """Nothing, if nothing follows."""
        if self.at < self._size:
            self.fail(f"nothing may follow here, but there is {self._shown()}")

    def _next(self) -> str:
        at = self.at
        return chr(self._text[at]) if at < self._size else ""

    def _shown(self) -> str:
        piece = bytes(self._text[self._at : self._at + 20])
        return repr(piece.decode("utf-8", "replace")) if piece else "the end of the file"

    def _blame(self, piece: bytes, at: int) -> NoReturn:
        place = 0
        while match := _INTEGER.match(piece, place):
            place = match.end()
        self._at = at + place
        self._at = min(self.at, at + len(piece))
        self.fail(f"a byte from 0 to 255 must stand here, not {self._shown()}")


def parse_json(text: Buffer, name: str) -> Any:
    """The value of a whole JSON text of at most `MAX_VALUE_BYTES`.

    Raises:
        DecodeError: It is not JSON, is longer, repeats a key, or is nested too deep; says where.

    >>> parse_json(b'{"a": [1, 2.5, null]}', "config.json")
    {'a': [1, 2.5, None]}
    """
    scanner = JsonScanner(text, name)
    raw = scanner.value()
    scanner.end()
    return _parsed(raw.decode())[0]


class _NotJsonError(Exception):
    def __init__(self, what: str, place: int) -> None:
        super().__init__(what)
        self.what, self.place = what, place


class _RefusedError(Exception):
    pass


def _parsed(text: str) -> tuple[Any, int]:
    """The value with which ``text`` begins, and where it ends.

    Raises:
        _NotJsonError: It begins with none. Where that may be because the text is cut off, the
            place is at its end.
    """
    try:
        parsed: tuple[Any, int]
        try:
            parsed = _DECODER.scan_once(text, 0)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python makes no integer of thousands of digits.
            parsed = _DECODER_OF_LONG_INTEGERS.scan_once(text, 0)
        return parsed
    except StopIteration as error:
        raise _NotJsonError("a value must stand here", error.value) from None
    except json.JSONDecodeError as error:
        place = len(text) if error.msg.startswith("Unterminated") else error.pos
        raise _NotJsonError(error.msg, place) from None
    except RecursionError:
        raise _NotJsonError("the value that begins here is nested too deep", 0) from None
    except _RefusedError as error:
        raise _NotJsonError(f"in the value that begins here, {error}", 0) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedError(f"the key {json.dumps(twice)[:80]} is there more than once")
    return made


def _constant(name: str) -> NoReturn:
    raise _RefusedError(f"there is {name}, which is no JSON")


_DECODER: Any = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_DECODER_OF_LONG_INTEGERS: Any = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=float
)
