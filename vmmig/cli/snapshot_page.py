"""A snapshot as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from vmmig import formats
from vmmig.cli.words import count_text, decoded_text, shown, size_text, value_text
from vmmig.codec import LARGE_BYTES, StoredSection
from vmmig.errors import MigratableError
from vmmig.inspection import PAGE_BYTES, Change, Comparison, Opened, page_map
from vmmig.snapshot import Snapshot, SnapshotDataSection, SnapshotPath, raw_view

_HEX_BYTES = 4096
_ALL_HEX_BYTES = 4 << 20
_FEW_HEX_BYTES = 64
_FIELDS = 500
_ALL_FIELDS = 50_000
_ID_CHARACTERS = 200
_CHANGES = 1000
_ROWS = 20_000
_CELLS = 1 << 14
_PICTURES = 64


def render(
    opened: Opened,
    before: Opened | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """The page of a snapshot, and of what has changed since another one.

    Of each section it has the first 4 KiB, and of all together 4 MiB; of the RAM a picture of
    16,384 cells at most; and of the tree the first 20,000 nodes and sections.

    Raises:
        MigratableError: The index, or a large section, cannot be read.

    >>> snapshot = Snapshot("vm", {}, {"</script>": SnapshotDataSection("</script>", b"<b>")})
    >>> page = render(Opened("vm", "vmmig", snapshot))
    >>> page.count("</script>"), "<b>" in page
    (2, False)
    """
    data = json.dumps(_Page(opened, before, progress).data(), ensure_ascii=True)
    template = Path(__file__).with_name("snapshot_page.html").read_text("utf-8")
    head, tail = template.split("/*DATA*/")
    # Neither the end of the element nor a comment can begin without this character.
    return head.replace("TITLE", escape(shown(opened.url))) + data.replace("<", "\\u003c") + tail


class _Page:
    def __init__(
        self, opened: Opened, before: Opened | None, progress: Callable[[int, int], object] | None
    ) -> None:
        self._opened = opened
        self._before = before
        self._progress = progress
        self._hex_bytes_left = _ALL_HEX_BYTES
        self._fields_left = _ALL_FIELDS
        self._pictures_left = _PICTURES
        self._changes: list[Change] = []
        self._changed: dict[tuple[tuple[str, ...], str | None], list[Change]] = {}

    def data(self) -> dict[str, Any]:
        opened, before = self._opened, self._before
        if before is not None:
            self._changes = [*Comparison(before.snapshot, opened.snapshot, progress=self._progress)]
            for change in self._changes:
                self._changed.setdefault((change.path.ids, change.section), []).append(change)
        nodes: list[dict[str, Any]] = []
        numbers: dict[int, int] = {}
        paths: list[SnapshotPath] = []
        rows = total_nodes = total_sections = total_bytes = 0
        left_out = 0
        for path, node in opened.snapshot.walk():
            total_nodes += 1
            total_sections += len(node.snapshot_data)
            total_bytes += sum(section.nbytes for section in node.snapshot_data.values())
            rows += 1 + len(node.snapshot_data)
            if rows > _ROWS:
                left_out += 1
                continue
            # By identity: to hash a path, or to compare it, takes as long as it is deep.
            numbers[id(path)] = len(nodes)
            paths.append(path)
            ids = path.ids if node.snapshot_data or self._changed else ()
            nodes.append(
                {
                    "id": _id(node.id),
                    "parent": numbers[id(path.parent)] if path.parent is not None else -1,
                    "change": self._status(ids, None),
                    "sections": [
                        self._section(ids, each) for _, each in sorted(node.snapshot_data.items())
                    ],
                }
            )
        facts = [("format", opened.format)]
        if opened.version is not None:
            facts.append(("version", str(opened.version)))
        if opened.writer:
            facts.append(("writer", shown(opened.writer)))
        if opened.nbytes is not None:
            facts.append(("file", size_text(opened.nbytes)))
        facts.append(
            (
                "content",
                f"{count_text(total_nodes, 'node')}, "
                f"{count_text(total_sections, 'section')}, {size_text(total_bytes)}",
            )
        )
        if left_out:
            facts.append(("left out here", count_text(left_out, "node")))
        if before is not None:
            facts.append(("compared with", shown(before.url)))
        return {
            "url": shown(opened.url),
            "facts": facts,
            "nodes": nodes,
            "against": None if before is None else shown(before.url),
            "changes": [_change_text(change) for change in self._changes[:_CHANGES]],
            "more_changes": max(len(self._changes) - _CHANGES, 0),
        }

    def _status(self, ids: tuple[str, ...], section: str | None) -> str:
        changes = self._changed.get((ids, section), ())
        if any(change.change == "added" and change.field is None for change in changes):
            return "added"
        return "changed" if changes else ""

    def _section(self, ids: tuple[str, ...], section: SnapshotDataSection) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "id": _id(section.id),
            "size": size_text(section.nbytes),
            "nbytes": section.nbytes,
            "change": self._status(ids, section.id),
        }
        try:
            if isinstance(section, StoredSection):
                facts["stored"] = section.stored
                facts["checksum"] = section.digest()
            if section.nbytes < LARGE_BYTES:
                self._decode(ids, section, facts)
            self._hex(section, facts)
            if section.nbytes >= LARGE_BYTES and self._pictures_left:
                self._pictures_left -= 1
                facts["ram"] = self._ram(ids, section)
        except MigratableError as error:
            facts["error"] = shown(str(error))[:2000]
        return facts

    def _decode(
        self, ids: tuple[str, ...], section: SnapshotDataSection, facts: dict[str, Any]
    ) -> None:
        decoded = formats.decode(self._opened.snapshot, ids, section.id)
        if decoded is None:
            return
        facts["kind"] = decoded_text(decoded)
        before = {
            change.field: "" if change.change == "added" else value_text(change.before)
            for change in self._changed.get((ids, section.id), ())
            if change.field is not None
        }
        fields = [
            [_id(name), value_text(value), *([before[name]] if name in before else [])]
            for name, value in formats.leaves(decoded.fields)
        ]
        count = min(_FIELDS, self._fields_left)
        facts["fields"] = fields[:count]
        facts["more_fields"] = len(fields) - len(facts["fields"])
        self._fields_left -= len(facts["fields"])

    def _hex(self, section: SnapshotDataSection, facts: dict[str, Any]) -> None:
        count = min(section.nbytes, _HEX_BYTES if self._hex_bytes_left > 0 else _FEW_HEX_BYTES)
        self._hex_bytes_left -= count
        if isinstance(section, StoredSection):
            data = bytes(section.read(0, count))
        else:
            data = bytes(raw_view(section.snapshot)[:count])
        facts["hex"] = base64.b64encode(data).decode()

    def _ram(self, ids: tuple[str, ...], section: SnapshotDataSection) -> dict[str, Any]:
        against = None
        if self._before is not None:
            node: Snapshot | None = self._before.snapshot
            for id in ids:
                node = node.snapshots.get(id) if node is not None else None
            other = node.snapshot_data.get(section.id) if node is not None else None
            against = other or SnapshotDataSection(section.id)
        pages = page_map(section, against, max_cells=_CELLS, progress=self._progress)
        return {
            "pages": pages.pages,
            "page_bytes": PAGE_BYTES,
            "per_cell": pages.pages_per_cell,
            "zero": _shares(pages.zero, pages.pages, pages.pages_per_cell),
            "changed": _shares(pages.changed, pages.pages, pages.pages_per_cell),
            "zero_pages": sum(pages.zero),
            "changed_pages": sum(pages.changed),
        }


def _shares(counts: tuple[int, ...], pages: int, per_cell: int) -> str:
    """Each cell's share as a byte, in base64; 0 only for none and 255 only for all."""
    shares = bytearray()
    for i, count in enumerate(counts):
        size = min(per_cell, pages - i * per_cell)
        shares.append(0 if not count else 255 if count == size else 1 + count * 253 // size)
    return base64.b64encode(shares).decode()


def _change_text(change: Change) -> list[str]:
    if change.pages is not None:
        what = f"{size_text(change.pages.ranges.total_bytes)} differ"
    elif change.change == "changed":
        what = f"{value_text(change.before)} -> {value_text(change.after)}"
    else:
        what = change.change
    return [change.change, shown(change.place), what]


def _id(text: str) -> str:
    text = shown(text)
    return text if len(text) <= _ID_CHARACTERS else f"{text[:_ID_CHARACTERS]}... ({len(text)})"
