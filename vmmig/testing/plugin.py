"""The pytest plugin: the option ``--vmmig-record``, and which laws ran on which components.

It is loaded by every pytest of an environment in which vmmig is installed, so it imports nothing
that is not there already; what a test uses, that test loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from vmmig.testing.fixtures import (  # noqa: F401
    vmmig_failing,
    vmmig_faulty_stream,
    vmmig_full_disk,
)

_NOT_RUN = "."


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("vmmig").addoption(
        "--vmmig-record",
        action="store_true",
        help="record the golden corpora of the current release, instead of checking them; "
        "what is recorded already is never changed",
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    if not isinstance(item, pytest.Function):
        return
    law = getattr(item.function, "vmmig_law", None)
    if law is not None:
        # Reports carry these also from the workers of pytest-xdist.
        item.user_properties += [
            ("vmmig_component", getattr(item.cls, "vmmig_component", item.nodeid)),
            ("vmmig_law", law),
            *(("vmmig_note", note) for note in getattr(item.cls, "vmmig_notes", ())),
        ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[tuple[str, str], Counter[str]] = {}
    notes: dict[str, dict[str, None]] = {}
    recorded: list[str] = []
    for outcome, report in _reports(terminalreporter):
        said: dict[str, list[str]] = {}
        for name, value in report.user_properties:
            said.setdefault(name, []).append(str(value))
        if "vmmig_recorded" in said:
            recorded += said["vmmig_recorded"]
        elif "vmmig_law" in said:
            component, law = said["vmmig_component"][0], said["vmmig_law"][0]
            counts.setdefault((component, law), Counter())[outcome] += 1
            notes.setdefault(component, {}).update(dict.fromkeys(said.get("vmmig_note", ())))
    if counts or recorded:
        terminalreporter.write_sep("=", "vmmig")
        for line in [*_table(counts, notes), *(f"recorded {text}" for text in recorded)]:
            terminalreporter.write_line(line)


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, pytest.TestReport]]:
    """Each report, with how it is shown: passed, F for failed, s for all others."""
    outcomes = {"passed": "", "failed": "F", "error": "F"}
    for category in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(category, ()):
            if isinstance(report, pytest.TestReport):
                yield outcomes.get(category, "s"), report


def _table(
    counts: dict[tuple[str, str], Counter[str]], notes: dict[str, dict[str, None]]
) -> Iterator[str]:
    """A row for each component and a column for each law, with how many tests had which outcome."""
    if not counts:
        return
    laws = sorted({law for _, law in counts})
    rows = [["", *map(str, range(1, len(laws) + 1))]]
    rows += [[name, *(_cell(counts.get((name, law))) for law in laws)] for name in sorted(notes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        weak = f"  weak: {', '.join(notes[row[0]])}" if notes.get(row[0]) else ""
        yield " ".join(cells) + weak
    yield f"tests passed of each law; F: failed, s: skipped, {_NOT_RUN}: not run"
    for number, law in enumerate(laws, 1):
        yield f"{number:>2} {law}"


def _cell(outcomes: Counter[str] | None) -> str:
    if not outcomes:
        return _NOT_RUN
    return "+".join(f"{count}{outcome}" for outcome, count in sorted(outcomes.items()))
