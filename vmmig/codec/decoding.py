"""The bytes of a container to a snapshot: from memory, from a stream, from far away."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from xxhash import xxh3_64_intdigest as checksum

from vmmig.codec.compression import Decompression, DecompressionInto, zstd
from vmmig.codec.layout import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES,
    COMPRESSED,
    HEADER_BYTES,
    Header,
    Layout,
    Limits,
    Part,
    blaming,
    check_header,
    chunk_sums,
    decode_index,
    decode_table,
    read_header,
    view_of,
)
from vmmig.errors import DecodeError, MigratableError
from vmmig.snapshot import Buffer, Snapshot, SnapshotDataSection, build, make_sections, raw_view

_FIRST_BYTES = 1 << 16
REQUEST_BYTES = 1 << 24
_DEFAULT_LIMITS = Limits()


class ReadableStream(Protocol):
    """What `load` reads from: a binary file, a pipe, a socket's ``makefile("rb")``."""

    def readinto(self, buffer: Any, /) -> int | None:
        """As `io.RawIOBase.readinto`."""


class RangeReader(Protocol):
    """What `open_ranges` reads from: a container far away, of which any part can be had."""

    @property
    def total_bytes(self) -> int:
        """How many bytes there are."""
        ...

    def read_into(self, start: int, view: memoryview, /) -> None:
        """Fill ``view`` with the bytes from ``start`` on; several threads may ask at once.

        Raises:
            MigrateReceiveError: They could not all be had.
        """


def loads(
    data: Buffer,
    *,
    detached: Sequence[Buffer] = (),
    lazily: bool = False,
    limits: Limits | None = None,
) -> Snapshot:
    """The snapshot in a container.

    Sections below 64 KiB become bytes; larger ones are views of ``data``, which must not change
    as long as the snapshot is in use, or of memory of their own where they were compressed.

    Args:
        data: One whole container: bytes, or for instance a mapping of a file.
        detached: The bytes of the sections that were detached, in their order; they become
            the sections' as they are, unchecked but for their sizes.
        lazily: Check, and decompress, a large section when its bytes are first asked for.
        limits: What to refuse before memory is spent on it.

    Raises:
        DecodeError: This is not one whole, undamaged container that this version can read.
            With ``lazily``, asking a damaged section for its bytes raises it.
        MissingExtraError: It is compressed, and the library for that is not installed.

    >>> loads(b"GIF89a")
    Traceback (most recent call last):
    vmmig.errors.DecodeError: Failed to restore migratable component: header: ...
    """
    source = MemorySource(view_of(data))
    header = read_header(source.everything)
    with blaming(header):
        container = _Container(source, header, limits or _DEFAULT_LIMITS)
        joined = _joined(container.layout, detached)
        source.check_padding(container.layout)
        small, columns = container.small(), container.layout.columns
        if not container.layout.large:
            return build(*columns[:4], small)
        fetch = container.lazy if lazily else container.payload
        large = [
            joined[part.section] if part.detached else fetch(part)
            for part in container.layout.large
        ]
        payloads = container.layout.arrange(small, large)
        if lazily:
            sections = make_sections(columns.section_ids, payloads)
            payloads = [
                lazy if isinstance(lazy, LazySection) else section
                for lazy, section in zip(payloads, sections, strict=True)
            ]
        return build(*columns[:4], payloads)


def open_ranges(reader: RangeReader, *, limits: Limits | None = None) -> Snapshot:
    """The snapshot in a container far away: its tree now, each section when it is first touched.

    One read of 64 KiB, and where the index is longer a second one, bring the tree. The table of
    checksums, then the small sections all together, then each large section are fetched when
    they are needed for the first time, checked, and kept. Zero bytes between them are not read.

    Args:
        reader: Where to read. It is used as long as a section has not been touched.
        limits: What to refuse before memory is spent on it.

    Raises:
        DecodeError: This is no whole, undamaged container that this version can read. Asking a
            damaged section for its bytes raises it, too.
        MigrateReceiveError: The reader raised it; asking for a section's bytes may, too, and
            the next time reads again.
        MissingExtraError: It is compressed, and the library for that is not installed.

    >>> import io
    >>> class File:
    ...     def __init__(self, data):
    ...         self.data, self.total_bytes = data, len(data)
    ...     def read_into(self, start, view):
    ...         view[:] = self.data[start : start + len(view)]
    >>> from vmmig.codec import dumps
    >>> cpu = Snapshot("cpu")
    >>> cpu.add_data_section(SnapshotDataSection("regs", b"0123"))
    >>> section = open_ranges(File(dumps(cpu))).section("regs")
    >>> section
    SnapshotDataSection('regs', 4 bytes, not read yet)
    >>> section.snapshot
    b'0123'
    """
    source = RemoteSource(reader)
    header = read_header(source.head)
    with blaming(header):
        container = _Container(source, header, limits or _DEFAULT_LIMITS)
        layout = container.layout
        columns = layout.columns
        _joined(layout, ())
        numbers = range(len(layout.small_lengths))
        small = [partial(container.one_small, number) for number in numbers]
        large = [partial(container.payload, part) for part in layout.large]
        streams = [partial(container.stream, part) for part in layout.large]
        sections = [
            LazySection(id, fetch=partial(container.fetch, get), stream=stream, nbytes=nbytes)
            for id, get, stream, nbytes in zip(
                columns.section_ids,
                layout.arrange(small, large),
                layout.arrange([None] * len(small), streams),
                columns.payloads,
                strict=True,
            )
        ]
        return build(*columns[:4], sections)


def load(
    stream: ReadableStream, *, detached: Sequence[Buffer] = (), limits: Limits | None = None
) -> Snapshot:
    """Read one container from a stream, and not a byte more.

    Memory is taken as bytes arrive, whatever the header promises.

    Args:
        stream: A binary file, a pipe, a socket's ``makefile("rb")``; it must block.
        detached: As for `loads`.
        limits: What to refuse before memory is spent on it.

    Raises:
        DecodeError: The stream does not hold one whole, undamaged container, or failed.
        MissingExtraError: It is compressed, and the library for that is not installed.

    >>> import io
    >>> from vmmig.codec import dumps
    >>> stream = io.BytesIO(dumps(Snapshot("vm")) + b"more")
    >>> load(stream), stream.read()
    (Snapshot('vm'), b'more')
    """
    source = _Stream(stream)
    header = read_header(source.take(HEADER_BYTES, "header"))
    with blaming(header):
        return _read(source, header, limits or _DEFAULT_LIMITS, detached)


def read_pieces(section: SnapshotDataSection) -> Iterator[memoryview]:
    """A section's bytes in pieces, from the first to the last, each checked before it is given.

    What was opened lazily, and has not been touched, is fetched and decompressed as the iteration
    comes to it, and not kept: a section may be larger than memory. All others are one piece.

    Raises:
        DecodeError: The section is damaged; the pieces before were not.
        MigrateReceiveError: It could not be fetched.

    >>> [bytes(piece) for piece in read_pieces(SnapshotDataSection("regs", b"0123"))]
    [b'0123']
    """
    if isinstance(section, LazySection):
        return section.pieces()
    return iter([raw_view(section.snapshot)])


class LazySection(SnapshotDataSection):
    """A section whose bytes are fetched and checked when they are first asked for."""

    __slots__ = ("_fetch", "_nbytes", "_payload", "_stream", "_view")

    # What attrs.evolve calls, with a payload; the rest of vmmig gives a fetch.
    def __init__(
        self,
        id: str = "",
        snapshot: Buffer = b"",
        *,
        fetch: Callable[[], Buffer] | None = None,
        view: Callable[[], tuple[memoryview, Callable[[int, int], None]]] | None = None,
        stream: Callable[[], Iterator[memoryview]] | None = None,
        nbytes: int = 0,
    ) -> None:
        self._view = view
        self.id = id
        self.snapshot = snapshot  # pyright: ignore
        self._fetch = fetch
        self._stream = stream
        self._nbytes = nbytes

    @property
    def snapshot(self) -> Buffer:  # pyright: ignore
        fetch = self._fetch
        if fetch is not None:
            self._payload = fetch()
            self._fetch = None
        return self._payload

    @snapshot.setter
    def snapshot(self, payload: Buffer) -> None:  # pyright: ignore
        raw_view(payload)
        self._payload = payload
        self._fetch = None

    def in_pieces(self) -> tuple[memoryview, Callable[[int, int], None]]:
        if self._fetch is None or self._view is None:
            return super().in_pieces()
        return self._view()

    def pieces(self) -> Iterator[memoryview]:
        """The bytes in pieces; none is kept, unless all of them are here."""
        if self._fetch is None or self._stream is None:
            return iter([raw_view(self.snapshot)])
        return self._stream()

    @property
    def nbytes(self) -> int:
        return self._nbytes if self._fetch is not None else raw_view(self._payload).nbytes

    def __repr__(self) -> str:
        if self._fetch is not None:
            return f"SnapshotDataSection({self.id!r}, {self.nbytes} bytes, not read yet)"
        return super().__repr__()


class _Container:
    """An opened container, from which sections are fetched, now or when they are touched."""

    def __init__(self, source: MemorySource | RemoteSource, header: Header, limits: Limits) -> None:
        self.layout = opened_layout(source, header, limits)
        if header.flags & COMPRESSED:
            zstd()
        self._source = source
        self._header = header
        self._lock = threading.Lock()
        self._sums: list[int] | None = None
        self._small: list[bytes] | None = None

    def lazy(self, part: Part) -> LazySection:
        fetch = partial(self.fetch, partial(self.payload, part))
        view = None if part.compressed else partial(self.checked_view, part)
        stream = partial(self.stream, part)
        return LazySection(part.id, fetch=fetch, view=view, stream=stream, nbytes=part.nbytes)

    def checked_view(self, part: Part) -> tuple[memoryview, Callable[[int, int], None]]:
        """All of a part that is not compressed, and what checks pieces of it, each once."""
        sums = self._all_sums()
        view = self._source.view(part.start, part.end, part)
        checked = bytearray(-(-part.nbytes // CHUNK_BYTES))

        def check(start: int, end: int) -> None:
            first, last = start // CHUNK_BYTES, -(-end // CHUNK_BYTES)
            while (first := checked.find(0, first, last)) >= 0:
                behind = checked.find(1, first, last)
                behind = last if behind < 0 else behind
                offset = first * CHUNK_BYTES
                found = chunk_sums(view[offset : behind * CHUNK_BYTES])
                with blaming(self._header):
                    part.check(offset, found, sums)
                checked[first:behind] = b"\1" * (behind - first)

        return view, check

    def fetch(self, get: Callable[[], Buffer]) -> Buffer:
        """What `get` returns, with errors that know the container."""
        with blaming(self._header):
            return get()

    def small(self) -> list[bytes]:
        sums = self._all_sums()
        with self._lock:
            if self._small is None:
                start, end = self.layout.small_start, self.layout.small_end
                data = self._source.view(start, end, "the small sections")
                self._small = self.layout.split_small(data, sums)
            return self._small

    def one_small(self, number: int) -> bytes:
        return self.small()[number]

    def payload(self, part: Part) -> memoryview:
        sums = self._all_sums()
        if not part.compressed:
            view = self._source.view(part.start, part.end, part)
            part.check(0, chunk_sums(view), sums)
            return view
        memory = memory_of(part.nbytes)
        at = 0
        for piece in self.pieces(part):
            memory[at : at + len(piece)] = piece
            at += len(piece)
        return memory.toreadonly()

    def pieces(self, part: Part) -> Iterator[memoryview]:
        """As `payload`, in pieces of 16 MiB at most, each fetched when it is asked for."""
        sums = self._all_sums()
        frame = Decompression(part.nbytes, part) if part.compressed else None
        for start in range(part.start, part.end, REQUEST_BYTES):
            view = self._source.view(start, min(start + REQUEST_BYTES, part.end), part)
            part.check(start - part.start, chunk_sums(view), sums)
            if frame is None:
                yield view
            else:
                for data in frame.pieces(view):
                    yield memoryview(data)
        if frame is not None:
            frame.finish()

    def stream(self, part: Part) -> Iterator[memoryview]:
        """What `pieces` yields, with errors that know the container."""
        with blaming(self._header):
            yield from self.pieces(part)

    def _all_sums(self) -> list[int]:
        with self._lock:
            if self._sums is None:
                start, end = self.layout.table_start, self._header.total_bytes
                table = self._source.view(start, end, "table of checksums")
                self._sums = decode_table(self.layout, table)
            return self._sums


def opened_layout(source: MemorySource | RemoteSource, header: Header, limits: Limits) -> Layout:
    """Where everything stands in a container that must be there as a whole."""
    check_header(header, limits)
    if wrong := wrong_size(source.total_bytes, header.total_bytes):
        raise DecodeError(wrong, where=f"byte {min(source.total_bytes, header.total_bytes)}")
    index = source.view(HEADER_BYTES, HEADER_BYTES + header.index_bytes, "index")
    return decode_index(header, index, limits)


def wrong_size(found_bytes: int, total_bytes: int) -> str | None:
    """What is wrong where not as many bytes are there as should be."""
    missing = total_bytes - found_bytes
    if missing > 0:
        return f"truncated: {missing} of {total_bytes} bytes are missing"
    return f"{-missing} bytes stand behind the container's {total_bytes}" if missing else None


class MemorySource:
    """A container that is there as a whole."""

    def __init__(self, everything: memoryview) -> None:
        self.everything = self.head = everything
        self.total_bytes = everything.nbytes

    def view(self, start: int, end: int, what: object) -> memoryview:
        return self.everything[start:end]

    def check_padding(self, layout: Layout) -> None:
        end = layout.small_end
        for part in layout.large:
            if any(self.everything[end : part.start]):
                raise DecodeError("the bytes before it are not zero", where=str(part))
            end = part.end


class RemoteSource:
    """A container far away, of which only the head is kept."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.head = memoryview(b"")
        try:
            self.total_bytes = reader.total_bytes
            first_bytes = min(self.total_bytes, _FIRST_BYTES)
        except MigratableError:
            raise
        except Exception as error:
            raise DecodeError(f"the reader failed: {error}", where="header") from error
        self.head = self.view(0, first_bytes, "header")

    def view(self, start: int, end: int, what: object) -> memoryview:
        if end <= self.head.nbytes:
            return self.head[start:end]
        memory = memory_of(end - start)
        known = self.head[start:]
        memory[: known.nbytes] = known
        try:
            for at in range(start + known.nbytes, end, REQUEST_BYTES):
                stop = min(at + REQUEST_BYTES, end)
                self._reader.read_into(at, memory[at - start : stop - start])
        except MigratableError:
            raise
        except Exception as error:
            raise DecodeError(f"the reader failed: {error}", where=str(what)) from error
        return memory.toreadonly()


def _joined(layout: Layout, detached: Sequence[Buffer]) -> dict[int, Buffer]:
    """The payload of each detached section."""
    parts = [part for part in layout.large if part.detached]
    if len(parts) != len(detached):
        raise DecodeError(
            f"{len(parts)} of its sections are detached, {len(detached)} were given; they are "
            "with whoever sent it, and must be given in the same order",
            where=str(parts[0]) if parts else "index",
        )
    for part, payload in zip(parts, detached, strict=True):
        nbytes = view_of(payload).nbytes
        if nbytes != part.nbytes:
            raise DecodeError(
                f"it is detached and has {part.nbytes} bytes, but {nbytes} were given",
                where=str(part),
            )
    return {part.section: payload for part, payload in zip(parts, detached, strict=True)}


def _read(source: _Stream, header: Header, limits: Limits, detached: Sequence[Buffer]) -> Snapshot:
    check_header(header, limits)
    index = source.take(header.index_bytes, "index")
    layout = decode_index(header, memoryview(index), limits)
    joined = _joined(layout, detached)
    if header.flags & COMPRESSED:
        zstd()
    small_bytes = source.take(layout.small_end - layout.small_start, "the small sections")
    large: list[Buffer] = []
    found: list[list[int]] = []
    frames: list[tuple[DecompressionInto, DecodeError | None]] = []
    # One mapping serves all, for a process may have no more than some 65,000.
    room = [0 if part.detached else part.nbytes for part in layout.large]
    memory = memory_of(sum(nbytes + -nbytes % ALIGNMENT_BYTES for nbytes in room))
    for part, nbytes in zip(layout.large, room, strict=True):
        view, memory = memory[:nbytes], memory[nbytes + -nbytes % ALIGNMENT_BYTES :]
        source.skip_zeros(part.start - source.taken, part)
        if part.compressed:
            frame = DecompressionInto(view, part)
            sums, error = source.decompress(part, frame)
            frames.append((frame, error))
        else:
            sums = source.take_into(view, part)
        found.append(sums)
        large.append(joined[part.section] if part.detached else view.toreadonly())
    table = source.take(header.total_bytes - source.taken, "table of checksums")
    sums = decode_table(layout, memoryview(table))
    small = layout.split_small(memoryview(small_bytes), sums)
    for part, own in zip(layout.large, found, strict=True):
        part.check(0, own, sums)
    for frame, error in frames:
        if error is not None:
            raise error
        frame.finish()
    return build(*layout.columns[:4], layout.arrange(small, large))


def memory_of(count: int) -> memoryview:
    """Memory; if it is much, then such that the kernel hands out only as it is written to."""
    if count <= CHUNK_BYTES:
        return memoryview(bytearray(count))
    try:
        return memoryview(mmap.mmap(-1, count))
    except (OSError, OverflowError, ValueError) as error:
        raise DecodeError(
            f"{count} bytes of memory are not to be had", where="the large sections"
        ) from error


class _Stream:
    """A stream, read exactly."""

    def __init__(self, stream: ReadableStream) -> None:
        self._stream = stream
        self.taken = 0

    def take(self, count: int, what: object) -> bytearray:
        data = bytearray()
        while len(data) < count:
            start = len(data)
            data += bytes(min(count - start, CHUNK_BYTES))
            with memoryview(data) as view:
                self._fill(view[start:], what)
        return data

    def take_into(self, view: memoryview, what: object) -> list[int]:
        """Fill the view; the checksum of each MiB is taken while it is in the cache."""
        sums = []
        for start in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._fill(chunk, what)
            sums.append(checksum(chunk))
        return sums

    def decompress(
        self, part: Part, frame: DecompressionInto
    ) -> tuple[list[int], DecodeError | None]:
        """The checksum of each stored MiB, and what the frame refused.

        That comes second: where the bytes are damaged, their checksums will tell it better.
        """
        sums = []
        error = None
        memory = memoryview(bytearray(min(CHUNK_BYTES, part.end - part.start)))
        for start in range(part.start, part.end, CHUNK_BYTES):
            chunk = memory[: min(CHUNK_BYTES, part.end - start)]
            sums += self.take_into(chunk, part)
            try:
                if error is None:
                    frame.feed(chunk)
            except DecodeError as refused:
                error = refused
        return sums, error

    def skip_zeros(self, count: int, what: object) -> None:
        if any(self.take(count, what)):
            raise DecodeError("the bytes before it are not zero", where=str(what))

    def _fill(self, view: memoryview, what: object) -> None:
        while view.nbytes:
            try:
                count = self._stream.readinto(view)
                if count is not None and not (isinstance(count, int) and 0 <= count <= view.nbytes):
                    raise ValueError(f"it says to have read {count} of {view.nbytes} bytes")
            except Exception as error:
                raise DecodeError(f"the stream failed: {error}", where=str(what)) from error
            if not count:
                raise DecodeError(
                    f"truncated: the stream ends at byte {self.taken}"
                    if count == 0
                    else "the stream has nothing yet: it must be a blocking one",
                    where=str(what),
                )
            self.taken += count
            view = view[count:]
