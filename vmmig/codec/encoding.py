"""A snapshot to the bytes of a container."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from xxhash import xxh3_64_intdigest as checksum

from vmmig.codec.compression import compress_each, level_of
from vmmig.codec.layout import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES,
    COMPRESSED,
    DETACHED,
    HEADER_BYTES,
    LARGE_BYTES,
    NOT_STORED,
    chunks_in,
    encode_index,
    encode_table,
    write_header,
)
from vmmig.errors import MigratableError, SnapshotError
from vmmig.foreign import pieces
from vmmig.snapshot import MAX_NODES, Columns, Snapshot, flatten, raw_view


class WritableStream(Protocol):
    """What `dump` writes to."""

    def write(self, data: Any, /) -> int | None:
        """As `io.RawIOBase.write`."""


def dumps(snapshot: Snapshot, *, compression: str | None = None) -> bytes:
    """The container of a snapshot, as bytes.

    Args:
        snapshot: The tree.
        compression: As for `encode`.

    Raises:
        SnapshotError: The tree is not valid; see `vmmig.snapshot.flatten`.
        MissingExtraError: The library for the compression is not installed.

    >>> from vmmig.codec import loads
    >>> loads(dumps(Snapshot("vm")))
    Snapshot('vm')
    """
    chunks = [*encode(snapshot, compression=compression)]
    return chunks[0] if len(chunks) == 1 and type(chunks[0]) is bytes else b"".join(chunks)


def dump(snapshot: Snapshot, stream: WritableStream, *, compression: str | None = None) -> None:
    """Write the container of a snapshot to a stream in one pass, without holding a copy of it.

    Args:
        snapshot: The tree.
        stream: A binary file, a pipe, a socket's ``makefile("wb")``; it must block.
        compression: As for `encode`.

    Raises:
        MissingExtraError: The library for the compression is not installed.
        SnapshotError: The tree is not valid.
        MigratableError: The stream failed.

    >>> import io
    >>> stream = io.BytesIO()
    >>> dump(Snapshot("vm"), stream)
    >>> stream.getvalue() == dumps(Snapshot("vm"))
    True
    """
    for chunk in encode(snapshot, compression=compression):
        view = memoryview(chunk)
        try:
            while view.nbytes:
                written = stream.write(view)
                if not written:
                    raise MigratableError("the stream takes no more: it must be a blocking one")
                if not 0 < written <= view.nbytes:
                    raise ValueError(f"it says to have taken {written} of {view.nbytes} bytes")
                view = view[written:]
        except MigratableError:
            raise
        except Exception as error:
            raise MigratableError(f"the container could not be written: {error}") from error


class Encoding:
    """A container about to be written: iterate over it for its chunks, in order, in one pass.

    Nothing is copied but the small sections; large ones are read as the iteration comes to
    them, one MiB at a time. It may be iterated over again.

    Attributes:
        total_bytes: How many bytes the chunks have together.
        detached: The sections whose bytes are not among them, in index order.

    >>> encoding = encode(Snapshot("vm"))
    >>> encoding.total_bytes == len(b"".join(encoding))
    True
    """

    __slots__ = (
        "_head",
        "_large",
        "_small",
        "_small_end",
        "_table_padding",
        "detached",
        "total_bytes",
    )

    def __init__(self, columns: Columns, small: list[Any], large: list[_Large]) -> None:
        flags, stored = 0, None
        if any(part.stored is not part.payload for part in large):
            rest = iter(large)
            stored = [
                length if length < LARGE_BYTES else next(rest).stored_bytes
                for length in columns.payloads
            ]
            for part in large:
                flags |= 0 if part.aligned else DETACHED if part.stored is None else COMPRESSED
        index = encode_index(columns, stored)
        self.detached = [part.payload for part in large if part.stored is None]
        self._small = small
        self._large = [
            (part.stored, ALIGNMENT_BYTES if part.aligned else 1)
            for part in large
            if part.stored is not None
        ]
        end = HEADER_BYTES + len(index) + sum(map(len, small))
        sums = len(small)
        self._small_end = end
        for view, alignment in self._large:
            end += -end % alignment + view.nbytes
            sums += chunks_in(view.nbytes)
        self._table_padding = bytes(-end % 8)
        self.total_bytes: int = end + len(self._table_padding) + 8 * sums + 8
        self._head = [write_header(flags, index, self.total_bytes), index]

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if not self._large:
            yield self._whole()
            return
        yield b"".join([*self._head, *self._small])
        end = self._small_end
        sums: list[int] = []
        for view, alignment in self._large:
            yield bytes(-end % alignment)
            end += -end % alignment + view.nbytes
            for chunk in pieces(view, CHUNK_BYTES):
                sums.append(checksum(chunk))
                yield chunk
        yield b"".join(self._table(sums))

    def _whole(self) -> bytes:
        return b"".join([*self._head, *self._small, *self._table([])])

    def _table(self, large_sums: list[int]) -> tuple[bytes, bytes]:
        return self._table_padding, encode_table([*map(checksum, self._small), *large_sums])


class _Large(NamedTuple):
    """A large section: its bytes, and those of them or for them that the container gets."""

    payload: memoryview
    stored: memoryview | None

    @property
    def aligned(self) -> bool:
        return self.stored is self.payload

    @property
    def stored_bytes(self) -> int:
        return NOT_STORED if self.stored is None else self.stored.nbytes


def encode(
    snapshot: Snapshot,
    *,
    compression: str | None = None,
    detach: Callable[[memoryview], bool] | None = None,
) -> Encoding:
    """The container of a snapshot, ready to be written.

    Args:
        snapshot: The tree.
        compression: ``"zstd"``, or ``"zstd:1"`` to ``"zstd:19"`` for a level other than 1:
            compress each section of 64 KiB or more that gets smaller by a sixteenth at least.
            That is done now, for the index says how much is left; what does not fit in 64 MiB
            is held in a temporary file without a name. Equal trees give equal bytes where the
            library has the same version.
        detach: Asked for each section of 64 KiB or more: whether its bytes go another way, for
            instance as a descriptor of the memory that holds them. They then are not in the
            container but in `Encoding.detached`, and whoever loads it must have them.

    Raises:
        SnapshotError: The tree is not valid; see `vmmig.snapshot.flatten`. Or ``detach``
            failed, or the temporary file could not be written.
        MissingExtraError: The library for the compression is not installed.

    >>> encode(Snapshot("vm")).total_bytes
    128
    """
    level = None if compression is None else level_of(compression)
    columns = flatten(snapshot)
    if len(columns.ids) + len(columns.section_ids) > MAX_NODES:
        raise SnapshotError(f"it has more than {MAX_NODES} nodes and sections")
    small = columns.payloads
    large: list[_Large] = []
    if {*map(type, small)} <= {bytes}:
        lengths = [*map(len, small)]
    else:
        small = [p if type(p) is bytes else raw_view(p) for p in small]
        lengths = [p.nbytes if type(p) is memoryview else len(p) for p in small]
    if lengths and max(lengths) >= LARGE_BYTES:
        views = [memoryview(p) for p in small if len(p) >= LARGE_BYTES]
        large = _stored(views, level, detach)
        small = [p for p in small if len(p) < LARGE_BYTES]
    return Encoding(columns._replace(payloads=lengths), small, large)


def _stored(
    views: list[memoryview], level: int | None, detach: Callable[[memoryview], bool] | None
) -> list[_Large]:
    try:
        apart = [detach is not None and detach(view) for view in views]
    except Exception as error:
        raise SnapshotError(f"what should be detached cannot be told: {error!r}") from error
    stored = [view for view, is_apart in zip(views, apart, strict=True) if not is_apart]
    if level is not None:
        stored = compress_each(stored, level)
    rest = iter(stored)
    return [
        _Large(view, None if is_apart else next(rest))
        for view, is_apart in zip(views, apart, strict=True)
    ]
