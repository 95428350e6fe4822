"""A migration stream into a `Snapshot`."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from vmmig.errors import DecodeError
from vmmig.formats.qemu import configuration, description
from vmmig.formats.qemu.ram import RAM_VERSION, RamReader
from vmmig.formats.qemu.wire import (
    COMMAND,
    CONFIGURATION,
    DESCRIPTION,
    EOF,
    FOOTER,
    MAGIC,
    MAX_KEPT_BYTES,
    SECTION_END,
    SECTION_FULL,
    SECTION_PART,
    SECTION_START,
    VERSION,
    Window,
    damaged,
)
from vmmig.snapshot import Snapshot, SnapshotDataSection

_PAGE_BYTES = 4096
_SEARCHED_BYTES = 1 << 22
_POSTCOPY_ADVISE, _PACKAGED = 3, 8
_DESCRIPTION = re.compile(rb"\x00\x06(?=(....)\{)", re.DOTALL)
_FOOTERS = rb"(?=\x04....[\x01-\xff][ -~]|\x00(?:\x06....\{|\Z)|[\x01\x02\x03]\x00|\x08\x00)"
"""What can follow a footer: the next section, or the end."""


class Reader:
    """Reads one stream, once.

    >>> Reader(Window(memoryview(b"QEVM"))).snapshot()
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ...byte 4: the stream ends here, within ...
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._root = Snapshot("qemu")
        self._ram_id: int | None = None
        self._ram: RamReader | None = None
        self._others: dict[int, tuple[str, bytearray]] = {}
        self._footers: bool | None = None
        self._parts: list[dict[str, Any]] = []
        self._described: dict[tuple[str, int], dict[str, Any]] = {}
        self._page_bytes = _PAGE_BYTES
        self._ignores_shared = False
        self._ram_ended = self._has_rest = False

    def snapshot(self) -> Snapshot:
        """The tree of the whole stream.

        Raises:
            DecodeError: It is no stream that can be read.
        """
        try:
            self._head()
            while self._section():
                pass
            self._tail()
            self._finish_ram()
            for child, state in self._others.values():
                node = self._root.snapshots[child]
                node.add_data_section(SnapshotDataSection("state", bytes(state)))
        except (OSError, MemoryError) as error:
            raise DecodeError(error, where=f"byte {self._window.offset}") from error
        finally:
            if self._ram is not None:
                self._ram.close()
        layout = {"layout": 1, "parts": self._parts}
        text = json.dumps(layout, separators=(",", ":")).encode()
        self._root.add_data_section(SnapshotDataSection("stream", text))
        return self._root

    def _head(self) -> None:
        window = self._window
        if window.take(4, "its magic") != MAGIC:
            raise damaged(0, "it does not begin with 'QEVM': it is no migration stream of QEMU")
        version = window.number(4, "its version")
        if version != VERSION:
            raise damaged(4, f"its version is {version}; only {VERSION} is known")

    def _section(self) -> bool:
        """Read a section; False behind the last."""
        window = self._window
        begin = window.offset
        if self._ram_ended and not self._has_rest and window.peek() == SECTION_FULL:
            self._hold_rest()
        kind = window.number(1, "a section")
        if kind == EOF:
            self._parts.append({"part": "eof"})
            return False
        if kind == CONFIGURATION and not self._parts:
            self._configuration()
        elif kind == COMMAND:
            self._command(begin)
        elif kind in (SECTION_START, SECTION_FULL):
            id = window.number(4, "a section's number")
            name = window.text("a section's name")
            instance = window.number(4, "a section's instance")
            version = window.number(4, "a section's version")
            part = {"id": id, "name": name, "instance": instance, "version": version}
            if kind == SECTION_FULL:
                return self._device(begin, part)
            self._start(begin, part)
        elif kind in (SECTION_PART, SECTION_END):
            self._go_on(begin, "part" if kind == SECTION_PART else "end")
        else:
            raise damaged(begin, f"no section can begin with {kind:#04x} here")
        return True

    def _configuration(self) -> None:
        raw, found = configuration.read(self._window)
        self._page_bytes = 1 << found.page_bits
        self._ignores_shared = configuration.IGNORE_SHARED in found.capabilities
        node = Snapshot("configuration")
        node.add_data_section(SnapshotDataSection("state", raw))
        self._root.add_snapshot(node)
        self._parts.append({"part": "configuration"})

    def _command(self, begin: int) -> None:
        window = self._window
        command = window.number(2, "a command")
        data = window.take(window.number(2, "a command"), "a command")
        normal = self._page_bytes.to_bytes(8, "big")
        if command == _PACKAGED or (command == _POSTCOPY_ADVISE and data[:8] not in (b"", normal)):
            raise damaged(
                begin,
                "this stream cannot be read: it is made for postcopy; "
                "switch the capability 'postcopy-ram' off",
            )
        self._parts.append({"part": "command", "command": command, "data": data.hex()})

    def _start(self, begin: int, part: dict[str, Any]) -> None:
        id, name = part["id"], part["name"]
        if id in self._others or id == self._ram_id:
            raise damaged(begin, f"section {id} begins twice")
        if name == "ram":
            if self._ram is not None:
                raise damaged(begin, "RAM begins twice")
            if part["version"] != RAM_VERSION:
                raise damaged(begin, f"RAM's version is {part['version']}, not {RAM_VERSION}")
            self._ram_id = id
            self._ram = RamReader(self._window, self._page_bytes, self._ignores_shared)
            self._ram.setup()
            blocks = [[block.name, block.length, block.extra] for block in self._ram.blocks]
            part |= {"page_bytes": self._page_bytes, "blocks": blocks}
            self._add_ram_part("start", part)
        else:
            self._others[id] = self._new_child(name, part["instance"]), bytearray()
            self._opaque("start", part)

    def _go_on(self, begin: int, kind: str) -> None:
        id = self._window.number(4, "a section's number")
        if id == self._ram_id and self._ram is not None:
            self._ram.records()
            self._add_ram_part(kind, {"id": id})
        elif id in self._others:
            self._opaque(kind, {"id": id})
        else:
            raise damaged(begin, f"section {id} goes on, but has not begun")

    def _add_ram_part(self, kind: str, part: dict[str, Any]) -> None:
        assert self._ram is not None
        runs = self._ram.end_section()
        self._ram_ended = kind == "end"
        self._footer({"part": kind, **part, "runs": runs})

    def _opaque(self, kind: str, part: dict[str, Any]) -> None:
        """A section of no known layout, up to its footer, without which its end is unknown."""
        window, id = self._window, part["id"]
        child, state = self._others[id]
        begin = window.offset
        length = self._length_by_footer(id)
        if length is None:
            raise damaged(begin, f"where this section of {child!r} ends cannot be known")
        state += window.take(length, f"section {id}")
        self._footer({"part": kind, **part, "child": child, "bytes": length})

    def _footer(self, part: dict[str, Any]) -> None:
        """Behind a section: its footer, if this stream has footers."""
        window = self._window
        begin = window.offset
        has = window.peek() == FOOTER
        if self._footers is None:
            self._footers = has
        if has != self._footers:
            what = "a section begins" if has else "there is no footer"
            raise damaged(begin, f"{what} where section {part['id']} ends")
        if has:
            window.number(1)
            id = window.number(4, "a footer")
            if id != part["id"]:
                raise damaged(begin, f"section {part['id']} ends with the footer of {id}")
        part["footer"] = has
        self._parts.append(part)

    def _length_by_footer(self, id: int) -> int | None:
        """How far it is to the next thing that looks like this section's footer."""
        if self._footers is False:
            return None
        window = self._window
        pattern = re.compile(
            re.escape(bytes((FOOTER,)) + id.to_bytes(4, "big")) + _FOOTERS, re.DOTALL
        )
        searched = 0
        while True:
            more = window.fill(window.in_memory + _SEARCHED_BYTES)
            found = pattern.search(window.view, window.at + searched)
            if found:
                return found.start() - window.at
            if not more or window.in_memory > MAX_KEPT_BYTES:
                return None
            searched = max(0, window.in_memory - 16)

    def _new_child(self, name: str, instance: int) -> str:
        child = f"{name}/{instance}" if instance else name
        while child in self._root.snapshots or child in ("configuration", "ram"):
            child += "'"
        self._root.add_snapshot(Snapshot(child))
        return child

    def _device(self, begin: int, part: dict[str, Any]) -> bool:
        """The state of a device; False where nothing is left, for its end is not known."""
        window, id = self._window, part["id"]
        described = self._described.get((part["name"], part["instance"]))
        length = description.length_of(described) if described is not None else None
        if length is None or not self._ends_after(length, id):
            length = self._length_by_footer(id)
        if length is None:
            if not self._has_rest:
                raise damaged(begin, f"where the state of {part['name']!r} ends cannot be known")
            window.go_back(begin)
            self._add_rest()
            return False
        child = self._new_child(part["name"], part["instance"])
        state: bytes | memoryview
        if self._has_rest:
            state = window.view[window.at : window.at + length]
            window.at += length
        else:
            state = window.take(length, f"section {id}")
        self._root.snapshots[child].add_data_section(SnapshotDataSection("state", state))
        self._footer({"part": "full", **part, "child": child})
        return True

    def _ends_after(self, length: int, id: int) -> bool:
        """Whether what stands behind so many bytes can be the end of a section."""
        window = self._window
        if length > window.in_memory:
            return False
        end = window.at + length
        if self._footers is False:
            return window.view[end : end + 1].tolist() in ([EOF], [SECTION_FULL], [COMMAND])
        return window.view[end : end + 5] == bytes((FOOTER,)) + id.to_bytes(4, "big")

    def _hold_rest(self) -> None:
        """Have all devices in memory, and what describes them, which stands behind them."""
        self._has_rest = True
        data = self._window.hold_rest("the devices' state")
        best = None
        for found in _DESCRIPTION.finditer(data):
            left = len(data) - found.end() - 4 - int.from_bytes(found[1], "big")
            if left >= 0:
                best = found
            if not left:
                break
        if best is not None:
            start = best.end() + 4
            text = data[start : start + int.from_bytes(best[1], "big")]
            where = f"byte {self._window.offset + start}"
            self._described = description.devices(description.parse(text, where))

    def _add_rest(self) -> None:
        """Devices of a stream that has neither footers nor a description: in one piece."""
        child = self._new_child("devices", 0)
        data = self._window.rest("the devices' state")
        self._root.snapshots[child].add_data_section(SnapshotDataSection("state", data))
        self._parts.append({"part": "rest", "child": child})

    def _tail(self) -> None:
        window = self._window
        if window.peek() == DESCRIPTION:
            window.number(1)
            begin = window.offset
            length = window.number(4, "the description of the devices")
            if length > description.MAX_BYTES:
                raise damaged(begin, f"the description of the devices cannot have {length} bytes")
            data = window.take(length, "the description of the devices")
            description.parse(data, f"byte {begin + 4}")
            self._root.add_data_section(SnapshotDataSection("vmdesc", data))
            self._parts.append({"part": "vmdesc"})
        if window.peek() >= 0:
            data = window.rest("what stands behind the stream")
            self._root.add_data_section(SnapshotDataSection("trailing", data))
            self._parts.append({"part": "trailing"})

    def _finish_ram(self) -> None:
        ram = self._ram
        if ram is None:
            return
        if ram.blocks and not ram.runs and not self._ignores_shared:
            raise DecodeError(
                "no page of RAM is in this stream: it was sent by other connections; "
                "switch the capability 'multifd' off"
            )
        node = Snapshot("ram")
        for block in ram.blocks:
            if (held := block.finish()) is not None:
                node.add_data_section(SnapshotDataSection(block.name, held))
        self._root.add_snapshot(node)
        runs = ram.runs
        if sys.byteorder == "big":
            runs.byteswap()
        self._root.add_data_section(SnapshotDataSection("stream-runs", runs.tobytes()))
        if ram.earlier is not None:
            self._root.add_data_section(
                SnapshotDataSection("stream-earlier-pages", ram.earlier.finish())
            )
