"""``vmmig edit`` and ``vmmig convert``: a snapshot changed, or in another format, in a new file."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from vmmig import formats
from vmmig.cli.console import CancelOnSignals, Show, showing_progress
from vmmig.cli.urls import options_for, with_url_options
from vmmig.codec import StoredSection
from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    MissingExtraError,
)
from vmmig.inspection import is_file, locate, open_snapshot
from vmmig.snapshot import Snapshot

_FORMAT = click.Choice(formats.names())
_from = click.option(
    "--from", "source_format", type=_FORMAT, help="The format of SOURCE. [default: what it is]"
)


@click.command(short_help="Change a copy of a snapshot.")
@click.argument("source", type=click.Path())
@click.argument("destination", type=click.Path())
@_from
@click.option(
    "--set",
    "fields",
    type=(str, str, str),
    multiple=True,
    metavar="PATH FIELD VALUE",
    help="Set a decoded field: to JSON, to 0x..., to hex:... for bytes, or else to a text.",
)
@click.option(
    "--replace",
    "replaced",
    type=(str, click.Path(exists=True, dir_okay=False)),
    multiple=True,
    metavar="PATH FILE",
    help="Let a section have the bytes of a file.",
)
@click.option(
    "--drop", "dropped", multiple=True, metavar="PATH", help="Leave out a section or a node."
)
@click.option(
    "--rename",
    "renamed",
    type=(str, str),
    multiple=True,
    metavar="PATH ID",
    help="Give a section or a node another id.",
)
@with_url_options
def edit(
    source: str,
    destination: str,
    source_format: str | None,
    fields: tuple[tuple[str, str, str], ...],
    replaced: tuple[tuple[str, str], ...],
    dropped: tuple[str, ...],
    renamed: tuple[tuple[str, str], ...],
    **options: Any,
) -> None:
    """Write the snapshot SOURCE, a file or a URL, with changes, to the file DESTINATION.

    Each option may be given many times. A PATH is one of SOURCE as it is, and written as for
    `vmmig inspect`, which shows the fields. DESTINATION has the format of SOURCE. It appears in
    one step, or not at all, and SOURCE itself is never changed.

    \b
      vmmig edit vm.vmsnap new.vmsnap --drop nic --rename cpu0 cpu-0
      vmmig edit vm.vmsnap new.vmsnap --set cpu/state regs.rip 0x1000
      vmmig edit vm.vmsnap new.vmsnap --replace firmware/image OVMF.fd
    """
    if not (fields or replaced or dropped or renamed):
        raise click.UsageError("nothing is to be changed; `vmmig convert` copies")
    _refuse_in_place(source, destination)
    from vmmig import transport
    from vmmig.editing import edited

    with showing_progress(as_json=False) as show, CancelOnSignals() as signals:
        url_options = options_for(source, **options)
        opened = open_snapshot(source, format=source_format, cancel=signals.token, **url_options)
        with signals.at_once():
            snapshot = edited(
                opened.snapshot,
                fields=[
                    (path, field, _value(opened.snapshot, path, field, text))
                    for path, field, text in fields
                ],
                replaced=[(path, transport.recv(os.path.abspath(file))) for path, file in replaced],
                dropped=dropped,
                renamed=renamed,
            )
            _write(snapshot, opened.snapshot, destination, opened.format, show)


@click.command(short_help="Write a snapshot in another format.")
@click.argument("source", type=click.Path())
@click.argument("destination", type=click.Path())
@_from
@click.option(
    "--to",
    "destination_format",
    type=_FORMAT,
    help="The format of DESTINATION. [default: what its name ends in]",
)
@with_url_options
def convert(
    source: str,
    destination: str,
    source_format: str | None,
    destination_format: str | None,
    **options: Any,
) -> None:
    """Write the snapshot SOURCE, a file, a folder or a URL, to DESTINATION in another format.

    `vmmig` is the container (.vmsnap); `json` is the JSON of the vm-migration crate of 2020
    (.json), `msgpack` the same in msgpack (.msgpack); `qemu` is a migration stream (.qemu), and
    `cloud-hypervisor` a folder, as that of today and that of 2020.

    \b
      vmmig convert vm.vmsnap vm.json
      vmmig convert snapshot-folder vm.vmsnap
      vmmig convert --from json old-file new-file --to vmmig
    """
    name = destination_format or formats.of_suffix(destination)
    if name is None:
        raise click.UsageError(f"{destination!r} does not say its format; --to does")
    _refuse_in_place(source, destination)
    with showing_progress(as_json=False) as show, CancelOnSignals() as signals:
        url_options = options_for(source, **options)
        opened = open_snapshot(source, format=source_format, cancel=signals.token, **url_options)
        with signals.at_once():
            _write(opened.snapshot, opened.snapshot, destination, name, show)


def _refuse_in_place(source: str, destination: str) -> None:
    if not (is_file(source) and is_file(destination)):
        return
    from vmmig.transport.file import path_of

    ours = path_of(source, MigrateReceiveError), path_of(destination, MigrateSendError)
    try:
        same = os.path.samefile(*ours)
    except OSError:
        return
    if same:
        raise click.UsageError("SOURCE and DESTINATION are the same file; name a new one")


def _write(snapshot: Snapshot, source: Snapshot, destination: str, format: str, show: Show) -> None:
    """Write the snapshot; a container is compressed if its source was."""
    try:
        if format == "vmmig":
            from vmmig.migration import send

            compression = "zstd" if _is_compressed(source) else None
            send(snapshot, destination, compression=compression, progress=show)
        elif is_file(destination):
            from vmmig.transport.file import path_of

            formats.write(snapshot, path_of(destination, MigrateSendError), format)
        else:
            raise MigrateSendError(f"{format} goes to a file; {destination!r} is a URL")
    except (MigrateSendError, MissingExtraError):
        raise
    except MigratableError as error:
        raise MigrateSendError(error) from error


def _is_compressed(snapshot: Snapshot) -> bool:
    return any(
        isinstance(section, StoredSection) and section.stored == "compressed"
        for _, node in snapshot.walk()
        for section in node.snapshot_data.values()
    )


def _value(root: Snapshot, path: str, field: str, text: str) -> object:
    """What a text stands for, where the field tells of which kind it must be."""
    place, section = locate(root, path)
    decoded = formats.decode(root, place, section) if section is not None else None
    old = dict(formats.leaves(decoded.fields)).get(field) if decoded is not None else None
    if isinstance(old, str):
        return text
    try:
        if text.startswith("hex:"):
            return bytes.fromhex(text[4:])
        value = int(text, 16) if text[:2].lower() == "0x" else json.loads(text)
    except ValueError:
        return text
    return float(value) if type(value) is int and isinstance(old, float) else value
