"""All benchmarks, or those named: ``python -m benchmarks [--quick] [codec files ...]``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

names = [
    path.stem.removeprefix("bench_") for path in sorted(Path(__file__).parent.glob("bench_*.py"))
]
wanted = [argument for argument in sys.argv[1:] if argument != "--quick"] or names
for name in wanted:
    if name not in names:
        sys.exit(f"there is no benchmark {name!r}; there are {', '.join(names)}")
    import_module(f"benchmarks.bench_{name}").main(quick="--quick" in sys.argv)
