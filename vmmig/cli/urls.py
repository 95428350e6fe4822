"""The options with which every command reaches a URL."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any, TypeVar

import click

from vmmig.transfer import SCHEME, Options

_TOKEN_VARIABLE = "VMMIG_TOKEN"

_F = TypeVar("_F", bound=Callable[..., Any])


def _token(ctx: click.Context, parameter: click.Parameter, file: IO[str] | None) -> str | None:
    if file is None:
        return None
    try:
        token = file.read().strip()
    except ValueError as error:
        raise click.BadParameter("it is not a text file", ctx, parameter) from error
    if not token:
        raise click.BadParameter("it is empty", ctx, parameter)
    return token


_OPTIONS = (
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="How long to wait for the other side: to come, and whenever it stalls. [default: 60]",
    ),
    click.option(
        "--tls",
        type=click.Path(exists=True, file_okay=False),
        metavar="FOLDER",
        help="Encrypt, and prove both sides, with the certificates in this folder.",
    ),
    click.option(
        "--token-file",
        "token",
        type=click.File(encoding="utf-8"),
        callback=_token,
        metavar="FILE",
        help=f"The bearer token for http: and https:, else that in ${_TOKEN_VARIABLE}.",
    ),
)

as_json_lines = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print progress, and at the end the result, as JSON, one object a line.",
)
compress = click.option(
    "--compress",
    "compression",
    is_flag=False,
    flag_value="zstd",
    metavar="[zstd:LEVEL]",
    help="Compress what is large and shrinks, by Zstandard; level 1 to 19. [default: 1]",
)


def with_url_options(function: _F) -> _F:
    """Add ``--timeout``, ``--tls`` and ``--token-file`` to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def options_for(url: str, timeout: float | None, tls: str | None, token: str | None) -> Options:
    """What the command line says about a transfer to or from a URL."""
    options = Options()
    if timeout is not None:
        options["timeout_s"] = timeout
    if tls is not None:
        options["tls"] = tls
    if token is None and scheme_of(url) in ("http", "https"):
        token = os.environ.get(_TOKEN_VARIABLE)
    if token:
        options["token"] = token
    return options


def scheme_of(url: str) -> str:
    """The scheme of a URL in small letters; ``file`` for a path."""
    match = SCHEME.match(url)
    return match[1].lower() if match else "file"
