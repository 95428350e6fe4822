"""Bytes to and from a URL: one module for each scheme, loaded when it is first used.

A transport never sees a `Snapshot`. Its module has the two functions of `Transport`.

What begins like a URL - a letter, then letters, digits, ``+``, ``-`` or ``.``, then a colon - is
one, whether its scheme is known or not; a file of such a name is called ``./tcp:x`` or
``Path("tcp:x")``. Every other text, and every `os.PathLike`, is a path and means the file there.

Another package adds a scheme by an entry point of the group ``vmmig.transports``: its name is
the scheme, and what it refers to is a `Transport`, for instance a module. What vmmig has itself
cannot be replaced; what another package adds goes before what fsspec has.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast, overload

from vmmig.errors import MigratableError, MigrateReceiveError, MigrateSendError
from vmmig.transfer import SCHEME, CancelToken, Options, Progress, Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer, Unpack

    from vmmig.codec import RangeReader


class Transport(Protocol):
    """What serves a scheme.

    Attributes:
        OPTIONS: The names of the `vmmig.transfer.Options` it takes; it has this attribute only
            if there are any.
        HANDS_OVER: Those of its schemes where ``transfer.attached`` travels as descriptors,
            beside the chunks; it has this attribute only if there are any.
    """

    def send(self, chunks: Iterable[Buffer], transfer: Transfer, /) -> None:
        """Bring ``chunks`` to ``transfer.url``; on return they are there to stay.

        Every failure is raised as a `MigrateSendError`, by ``transfer.failure``, and leaves
        there what was there before. ``transfer.views`` checks the chunks on the way;
        ``transfer.advance`` is told how many bytes are through, and raises when it is cancelled.
        """

    def recv(self, transfer: Transfer, /) -> memoryview | RangeReader:
        """The bytes at ``transfer.url``, or, if ``transfer.lazily``, what reads parts of them.

        Every failure is raised as a `MigrateReceiveError`, by ``transfer.failure``; more than
        ``transfer.max_bytes`` are refused before memory is spent on them. Where somebody waits to
        be told that all is here, ``transfer.accept`` is given the bytes before.
        """
        ...


_MODULES = {
    "file": "vmmig.transport.file",
    "http": "vmmig.transport.http",
    "https": "vmmig.transport.http",
    "tcp": "vmmig.transport.stream",
    "unix": "vmmig.transport.stream",
}

_FSSPEC_MODULE = "vmmig.transport.object_store"


def send(
    chunks: Iterable[Buffer],
    url: str | os.PathLike[str],
    *,
    total_bytes: int,
    attached: Sequence[memoryview] = (),
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> None:
    """Bring ``chunks``, one behind the other, to ``url``; on return they are there to stay.

    Args:
        chunks: Contiguous bytes-like objects. What they show must not change before the return.
        url: Where to; a path means a file.
        total_bytes: The sum of the chunks' sizes.
        attached: Sealed shared memory that travels as descriptors, where `hands_over`.
        progress: Is told how far it is.
        cancel: Stops it.
        options: See `vmmig.transfer.Options`.

    Raises:
        MigrateSendError: They are not there; what was there before still is. A MigratableError
            that ``chunks`` raises comes through as it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     send([b"two ", b"chunks"], f"file://{folder}/vm.vmsnap", total_bytes=10)
    ...     bytes(recv(f"{folder}/vm.vmsnap"))
    b'two chunks'
    """
    transfer = Transfer(
        url,
        MigrateSendError,
        total_bytes=total_bytes,
        progress=progress,
        cancel=cancel,
        options=options,
    )
    transport = _transport(transfer)
    transfer.attached += attached
    transfer.enter("connecting")
    transport.send(chunks, transfer)
    transfer.finish()


@overload
def recv(
    url: str | os.PathLike[str],
    *,
    lazily: Literal[False] = False,
    max_bytes: int = ...,
    attached: list[memoryview] | None = None,
    accept: Callable[[memoryview], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> memoryview: ...


@overload
def recv(
    url: str | os.PathLike[str],
    *,
    lazily: bool,
    max_bytes: int = ...,
    attached: list[memoryview] | None = None,
    accept: Callable[[memoryview], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> memoryview | RangeReader: ...


def recv(
    url: str | os.PathLike[str],
    *,
    lazily: bool = False,
    max_bytes: int = (1 << 63) - 1,
    attached: list[memoryview] | None = None,
    accept: Callable[[memoryview], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> memoryview | RangeReader:
    """All the bytes at ``url``, read-only; those of a file are mapped, not copied.

    Args:
        url: Where from; a path means a file.
        lazily: Where parts can be fetched by themselves, get a `RangeReader`.
        max_bytes: Refuse more.
        attached: Is given what came as descriptors beside the bytes.
        accept: Is called with the bytes, unless they are a `RangeReader`, before the sender is
            told that they are here, where there is one who waits for that; what it raises, the
            sender is told instead.
        progress: Is told how far it is.
        cancel: Stops it, and later reads of a `RangeReader`.
        options: See `vmmig.transfer.Options`.

    Raises:
        MigrateReceiveError: They could not be had.

    >>> recv("carrier-pigeon:vm")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: Failed to receive migratable component snapshot: \
'carrier-pigeon:vm': there is no transport for 'carrier-pigeon:', only for 'file:', ...; \
a file of this name is './carrier-pigeon:vm'
    """
    transfer = Transfer(
        url,
        MigrateReceiveError,
        max_bytes=max_bytes,
        lazily=lazily,
        progress=progress,
        cancel=cancel,
        options=options,
    )
    transport = _transport(transfer)
    if attached is not None:
        transfer.takes_attached = True
        transfer.attached = attached
    transfer.on_accept(accept)
    transfer.enter("connecting")
    data = transport.recv(transfer)
    if isinstance(data, memoryview):
        transfer.accept(data)
    transfer.finish()
    return data


def hands_over(url: str | os.PathLike[str]) -> bool:
    """Whether sealed shared memory can be sent there as descriptors.

    >>> hands_over("unix:/run/vm.sock"), hands_over("vm.vmsnap")
    (True, False)
    """
    transport = _transport(Transfer(url, MigrateSendError))
    return _scheme_of(url) in getattr(transport, "HANDS_OVER", ())


def _scheme_of(url: str | os.PathLike[str]) -> str:
    match = SCHEME.match(url) if isinstance(url, str) else None
    return match[1].lower() if match else "file"


def _transport(transfer: Transfer) -> Transport:
    scheme = _scheme_of(transfer.url)
    transport = _of_scheme(scheme, transfer)
    taken: frozenset[str] = getattr(transport, "OPTIONS", frozenset())
    for name in transfer.options:
        if name not in taken:
            ours = ", ".join(f"{option!r}" for option in sorted(taken)) or "none"
            raise transfer.failure(f"'{scheme}:' takes no option {name!r}, of options: {ours}")
    return transport


def _of_scheme(scheme: str, transfer: Transfer) -> Transport:
    if scheme in _MODULES:
        return _loaded(_MODULES[scheme], transfer)
    from importlib.metadata import entry_points

    foreign = entry_points(group="vmmig.transports")
    for entry in foreign:
        if entry.name.lower() == scheme:
            try:
                return cast(Transport, entry.load())
            except Exception as error:
                raise transfer.failure(
                    f"the transport for '{scheme}:', {entry.value}, cannot be loaded: {error!r}"
                ) from error
    try:
        from fsspec import available_protocols
    except ImportError:
        stores: list[str] = []
        hint = "; pip install 'vmmig[s3]' adds 's3:' and every scheme of fsspec"
    else:
        stores, hint = available_protocols(), ""
    if scheme in stores:
        return _loaded(_FSSPEC_MODULE, transfer)
    known = sorted({*_MODULES, *(entry.name for entry in foreign), *stores})
    raise transfer.failure(
        f"there is no transport for '{scheme}:', only for "
        f"{', '.join(f'{name!r}' for name in [f'{name}:' for name in known])}{hint}; "
        f"a file of this name is {f'./{transfer.shown_url}'!r}"
    )


def _loaded(module: str, transfer: Transfer) -> Transport:
    try:
        return cast(Transport, importlib.import_module(module))
    except MigratableError as error:
        raise transfer.failure(error) from error
