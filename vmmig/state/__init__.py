"""A component's state: an attrs class with a name and a version, as a section and back.

>>> import attrs
>>> from vmmig.state import Added, U8, load_state, save_state, versioned
>>> @versioned("serial", 2, history={2: Added("scr", 0)})
... @attrs.define
... class SerialState:
...     lcr: U8 = 0
...     scr: U8 = 0
>>> load_state(save_state("com1", SerialState(lcr=3)), SerialState)
SerialState(lcr=3, scr=0)
"""

from __future__ import annotations

from vmmig.state.history import Added, Change, Changed, History, LostError, Removed, Renamed
from vmmig.state.section import (
    Peeked,
    StateType,
    Target,
    declared_states,
    get_state,
    load_state,
    peek,
    put_state,
    save_state,
    state_type,
    subsection,
    versioned,
    writing_versions,
)
from vmmig.state.types import I8, I16, I32, I64, U8, U16, U32, U64, Length, Range

__all__ = [
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
    "Added",
    "Change",
    "Changed",
    "History",
    "Length",
    "LostError",
    "Peeked",
    "Range",
    "Removed",
    "Renamed",
    "StateType",
    "Target",
    "declared_states",
    "get_state",
    "load_state",
    "peek",
    "put_state",
    "save_state",
    "state_type",
    "subsection",
    "versioned",
    "writing_versions",
]
