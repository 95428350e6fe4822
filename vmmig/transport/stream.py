"""``tcp:host:port`` and ``unix:/path``: who receives listens, who sends connects.

The two sides may start in either order. All integers are little-endian, all checksums are
XXH3's of 64 bits.

1. The sender's hello, 32 bytes: magic ``89 56 4d 4d 49 47 0d 0a``, u16 version (1), u16 zero,
   u32 how many descriptors, u64 how many bytes, u64 the checksum of these 24 bytes.
2. The receiver's answer: magic ``56 4d 41 0a``, u8 kind (1 go on, 2 received, 3 refused), u8
   zero, u16 the size of the reason, the reason in UTF-8, u64 the checksum of all before. The
   sender awaits a 1 before it sends more; a 3 can come at any time and ends the transfer.
3. If there are descriptors, they come in messages of up to 253, each with a u64 offset and a u64
   length for each descriptor: where in that sealed memfd the bytes are.
4. The bytes, and u64 their checksum, with those offsets and lengths before them.
5. The receiver's answer, 2 or 3.

``send`` returns only after a 2, which says that the receiver has all bytes, and that they are
those which were sent. It does not say that they can be decoded: what they mean is the business of
who asked for them, and who encodes them checks them. Where the 2 is lost on its way, the sender
cannot know whether it was sent, and its error says so. The receiver keeps nothing if it could
not send the 2.

A peer that sends no hello, or a wrong one, or fails the TLS handshake, is refused and told why,
and the receiver listens on until its time is up; the first right hello ends that.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from socket import SHUT_RD, socket
from typing import TYPE_CHECKING

from xxhash import xxh3_64, xxh3_64_intdigest

from vmmig import sockets
from vmmig.errors import MigratableError
from vmmig.transfer import Transfer

if TYPE_CHECKING:
    from typing_extensions import Buffer

OPTIONS = frozenset({"timeout_s", "tls"})
HANDS_OVER = frozenset({"unix"})

_VERSION = 1
_MAGIC, _ANSWER_MAGIC = b"\x89VMMIG\r\n", b"VMA\n"
_HELLO = struct.Struct("<8sHHIQ")
_ANSWER = struct.Struct("<4sBBH")
_CHECKSUM = struct.Struct("<Q")
_PLACE = struct.Struct("<QQ")
_HELLO_BYTES = _HELLO.size + _CHECKSUM.size
_GO_ON, _RECEIVED, _REFUSED = 1, 2, 3
_REASON_BYTES = 1000
_PIECE_BYTES = 1 << 20
_MADV_POPULATE_WRITE = 23
_MOST_DESCRIPTORS = 1 << 16
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
_USE_TLS = "the other side speaks TLS; give both sides the option tls, or none"


def send(chunks: Iterable[Buffer], transfer: Transfer) -> None:
    """Connect, send ``chunks``, and wait until the other side has verified them.

    Raises:
        MigrateSendError: The other side did not confirm that it has them. The error says so
            where it might have them nevertheless.

    >>> from vmmig.errors import MigrateSendError
    >>> to = Transfer("tcp:127.0.0.1:0", MigrateSendError, total_bytes=3)
    >>> send([b"abc"], to)
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...nobody can be reached at port 0...
    """
    try:
        descriptors = [_descriptor(view, transfer) for view in transfer.attached]
        sock = sockets.connect(
            str(transfer.url),
            timeout_s=transfer.timeout_s,
            tls=transfer.options.get("tls"),
            cancel=transfer.cancel,
        )
    except (MigratableError, OSError) as error:
        raise transfer.failure(error) from error
    with sock, transfer.cancel.calling(partial(sockets.shut_down, sock)):
        try:
            checksum = _send_all(sock, chunks, descriptors, transfer)
        except _RefusedError as error:
            raise transfer.failure(error) from error
        except OSError as error:
            raise transfer.failure(_refusal(sock) or error) from error
        transfer.enter("confirming")
        try:
            sockets.send_all(sock, [_CHECKSUM.pack(checksum)])
            _await_answer(sock, _RECEIVED)
        except _RefusedError as error:
            raise transfer.failure(error) from error
        except OSError as error:
            if refusal := _refusal(sock):
                raise transfer.failure(refusal) from error
            cause = "cancelled" if transfer.cancel.cancelled else str(error)
            raise transfer.error(
                f"{transfer.shown_url!r}: {cause}; all was sent, but the other side did not "
                "confirm it: it may have it or not, so look there before you send it again"
            ) from error


def recv(transfer: Transfer) -> memoryview:
    """Listen until somebody sends, and take what comes, in memory that grows as it comes.

    Raises:
        MigrateReceiveError: Nothing came, or not whole, or not as it was sent.

    >>> from vmmig.errors import MigrateReceiveError
    >>> recv(Transfer("tcp:127.0.0.1", MigrateReceiveError))
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...'tcp:127.0.0.1': the port is missing...
    """
    try:
        listener = sockets.Listener(str(transfer.url), tls=transfer.options.get("tls"))
    except (MigratableError, OSError) as error:
        raise transfer.failure(error) from error
    with listener:
        transfer.shown_url = listener.url
        transfer.enter("connecting")
        try:
            sock, hello = listener.accept_greeted(
                _HELLO_BYTES,
                _check_hello,
                answer=partial(_answer, _REFUSED),
                timeout_s=transfer.timeout_s,
                cancel=transfer.cancel,
            )
        except OSError as error:
            raise transfer.failure(error) from error
    # Only what is read is ended by a cancellation: the other side is still to be told.
    with sock, transfer.cancel.calling(partial(sockets.shut_down, sock, SHUT_RD)):
        try:
            return _recv_all(sock, hello, transfer)
        except MigratableError as error:
            _refuse(sock, error, transfer)
            raise
        except OSError as error:
            failure = transfer.failure(error)
            _refuse(sock, failure, transfer)
            raise failure from error


def _send_all(
    sock: socket,
    chunks: Iterable[Buffer],
    descriptors: list[tuple[int, int, int]],
    transfer: Transfer,
) -> int:
    """Send everything but the checksum, which is returned."""
    if transfer.total_bytes is None:
        raise transfer.failure("the size must be known before it is sent; give total_bytes")
    hello = _HELLO.pack(_MAGIC, _VERSION, 0, len(descriptors), transfer.total_bytes)
    sockets.send_all(sock, [hello, _checksum(hello)])
    try:
        _await_answer(sock, _GO_ON)
    except ConnectionError as error:
        if "tls" in transfer.options:
            raise
        raise ConnectionError(
            f"{error}, before it accepted anything; if it speaks TLS, give the option tls"
        ) from error
    transfer.enter("transferring")
    digest = xxh3_64()
    for first in range(0, len(descriptors), sockets.MAX_DESCRIPTORS):
        batch = descriptors[first : first + sockets.MAX_DESCRIPTORS]
        places = b"".join(_PLACE.pack(offset, length) for _, offset, length in batch)
        digest.update(places)
        sockets.send_fds(sock, places, [fd for fd, _, _ in batch])
        transfer.check()
    for pieces, count_bytes in _batches(transfer.views(chunks)):
        for piece in pieces:
            digest.update(piece)
        sockets.send_all(sock, pieces)
        transfer.advance(count_bytes)
    return digest.intdigest()


def _recv_all(sock: socket, hello: bytes, transfer: Transfer) -> memoryview:
    _, _, _, count, total_bytes = _HELLO.unpack_from(hello)
    if total_bytes > transfer.max_bytes:
        raise transfer.failure(f"{total_bytes} bytes are to come, of {transfer.max_bytes} allowed")
    if count and not transfer.takes_attached:
        raise transfer.failure("descriptors are to come, which are not expected here")
    if count > _MOST_DESCRIPTORS:
        raise transfer.failure(f"{count} descriptors are to come, of {_MOST_DESCRIPTORS} allowed")
    transfer.total_bytes = total_bytes
    memory = _memory(total_bytes, transfer)
    attached: list[memoryview] = []
    try:
        sockets.send_all(sock, [_answer(_GO_ON)])
        transfer.enter("transferring")
        digest = xxh3_64()
        _recv_attached(sock, count, attached, digest, transfer)
        for start in range(0, total_bytes, _PIECE_BYTES):
            with memory[start : start + _PIECE_BYTES] as piece:
                _populate(memory.obj, start, len(piece))
                sockets.recv_exactly_into(sock, piece)
                digest.update(piece)
                transfer.advance(len(piece))
        transfer.enter("confirming")
        if sockets.recv_exactly(sock, _CHECKSUM.size) != _CHECKSUM.pack(digest.intdigest()):
            raise transfer.failure(
                "the checksum does not match: it was damaged on its way; send it again"
            )
        transfer.check()
        transfer.attached += attached
        transfer.accept(memory.toreadonly())
        sockets.send_all(sock, [_answer(_RECEIVED)])
    except BaseException:
        # An error keeps its frames, and so what they refer to.
        attached.clear()
        transfer.attached.clear()
        mapping = memory.obj
        with suppress(BufferError):
            memory.release()
            if isinstance(mapping, mmap.mmap):
                mapping.close()
        raise
    return memory.toreadonly()


def _recv_attached(
    sock: socket, count: int, attached: list[memoryview], digest: xxh3_64, transfer: Transfer
) -> None:
    room_bytes = transfer.max_bytes - (transfer.total_bytes or 0)
    while len(attached) < count:
        batch = min(count - len(attached), sockets.MAX_DESCRIPTORS)
        places, fds = sockets.recv_fds(sock, batch * _PLACE.size, batch)
        try:
            digest.update(places)
            if len(fds) != batch:
                raise transfer.failure(f"{len(fds)} descriptors came where {batch} were announced")
            for fd, (offset, length) in zip(fds, _PLACE.iter_unpack(places), strict=True):
                room_bytes -= length
                if room_bytes < 0:
                    raise transfer.failure(
                        f"more came than the {transfer.max_bytes} bytes that are allowed"
                    )
                attached.append(_mapped(fd, offset, length, transfer))
        finally:
            for fd in fds:
                os.close(fd)
        transfer.check()


def _mapped(fd: int, offset: int, length: int, transfer: Transfer) -> memoryview:
    from vmmig.sealed import map_sealed

    try:
        size_bytes = os.fstat(fd).st_size
        if offset + length > size_bytes:
            raise transfer.failure(
                f"bytes {offset} to {offset + length} were announced of a descriptor with "
                f"{size_bytes}"
            )
        return map_sealed(fd, size_bytes)[offset : offset + length]
    except MigratableError as error:
        raise error if isinstance(error, transfer.error) else transfer.failure(error) from error
    except OSError as error:
        raise transfer.failure(error) from error


def _descriptor(view: memoryview, transfer: Transfer) -> tuple[int, int, int]:
    from vmmig.sealed import descriptor_of

    place = descriptor_of(view)
    if place is None:
        raise transfer.failure("only sealed memory can be handed over; see vmmig.sealed")
    return place


def _memory(total_bytes: int, transfer: Transfer) -> memoryview:
    """Memory that is taken from the system page by page, when it is first written to."""
    if not total_bytes:
        return memoryview(bytearray())
    try:
        mapping = mmap.mmap(-1, total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise transfer.failure(
            f"there is no memory for the {total_bytes} bytes that are to come ({error})"
        ) from error
    return memoryview(mapping)


def _populate(mapping: object, start: int, count_bytes: int) -> None:
    """Take the pages now, at once: a tenth faster than one by one, as each is written to."""
    # Huge pages would be faster still, but where memory is fragmented, three times slower.
    if sys.platform == "linux" and isinstance(mapping, mmap.mmap):
        with suppress(OSError):
            mapping.madvise(_MADV_POPULATE_WRITE, start, count_bytes)


def _check_hello(data: bytes) -> None:
    hello, checksum = data[: _HELLO.size], data[_HELLO.size :]
    magic, version, zero, _, _ = _HELLO.unpack(hello)
    if magic != _MAGIC:
        raise MigratableError(
            _USE_TLS if data.startswith(_TLS_RECORDS) else "the other side sends no snapshot"
        )
    if version != _VERSION:
        raise MigratableError(
            f"the other side sends by version {version} of the protocol, and here is version "
            f"{_VERSION}; use the same release of vmmig on both sides"
        )
    if zero or checksum != _checksum(hello):
        raise MigratableError("the other side's hello was damaged on its way; try again")


class _RefusedError(OSError):
    """The other side said no, and perhaps why."""


def _await_answer(sock: socket, kind: int) -> None:
    head = sockets.recv_exactly(sock, _ANSWER.size)
    magic, came, zero, reason_bytes = _ANSWER.unpack(head)
    if magic != _ANSWER_MAGIC or zero or reason_bytes > _REASON_BYTES:
        raise ConnectionError(
            _USE_TLS
            if head.startswith(_TLS_RECORDS)
            else "what listens there does not receive snapshots; check the address"
        )
    rest = sockets.recv_exactly(sock, reason_bytes + _CHECKSUM.size)
    reason, checksum = rest[:reason_bytes], rest[reason_bytes:]
    if checksum != _checksum(head + reason):
        raise ConnectionError("the other side's answer was damaged on its way")
    if came == _REFUSED:
        text = "".join(c if c.isprintable() else "?" for c in reason.decode(errors="replace"))
        raise _RefusedError(f"the other side refused it: {text}")
    if came != kind:
        raise ConnectionError(f"the other side gave the answer {came} where {kind} was expected")


def _answer(kind: int, reason: str = "") -> bytes:
    text = reason.encode(errors="replace")[:_REASON_BYTES]
    head = _ANSWER.pack(_ANSWER_MAGIC, kind, 0, len(text)) + text
    return head + _checksum(head)


def _refusal(sock: socket) -> _RefusedError | None:
    """Why the other side ended the connection, if it said so."""
    try:
        sockets.set_timeout(sock, 0)
        _await_answer(sock, _REFUSED)
    except _RefusedError as error:
        return error
    except OSError:
        pass
    return None


def _refuse(sock: socket, error: MigratableError, transfer: Transfer) -> None:
    """Tell the other side why, if it can be told at once."""
    with suppress(OSError):
        sock.setblocking(False)
        reason = str(error.cause).removeprefix(f"{transfer.shown_url!r}: ")
        sock.send(_answer(_REFUSED, reason))


def _checksum(data: bytes) -> bytes:
    return _CHECKSUM.pack(xxh3_64_intdigest(data))


def _batches(views: Iterable[memoryview]) -> Iterator[tuple[list[memoryview], int]]:
    """The views in batches of up to 1 MiB, each with its size; large ones are cut."""
    batch: list[memoryview] = []
    batch_bytes = 0
    for view in views:
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            if batch_bytes + len(piece) > _PIECE_BYTES:
                yield batch, batch_bytes
                batch, batch_bytes = [], 0
            batch.append(piece)
            batch_bytes += len(piece)
    if batch:
        yield batch, batch_bytes
