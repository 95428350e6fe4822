"""A check of a component whose class was seen before, against a look-up and `isinstance`."""

from __future__ import annotations

import sys
import weakref

from benchmarks.timing import medians_s, table
from vmmig import Composite, Migratable, verify


def main(*, quick: bool = False) -> None:
    component = Composite("vm", [])
    plain = {type(component): True}
    weak = weakref.WeakKeyDictionary(plain)
    number = 10 if quick else 20_000
    times = medians_s(
        {
            "dict look-up by class": lambda: plain[type(component)],
            "WeakKeyDictionary look-up by class": lambda: weak[type(component)],
            "verify(component, Migratable)": lambda: verify(component, Migratable),
            "isinstance(component, Migratable)": lambda: isinstance(component, Migratable),
        },
        rounds=1 if quick else 11,
        number=number,
    )

    def first_seen() -> None:
        cls = type("Fresh", (Composite,), {})
        verify(cls, Migratable)

    times |= medians_s({"verify of a class made just now": first_seen}, rounds=1 if quick else 201)
    base = times["dict look-up by class"]
    rows = [(name, f"{time * 1e6:.3f}", f"{time / base:.1f}") for name, time in times.items()]
    print(table("Checks", ("what", "microseconds", "x dict look-up"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
