"""A container opened by its index: what stands where, and any part of a section."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any, Literal

from xxhash import xxh3_64_hexdigest

from vmmig.codec.compression import Decompression
from vmmig.codec.decoding import (
    REQUEST_BYTES,
    LazySection,
    MemorySource,
    RangeReader,
    RemoteSource,
    memory_of,
    opened_layout,
)
from vmmig.codec.layout import (
    CHUNK_BYTES,
    LARGE_BYTES,
    Limits,
    Part,
    blaming,
    chunk_sums,
    decode_table,
    read_header,
    view_of,
)
from vmmig.errors import DecodeError
from vmmig.snapshot import Buffer, build

_SMALL_AT_ONCE_BYTES = 1 << 24


class StoredSection(LazySection):
    """A section of a container: fetched and checked when asked for, as a whole or in part.

    Attributes:
        offset_bytes: Where what is stored of it begins in the container.
        stored_bytes: How much is: fewer bytes than it has where it is compressed, none where it
            is detached.
    """

    __slots__ = ("_container", "_part", "offset_bytes", "stored_bytes")

    _container: Container | None

    # What attrs.evolve calls, with a payload, makes a section that is not stored any more.
    def __init__(
        self,
        id: str = "",
        snapshot: Buffer = b"",
        *,
        container: Container | None = None,
        part: Part | None = None,
    ) -> None:
        fetch, nbytes = None, 0
        if container is not None and part is not None:
            fetch, nbytes = partial(container.payload, part), part.nbytes
        super().__init__(id, snapshot, fetch=fetch, nbytes=nbytes)
        self._container, self._part = container, part
        self.offset_bytes = part.start if part else 0
        self.stored_bytes = part.end - part.start if part else 0

    @property
    def stored(self) -> Literal["plain", "compressed", "detached"]:
        """How the container has it."""
        if self._part is not None and self._part.detached:
            return "detached"
        return "compressed" if self._part is not None and self._part.compressed else "plain"

    def checksums(self) -> list[int]:
        """The checksums of what is stored: of the whole below 64 KiB, else of each MiB.

        Raises:
            DecodeError: The table of checksums is damaged.
            MigrateReceiveError: It could not be fetched.
        """
        if self._container is None or self._part is None:
            return []
        return self._container.sums(self._part)

    def digest(self) -> str | None:
        """A name for its content: the checksum, in hexadecimal, or that of the checksums.

        Equal sections that are stored alike have equal ones. A detached one has none.

        Raises:
            DecodeError: The table of checksums is damaged.
            MigrateReceiveError: It could not be fetched.
        """
        sums = self.checksums()
        if len(sums) == 1 and self.nbytes < LARGE_BYTES:
            return f"{sums[0]:016x}"
        return xxh3_64_hexdigest(struct.pack(f"<{len(sums)}Q", *sums)) if sums else None

    def read(self, start: int = 0, stop: int | None = None, *, checked: bool = True) -> memoryview:
        """Some of its bytes, fetching no more than the MiBs in which they are.

        A compressed section is decompressed from its start, and what comes before is dropped.

        Args:
            start: The first byte.
            stop: The one behind the last; None for the section's end.
            checked: Whether checksums are compared; else what stands there is returned.

        Raises:
            DecodeError: The bytes are damaged.
            MigrateReceiveError: They could not be fetched.
        """
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        if self._container is None or self._part is None:
            return view_of(self.snapshot)[start:stop]
        return self._container.read(self._part, start, stop, checked)


class Container:
    """A container that is opened by its header and index alone, however large it is.

    Args:
        source: Its bytes, for instance a mapping of a file, or what reads parts of them.
        limits: What to refuse before memory is spent on it.

    Attributes:
        header: Its header.
        snapshot: Its tree, whose sections are `StoredSection`. The table of checksums is read
            when a checksum or a section is first asked for.

    Raises:
        DecodeError: Its header, index or size is not what it should be: `examine` says more.
        MigrateReceiveError: They could not be fetched.

    >>> from vmmig.codec import dumps
    >>> from vmmig.snapshot import Snapshot, SnapshotDataSection
    >>> cpu = Snapshot("cpu", {}, {"regs": SnapshotDataSection("regs", b"0123")})
    >>> section = Container(dumps(cpu)).snapshot.section("regs")
    >>> section.stored, section.digest(), bytes(section.read(1, 3))
    ('plain', '8aa92da18edb594b', b'12')
    """

    def __init__(self, source: Buffer | RangeReader, *, limits: Limits | None = None) -> None:
        self._source = source_of(source)
        self.header = read_header(self._source.head)
        with blaming(self.header):
            self._layout = opened_layout(self._source, self.header, limits or Limits())
        self._sums: list[int] | None = None
        self._small: memoryview | None = None
        columns = self._layout.columns
        sections = [
            StoredSection(id, container=self, part=part)
            for id, part in zip(columns.section_ids, self._layout.parts(), strict=True)
        ]
        self.snapshot = build(*columns[:4], sections)

    def sums(self, part: Part) -> list[int]:
        """Those of the table that are of this part."""
        if self._sums is None:
            start = self._layout.table_start
            with blaming(self.header):
                table = self._source.view(start, self.header.total_bytes, "table of checksums")
                self._sums = decode_table(self._layout, table)
        return self._sums[part.first_sum : part.first_sum + sums_in(part)]

    def payload(self, part: Part) -> Buffer:
        """All of a section."""
        view = self.read(part, 0, part.nbytes, True)
        return view if part.nbytes >= LARGE_BYTES else bytes(view)

    def read(self, part: Part, start: int, stop: int, checked: bool) -> memoryview:
        """Some bytes of a section."""
        with blaming(self.header):
            if part.detached:
                raise DecodeError("it is detached: its bytes are elsewhere", where=str(part))
            if start >= stop:
                return memoryview(b"")
            if part.compressed:
                return self._decompressed(part, start, stop, checked)
            begin = start - start % CHUNK_BYTES
            end = min(stop + -stop % CHUNK_BYTES, part.nbytes)
            if not checked:
                begin, end = start, stop
            view = self._stored(part, begin, end)
            if checked:
                self._check(part, begin, view)
            return view[start - begin : stop - begin]

    def _check(self, part: Part, start: int, view: memoryview) -> None:
        sums = self.sums(part)
        part._replace(first_sum=0).check(start, chunk_sums(view), sums)

    def _stored(self, part: Part, start: int, end: int) -> memoryview:
        small_start, small_end = self._layout.small_start, self._layout.small_end
        if part.nbytes >= LARGE_BYTES or small_end - small_start > _SMALL_AT_ONCE_BYTES:
            return self._source.view(part.start + start, part.start + end, part)
        if self._small is None:
            self._small = self._source.view(small_start, small_end, "the small sections")
        return self._small[part.start - small_start :][start:end]

    def _decompressed(self, part: Part, start: int, stop: int, checked: bool) -> memoryview:
        memory = memory_of(stop - start)
        frame = Decompression(part.nbytes, part)
        made = 0
        stored_bytes = part.end - part.start
        for at in range(0, stored_bytes, REQUEST_BYTES):
            view = self._stored(part, at, min(at + REQUEST_BYTES, stored_bytes))
            if checked:
                self._check(part, at, view)
            for piece in frame.pieces(view):
                wanted = memoryview(piece)[max(start - made, 0) : max(stop - made, 0)]
                to = max(made - start, 0)
                memory[to : to + wanted.nbytes] = wanted
                made += len(piece)
                if made >= stop and stop < part.nbytes:
                    return memory.toreadonly()
        frame.finish()
        return memory.toreadonly()


def source_of(source: Buffer | RangeReader) -> MemorySource | RemoteSource:
    """What parts of a container are read from."""
    reader: Any = source
    return RemoteSource(reader) if hasattr(source, "read_into") else MemorySource(view_of(reader))


def sums_in(part: Part) -> int:
    """How many checksums a section has."""
    if part.nbytes < LARGE_BYTES:
        return 1
    return 0 if part.detached else -(-(part.end - part.start) // CHUNK_BYTES)
