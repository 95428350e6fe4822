"""A terminal of pyte: what a program has drawn on its screen, in the midst of what it draws."""

from __future__ import annotations

import json
from typing import Any

import pyte
from pyte.screens import Char, Cursor, Margins, Savepoint

from retrofit.still import Still, refusing
from vmmig import Snapshot

_PLAIN = ("title", "icon_name", "charset", "g0_charset", "g1_charset", "columns", "saved_columns")
_SETS = ("mode", "tabstops", "dirty")


class Terminal(Still):
    """Beside the screen, state is what the parser has begun to read: half an escape sequence."""

    def __init__(self) -> None:
        self.screen = pyte.Screen(12, 5)
        self.stream = pyte.ByteStream(self.screen)
        self.begun = b""

    def feed(self, data: bytes) -> None:
        for byte in data:
            self.begun += bytes([byte])
            try:
                self.stream.feed(self.begun[-1:])
            finally:
                if self.stream._taking_plain_text and not self.stream.utf8_decoder.getstate()[0]:
                    self.begun = b""

    def state(self) -> dict[str, Any]:
        screen = self.screen
        return {
            "begun": self.begun.hex(),
            "utf8": self.stream.use_utf8,
            "margins": screen.margins,
            "cursor": _from_cursor(screen.cursor),
            "saved": [[_from_cursor(saved.cursor), *saved[1:]] for saved in screen.savepoints],
            "lines": [
                [y, sorted(line.items())] for y, line in sorted(screen.buffer.items()) if line
            ],
            **{name: getattr(screen, name) for name in _PLAIN},
            **{name: sorted(getattr(screen, name)) for name in _SETS},
        }

    def snapshot(self) -> Snapshot:
        return self.snapshot_of(state=json.dumps(self.state()).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (payload,) = snapshot.take("state")
        with refusing():
            state = json.loads(payload)
            restored = Terminal()
            restored.stream.use_utf8 = state["utf8"]
            restored.feed(bytes.fromhex(state["begun"]))  # what it draws is overwritten below
            screen = restored.screen
            for name in _PLAIN:
                setattr(screen, name, state[name])
            for name in _SETS:
                setattr(screen, name, set(state[name]))
            screen.margins = state["margins"] and Margins(*state["margins"])
            screen.cursor = _to_cursor(*state["cursor"])
            screen.savepoints = [Savepoint(_to_cursor(*c), *rest) for c, *rest in state["saved"]]
            screen.buffer.clear()
            for y, cells in state["lines"]:
                screen.buffer[y].update({x: Char(*cell) for x, cell in cells})
        vars(self).update(vars(restored))


def _from_cursor(cursor: Cursor) -> list[Any]:
    return [cursor.x, cursor.y, cursor.attrs, cursor.hidden]


def _to_cursor(x: int, y: int, attrs: list[Any], hidden: bool) -> Cursor:
    cursor = Cursor(x, y, Char(*attrs))
    cursor.hidden = hidden
    return cursor
