"""Coverage-guided fuzzing of one receiver, for as long as you like::

    pip install atheris
    python tests/fuzz/fuzz_receivers.py container -max_total_time=60

The first argument is one of `tests.hostile.RECEIVERS`; the others are libFuzzer's. What is found
is written to ``crash-*`` in the current folder; give that file as an argument to run it again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["vmmig"], enable_loader_override=False):
    from tests.hostile import RECEIVERS, SEEDS


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name not in RECEIVERS:
        sys.exit(f"name one of {', '.join(RECEIVERS)}")
    receive = RECEIVERS[name]
    for seed in SEEDS[name]:
        receive(seed)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[name]):
            Path(folder, str(number)).write_bytes(seed)
        bounds = ["-timeout=20", "-rss_limit_mb=1024", "-max_len=8192"]
        inputs = [] if any(Path(argument).is_file() for argument in arguments) else [folder]
        atheris.Setup([sys.argv[0], *inputs, *bounds, *arguments], receive)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
