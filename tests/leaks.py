"""What a test must not leave behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Fails if more descriptors are open, or more threads run, than before."""
    before = _counts()
    yield
    # To collect garbage takes longer than most tests.
    if not _fewer(_counts(), before):
        gc.collect()
        assert _fewer(_counts(), before), f"{_counts()} descriptors and threads, from {before}"


def _counts() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def _fewer(counts: tuple[int, int], before: tuple[int, int]) -> bool:
    """Fewer are none that leak: those of earlier tests may go at any time."""
    return all(now <= then for now, then in zip(counts, before, strict=True))
