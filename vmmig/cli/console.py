"""What all commands share: how they show progress, report errors, and are cancelled."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

import click

from vmmig.errors import MigratableError, MissingExtraError
from vmmig.transfer import CancelToken, Progress

_VERBOSE = "vmmig.verbose"
_FAILURE = "vmmig.failure"
_PATIENCE_S = 1.0
_LINE_EACH_S = 0.5
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Group(click.Group):
    """A group whose commands' errors are one line each on stderr, and an exit status.

    A command's module is loaded when the command is first asked for.

    Attributes:
        places: For each command its module, and after a colon its name there.
    """

    places: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.places]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.places:
            return None
        if cmd_name not in self.commands:
            module, _, name = self.places[cmd_name].partition(":")
            command = getattr(importlib.import_module(module), name)
            below = command.commands.values() if isinstance(command, click.Group) else ()
            for each in (command, *below):
                _verbose(each)
            self.add_command(command, cmd_name)
        return self.commands[cmd_name]

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        for stream in (sys.stdout, sys.stderr):
            # An id may have characters that the terminal's encoding has not.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                return self._invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read has seen enough; what is still buffered must not complain at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Cancelled as error:
            print_error(error.__cause__, verbose=ctx.meta.get(_VERBOSE, False))
            ctx.exit(128 + error.signal_number)
        except KeyboardInterrupt:
            print_error(None)
            ctx.exit(128 + signal.SIGINT)
        except MigratableError as error:
            print_error(error, verbose=ctx.meta.get(_VERBOSE, False))
            usual = 2 if isinstance(error, MissingExtraError) else 1
            ctx.exit(ctx.meta.get(_FAILURE, usual))


def fails_with(status: int) -> None:
    """Let a failure of this command have another exit status than 1."""
    click.get_current_context().meta[_FAILURE] = status


def print_error(error: BaseException | None, *, verbose: bool = False) -> None:
    """One line on stderr, and if ``verbose``, one more for each cause behind it.

    What says nothing itself, as a KeyboardInterrupt, is called a cancellation.
    """
    print(f"vmmig: {_one_line(str(error or '')) or 'cancelled'}", file=sys.stderr)
    while verbose and error is not None and (error := error.__cause__) is not None:
        print(f"  caused by {type(error).__name__}: {_one_line(str(error))}", file=sys.stderr)


def _one_line(text: str) -> str:
    """The text without line ends, and without anything else that a terminal would obey."""
    line = "; ".join(part.strip().removeprefix("- ") for part in text.splitlines() if part.strip())
    line = line.replace(":; ", ": ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True


_verbose = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_be_verbose,
    help="If it fails, also print what caused the error.",
)


class Cancelled(Exception):
    """A signal ended the command; ``__cause__`` is the error it ended with."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class CancelOnSignals:
    """Within this context, Ctrl-C, SIGTERM and SIGHUP cancel the token, and nothing else.

    A second signal raises KeyboardInterrupt. A signal that the process was started to ignore,
    as by nohup, stays ignored.

    Attributes:
        token: To be given to the transfers.

    Raises:
        Cancelled: A signal came, and the block failed.
    """

    def __init__(self) -> None:
        self.token = CancelToken()
        self._at_once = False
        self._signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> CancelOnSignals:
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._signal_number is not None and isinstance(
            error, (MigratableError, KeyboardInterrupt)
        ):
            raise Cancelled(self._signal_number) from error

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that watches no token and needs no cleaning up: a signal interrupts it."""
        self._at_once = True
        try:
            if self.token.cancelled:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.token.cancelled
        self._signal_number = number
        self.token.cancel()
        if self._at_once or again:
            raise KeyboardInterrupt


Show = Callable[[Progress], None]


@contextmanager
def showing_progress(*, as_json: bool) -> Iterator[Show]:
    """What shows each `Progress`: as JSON lines on stdout, or as a bar if stderr is a terminal.

    Else it shows nothing.

    Raises:
        MissingExtraError: There is a terminal, but rich is not installed.
    """
    if as_json:
        yield _JsonLines()
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield lambda _: None


@contextmanager
def showing_work(what: str) -> Iterator[Callable[[int, int], None]]:
    """What shows how much is done of how much, once it takes over a second on a terminal.

    Raises:
        MissingExtraError: There is a terminal, but rich is not installed.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    began_s = time.monotonic()
    show: Show | None = None
    with ExitStack() as stack:

        def tell(done: int, total: int) -> None:
            nonlocal show
            elapsed_s = time.monotonic() - began_s
            if elapsed_s < _PATIENCE_S:
                return
            show = show or stack.enter_context(_bar())
            show(Progress(what, "confirming", done, total, elapsed_s))

        yield tell


class _JsonLines:
    """One JSON object for each new stage, and two a second between."""

    def __init__(self) -> None:
        self._last: tuple[str, str] | None = None
        self._next_s = 0.0

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        this = (progress.url, progress.stage)
        if this == self._last and now_s < self._next_s:
            return
        self._last, self._next_s = this, now_s + _LINE_EACH_S
        facts = {
            "stage": progress.stage,
            "url": progress.url,
            "done_bytes": progress.done_bytes,
            "total_bytes": progress.total_bytes,
            "elapsed_s": round(progress.elapsed_s, 6),
            "rate_bytes_per_s": round(progress.rate_bytes_per_s),
        }
        click.echo(json.dumps(facts))


@contextmanager
def _bar() -> Iterator[Show]:
    try:
        from rich import filesize, progress
        from rich.console import Console
    except ImportError as error:
        raise MissingExtraError("the progress bar", extra="cli") from error
    bar = progress.Progress(
        # Not markup: an IPv6 address stands in brackets.
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    shown: tuple[str, str] | None = None

    def show(event: Progress) -> None:
        nonlocal shown
        if event.stage == "done":
            rate = filesize.decimal(int(event.rate_bytes_per_s))
            size = filesize.decimal(event.done_bytes)
            bar.console.print(
                f"{event.url}: {size} in {event.elapsed_s:.1f} s, {rate}/s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        elif (event.url, event.stage) != shown:
            shown = (event.url, event.stage)
            # Starts the clock again, so that the rate is that of this stage.
            bar.reset(
                task,
                total=event.total_bytes,
                completed=event.done_bytes,
                description=f"{event.stage} {event.url}",
            )
        else:
            bar.update(task, total=event.total_bytes, completed=event.done_bytes)

    with bar:
        task = bar.add_task("", total=None)
        yield show
