"""A socket and its side of the protocol: messages, and memory without a copy too many."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from xxhash import xxh3_64

from vmmig import sockets
from vmmig.errors import MigratableError, ProtocolError
from vmmig.memory import MemoryRangeTable
from vmmig.protocol import (
    HEADER_BYTES,
    Connection,
    Error,
    Event,
    Feature,
    Memory,
    MemoryEnd,
    MemoryFd,
    Message,
    Ok,
    Wait,
)

_STAGE_BYTES = 1 << 20
_LARGE_BYTES = 1 << 16


class PeerError(MigratableError):
    """The other side answered with Error.

    >>> str(PeerError("no such slot"))
    'no such slot'
    """


class Link:
    """One socket of a migration.

    Args:
        sock: The connected socket, of `vmmig.sockets`; `close` closes it.
        connection: Its side of the protocol.
    """

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        self.sock = sock
        self.connection = connection
        self._stage: memoryview | None = None

    def close(self) -> None:
        """Close the socket."""
        with suppress(OSError):
            self.sock.close()

    def shut_down(self) -> None:
        """Wake whoever waits for the socket, from any thread."""
        sockets.shut_down(self.sock)

    def ask(self, request: Message, fd: int | None = None) -> Ok:
        """Send a request, and wait for its Ok.

        Raises:
            PeerError: It was answered with Error.
            ProtocolError: The peer broke the protocol, or ended the stream.
            OSError: The connection failed.
        """
        self.send(request, fd)
        return self.answer()

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message, and no memory."""
        data = self.connection.send(message)
        if isinstance(message, MemoryFd):
            assert fd is not None
            self._write(data[:HEADER_BYTES])
            sockets.send_fds(self.sock, data[HEADER_BYTES:], [fd])
        else:
            self._write(data)

    def answer(self) -> Ok:
        """Wait for the Ok of what was sent; see `ask`."""
        event = self.event()
        if isinstance(event, Ok):
            return event
        if isinstance(event, Error):
            raise PeerError(event.text or "the peer refused it, and does not say why")
        raise ProtocolError(f"{type(event).__name__} came where an answer was awaited")

    def event(self, descriptors: list[int] | None = None) -> Event:
        """The peer's next message; a MemoryFd's descriptor goes to ``descriptors``."""
        connection = self.connection
        while True:
            event = connection.next_event()
            if event is Wait.PAUSED:
                raise ProtocolError("the peer is awaited, but it is not its turn")
            if not isinstance(event, Wait):
                return event
            count = min(connection.bytes_wanted, _STAGE_BYTES)
            if connection.descriptor_follows and descriptors is not None:
                data, fds = sockets.recv_fds(self.sock, count, sockets.MAX_DESCRIPTORS)
                descriptors += fds
            else:
                data = sockets.recv_some(self.sock, count)
            connection.receive_data(data)

    def send_memory(
        self,
        table: MemoryRangeTable,
        views: Iterable[memoryview],
        sent: Callable[[int], object],
    ) -> None:
        """Send ranges and their bytes, and wait for the Ok.

        Args:
            table: The ranges.
            views: Their bytes, which may change meanwhile: with checksums, each piece is copied
                once, and what is hashed is the copy that is sent.
            sent: Is told how many bytes are sent, piece by piece.
        """
        connection = self.connection
        self._write(connection.send(Memory(table)))
        if Feature.CHECKSUMS in connection.agreed:
            digest = xxh3_64()
            for piece in self._staged(views):
                digest.update(piece)
                self._write(piece)
                connection.memory_sent(len(piece))
                sent(len(piece))
            self._write(connection.send(MemoryEnd(digest.intdigest())))
        else:
            for batch, count_bytes in _batched(views):
                sockets.send_all(self.sock, batch)
                connection.memory_sent(count_bytes)
                sent(count_bytes)
            connection.send(MemoryEnd())
        self.answer()

    def receive_memory(
        self, views: Iterable[memoryview], received: Callable[[int], object]
    ) -> None:
        """Read the bytes of the Memory request on its way into ``views``, and check them.

        Raises:
            ProtocolError: The checksum does not match; the bytes are in the views.
        """
        connection = self.connection
        is_checked = Feature.CHECKSUMS in connection.agreed
        digest = xxh3_64()
        small: list[memoryview] = []
        small_bytes = 0

        def take_small() -> None:
            stage = self._staging()[:small_bytes]
            self._fill(stage)
            if is_checked:
                digest.update(stage)
            start = 0
            for view in small:
                end = start + len(view)
                view[:] = stage[start:end]
                start = end
            received(small_bytes)

        for view in views:
            if len(view) < _LARGE_BYTES:
                if small_bytes + len(view) > _STAGE_BYTES:
                    take_small()
                    small, small_bytes = [], 0
                small.append(view)
                small_bytes += len(view)
                continue
            if small:
                take_small()
                small, small_bytes = [], 0
            for start in range(0, len(view), _STAGE_BYTES):
                piece = view[start : start + _STAGE_BYTES]
                self._fill(piece)
                if is_checked:
                    digest.update(piece)
                received(len(piece))
        if small:
            take_small()
        end = self.event()
        if not isinstance(end, MemoryEnd):
            raise ProtocolError(f"{type(end).__name__} came where memory was awaited")
        if end.checksum is not None and end.checksum != digest.intdigest():
            raise ProtocolError("the memory's checksum does not match: it was damaged on its way")

    def refuse(self, error: Exception) -> None:
        """Answer with Error, if something can still be answered; the cause goes along."""
        with suppress(OSError, MigratableError):
            self._write(self.connection.send(Error(str(error) or repr(error))))

    def is_readable(self) -> bool:
        """Whether something came already that the kernel does not tell of: TLS keeps records."""
        pending = getattr(self.sock, "pending", None)
        return pending is not None and pending() > 0

    def _write(self, data: bytes | memoryview) -> None:
        sockets.send_all(self.sock, [data])

    def _fill(self, view: memoryview) -> None:
        sockets.recv_exactly_into(self.sock, view)
        self.connection.memory_received(len(view))

    def _staging(self) -> memoryview:
        if self._stage is None:
            self._stage = memoryview(bytearray(_STAGE_BYTES))
        return self._stage

    def _staged(self, views: Iterable[memoryview]) -> Iterator[memoryview]:
        """The views' bytes, copied together into pieces of up to 1 MiB."""
        stage = self._staging()
        filled = 0
        for view in views:
            start = 0
            while start < len(view):
                count = min(len(view) - start, _STAGE_BYTES - filled)
                stage[filled : filled + count] = view[start : start + count]
                filled += count
                start += count
                if filled == _STAGE_BYTES:
                    yield stage
                    filled = 0
        if filled:
            yield stage[:filled]


def _batched(views: Iterable[memoryview]) -> Iterator[tuple[list[memoryview], int]]:
    """The views in batches of up to 1 MiB, large ones cut, each with its size."""
    batch: list[memoryview] = []
    batch_bytes = 0
    for view in views:
        for start in range(0, len(view), _STAGE_BYTES):
            piece = view[start : start + _STAGE_BYTES]
            if batch_bytes + len(piece) > _STAGE_BYTES:
                yield batch, batch_bytes
                batch, batch_bytes = [], 0
            batch.append(piece)
            batch_bytes += len(piece)
    if batch:
        yield batch, batch_bytes
