"""``vmmig send`` and ``vmmig recv``: a container from one URL to another, checked between."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from vmmig.cli.console import CancelOnSignals, Show, showing_progress
from vmmig.cli.urls import as_json_lines, compress, options_for, scheme_of, with_url_options
from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.transfer import Options, Progress, Stage, Transfer, shown_url

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vmmig.snapshot import Snapshot

_PIPE = "-"
_PIECE_BYTES = 1 << 20


@click.command(short_help="Send a snapshot file to a URL.")
@click.argument("source", type=click.Path(allow_dash=True))
@click.argument("url")
@with_url_options
@as_json_lines
@compress
def send(source: str, url: str, as_json: bool, compression: str | None, **options: Any) -> None:
    """Check the snapshot file SOURCE, and send it to URL.

    It is there, whole and durably, when the command ends with status 0; else what was there
    before still is. SOURCE may be a URL too, or - for stdin.

    \b
      vmmig send vm.vmsnap tcp:other-host:9000    (where `vmmig recv` waits)
      vmmig send vm.vmsnap https://store/vm.vmsnap
      vmmig send vm.vmsnap s3://bucket/vm.vmsnap
      ssh other-host cat vm.vmsnap | vmmig send - vm.vmsnap
    """
    _copy(
        source,
        url,
        options_for(url, **options),
        sending=True,
        as_json=as_json,
        compression=compression,
    )


@click.command(short_help="Fetch a snapshot from a URL into a file.")
@click.argument("url")
@click.argument("destination", type=click.Path(allow_dash=True))
@with_url_options
@as_json_lines
def recv(url: str, destination: str, as_json: bool, **options: Any) -> None:
    """Fetch a snapshot from URL, check it, and write it to the file DESTINATION.

    The file is replaced in one step, or not at all. At tcp:HOST:PORT and unix:/PATH, wait for
    `vmmig send`. DESTINATION may be a URL too, or - for stdout.

    \b
      vmmig recv tcp:0.0.0.0:9000 vm.vmsnap
      vmmig recv https://store/vm.vmsnap vm.vmsnap
      vmmig recv s3://bucket/vm.vmsnap - | ssh other-host 'cat > vm.vmsnap'
    """
    _copy(url, destination, options_for(url, **options), sending=False, as_json=as_json)


def _copy(
    source: str,
    destination: str,
    options: Options,
    *,
    sending: bool,
    as_json: bool,
    compression: str | None = None,
) -> None:
    """Bring a container to ``destination``, once it is checked.

    Where ``sending``, the options are for that side, else for the other.
    """
    if destination == _PIPE and as_json:
        raise click.UsageError("--json prints to stdout, where the snapshot goes; name a file")
    if destination == _PIPE and os.isatty(1):
        raise click.UsageError("a snapshot is no text for a terminal; name a file, or use a pipe")
    error_type = MigrateSendError if sending else MigrateReceiveError
    remote_url = shown_url(destination if sending else source)
    began_s = time.monotonic()
    moving = False
    size_bytes = 0

    with showing_progress(as_json=as_json) as show, CancelOnSignals() as signals:

        def note(progress: Progress) -> None:
            nonlocal began_s, moving
            if progress.url == remote_url and progress.stage == "transferring" and not moving:
                # To wait for the other side is not to transfer.
                began_s, moving = time.monotonic(), True
            if progress.stage != "done":
                show(progress)

        def tell(url: str, stage: Stage) -> None:
            elapsed_s = time.monotonic() - began_s
            show(Progress(shown_url(url), stage, size_bytes, size_bytes, elapsed_s))

        def accept(data: memoryview) -> None:
            """Write it down, before one who waits for that is told that it is here."""
            nonlocal size_bytes
            size_bytes = len(data)
            tell(source, "confirming")
            snapshot = _check(data, source, signals)
            # A list, for a transport that tries again iterates again.
            pieces: Iterable[Buffer] = [
                data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)
            ]
            if compression is not None:
                from vmmig import codec

                pieces = encoding = codec.encode(snapshot, compression=compression)
                size_bytes = encoding.total_bytes
            where_to = options if sending else Options()
            _deliver(pieces, size_bytes, destination, where_to, signals, note)

        try:
            _fetch(source, destination, Options() if sending else options, signals, note, accept)
        except MigratableError as error:
            # One command, one name for its failure, whichever end it was at.
            if isinstance(error, (MigrateSendError, MigrateReceiveError)):
                raise error_type(error.cause) from error.__cause__
            raise error_type(error) from error
        tell(remote_url, "done")


def _fetch(
    source: str,
    destination: str,
    options: Options,
    signals: CancelOnSignals,
    note: Show,
    accept: Callable[[memoryview], None],
) -> None:
    from vmmig import transport

    if destination != _PIPE and scheme_of(destination) == "file":
        from vmmig.transport.file import check_destination

        check_destination(destination)
    if source != _PIPE:
        transport.recv(source, accept=accept, progress=note, cancel=signals.token, **options)
        return
    transfer = Transfer(_PIPE, MigrateReceiveError, progress=note, cancel=signals.token)
    data = bytearray()
    transfer.enter("transferring")
    try:
        with signals.at_once(), open(0, "rb", buffering=0, closefd=False) as stdin:
            while piece := stdin.read(_PIECE_BYTES):
                data += piece
                transfer.advance(len(piece))
    except OSError as error:
        raise transfer.failure(error) from error
    accept(memoryview(data).toreadonly())


def _check(data: memoryview, source: str, signals: CancelOnSignals) -> Snapshot:
    from vmmig import codec

    try:
        with signals.at_once():
            return codec.loads(data)
    except MigratableError as error:
        raise MigrateReceiveError(f"{shown_url(source)!r}: {error}") from error


def _deliver(
    pieces: Iterable[Buffer],
    size_bytes: int,
    destination: str,
    options: Options,
    signals: CancelOnSignals,
    note: Show,
) -> None:
    from vmmig import transport

    cancel = signals.token
    if destination != _PIPE:
        transport.send(
            pieces, destination, total_bytes=size_bytes, progress=note, cancel=cancel, **options
        )
        return
    from vmmig.transport.file import write_chunks

    transfer = Transfer(
        _PIPE, MigrateSendError, total_bytes=size_bytes, progress=note, cancel=cancel
    )
    transfer.enter("transferring")
    try:
        with signals.at_once():
            write_chunks(1, transfer.views(pieces), transfer.advance)
    except OSError as error:
        raise transfer.failure(error) from error
