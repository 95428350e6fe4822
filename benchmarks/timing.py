"""Medians of interleaved runs, so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def medians_s(
    actions: Mapping[str, Callable[[], object]], *, rounds: int, number: int = 1
) -> dict[str, float]:
    """The median time in seconds of one call of each action, over ``rounds`` rounds."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            gc.collect()
            start = time.perf_counter()
            for _ in range(number):
                action()
            times[name].append((time.perf_counter() - start) / number)
    return {name: statistics.median(series) for name, series in times.items()}


def table(title: str, head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [f"\n## {title}\n", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
