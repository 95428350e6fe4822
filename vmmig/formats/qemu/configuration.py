"""The section of the stream that says what machine it is of, and what changes the stream."""

from __future__ import annotations

import attrs

from vmmig.formats.qemu.wire import SUBSECTION, Window, damaged

IGNORE_SHARED = "x-ignore-shared"

_MAX_MACHINE_BYTES = 1 << 10
_MAX_CAPABILITIES = 1 << 10


@attrs.define
class Configuration:
    """What the section says.

    Attributes:
        machine: The type of the machine, with its version.
        page_bits: A page has ``2**page_bits`` bytes.
        capabilities: Those migration capabilities that change the stream.
        uuid: The machine's, where it must be the same.
    """

    machine: str
    page_bits: int = 12
    capabilities: list[str] = attrs.field(factory=list)
    uuid: str | None = None


def read(window: Window) -> tuple[bytes, Configuration]:
    """The section's bytes behind its kind, and what they say.

    Raises:
        DecodeError: It is damaged, or says what is not known here.

    >>> read(Window(memoryview(b"\\0\\0\\0\\2pc")))[1].machine
    'pc'
    """
    begin = window.offset
    length = window.number(4, "the configuration")
    if length > _MAX_MACHINE_BYTES:
        raise damaged(begin, f"the machine's name cannot have {length} bytes")
    machine = window.take(length, "the machine's name")
    found = Configuration(machine.decode("ascii", "replace"))
    raw = length.to_bytes(4, "big") + machine
    while window.peek() == SUBSECTION:
        begin = window.offset
        window.number(1)
        name = window.text("a subsection's name")
        version = window.number(4, "a subsection's version")
        raw += bytes((SUBSECTION, len(name))) + name.encode() + version.to_bytes(4, "big")
        raw += _subsection(window, begin, name, found)
    return raw, found


def _subsection(window: Window, begin: int, name: str, found: Configuration) -> bytes:
    if name == "configuration/target-page-bits":
        raw = window.take(4, name)
        found.page_bits = int.from_bytes(raw, "big")
        if not 10 <= found.page_bits <= 16:
            raise damaged(begin, f"pages cannot have 2**{found.page_bits} bytes")
        return raw
    if name == "configuration/uuid":
        raw = window.take(16, name)
        found.uuid = raw.hex()
        return raw
    if name != "configuration/capabilities":
        raise damaged(begin, f"the configuration's subsection {name!r} is not known")
    count = window.number(4, name)
    if count > _MAX_CAPABILITIES:
        raise damaged(begin, f"there cannot be {count} capabilities")
    raw = count.to_bytes(4, "big")
    for _ in range(count):
        capability = window.text("a capability's name")
        if capability != IGNORE_SHARED:
            raise damaged(
                begin,
                f"it was made with the capability {capability!r}, which changes the stream and is "
                "not known here; switch it off",
            )
        raw += bytes((len(capability),)) + capability.encode()
        found.capabilities.append(capability)
    return raw
