"""A small x86-64 machine on the Unicorn engine: vCPU, RAM, serial port, timer and power switch.

Each part is a component of its own; `Machine` puts them together and runs guest code on a
thread. It has no interrupts: a guest polls. What a snapshot holds is the whole state of the
guest, so it goes on in another process from the instruction at which it was paused.

What the engine keeps to itself cannot be saved: the time-stamp counter is the host's, and a
guest outside ring 0 is refused (the hidden parts of its segments cannot be read).
"""

from vmmig.errors import MissingExtraError

try:
    import unicorn as _engine  # noqa: F401
except ImportError as error:
    raise MissingExtraError("the Unicorn engine", extra="unicorn") from error

from vmmig.adapters.unicorn.devices import PmTimer, PowerSwitch, SerialPort
from vmmig.adapters.unicorn.machine import Machine
from vmmig.adapters.unicorn.ram import Ram
from vmmig.adapters.unicorn.vcpu import GuestError, Vcpu

__all__ = ["GuestError", "Machine", "PmTimer", "PowerSwitch", "Ram", "SerialPort", "Vcpu"]
