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
    """A numpy Generator."""

    def __init__(self) -> None:
        self.generator = numpy.random.Generator(numpy.random.PCG64(6))

    def snapshot(self) -> Snapshot:
        state = self.generator.bit_generator.state
        return self.snapshot_of(state=json.dumps(state, sort_keys=True).encode())

    def restore(self, snapshot: Snapshot) -> None:
        (state,) = snapshot.take("state")
        with refusing():
            bits = numpy.random.PCG64()
            bits.state = json.loads(state)
        self.generator = numpy.random.Generator(bits)
