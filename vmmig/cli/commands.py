"""The group of commands."""

from __future__ import annotations

import click

from vmmig import __version__
from vmmig.cli.demo import demo, run
from vmmig.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def vmmig() -> None:
    """Pause, snapshot, save, move and restore machines."""


vmmig.add_command(demo)
vmmig.add_command(run)
vmmig.add_command(serve)
