"""The group of commands."""

from __future__ import annotations

import click

from vmmig import __version__
from vmmig.cli.console import Group

_EPILOG = """\b
Exit status:
  0    all is done
  1    it failed; stderr says why in one line, --verbose what caused it
  2    the command was misused, or a part of vmmig is not installed
       diff: 0 if nothing differs, 1 if something does, 2 if it failed
       verify: 0 if all is sound, 1 if something is damaged, 2 if it failed
       compat: the number of breaks, 255 if it failed
  130  cancelled by Ctrl-C (129 by SIGHUP, 143 by SIGTERM); nothing is left half-written
  141  whoever read the output has gone

\b
Colours and progress are shown on a terminal alone, and no colours where NO_COLOR is set.

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
      vmmig inspect vm.vmsnap                   what is in it
      vmmig diff before.vmsnap after.vmsnap     what has changed
    """


vmmig.places = {
    "demo": "vmmig.cli.demo:demo",
    "run": "vmmig.cli.demo:run",
    "send": "vmmig.cli.copying:send",
    "recv": "vmmig.cli.copying:recv",
    "serve": "vmmig.cli.serve:serve",
    "migrate": "vmmig.cli.live:migrate",
    "receive": "vmmig.cli.live:receive",
    "simulate": "vmmig.cli.live:simulate",
    "offload": "vmmig.cli.offload:offload",
    "schema": "vmmig.cli.schemas:schema",
    "compat": "vmmig.cli.schemas:compat",
    "inspect": "vmmig.cli.inspecting:inspect",
    "diff": "vmmig.cli.comparing:diff",
    "verify": "vmmig.cli.verifying:verify",
    "edit": "vmmig.cli.editing:edit",
    "convert": "vmmig.cli.editing:convert",
}
