"""``vmmig serve``: a folder that snapshots are sent to and received from over HTTP."""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import click

from vmmig.errors import MigratableError


class _StopError(BaseException):
    """SIGTERM or SIGINT came."""


def _stop(number: int, _: FrameType | None) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise _StopError(number)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="The port to listen at; 0 takes any that is free.",
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with the bearer token every request needs; else VMMIG_TOKEN, if it is set.",
)
@click.option(
    "--tls",
    type=click.Path(exists=True, file_okay=False),
    help="Speak HTTPS, with ca-cert.pem, server-cert.pem and server-key.pem of this folder; "
    "clients need a certificate of that authority.",
)
@click.option(
    "--max-bytes", type=click.IntRange(min=0), default=(1 << 63) - 1, help="Refuse larger files."
)
@click.option(
    "--insecure", is_flag=True, help="Let everyone who reaches a public address read and write."
)
def serve(
    folder: str,
    host: str,
    port: int,
    token_file: Path | None,
    tls: str | None,
    max_bytes: int,
    insecure: bool,
) -> None:
    """Store snapshots in DIR that are sent over HTTP, and hand them out.

    Prints the URL once it listens; a file there is URL and its name. Ends on SIGTERM and SIGINT.

    \b
      vmmig serve /var/lib/snapshots
      vmmig serve /var/lib/snapshots --host 0.0.0.0 --token-file token --tls certificates
    """
    token = _token(token_file)
    if not (token or tls or insecure or _is_local(host)):
        raise click.UsageError(
            f"everyone who reaches {host} could read and write; give --token-file or --tls, "
            "or --insecure if that is wanted"
        )
    from vmmig import http_server

    app = http_server.Folder(folder, token=token, max_bytes=max_bytes)
    server = http_server.server(app, host, port, tls=tls, log=_tell)
    try:
        server.prepare()
    except OSError as error:
        raise MigratableError(f"cannot listen at {host} port {port}: {error}") from error
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"{'https' if tls else 'http'}://{shown}:{server.bind_addr[1]}/")
        server.serve()
    except _StopError:
        pass
    finally:
        app.stop()
        server.stop()


def _tell(message: str) -> None:
    # It may run without a terminal, as a service.
    if sys.stderr is not None:
        click.echo(f"vmmig serve: {message}", err=True)


def _token(token_file: Path | None) -> str | None:
    token = os.environ.get("VMMIG_TOKEN")
    if token_file is not None:
        try:
            token = token_file.read_text("utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise MigratableError(f"{str(token_file)!r} cannot be read: {error}") from error
    if token is not None and not token:
        raise MigratableError("the token is empty; write one, or give none at all")
    return token


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
