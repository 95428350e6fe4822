"""``import vmmig`` in a fresh interpreter, against importing what it depends on alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.timing import medians_s, ms, table

DEPENDENCIES = "import attrs, cattrs, msgpack, xxhash"


def main(*, quick: bool = False) -> None:
    # As where it is installed: compiled once, at the first import.
    folder = tempfile.TemporaryDirectory()
    env = {**os.environ, "PYTHONPYCACHEPREFIX": folder.name}
    env.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, env=env)

    times = medians_s(
        {
            "nothing": lambda: run("pass"),
            "dependencies": lambda: run(DEPENDENCIES),
            "vmmig": lambda: run("import vmmig"),
            "every name": lambda: run("from vmmig import *"),
        },
        rounds=1 if quick else 41,
    )
    base = times["dependencies"] - times["nothing"]
    rows: list[tuple[object, ...]] = [
        ("attrs, cattrs, msgpack, xxhash", ms(base), "1.00"),
    ]
    for name in ("vmmig", "every name"):
        own = times[name] - times["nothing"]
        rows.append((f"vmmig, {name}" if name != "vmmig" else name, ms(own), f"{own / base:.2f}"))
    head = ("import", "ms, the interpreter's own start taken off", "x dependencies")
    print(table("Import time", head, rows))
    folder.cleanup()


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
