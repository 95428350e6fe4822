"""Two sources of random numbers: Python's own and numpy's."""

from __future__ import annotations

import json
import random

import numpy

from retrofit.still import Still, refusing
from vmmig import Snapshot


class Dice(Still):
    """A `random.Random`."""

    def __init__(self) -> None:
        self.random = random.Random(6)

    def snapshot(self) -> Snapshot:
        return self.snapshot_of(state=json.dumps(self.random.getstate()).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (state,) = snapshot.take("state")
        with refusing():
            version, words, gauss = json.loads(state)
            restored = random.Random()
            restored.setstate((version, tuple(words), None if gauss is None else float(gauss)))
        self.random = restored


class Noise(Still):
    """A numpy Generator: its bits, and how many children its seed has had."""

    SEED = 6

    def __init__(self, children: int = 0) -> None:
        seed = numpy.random.SeedSequence(self.SEED, n_children_spawned=children)
        self.generator = numpy.random.Generator(numpy.random.PCG64(seed))

    def state(self) -> dict[str, object]:
        bits = self.generator.bit_generator
        return {"bits": bits.state, "children": bits.seed_seq.n_children_spawned}

    def snapshot(self) -> Snapshot:
        return self.snapshot_of(state=json.dumps(self.state(), sort_keys=True).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (payload,) = snapshot.take("state")
        with refusing():
            state = json.loads(payload)
            restored = Noise(state["children"])
            restored.generator.bit_generator.state = state["bits"]
        self.generator = restored.generator
