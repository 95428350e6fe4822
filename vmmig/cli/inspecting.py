"""``vmmig inspect``: what is in a snapshot, from its index alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vmmig import formats
from vmmig.cli.console import CancelOnSignals, showing_progress, showing_work
from vmmig.cli.urls import options_for, with_url_options
from vmmig.cli.words import (
    DEEPEST,
    count_text,
    decoded_json,
    decoded_text,
    hex_lines,
    path_json,
    shown,
    size_text,
    value_text,
)
from vmmig.codec import LARGE_BYTES, StoredSection
from vmmig.errors import MigratableError
from vmmig.formats import Decoded
from vmmig.inspection import Opened, is_file, locate, open_snapshot
from vmmig.snapshot import Snapshot, SnapshotDataSection, SnapshotPath, raw_view

_FIELDS_SHOWN = 6
_DEEPEST_INDENT = 40
_HEX_BYTES = 512
_REMOTE_BYTES = 1 << 20


@click.command(short_help="Show what is in a snapshot.")
@click.argument("source", metavar="FILE|URL", type=click.Path())
@click.argument("path", required=False)
@click.option(
    "--from",
    "format",
    type=click.Choice(formats.names()),
    help="The format of FILE, where it is not what it looks like.",
)
@with_url_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--html",
    "page",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT",
    help="Write a page for a browser that shows all of it, with a picture of the RAM.",
)
@click.option(
    "--against",
    type=click.Path(),
    metavar="OTHER",
    help="With --html: an earlier snapshot; the page shows what has changed since.",
)
def inspect(
    source: str,
    path: str | None,
    format: str | None,
    as_json: bool,
    page: Path | None,
    against: str | None,
    **options: Any,
) -> None:
    """Show the tree of a snapshot: each section's size, its checksum, and what is in it.

    PATH names a node or a section: ids joined by /, or a place as errors show it. Of a section
    that can be decoded, all fields are shown, else its first bytes. Of a file of many GiB, or one
    far away, no more is read than is shown. A checksum of a section of 64 KiB or more is that of
    the checksums of its MiBs.

    \b
      vmmig inspect vm.vmsnap
      vmmig inspect vm.vmsnap cpu-manager/cpu0/regs
      vmmig inspect s3://bucket/vm.vmsnap --json
      vmmig inspect vm.vmsnap --html vm.html --against before.vmsnap
    """
    if against is not None and page is None:
        raise click.UsageError("--against is for --html; `vmmig diff` compares two snapshots")
    with CancelOnSignals() as signals, showing_progress(as_json=False) as show:
        opened = open_snapshot(
            source,
            format=format,
            cancel=signals.token,
            progress=None if is_file(source) else show,
            **options_for(source, **options),
        )
        if page is not None:
            with signals.at_once(), showing_work(str(page)) as progress:
                _write_page(opened, page, against, progress)
            return
        with signals.at_once():
            if as_json:
                text = json.dumps(_document(opened, path), indent=2)
            else:
                text = "\n".join(_lines(opened, path))
    click.echo(text)


def _write_page(opened: Opened, page: Path, against: str | None, progress: Any) -> None:
    from vmmig.cli.snapshot_page import render
    from vmmig.transport import send

    before = None if against is None else open_snapshot(against)
    text = render(opened, before, progress=progress).encode()
    send([text], page, total_bytes=len(text))


def _lines(opened: Opened, path: str | None) -> Iterator[str]:
    place, section_id = locate(opened.snapshot, path or "")
    node = opened.snapshot.find(place)
    if section_id is not None:
        yield from _section_lines(opened.snapshot, place, node.snapshot_data[section_id])
        return
    looks = _looks_inside(opened)
    if path is None:
        yield _head(opened)
    for relative, depth, _, below in _walked(node):
        indent = "  " * min(depth, _DEEPEST_INDENT)
        yield indent + click.style(shown(below.id), bold=True)
        full = (*place, *relative) if looks and below.snapshot_data else ()
        for _, section in sorted(below.snapshot_data.items()):
            yield from _summary(opened.snapshot, full, section, indent + "  ", looks)


def _head(opened: Opened) -> str:
    nodes = sections = 0
    for _, node in opened.snapshot.walk():
        nodes += 1
        sections += len(node.snapshot_data)
    words = [f"{opened.format} format{'' if opened.version is None else f' {opened.version}'}"]
    if opened.writer:
        words.append(f"written by {shown(opened.writer)}")
    if opened.nbytes is not None:
        words.append(size_text(opened.nbytes))
    words += [count_text(nodes, "node"), count_text(sections, "section")]
    return f"{shown(opened.url)}: {', '.join(words)}"


def _summary(
    root: Snapshot, path: tuple[str, ...], section: SnapshotDataSection, indent: str, looks: bool
) -> Iterator[str]:
    words = [f"{indent}{click.style(shown(section.id), fg='cyan')}", size_text(section.nbytes)]
    problem = None
    decoded: Decoded | None = None
    try:
        if isinstance(section, StoredSection):
            words += _stored_words(section)
        if looks and section.nbytes < LARGE_BYTES:
            decoded = formats.decode(root, path, section.id)
            if decoded is None:
                words.append(value_text(bytes(raw_view(section.snapshot)[:16])))
            else:
                words.append(decoded_text(decoded))
    except MigratableError as error:
        problem = error
    yield "  ".join(words)
    if problem is not None:
        yield f"{indent}  {click.style(shown(str(problem)), fg='red')}"
    if decoded is not None:
        fields = [*formats.leaves(decoded.fields)]
        for name, value in fields[:_FIELDS_SHOWN]:
            yield f"{indent}  {shown(name)} = {value_text(value)}"
        if len(fields) > _FIELDS_SHOWN:
            yield f"{indent}  ... {count_text(len(fields) - _FIELDS_SHOWN, 'more field')}"


def _stored_words(section: StoredSection) -> Iterator[str]:
    if section.stored == "compressed":
        yield f"({size_text(section.stored_bytes)} compressed)"
    elif section.stored == "detached":
        yield "(detached)"
    if (digest := section.digest()) is not None:
        yield digest


def _section_lines(
    root: Snapshot, place: SnapshotPath, section: SnapshotDataSection
) -> Iterator[str]:
    words = [place.section(section.id), size_text(section.nbytes)]
    if isinstance(section, StoredSection):
        words += _stored_words(section)
    decoded = None
    if section.nbytes < LARGE_BYTES:
        decoded = formats.decode(root, place, section.id)
    if decoded is not None:
        words.append(decoded_text(decoded))
    yield "  ".join(map(shown, words))
    if decoded is not None:
        for name, value in formats.leaves(decoded.fields):
            yield f"  {shown(name)} = {value_text(value)}"
        return
    yield from hex_lines(first_bytes(section, _HEX_BYTES))
    if section.nbytes > _HEX_BYTES:
        yield f"... {section.nbytes - _HEX_BYTES} more bytes"


def first_bytes(section: SnapshotDataSection, count: int) -> bytes:
    """The first bytes of a section, of which no more than a MiB is fetched and checked."""
    if isinstance(section, StoredSection):
        return bytes(section.read(0, count))
    return bytes(raw_view(section.snapshot)[:count])


def _looks_inside(opened: Opened) -> bool:
    """Whether the small sections are here, or so small that they may be fetched unasked."""
    if is_file(opened.url):
        return True
    small = 0
    for _, node in opened.snapshot.walk():
        small += sum(s.nbytes for s in node.snapshot_data.values() if s.nbytes < LARGE_BYTES)
        if small > _REMOTE_BYTES:
            return False
    return True


def _document(opened: Opened, path: str | None) -> dict[str, Any]:
    place, section_id = locate(opened.snapshot, path or "")
    node = opened.snapshot.find(place)
    facts: dict[str, Any] = {
        "url": opened.url,
        "format": opened.format,
        "version": opened.version,
        "writer": opened.writer,
        "nbytes": opened.nbytes,
    }
    if section_id is not None:
        section = node.snapshot_data[section_id]
        whole = _section_json(opened.snapshot, place.ids, section, _HEX_BYTES)
        return {**facts, "path": path_json(place), "section": whole}
    looks = _looks_inside(opened)
    nodes: list[dict[str, Any]] = []
    for relative, depth, parent, below in _walked(node):
        ids = (*place, *relative) if below.snapshot_data else ()
        sections = [
            _section_json(opened.snapshot, ids, section, 16 if looks else 0)
            for _, section in sorted(below.snapshot_data.items())
        ]
        full = [*place, *relative] if depth <= DEEPEST else None
        nodes.append({"id": below.id, "path": full, "parent": parent, "sections": sections})
    return {**facts, "nodes": nodes}


def _section_json(
    root: Snapshot, path: tuple[str, ...], section: SnapshotDataSection, hex_bytes: int
) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": section.id, "nbytes": section.nbytes}
    try:
        if isinstance(section, StoredSection):
            facts |= {
                "stored": section.stored,
                "stored_bytes": section.stored_bytes,
                "offset_bytes": section.offset_bytes,
                "checksum": section.digest(),
            }
        if hex_bytes and section.nbytes < LARGE_BYTES:
            decoded = formats.decode(root, path, section.id)
            facts["decoded"] = None if decoded is None else decoded_json(decoded)
        if hex_bytes and (section.nbytes < LARGE_BYTES or hex_bytes > 16):
            facts["hex"] = first_bytes(section, hex_bytes).hex()
    except MigratableError as error:
        facts["error"] = str(error)
    return facts


def _walked(root: Snapshot) -> Iterator[tuple[SnapshotPath, int, int | None, Snapshot]]:
    """Every node with its path, its depth, and its parent's number; none takes longer if deep."""
    depths: dict[int, tuple[int, int]] = {}
    paths: list[SnapshotPath] = []
    for path, node in root.walk():
        depth, parent = 0, None
        if path.parent is not None:
            above, parent = depths[id(path.parent)]
            depth = above + 1
        depths[id(path)] = depth, len(paths)
        # Alive, so that no other path is taken for it.
        paths.append(path)
        yield path, depth, parent, node
