"""``vmmig diff``: where two snapshots differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from vmmig import formats
from vmmig.cli.console import CancelOnSignals, fails_with, showing_work
from vmmig.cli.urls import options_for, with_url_options
from vmmig.cli.words import (
    count_text,
    path_json,
    plain,
    ranges_text,
    shown,
    size_text,
    value_text,
)
from vmmig.codec import LARGE_BYTES
from vmmig.inspection import PAGE_BYTES, Change, Comparison, open_snapshot
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view

_COLOURS = {"added": "green", "removed": "red", "changed": "yellow"}
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


@click.command(short_help="Show where two snapshots differ.")
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
@click.option("--from", "format", type=click.Choice(formats.names()), help="The format of both.")
@click.option(
    "--full",
    is_flag=True,
    help="Compare every byte of large sections, also where the checksums are equal.",
)
@with_url_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def diff(
    before: str, after: str, format: str | None, full: bool, as_json: bool, **options: Any
) -> None:
    """Show what AFTER, a file or a URL, has changed, added and removed in BEFORE.

    Decoded sections are compared by field, others by the byte, and large ones by the page of
    4 KiB. In two containers, what has equal checksums is taken to be equal: `vmmig verify` says
    whether a file still agrees with its checksums, and --full asks for none.

    The exit status is 0 if nothing differs, 1 if something does, and 2 if it failed.

    \b
      vmmig diff before.vmsnap after.vmsnap
      vmmig diff --full before.vmsnap after.vmsnap --json
      vmmig diff vm.vmsnap https://store/vm.vmsnap
    """
    fails_with(2)
    with CancelOnSignals() as signals, showing_work(shown(after)) as progress:
        snapshots = [
            open_snapshot(
                url, format=format, cancel=signals.token, **options_for(url, **options)
            ).snapshot
            for url in (before, after)
        ]
        with signals.at_once():
            comparison = Comparison(snapshots[0], snapshots[1], full=full, progress=progress)
            changes = [*comparison]
            if as_json:
                document = {
                    "differ": bool(changes),
                    "compared_bytes": comparison.compared_bytes,
                    "proven_bytes": comparison.proven_bytes,
                    "changes": [*map(_json, changes)],
                }
                text = json.dumps(document, indent=2)
            else:
                heads = [f"--- {shown(before)}", f"+++ {shown(after)}"]
                text = "\n".join([*heads, *map(_line, changes)]) if changes else ""
    if text:
        click.echo(text)
    if comparison.proven_bytes >= LARGE_BYTES and not as_json:
        click.echo(
            f"vmmig: {size_text(comparison.proven_bytes)} were taken to be equal, for their "
            "checksums are; --full compares every byte",
            err=True,
        )
    sys.exit(1 if changes else 0)


def _line(change: Change) -> str:
    sign = click.style(_SIGNS[change.change], fg=_COLOURS[change.change])
    return f"{sign} {shown(change.place)}: {_what(change)}"


def _what(change: Change) -> str:
    if change.pages is not None:
        return _pages(change)
    if change.change == "changed":
        return f"{value_text(change.before)} -> {value_text(change.after)}"
    return _thing(change.after if change.change == "added" else change.before)


def _pages(change: Change) -> str:
    assert change.pages is not None
    old, new = change.before.nbytes, change.after.nbytes
    sizes = "" if old == new else f" (it has {new} bytes, and had {old})"
    ranges = change.pages.ranges
    if max(old, new) >= LARGE_BYTES:
        unit, what = PAGE_BYTES, "page"
    else:
        unit, what = 1, "byte"
    count = sum(-(-length // unit) for _, length in ranges.pairs())
    total = count_text(-(-max(old, new) // unit), what)
    text = f"{count} of {total} {'differs' if count == 1 else 'differ'}{sizes}: "
    text += ranges_text(ranges, unit)
    if unit == 1:
        first = next(iter(ranges)).gpa
        was, now = (
            value_text(bytes(raw_view(section.snapshot)[first : first + 8]))
            for section in (change.before, change.after)
        )
        text += f"; from {first} on {was} -> {now}"
    return text


def _thing(value: object) -> str:
    if isinstance(value, Snapshot):
        nodes, sections, nbytes = _sums(value)
        words = [count_text(nodes, "node"), count_text(sections, "section"), size_text(nbytes)]
        return ", ".join(words)
    if isinstance(value, SnapshotDataSection):
        return size_text(value.nbytes)
    return value_text(value)


def _sums(snapshot: Snapshot) -> tuple[int, int, int]:
    nodes = sections = nbytes = 0
    for _, node in snapshot.walk():
        nodes += 1
        sections += len(node.snapshot_data)
        nbytes += sum(section.nbytes for section in node.snapshot_data.values())
    return nodes, sections, nbytes


def _json(change: Change) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "place": change.place,
        "path": path_json(change.path),
        "section": change.section,
        "field": change.field,
        "change": change.change,
    }
    for name, value in (("before", change.before), ("after", change.after)):
        if isinstance(value, Snapshot):
            facts[name] = dict(zip(("nodes", "sections", "nbytes"), _sums(value), strict=True))
        elif isinstance(value, SnapshotDataSection):
            facts[name] = {"nbytes": value.nbytes}
        else:
            facts[name] = plain(value)
    if change.pages is not None:
        facts["ranges"] = [*_ranges(change)]
    return facts


def _ranges(change: Change) -> Iterator[list[int]]:
    assert change.pages is not None
    for first, length in change.pages.ranges.pairs():
        yield [first, length]
