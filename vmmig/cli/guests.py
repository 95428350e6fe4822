"""The machine that the commands start by themselves, and the options that say how large it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from vmmig.adapters import guest

if TYPE_CHECKING:
    from vmmig.adapters.unicorn import Machine

MIB = 1 << 20

ram_mib = click.option(
    "--ram-mib", type=click.IntRange(min=1), default=48, show_default=True, help="The guest's RAM."
)
rounds = click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How often the guest hashes all of its RAM.",
)


def booted(ram_mib: int, rounds: int, output: Callable[[bytes], object]) -> Machine:
    """A machine that is about to run the guest; it is paused."""
    from vmmig.adapters.unicorn import Machine

    machine = Machine(ram_mib * MIB, output=output)
    machine.boot(guest.code(), gpa=guest.ENTRY, rdi=ram_mib * MIB, rsi=rounds)
    return machine
