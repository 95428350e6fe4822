"""Bytes to and from a URL: one module for each scheme, loaded when it is first used.

A transport never sees a `Snapshot`. Each module has `send` and `recv` as they are here.

What begins like a URL - a letter, then letters, digits, ``+``, ``-`` or ``.``, then a colon - is
one, whether its scheme is known or not; a file of such a name is called ``./tcp:x`` or
``Path("tcp:x")``. Every other text, and every `os.PathLike`, is a path and means the file there.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, cast

from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    class _Transport(Protocol):
        def send(
            self, chunks: Iterable[Buffer], url: str | os.PathLike[str], *, total_bytes: int
        ) -> None: ...

        def recv(self, url: str | os.PathLike[str]) -> memoryview: ...


_MODULES = {
    "file": "vmmig.transport.file",
}

_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*):"


def send(chunks: Iterable[Buffer], url: str | os.PathLike[str], *, total_bytes: int) -> None:
    """Bring ``chunks``, one behind the other, to ``url``; on return they are there to stay.

    Args:
        chunks: Contiguous bytes-like objects. What they show must not change before the return.
        url: Where to; a path means a file.
        total_bytes: The sum of the chunks' sizes.

    Raises:
        MigrateSendError: They are not there; what was there before still is. A MigratableError
            that ``chunks`` raises comes through as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     send([b"two ", b"chunks"], f"file://{folder}/vm.vmsnap", total_bytes=10)
    ...     bytes(recv(f"{folder}/vm.vmsnap"))
    b'two chunks'
    """
    _transport(url, MigrateSendError).send(chunks, url, total_bytes=total_bytes)


def recv(url: str | os.PathLike[str]) -> memoryview:
    """All the bytes at ``url``, read-only; those of a file are mapped, not copied.

    Raises:
        MigrateReceiveError: They could not be had.

    >>> recv("carrier-pigeon:vm")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: Failed to receive migratable component snapshot: \
'carrier-pigeon:vm': there is no transport for 'carrier-pigeon:', only for 'file:'; \
a file of this name is './carrier-pigeon:vm'
    """
    return _transport(url, MigrateReceiveError).recv(url)


def _transport(url: object, error: type[MigratableError]) -> _Transport:
    match = re.match(_SCHEME, url) if isinstance(url, str) else None
    scheme = match[1].lower() if match else "file"
    if scheme not in _MODULES:
        known = ", ".join(f"'{name}:'" for name in sorted(_MODULES))
        raise error(
            f"{url!r}: there is no transport for '{scheme}:', only for {known}; "
            f"a file of this name is {f'./{url}'!r}"
        )
    return cast("_Transport", importlib.import_module(_MODULES[scheme]))
