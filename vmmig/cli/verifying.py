"""``vmmig verify``: whether a snapshot is whole, and what of it can still be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from vmmig import formats
from vmmig.cli.console import CancelOnSignals, fails_with, showing_work
from vmmig.cli.urls import options_for, with_url_options
from vmmig.cli.words import count_text, path_json, ranges_text, shown, size_text
from vmmig.codec import CHUNK_BYTES, Examination, SectionVerdict, examine
from vmmig.errors import DecodeError, MigratableError, MigrateReceiveError
from vmmig.inspection import is_file
from vmmig.snapshot import raw_view
from vmmig.transfer import shown_url

_MOST = 50


@click.command(short_help="Check a snapshot, and say what of a damaged one can still be read.")
@click.argument("source", metavar="FILE|URL", type=click.Path())
@click.option(
    "--from",
    "format",
    type=click.Choice(formats.names()),
    help="The format of FILE, where it is not what it looks like.",
)
@with_url_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(source: str, format: str | None, as_json: bool, **options: Any) -> None:
    """Check every byte of a snapshot against its checksums.

    The exit status is 0 if all is sound, 1 if something is damaged, and 2 if it could not be
    read at all. `vmmig edit --drop` makes a snapshot without what is lost.

    \b
      vmmig verify vm.vmsnap
      vmmig verify s3://bucket/vm.vmsnap --json
    """
    fails_with(2)
    url = shown(shown_url(source))
    with CancelOnSignals() as signals, showing_work(url) as progress:
        other = _other_format(source, format)
        if other is not None:
            with signals.at_once():
                sound, document, lines = _read_all(source, url, other)
        else:
            from vmmig import transport

            data = transport.recv(
                source, lazily=True, cancel=signals.token, **options_for(source, **options)
            )
            with signals.at_once():
                found = examine(data, progress=progress)
                sound, document, lines = found.sound, _document(url, found), [*_lines(url, found)]
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(lines))
    sys.exit(0 if sound else 1)


def _other_format(source: str, format: str | None) -> str | None:
    """The format, where it is not the container, which also is what looks like nothing."""
    if format is None and is_file(source):
        from vmmig.transport.file import path_of

        path = path_of(source, MigrateReceiveError)
        try:
            format = formats.sniff(path)
        except DecodeError:
            return None
    return None if format == "vmmig" else format


def _read_all(source: str, url: str, format: str) -> tuple[bool, dict[str, Any], list[str]]:
    from vmmig.transport.file import path_of

    facts: dict[str, Any] = {"url": url, "format": format}
    try:
        snapshot = formats.read(path_of(source, MigrateReceiveError), format)
        sections = nbytes = 0
        for _, node in snapshot.walk():
            sections += len(node.snapshot_data)
            nbytes += sum(raw_view(s.snapshot).nbytes for s in node.snapshot_data.values())
    except MigrateReceiveError:
        raise
    except MigratableError as error:
        facts |= {"sound": False, "damages": [str(error)]}
        return False, facts, [f"{url}: {_red('damaged')}: {shown(str(error))}"]
    text = f"{count_text(sections, 'section')}, {size_text(nbytes)}"
    facts |= {"sound": True, "damages": []}
    return True, facts, [f"{url}: {text}, and no checksums: {format} has none; all can be read"]


def _lines(url: str, found: Examination) -> Iterator[str]:
    sections = found.sections
    nbytes = sum(section.nbytes for section in sections)
    total = f"{count_text(len(sections), 'section')}, {size_text(nbytes)}"
    if found.sound:
        yield f"{url}: {click.style('sound', fg='green')}: {total}, every checksum matches"
    else:
        yield f"{url}: {_red('damaged')}"
        yield from (f"  {shown(str(damage))}" for damage in found.damages[:_MOST])
        if len(found.damages) > _MOST:
            yield f"  ... and {len(found.damages) - _MOST} more (--json shows all)"
    if not found.sound and not sections:
        yield "Nothing can be read."
    elif not found.sound:
        sound = [section for section in sections if section.verdict == "sound"]
        size = size_text(sum(section.nbytes for section in sound))
        yield f"What can be read: {len(sound)} of {total} are whole and proven, {size}"
    others = [section for section in sections if section.verdict != "sound"]
    yield from (f"  {_verdict(section)}" for section in others[:_MOST])
    if len(others) > _MOST:
        yield f"  ... and {len(others) - _MOST} more (--json shows all)"


def _verdict(section: SectionVerdict) -> str:
    place = shown(str(section))
    if section.verdict == "detached":
        return f"{place}: detached, its {size_text(section.nbytes)} never were in the container"
    if section.verdict == "unproven":
        return f"{place}: there, but nothing proves that it is as it was"
    if section.verdict == "lost":
        return f"{place}: {_red('lost')}"
    lost = section.lost.total_bytes
    where = ranges_text(section.lost, CHUNK_BYTES)
    return (
        f"{place}: {_red('damaged')}, but {size_text(section.nbytes - lost)} of "
        f"{size_text(section.nbytes)} can be read; lost is, counted in MiB: {where}"
    )


def _document(url: str, found: Examination) -> dict[str, Any]:
    header = found.header
    return {
        "url": url,
        "format": "vmmig",
        "sound": found.sound,
        "version": header and header.version,
        "writer": header and header.writer,
        "found_bytes": found.found_bytes,
        "total_bytes": header and header.total_bytes,
        "damages": [{"where": damage.where, "what": damage.what} for damage in found.damages],
        "sections": [
            {
                "path": path_json(section.path),
                "id": section.id,
                "nbytes": section.nbytes,
                "verdict": section.verdict,
                "lost": [[first, length] for first, length in section.lost.pairs()],
            }
            for section in found.sections
        ],
    }


def _red(text: str) -> str:
    return click.style(text, fg="red")
