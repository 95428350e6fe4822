"""``vmmig migrate``, ``vmmig receive`` and ``vmmig simulate``: live migration by hand."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from vmmig._units import format_bytes, format_seconds
from vmmig.cli import guests
from vmmig.cli.console import CancelOnSignals, showing_progress
from vmmig.cli.guests import booted
from vmmig.errors import MigratableError
from vmmig.guest_memory import GuestMemory
from vmmig.precopy import PrecopyPolicy
from vmmig.transfer import Progress, Stage, shown_url

_MACHINES = {"unicorn": "vmmig.adapters.unicorn:Machine"}
_ENTRY_POINTS = "vmmig.machines"
_ASK_EACH_S = 1.0

_POLICY = (
    click.option(
        "--downtime-limit",
        "downtime_limit_ms",
        type=click.FloatRange(min=0),
        default=300,
        show_default=True,
        metavar="MS",
        help="Pause the machine once the rest takes no longer than this.",
    ),
    click.option(
        "--precopy-timeout",
        type=click.FloatRange(min=0),
        default=3600,
        show_default=True,
        metavar="SECONDS",
        help="How long memory is copied while the machine runs.",
    ),
    click.option(
        "--timeout-strategy",
        type=click.Choice(["cancel", "ignore"]),
        default="cancel",
        show_default=True,
        help="What happens then: give up, or pause it anyway.",
    ),
    click.option(
        "--max-iterations",
        type=click.IntRange(min=0),
        help="Pause it after so many passes at the latest.",
    ),
)
_PEER = (
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=60,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for the other side: to come, and whenever it stalls.",
    ),
    click.option(
        "--tls",
        type=click.Path(exists=True, file_okay=False),
        metavar="FOLDER",
        help="Encrypt, and prove both sides, with the certificates in this folder.",
    ),
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _policy(options: dict[str, Any]) -> PrecopyPolicy:
    return PrecopyPolicy(
        downtime_limit_s=options.pop("downtime_limit_ms") / 1000,
        timeout_s=options.pop("precopy_timeout"),
        timeout_strategy=options.pop("timeout_strategy"),
        max_iterations=options.pop("max_iterations"),
    )


@click.command(short_help="Move a running machine to `vmmig receive`.")
@click.argument("url")
@click.option(
    "--from",
    "snapshot",
    metavar="FILE",
    help="The machine's snapshot, of `vmmig demo --keep`; else the demo's machine starts.",
)
@guests.ram_mib
@guests.rounds
@click.option(
    "--after",
    type=click.FloatRange(min=0),
    default=1,
    show_default=True,
    metavar="SECONDS",
    help="How long it runs here first.",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 128),
    default=1,
    show_default=True,
    help="How many carry the memory.",
)
@_with(*_POLICY, *_PEER)
@click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write a page that shows how it went.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print progress and the result as JSON lines."
)
def migrate(
    url: str,
    snapshot: str | None,
    ram_mib: int,
    rounds: int,
    after: float,
    connections: int,
    report_path: Path | None,
    as_json: bool,
    timeout: float,
    tls: str | None,
    **options: Any,
) -> None:
    """Run a machine here, and move it to URL while it runs.

    The machine is the demo's, which prints a digest of its RAM at its end. If the migration is
    aborted, it runs on here to its end, and the exit status is 1.

    \b
      vmmig receive tcp:0.0.0.0:9000                         on the one host, and then
      vmmig migrate tcp:host:9000 --report migration.html    on the other
    """
    from vmmig.adapters.unicorn import Machine
    from vmmig.live import MigrationAborted, MigrationInDoubt, MigrationProgress
    from vmmig.live import migrate as move

    stream = sys.stderr if as_json else sys.stdout

    def output(data: bytes) -> None:
        click.echo(data.decode("latin-1"), file=stream, nl=False)

    if snapshot is None:
        machine = booted(ram_mib, rounds, output)
    else:
        from vmmig.migration import recv

        machine = Machine.from_snapshot(recv(snapshot), output=output)
    policy = _policy(options)
    with CancelOnSignals() as signals, showing_progress(as_json=as_json) as show:

        def note(event: MigrationProgress) -> None:
            where = f"{event.phase} {event.iteration or ''}".strip()
            show(
                Progress(
                    shown_url(url),
                    cast(Stage, where),
                    event.pass_sent_bytes,
                    event.pass_bytes,
                    event.elapsed_s,
                )
            )

        machine.resume()
        with signals.at_once():
            machine.wait(after)
        try:
            report = move(
                machine,
                url,
                configuration=machine.configuration(),
                policy=policy,
                connections=connections,
                progress=note,
                cancel=signals.token,
                timeout_s=timeout,
                tls=tls,
            )
        except MigrationAborted as error:
            if not signals.token.cancelled:
                click.echo(f"vmmig: {error}; the machine runs on here", err=True)
                with signals.at_once():
                    machine.wait()
            raise
        except MigrationInDoubt as error:
            if error.key is None:
                raise
            click.echo(f"vmmig: {error}; asking on, until Ctrl-C", err=True)
            with signals.at_once():
                _ask_until_known(url, error, tls)
            return
    if report_path is not None:
        from vmmig.cli.report import page
        from vmmig.transport import send

        text = page(report.to_dict()).encode()
        send([text], report_path, total_bytes=len(text))
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        click.echo()
        click.echo("\n".join(told(report.to_dict())))


def _ask_until_known(url: str, error: Any, tls: str | None) -> None:
    from vmmig.live import Outcome, ask

    while True:
        try:
            outcome = ask(url, error.key, timeout_s=_ASK_EACH_S, tls=tls)
        except MigratableError:
            outcome = Outcome.IN_DOUBT
        if outcome is Outcome.COMMITTED:
            return
        if outcome is Outcome.ABORTED:
            raise error
        time.sleep(_ASK_EACH_S)


def told(report: dict[str, Any]) -> list[str]:
    """A migration's record, as lines to read."""
    lines = [
        f"pass {each['iteration']}: {format_bytes(each['sent_bytes'])} in "
        f"{format_seconds(each['duration_s'])} "
        f"({format_bytes(each['sent_bytes'] / max(each['duration_s'], 1e-9))}/s), meanwhile "
        f"{format_bytes(each['dirty_bytes'])} were written"
        for each in report["iterations"]
    ]
    if report["decision"]:
        lines.append(report["decision"]["reason"])
    split = {name[:-2].replace("_", " "): value for name, value in report["downtime"].items()}
    total_s = split.pop("total")
    parts = ", ".join(f"{name} {format_seconds(value)}" for name, value in split.items())
    lines.append(f"downtime {format_seconds(total_s)}: {parts}")
    how = "handed over" if report["handed_over"] else f"sent {format_bytes(report['sent_bytes'])}"
    lines.append(
        f"moved {format_bytes(report['ram_bytes'])} of RAM to {report['url']} in "
        f"{format_seconds(report['total_s'])} ({how})"
    )
    return lines


@click.command(short_help="Wait for a machine that `vmmig migrate` moves here, and run it.")
@click.argument("url")
@click.option(
    "--record",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write down what becomes of each migration, so as to know it even after a crash.",
)
@_with(*_PEER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def receive(url: str, record: str | None, as_json: bool, timeout: float, tls: str | None) -> None:
    """Listen at URL for a machine, and run it to its end.

    Its console goes to stdout (with --json, to stderr). The migration says which kind of machine
    it is; vmmig has `unicorn`, and others come by entry points of the group vmmig.machines.

    \b
      vmmig receive tcp:0.0.0.0:9000 --record /var/lib/vm/record.json
    """
    from vmmig.live import receive as wait

    stream = sys.stderr if as_json else sys.stdout
    console = bytearray()

    def output(data: bytes) -> None:
        console.extend(data)
        click.echo(data.decode("latin-1"), file=stream, nl=False)

    def make(configuration: object, memory: GuestMemory) -> Any:
        return _machine_class(configuration).from_configuration(
            configuration, memory, output=output
        )

    with CancelOnSignals() as signals:
        machine = wait(
            make,
            url,
            record=record,
            listening=lambda url: click.echo(f"listening at {url}", err=True),
            cancel=signals.token,
            timeout_s=timeout,
            tls=tls,
        )
        resumed_at_s = time.time()
        with signals.at_once():
            machine.wait()
            machine.pause()
    if as_json:
        facts = {
            "console": console.decode("latin-1"),
            "resumed_at_s": resumed_at_s,
            "ran_s": machine.timer.elapsed_s,
        }
        click.echo(json.dumps(facts, indent=2))


def _machine_class(configuration: object) -> Any:
    kind = configuration.get("machine") if isinstance(configuration, dict) else None
    if kind in _MACHINES:
        module, _, name = _MACHINES[kind].partition(":")
        return getattr(importlib.import_module(module), name)
    from importlib.metadata import entry_points

    others = {entry.name: entry for entry in entry_points(group=_ENTRY_POINTS)}
    if kind not in others:
        known = ", ".join(repr(name) for name in sorted({*_MACHINES, *others}))
        raise MigratableError(f"{kind!r} is no kind of machine that is known here; known: {known}")
    try:
        return others[kind].load()
    except Exception as error:
        raise MigratableError(
            f"the machine {kind!r}, {others[kind].value}, cannot be loaded: {error!r}"
        ) from error


class _Bytes(click.ParamType):  # type: ignore[type-arg]
    name = "SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
        text = str(value).strip().upper().removesuffix("B").removesuffix("I")
        try:
            if text[-1:] in units and text[-1:]:
                return float(text[:-1]) * units[text[-1:]]
            return float(text)
        except ValueError:
            self.fail(f"{value!r} is no size; write 4GiB, 512M or a number of bytes", param, ctx)


@click.command(short_help="Show how a pre-copy policy would go, by a trace of dirty rates.")
@click.argument("trace", type=click.File(encoding="utf-8-sig"))
@click.option(
    "--memory", type=_Bytes(), required=True, help="The machine's RAM, for instance 4GiB."
)
@click.option(
    "--bandwidth", type=_Bytes(), required=True, help="What is sent in a second, as 1.2GiB."
)
@_with(*_POLICY)
def simulate(trace: Any, memory: float, bandwidth: float, **options: Any) -> None:
    """Replay TRACE through a policy, on a clock that costs no time, and print each pass.

    TRACE is CSV with the head duration_s,dirty_bytes_per_s,working_set_bytes; its last line
    lasts to the end.

    \b
      vmmig simulate trace.csv --memory 4GiB --bandwidth 1.2GiB --downtime-limit 20
    """
    from vmmig.simulation import parse_trace
    from vmmig.simulation import simulate as replay

    simulation = replay(
        _policy(options),
        parse_trace(trace.read()),
        memory_bytes=int(memory),
        bandwidth_bytes_per_s=bandwidth,
    )
    click.echo(simulation.render())
