"""``vmmig schema`` and ``vmmig compat``: what a machine's states are, and what would break."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click

from vmmig.cli.console import fails_with
from vmmig.errors import MigratableError, MissingExtraError
from vmmig.schema import Break, Schema, compare, load_schema, schema_of
from vmmig.snapshot import Snapshot

_MOST = 200
_FAILED = 255


@click.command(
    short_help="Write the schema of a machine's states.",
    epilog="""\b
Examples:
  vmmig schema acme.machine:Machine > schema.json     to check in
  vmmig schema acme.devices                           all states of a module""",
)
@click.argument("target", metavar="MODULE[:COMPONENT]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this file instead of the standard output.",
)
def schema(target: str, output: Path | None) -> None:
    """Write the schema of a component tree: versions, fields, types and what changed.

    COMPONENT is a component, a class or function that makes one without arguments, or the class
    of a state. Without it, all states that the module declares are written. The text is always
    the same for the same states, so that it can be checked in.
    """
    text = schema_of(_code(target)).dumps()
    if output is None:
        sys.stdout.write(text)
    else:
        try:
            output.write_text(text, "utf-8")
        except OSError as error:
            raise MigratableError(f"{str(output)!r} cannot be written: {error}") from error


class _Side(NamedTuple):
    name: str
    schema: Schema | None
    corpus: dict[str, Snapshot] | None = None
    code: Any = None


class _MisuseError(click.UsageError):
    exit_code = _FAILED


class _Counting(click.Command):
    """A command whose misuse must not look like a number of breaks."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _MisuseError(error.format_message(), error.ctx) from error


@click.command(
    cls=_Counting,
    short_help="Say which snapshots would not restore.",
    epilog="""\b
Examples:
  vmmig compat schema.json acme.machine:Machine       before each commit
  vmmig compat v1.json v2.json v3.json                three releases, also over two hops
  vmmig compat tests/golden acme.machine:Machine      old snapshots, today's code

\b
Exit status: the number of breaks, at most 200; 255 if it could not compare, or was misused.""",
)
@click.argument("old")
@click.argument("newer", nargs=-1, required=True, metavar="[MIDDLE]... NEW")
@click.option(
    "--direction",
    type=click.Choice(["both", "old-on-new", "new-on-old"]),
    default="both",
    show_default=True,
    help="Old snapshots on new code, or new snapshots on old code.",
)
@click.option(
    "--examples",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="How many states of each old one to make up, where NEW is code.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the breaks as JSON, one a line.")
def compat(old: str, newer: tuple[str, ...], direction: str, examples: int, as_json: bool) -> None:
    """Compare schemas, from the oldest to the newest, and print what would break.

    Each is a file that ``vmmig schema`` wrote, or MODULE[:COMPONENT]; the oldest may be a folder
    of snapshots, and the newest is then code. Every pair is compared, in both directions, so that
    what one release takes from another is known to be taken by a third. Where the newest is code,
    states are made up for each state of the older ones, and must be taken (extra `testing`).
    """
    fails_with(_FAILED)
    try:
        sides = [_side(name) for name in (old, *newer)]
        breaks = [*dict.fromkeys(_breaks(sides, direction.replace("-", " "), examples))]
    except MigratableError:
        raise
    except Exception as error:
        raise MigratableError(f"they cannot be compared: {error!r}") from error
    for problem in breaks:
        click.echo(json.dumps(problem._asdict()) if as_json else str(problem))
    sys.exit(min(len(breaks), _MOST))


def _breaks(sides: list[_Side], direction: Any, examples: int) -> list[Break]:
    found: list[Break] = []
    newest = sides[-1]
    for i, old in enumerate(sides):
        for new in sides[i + 1 :]:
            label = f"{old.name} -> {new.name}: " if len(sides) > 2 else ""
            if old.corpus is not None and new.code is None:
                raise MigratableError(
                    f"snapshots are compared with code, MODULE[:COMPONENT], not with {new.name!r}"
                )
            some: list[Break] = []
            if old.schema is not None and new.schema is not None:
                some += compare(old.schema, new.schema, direction=direction)
            if new is newest and new.code is not None and (old.corpus or examples):
                some += _tried(old, new, examples)
            found += [
                problem._replace(path=label + problem.path)
                for problem in some
                if direction in ("both", problem.direction)
            ]
    return found


def _tried(old: _Side, new: _Side, examples: int) -> list[Break]:
    try:
        from vmmig.testing.states import corpus_breaks, upgrade_breaks
    except ImportError as error:
        raise MissingExtraError("hypothesis, which makes up states,", extra="testing") from error
    if old.corpus is not None:
        return [*corpus_breaks(old.corpus, _factory(new.code))]
    assert old.schema is not None
    assert new.schema is not None
    found = compare(old.schema, new.schema)
    return [
        problem
        for problem in upgrade_breaks(old.schema, examples=examples)
        if problem.path in new.schema.states
        and not any(
            problem.direction == other.direction and f"{other.path}.".startswith(f"{problem.path}.")
            for other in found
        )
    ]


def _factory(code: Any) -> Callable[[], Any] | None:
    if isinstance(code, type) and "__vmmig_state__" in vars(code):
        return None
    return code if callable(code) else None


def _side(name: str) -> _Side:
    path = Path(name)
    if path.is_dir():
        from vmmig.migration import recv

        files = sorted(path.rglob("*.vmsnap"))
        if not files:
            raise MigratableError(f"there are no snapshots (*.vmsnap) in {name!r}")
        return _Side(name, None, {str(file.relative_to(path)): recv(file) for file in files})
    if path.is_file():
        return _Side(name, load_schema(path))
    code = _code(name)
    return _Side(name, schema_of(code), code=code)


def _code(target: str) -> Any:
    """What ``MODULE[:NAME]`` means, where the current folder is on the path, as for python -m."""
    module, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        thing: Any = import_module(module)
        for part in name.split(".") if name else ():
            thing = getattr(thing, part)
    except MigratableError:
        raise
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module}.".startswith(f"{absent}."):
            raise MigratableError(
                f"{target!r} is neither a file nor a folder, and there is no module {module!r}"
            ) from error
        raise MigratableError(f"{target!r} cannot be loaded: {error!r}") from error
    return thing
