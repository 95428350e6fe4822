"""What is damaged in a container, and what can still be read."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Literal

import attrs
from xxhash import xxh3_64_intdigest

from vmmig.codec.compression import Decompression, zstd
from vmmig.codec.decoding import (
    REQUEST_BYTES,
    MemorySource,
    RangeReader,
    RemoteSource,
    wrong_size,
)
from vmmig.codec.layout import (
    CHUNK_BYTES,
    COMPRESSED,
    HEADER_BYTES,
    LARGE_BYTES,
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
)
from vmmig.codec.opening import source_of, sums_in
from vmmig.errors import DecodeError
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Buffer, SnapshotPath

Verdict = Literal["sound", "damaged", "lost", "unproven", "detached"]


@attrs.frozen
class Damage:
    """One thing that is wrong with a container.

    Attributes:
        where: ``header``, ``index``, ``table of checksums``, a byte, or the place of a section.
        what: What is wrong there.

    >>> print(Damage("index", "damaged: its checksum does not match"))
    index: damaged: its checksum does not match
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@attrs.frozen
class SectionVerdict:
    """What is left of one section.

    Attributes:
        path: Its node.
        id: Its id.
        nbytes: Its size.
        verdict: ``sound``: every checksum matches. ``damaged``: some of it is lost. ``lost``:
            all of it. ``unproven``: it is there, but its checksums are not, or do not match and
            may be damaged themselves. ``detached``: it never was there.
        lost: The ranges of its bytes - where it is compressed, of what is stored of it - that
            are damaged or cut off.
    """

    path: SnapshotPath
    id: str
    nbytes: int
    verdict: Verdict
    lost: MemoryRangeTable = attrs.field(factory=MemoryRangeTable)

    def __str__(self) -> str:
        return self.path.section(self.id)


@attrs.frozen
class Examination:
    """All that is wrong with a container, and what can still be read.

    Attributes:
        header: Its header, where that could be read; it may have been put right.
        found_bytes: How many bytes are there.
        damages: What is wrong, in the order in which it stands there; empty if nothing is.
        sections: Each section, in the index's order; empty if they cannot be located.
    """

    header: Header | None
    found_bytes: int
    damages: tuple[Damage, ...] = ()
    sections: tuple[SectionVerdict, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong: then every section is proven, or detached."""
        return not self.damages


def examine(
    source: Buffer | RangeReader,
    *,
    limits: Limits | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Examination:
    """Check every byte of a container, and go on where something is damaged.

    A header with one damaged byte is put right by its checksum. An index whose checksum does not
    match is used if it still agrees with the header. Memory does not grow with the sections.

    Args:
        source: Its bytes, for instance a mapping of a file, or what reads parts of them.
        limits: What to refuse before memory is spent on it.
        progress: Is told how many bytes are checked, and how many there are.

    Raises:
        MigrateReceiveError: The reader raised it.
        MissingExtraError: It is compressed, and the library for that is not installed.

    >>> from vmmig.codec import dumps
    >>> from vmmig.snapshot import Snapshot, SnapshotDataSection
    >>> cpu = Snapshot("cpu", {}, {"regs": SnapshotDataSection("regs", b"0123")})
    >>> data = bytearray(dumps(cpu))
    >>> data[data.index(b"0123")] ^= 1
    >>> found = examine(data)
    >>> print(*found.damages)
    $.snapshot_data['regs']: damaged: the checksum of its bytes 0 to 3 does not match
    >>> found.sections[0].verdict
    'lost'
    """
    return _Examiner(source_of(source), limits or Limits(), progress).run()


class _Examiner:
    def __init__(
        self,
        source: MemorySource | RemoteSource,
        limits: Limits,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._source = source
        self._limits = limits
        self._progress = progress or (lambda done, total: None)
        self._damages: list[Damage] = []
        self._found_bytes = source.total_bytes
        self._done_bytes = 0
        self._small_start = 0
        self._small = memoryview(b"")

    def run(self) -> Examination:
        header = self._header()
        layout = header and self._layout(header)
        if header is None or layout is None:
            return Examination(header, self._found_bytes, tuple(self._damages))
        if header.flags & COMPRESSED:
            zstd()
        if wrong := wrong_size(self._found_bytes, header.total_bytes):
            self._damaged(f"byte {min(self._found_bytes, header.total_bytes)}", wrong)
        sums, proven = self._table(layout, header)
        verdicts = [*self._sections(layout, sums, proven)]
        self._progress(self._found_bytes, self._found_bytes)
        return Examination(header, self._found_bytes, tuple(self._damages), tuple(verdicts))

    def _damaged(self, where: str, what: str) -> None:
        self._damages.append(Damage(where, what))

    def _blame(self, error: DecodeError, where: str) -> None:
        self._damaged(error.where or where, str(error.cause))

    def _header(self) -> Header | None:
        """The header as it stands, or as it stood before one byte was damaged."""
        head = bytes(self._source.head[:HEADER_BYTES])
        try:
            header = read_header(head)
        except DecodeError as error:
            repaired = _repaired(head) if len(head) == HEADER_BYTES else None
            if repaired is None:
                self._blame(error, "header")
                return None
            at, header = repaired
            self._damaged("header", f"damaged: byte {at}, which its checksum puts right")
        try:
            check_header(header, self._limits)
        except DecodeError as error:
            self._blame(error, "header")
            return None
        return header

    def _layout(self, header: Header) -> Layout | None:
        end = HEADER_BYTES + header.index_bytes
        if end > self._found_bytes:
            self._damaged(
                f"byte {self._found_bytes}",
                f"truncated: it ends in the index, {header.total_bytes - self._found_bytes} of "
                f"{header.total_bytes} bytes are missing; no section can be located",
            )
            return None
        index = self._source.view(HEADER_BYTES, end, "index")
        found = xxh3_64_intdigest(index)
        damaged = found != header.index_checksum
        try:
            with blaming(header):
                layout = decode_index(header._replace(index_checksum=found), index, self._limits)
        except DecodeError as error:
            what = "damaged: its checksum does not match; " if damaged else ""
            self._damaged("index", f"{what}{error.cause}; no section can be located")
            return None
        if damaged:
            self._damaged(
                "index",
                "damaged: its checksum does not match; it agrees with the header, so at least "
                "the sections' places are right, but ids may be wrong",
            )
        return layout

    def _table(self, layout: Layout, header: Header) -> tuple[list[int], bool]:
        """The checksums that are there, and whether they are proven."""
        start, end = layout.table_start, header.total_bytes
        if self._found_bytes >= end:
            table = self._source.view(start, end, "table of checksums")
            try:
                return decode_table(layout, table), True
            except DecodeError as error:
                self._blame(error, "table of checksums")
                proven = xxh3_64_intdigest(table[-8 * layout.sums - 8 : -8]) == int.from_bytes(
                    table[-8:], "little"
                )
                return _words(table[-8 * layout.sums - 8 : -8]), proven
        begin = end - 8 * layout.sums - 8
        there = max(self._found_bytes - begin, 0) // 8 * 8
        if not there:
            return [], False
        return _words(self._source.view(begin, begin + there, "table of checksums")), False

    def _sections(self, layout: Layout, sums: list[int], proven: bool) -> Iterator[SectionVerdict]:
        columns = layout.columns
        places = [SnapshotPath()]
        for parent, count in enumerate(columns.children):
            first = len(places)
            places += [places[parent].child(id) for id in columns.ids[first : first + count]]
        nodes = [place for place, n in zip(places, columns.sections, strict=True) for _ in range(n)]
        end = layout.small_end
        for part, place in zip(layout.parts(), nodes, strict=True):
            if part.nbytes >= LARGE_BYTES:
                self._check_padding(end, part)
                end = part.end
            own = sums[part.first_sum : part.first_sum + sums_in(part)]
            yield self._check_part(part, place, own, proven, layout.small_end)

    def _check_padding(self, start: int, part: Part) -> None:
        end = min(part.start, self._found_bytes)
        if start < end and any(self._source.view(start, end, part)):
            self._damaged(str(part), "the bytes before it are not zero; its own are not affected")

    def _check_part(
        self, part: Part, path: SnapshotPath, own: list[int], proven: bool, small_end: int
    ) -> SectionVerdict:
        stored = part.end - part.start
        there = max(min(self._found_bytes - part.start, stored), 0)
        spans: list[tuple[int, int]] = []
        unproven = mismatched = 0
        refused: DecodeError | None = None
        frame = Decompression(part.nbytes, part) if part.compressed else None
        for at in range(0, there, REQUEST_BYTES):
            start, end = part.start + at, part.start + min(at + REQUEST_BYTES, there)
            view = self._view(start, end, part, small_end)
            for i, found in enumerate(chunk_sums(view), at // CHUNK_BYTES):
                first, last = i * CHUNK_BYTES, min((i + 1) * CHUNK_BYTES, stored)
                if i >= len(own) or last > there:
                    unproven += 1
                elif found != own[i]:
                    mismatched += 1
                    _extend(spans, first, last)
            if frame is not None and not spans:
                refused = refused or _refused(frame, view)
            self._done_bytes += view.nbytes
            self._progress(self._done_bytes, self._found_bytes)
        if frame is not None and not spans and there == stored:
            refused = refused or _refused(frame, None)
        if not part.nbytes and own and own[0] != xxh3_64_intdigest(b""):
            unproven += 1
        if mismatched and not proven:
            # Which of the two is damaged cannot be told.
            what = "its checksum does not match, but may itself be damaged"
            self._damaged(path.section(part.id), f"{what} ({mismatched} of {len(own)})")
            unproven, spans = mismatched, []
        elif spans:
            first, last = spans[0][0], min(spans[0][0] + CHUNK_BYTES, stored)
            more = f", and {mismatched - 1} more MiB" if mismatched > 1 else ""
            what = f"damaged: the checksum of its bytes {first} to {last - 1} does not match{more}"
            self._damaged(path.section(part.id), what)
        elif refused is not None:
            self._damaged(path.section(part.id), str(refused.cause))
            spans = [(0, there)]
        if there < stored:
            what = f"cut off: {stored - there} of its {stored} bytes are missing"
            self._damaged(path.section(part.id), what)
            _extend(spans, there, stored)
        lost = MemoryRangeTable.from_spans([a for a, _ in spans], [b for _, b in spans])
        verdict: Verdict = "unproven" if unproven else "sound"
        if part.detached:
            verdict = "detached"
        elif spans:
            verdict = "lost" if part.compressed or lost.total_bytes == stored else "damaged"
        return SectionVerdict(path, part.id, part.nbytes, verdict, lost)

    def _view(self, start: int, end: int, part: Part, small_end: int) -> memoryview:
        """Some stored bytes; small sections are fetched many at once."""
        if part.nbytes >= LARGE_BYTES:
            return self._source.view(start, end, part)
        known = self._small_start, self._small_start + self._small.nbytes
        if not known[0] <= start <= end <= known[1]:
            stop = max(min(start + REQUEST_BYTES, small_end, self._found_bytes), end)
            self._small_start = start
            self._small = self._source.view(start, stop, "the small sections")
        return self._small[start - self._small_start : end - self._small_start]


def _extend(spans: list[tuple[int, int]], first: int, last: int) -> None:
    if spans and spans[-1][1] == first:
        first = spans.pop()[0]
    spans.append((first, last))


def _refused(frame: Decompression, view: memoryview | None) -> DecodeError | None:
    """What is wrong with the frame, as far as it goes."""
    try:
        if view is None:
            frame.finish()
        else:
            for _ in frame.pieces(view):
                pass
    except DecodeError as error:
        return error
    return None


def _repaired(head: bytes) -> tuple[int, Header] | None:
    """The one byte that, set right, makes the header's checksum match; and the header then."""
    found = []
    trial = bytearray(head)
    expected = int.from_bytes(head[-8:], "little")
    difference = xxh3_64_intdigest(head[:-8]) ^ expected
    for at in range(8):
        if not difference & ~(0xFF << 8 * at):
            found.append(
                (HEADER_BYTES - 8 + at, head[:-8] + (expected ^ difference).to_bytes(8, "little"))
            )
    for at, byte in enumerate(head[:-8]):
        for value in range(256):
            trial[at] = value
            if xxh3_64_intdigest(trial[:-8]) == expected:
                found.append((at, bytes(trial)))
        trial[at] = byte
    if len(found) != 1:
        return None
    try:
        return found[0][0], read_header(found[0][1])
    except DecodeError:
        return None


def _words(table: memoryview) -> list[int]:
    return [*struct.unpack(f"<{len(table) // 8}Q", table)]
