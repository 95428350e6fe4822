"""The command line: the only part of vmmig that prints or exits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vmmig.errors import MissingExtraError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: with 2 if it is misused, or a part of vmmig for it is missing.

    Args:
        arguments: The command line without the program's name; None stands for that of the
            process.

    >>> main(["--version"])
    Traceback (most recent call last):
    SystemExit: 0
    """
    try:
        import click  # noqa: F401
    except ImportError:
        print(f"vmmig: {MissingExtraError('the command line', extra='cli')}", file=sys.stderr)
        sys.exit(2)
    from vmmig.cli.commands import vmmig

    vmmig(arguments, prog_name="vmmig")
