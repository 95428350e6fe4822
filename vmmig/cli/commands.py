"""The group of commands."""

from __future__ import annotations

import click

from vmmig import __version__
from vmmig.cli.console import Group, verbose
from vmmig.cli.copying import recv, send
from vmmig.cli.demo import demo, run
from vmmig.cli.live import migrate, receive, simulate
from vmmig.cli.offload import offload
from vmmig.cli.schemas import compat, schema
from vmmig.cli.serve import serve

_EPILOG = """\b
Exit status:
  0    all is done
  1    it failed; stderr says why in one line, --verbose what caused it
  2    the command was misused, or a part of vmmig is not installed
  130  cancelled by Ctrl-C (129 by SIGHUP, 143 by SIGTERM); nothing is left half-written

\b
Completion of commands, options and files, to be put into ~/.bashrc or ~/.zshrc:
  eval "$(_VMMIG_COMPLETE=bash_source vmmig)"
  eval "$(_VMMIG_COMPLETE=zsh_source vmmig)"
and for fish, into ~/.config/fish/completions/vmmig.fish:
  _VMMIG_COMPLETE=fish_source vmmig | source
"""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
@click.version_option(__version__)
def vmmig() -> None:
    """Pause, snapshot, save, move and restore machines.

    \b
      vmmig demo                                a machine moves to another process
      vmmig recv tcp:0.0.0.0:9000 vm.vmsnap     on the one host, and then
      vmmig send vm.vmsnap tcp:host:9000        on the other
      vmmig receive tcp:0.0.0.0:9000            or while it runs: on the one, and then
      vmmig migrate tcp:host:9000               on the other
    """


for _command in (demo, run, send, recv, serve, migrate, receive, simulate, schema, compat):
    vmmig.add_command(verbose(_command))
for _command in offload.commands.values():
    verbose(_command)
vmmig.add_command(offload)
