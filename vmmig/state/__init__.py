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

from typing import TYPE_CHECKING

from vmmig._lazy import load_lazily

if TYPE_CHECKING:
    from vmmig.state.history import Added as Added
    from vmmig.state.history import Change as Change
    from vmmig.state.history import Changed as Changed
    from vmmig.state.history import History as History
    from vmmig.state.history import LostError as LostError
    from vmmig.state.history import Removed as Removed
    from vmmig.state.history import Renamed as Renamed
    from vmmig.state.section import StateType as StateType
    from vmmig.state.section import Target as Target
    from vmmig.state.section import declared_states as declared_states
    from vmmig.state.section import get_state as get_state
    from vmmig.state.section import load_state as load_state
    from vmmig.state.section import put_state as put_state
    from vmmig.state.section import save_state as save_state
    from vmmig.state.section import state_type as state_type
    from vmmig.state.section import subsection as subsection
    from vmmig.state.section import versioned as versioned
    from vmmig.state.section import writing_versions as writing_versions
    from vmmig.state.types import I8 as I8
    from vmmig.state.types import I16 as I16
    from vmmig.state.types import I32 as I32
    from vmmig.state.types import I64 as I64
    from vmmig.state.types import U8 as U8
    from vmmig.state.types import U16 as U16
    from vmmig.state.types import U32 as U32
    from vmmig.state.types import U64 as U64
    from vmmig.state.types import Length as Length
    from vmmig.state.types import Range as Range
    from vmmig.state.wire import Peeked as Peeked
    from vmmig.state.wire import peek as peek

_HOMES = load_lazily(
    __name__,
    {
        "history": "Added Change Changed History LostError Removed Renamed",
        "section": "StateType Target declared_states get_state load_state put_state "
        "save_state state_type subsection versioned writing_versions",
        "types": "I8 I16 I32 I64 U8 U16 U32 U64 Length Range",
        "wire": "Peeked peek",
    },
)

__all__ = sorted(_HOMES)
