"""A snapshot's bytes: the container, format 1, and a cattrs converter for snapshots elsewhere.

A container (``.vmsnap``) is one header, one index, the sections, and one table of checksums.
All integers are little-endian; every checksum is the 64-bit XXH3 with seed 0
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).

Header, 96 bytes::

     0   8  magic: 89 56 4D 53 4E 41 50 0A
     8   2  format version: 1
    10   2  flags: features a reader must know; none are defined, so 0
    12   4  zero
    16   8  bytes of the index
    24   8  bytes of the whole container
    32   8  checksum of the index
    40  48  writer: UTF-8, filled up with zero bytes
    88   8  checksum of the 88 bytes before

Magic, version, writer and the header's checksum keep their places in every later version.

Index: one msgpack array of ``3 + N + S`` elements for a tree of N nodes and S sections::

    bin   N times u32: how many children each node has
    bin   N times u32: how many sections each node has
    bin   S times u64: how many bytes each section has
    str   N times: each node's id
    str   S times: each section's id

The nodes stand in breadth-first order: the root, its children, their children. The children of
one node, and the sections of one node, stand in the order of their ids' code points. That
determines every byte, so equal trees give equal bytes from offset 96 on, and equal containers
where the writer is the same.

Sections: directly behind the index, those below 64 KiB, one after another in index order. Then
the others in index order, each preceded by zero bytes up to a multiple of 4096 from the
container's start, so that they can be mapped.

Table: zero bytes up to a multiple of 8, then one u64 checksum for each section below 64 KiB,
in index order, then one for each MiB, begun or whole, of each other section, in index order;
last, one checksum of the table's bytes before. It comes last so that a container is written in
one pass, each MiB checked while it is in the processor's cache; its place follows from the index.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import attrs
import msgpack
from cattrs import Converter
from xxhash import xxh3_64_intdigest as checksum

from vmmig import __version__
from vmmig.errors import DecodeError, MigratableError, SnapshotError
from vmmig.snapshot import (
    MAX_NODES,
    Buffer,
    Columns,
    Snapshot,
    SnapshotDataSection,
    build,
    flatten,
    make_sections,
    raw_view,
)

MAGIC = b"\x89VMSNAP\n"
FORMAT_VERSION = 1
HEADER_BYTES = 96
LARGE_BYTES = 1 << 16
ALIGNMENT_BYTES = 4096
CHUNK_BYTES = 1 << 20

_HEADER = struct.Struct("<8sHHIQQQ48sQ")
_CHECKSUM = struct.Struct("<Q")
_WRITER = f"vmmig {__version__}".encode()
_SPLIT_AT_ONCE = 1 << 14


@attrs.frozen
class Limits:
    """What a decoder refuses before it spends memory on it.

    A tree is built only once its columns agree, and then takes about 400 bytes of memory a node
    and 200 a section, besides the ids and the sections' bytes. Until then, decoding takes at
    most twice the size of the input, and about 100 bytes for each id once their number is right.

    Attributes:
        max_nodes: Nodes and sections of the tree, together.
        max_bytes: The whole container.
        max_id_bytes: Any id, in UTF-8.

    >>> big = dumps(Snapshot("a rather long id"))
    >>> loads(big, limits=Limits(max_id_bytes=8))
    Traceback (most recent call last):
    vmmig.errors.DecodeError: Failed to restore migratable component: index: an id has more than \
the 8 bytes allowed; Limits(max_id_bytes=...) allows more
    """

    max_nodes: int = MAX_NODES
    max_bytes: int = (1 << 63) - 1
    max_id_bytes: int = (1 << 32) - 1


DEFAULT_LIMITS = Limits()


class Header(NamedTuple):
    """A container's header.

    >>> read_header(dumps(Snapshot("vm"))).version
    1
    """

    version: int
    flags: int
    index_bytes: int
    total_bytes: int
    index_checksum: int
    writer: str


class ReadableStream(Protocol):
    """What `load` reads from: a binary file, a pipe, a socket's ``makefile("rb")``."""

    def readinto(self, buffer: Any, /) -> int | None:
        """As `io.RawIOBase.readinto`."""


class WritableStream(Protocol):
    """What `dump` writes to."""

    def write(self, data: Any, /) -> int | None:
        """As `io.RawIOBase.write`."""


def dumps(snapshot: Snapshot) -> bytes:
    """The container of a snapshot, as bytes.

    Raises:
        SnapshotError: The tree is not valid; see `vmmig.snapshot.flatten`.

    >>> loads(dumps(Snapshot("vm")))
    Snapshot('vm')
    """
    chunks = [*encode(snapshot)]
    return chunks[0] if len(chunks) == 1 and type(chunks[0]) is bytes else b"".join(chunks)


def dump(snapshot: Snapshot, stream: WritableStream) -> None:
    """Write the container of a snapshot to a stream in one pass, without holding a copy of it.

    Raises:
        SnapshotError: The tree is not valid.
        MigratableError: The stream failed.

    >>> import io
    >>> stream = io.BytesIO()
    >>> dump(Snapshot("vm"), stream)
    >>> stream.getvalue() == dumps(Snapshot("vm"))
    True
    """
    for chunk in encode(snapshot):
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


def loads(data: Buffer, *, lazily: bool = False, limits: Limits | None = None) -> Snapshot:
    """The snapshot in a container.

    Sections below 64 KiB become bytes; larger ones are views of ``data``, which must not change
    as long as the snapshot is in use.

    Args:
        data: One whole container: bytes, or for instance a mapping of a file.
        lazily: Check a large section when its bytes are first asked for, not now.
        limits: What to refuse before memory is spent on it.

    Raises:
        DecodeError: This is not one whole, undamaged container that this version can read.
            With ``lazily``, asking a damaged section for its bytes raises it.

    >>> loads(b"GIF89a")
    Traceback (most recent call last):
    vmmig.errors.DecodeError: Failed to restore migratable component: header: ...
    """
    view = _view(data)
    header = read_header(view)
    try:
        return _decode(view, header, limits or DEFAULT_LIMITS, lazily)
    except Exception as error:
        raise _blame(error, header) from error


def load(stream: ReadableStream, *, limits: Limits | None = None) -> Snapshot:
    """Read one container from a stream, and not a byte more.

    Memory is taken as bytes arrive, whatever the header promises.

    Args:
        stream: A binary file, a pipe, a socket's ``makefile("rb")``; it must block.
        limits: What to refuse before memory is spent on it.

    Raises:
        DecodeError: The stream does not hold one whole, undamaged container, or failed.

    >>> import io
    >>> stream = io.BytesIO(dumps(Snapshot("vm")) + b"more")
    >>> load(stream), stream.read()
    (Snapshot('vm'), b'more')
    """
    source = _Source(stream)
    header = read_header(source.take(HEADER_BYTES, "header"))
    try:
        return _read(source, header, limits or DEFAULT_LIMITS)
    except Exception as error:
        raise _blame(error, header) from error


def read_header(data: Buffer) -> Header:
    """The header at the start of ``data``, also of a version that cannot be read further.

    Raises:
        DecodeError: There is no whole, undamaged header.

    >>> read_header(dumps(Snapshot("vm"))).writer
    'vmmig ...'
    """
    view = _view(data)[:HEADER_BYTES]
    if view.nbytes < HEADER_BYTES or view[: len(MAGIC)] != MAGIC:
        start = bytes(view[: len(MAGIC)])
        if start and start == MAGIC[: len(start)]:
            what = f"truncated: only {view.nbytes} of its {HEADER_BYTES} bytes are there"
        else:
            what = "no vmmig container begins like this" if start else "it is empty"
        raise DecodeError(what, where="header")
    _, version, flags, zero, index_bytes, total_bytes, index_sum, writer, own_sum = _HEADER.unpack(
        view
    )
    if own_sum != checksum(view[:-8]):
        raise DecodeError("damaged: its checksum does not match", where="header")
    try:
        name = writer.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the writer's name is not UTF-8: {error}", where="header") from error
    if version == FORMAT_VERSION and zero:
        raise DecodeError("bytes 12 to 15 are not zero", where="header", writer=name)
    return Header(version, flags, index_bytes, total_bytes, index_sum, name)


class Encoding:
    """A container about to be written: iterate over it for its chunks, in order, in one pass.

    Nothing is copied but the small sections; large ones are read as the iteration comes to
    them, one MiB at a time. It may be iterated over again.

    Attributes:
        total_bytes: How many bytes the chunks have together.

    >>> encoding = encode(Snapshot("vm"))
    >>> encoding.total_bytes == len(b"".join(encoding))
    True
    """

    __slots__ = ("_head", "_large", "_small", "_small_end", "_table_padding", "total_bytes")

    def __init__(self, index: bytes, small: list[Any], large: list[memoryview]) -> None:
        self._small = small
        self._large = large
        end = HEADER_BYTES + len(index) + sum(map(len, small))
        sums = len(small)
        self._small_end = end
        for view in large:
            end += -end % ALIGNMENT_BYTES + view.nbytes
            sums += _chunks(view.nbytes)
        self._table_padding = bytes(-end % 8)
        self.total_bytes: int = end + len(self._table_padding) + 8 * sums + 8
        fields = MAGIC, FORMAT_VERSION, 0, 0, len(index), self.total_bytes, checksum(index), _WRITER
        header = _HEADER.pack(*fields, 0)[:-8]
        self._head = [header, _CHECKSUM.pack(checksum(header)), index]

    def __iter__(self) -> Iterator[bytes | memoryview]:
        if not self._large:
            yield self._whole()
            return
        yield b"".join([*self._head, *self._small])
        end = self._small_end
        sums: list[int] = []
        for view in self._large:
            yield bytes(-end % ALIGNMENT_BYTES)
            end += -end % ALIGNMENT_BYTES + view.nbytes
            for start in range(0, view.nbytes, CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                sums.append(checksum(chunk))
                yield chunk
        yield b"".join(self._table(sums))

    def _whole(self) -> bytes:
        return b"".join([*self._head, *self._small, *self._table([])])

    def _table(self, large_sums: list[int]) -> tuple[bytes, bytes, bytes]:
        table = _packed("Q", [*map(checksum, self._small), *large_sums])
        return self._table_padding, table, _CHECKSUM.pack(checksum(table))


def encode(snapshot: Snapshot) -> Encoding:
    """The container of a snapshot, ready to be written.

    Raises:
        SnapshotError: The tree is not valid; see `vmmig.snapshot.flatten`.

    >>> encode(Snapshot("vm")).total_bytes
    128
    """
    columns = flatten(snapshot)
    if len(columns.ids) + len(columns.section_ids) > MAX_NODES:
        raise SnapshotError(f"it has more than {MAX_NODES} nodes and sections")
    small = columns.payloads
    large: list[memoryview] = []
    if {*map(type, small)} <= {bytes}:
        lengths = [*map(len, small)]
    else:
        small = [p if type(p) is bytes else raw_view(p) for p in small]
        lengths = [p.nbytes if type(p) is memoryview else len(p) for p in small]
    if lengths and max(lengths) >= LARGE_BYTES:
        large = [memoryview(p) for p in small if len(p) >= LARGE_BYTES]
        small = [p for p in small if len(p) < LARGE_BYTES]
    try:
        plain = _converter().unstructure(Columns(*columns[:4], lengths))
        index = cast(bytes, msgpack.packb(plain))
    except Exception as error:
        _explain_ids(columns, error)
    return Encoding(index, small, large)


def make_converter() -> Converter:
    """A `cattrs.Converter` that knows snapshots; see `configure_converter`.

    >>> make_converter().unstructure(SnapshotDataSection("regs", b"x"))
    {'id': 'regs', 'snapshot': b'x'}
    """
    converter = Converter()
    configure_converter(converter)
    return converter


def configure_converter(converter: Converter) -> None:
    """Teach a cattrs converter snapshots, for attrs classes of one's own that hold them.

    A `Snapshot` becomes a dict of its `vmmig.snapshot.Columns`, at any depth, and a
    `SnapshotDataSection` a dict of its two fields. Payloads become bytes, by the converter's own
    hook for bytes where the format needs one. Nothing is coerced on the way back: what has
    another type than it should is refused with a `DecodeError`.

    >>> import attrs
    >>> @attrs.define
    ... class SaveGame:
    ...     name: str
    ...     machine: Snapshot
    >>> from cattrs.preconf.msgpack import make_converter
    >>> converter = make_converter()
    >>> configure_converter(converter)
    >>> data = converter.dumps(SaveGame("level 3", Snapshot("vm")))
    >>> converter.loads(data, SaveGame)
    SaveGame(name='level 3', machine=Snapshot('vm'))
    """

    def payload_out(payload: Buffer) -> Any:
        return converter.unstructure(bytes(raw_view(payload)), bytes)

    def payload_in(data: Any, where: str) -> Any:
        if isinstance(data, (bytes, bytearray, memoryview)):
            return data
        if not isinstance(data, str):
            raise DecodeError(f"bytes are needed, not {type(data).__name__}", where=where)
        try:
            return converter.structure(data, bytes)
        except Exception as error:
            raise DecodeError(error, where=where) from error

    def snapshot_out(snapshot: Snapshot) -> dict[str, Any]:
        columns = flatten(snapshot)
        return columns._replace(payloads=[*map(payload_out, columns.payloads)])._asdict()

    def snapshot_in(data: Any, _: Any) -> Snapshot:
        fields = _fields(data, Columns._fields)
        for name, kind in zip(Columns._fields, (str, int, int, str, None), strict=True):
            _check_types(fields[name], kind, name)
        payloads = [payload_in(p, f"payloads[{i}]") for i, p in enumerate(fields["payloads"])]
        counts = fields["children"] + fields["sections"]
        if counts and min(counts) < 0:
            raise DecodeError("a node cannot have fewer than no children", where="index")
        ids, children, sections, section_ids = (fields[name] for name in Columns._fields[:4])
        return build(ids, children, sections, section_ids, payloads)

    def section_out(section: SnapshotDataSection) -> dict[str, Any]:
        return {"id": section.id, "snapshot": payload_out(section.snapshot)}

    def section_in(data: Any, _: Any) -> SnapshotDataSection:
        fields = _fields(data, ("id", "snapshot"))
        _check_types([fields["id"]], str, "id")
        return SnapshotDataSection(fields["id"], payload_in(fields["snapshot"], "snapshot"))

    converter.register_unstructure_hook(Snapshot, snapshot_out)
    converter.register_structure_hook(Snapshot, snapshot_in)
    converter.register_unstructure_hook(SnapshotDataSection, section_out)
    converter.register_structure_hook(SnapshotDataSection, section_in)


def _index_out(columns: Columns) -> list[Any]:
    """The index of a container, as msgpack takes it; the payloads are the sections' lengths."""
    return [
        _packed("I", columns.children),
        _packed("I", columns.sections),
        _packed("Q", columns.payloads),
        *columns.ids,
        *columns.section_ids,
    ]


def _index_in(elements: Iterable[Any], _: Any) -> Columns:
    """The columns of an index: their lengths are checked before its ids are even unpacked."""
    rest = iter(elements)
    children, sections, lengths = (
        _unpacked(code, next(rest, None), name)
        for code, name in (("I", "children"), ("I", "sections"), ("Q", "lengths"))
    )
    nodes, total = len(children), len(lengths)
    if not (nodes == len(sections) == sum(children) + 1 and sum(sections) == total):
        raise DecodeError(
            f"its columns disagree: {nodes} nodes with {sum(children)} children, "
            f"{len(sections)} nodes with {sum(sections)} sections, {total} lengths",
            where="index",
        )
    names = [*islice(rest, nodes + total + 1)]
    if len(names) != nodes + total:
        raise DecodeError(
            f"it needs {nodes + total} ids and has {'more' if len(names) > nodes else len(names)}",
            where="index",
        )
    try:
        "".join(names)
    except TypeError as error:
        raise DecodeError(f"an id is not a str: {error}", where="index") from error
    return Columns(
        names[:nodes], children.tolist(), sections.tolist(), names[nodes:], lengths.tolist()
    )


@cache
def _converter() -> Converter:
    """The converter of the container itself, which also knows its index."""
    converter = make_converter()
    converter.register_unstructure_hook(Columns, _index_out)
    converter.register_structure_hook(Columns, _index_in)
    return converter


class _Part(NamedTuple):
    """One large section: where it stands, and which of the table's checksums are its own."""

    columns: Columns
    section: int
    start: int
    end: int
    first_sum: int

    def __str__(self) -> str:
        """Its place, for messages: takes time linear in the tree."""
        return self.columns.section_place(self.section)

    @property
    def chunks(self) -> int:
        return _chunks(self.end - self.start)


class _Layout(NamedTuple):
    """Where everything stands, as it follows from the index alone."""

    columns: Columns
    small_start: int
    small_end: int
    small_lengths: list[int]
    large: list[_Part]
    table_start: int
    sums: int

    def arrange(self, small: list[Any], large: list[Any]) -> list[Any]:
        """The payloads in index order."""
        if not large:
            return small
        rest = iter(small)
        at = {part.section: payload for part, payload in zip(self.large, large, strict=True)}
        sections = range(len(self.columns.section_ids))
        return [at[i] if i in at else next(rest) for i in sections]


class _UncheckedSection(SnapshotDataSection):
    """A large section of a mapped container: checked when its bytes are first asked for."""

    __slots__ = ("_container", "_part", "_payload", "_sums")

    def __init__(self, part: _Part, container: memoryview, sums: list[int]) -> None:
        self.id = part.columns.section_ids[part.section]
        self._part: _Part | None = part
        self._container = container
        self._sums = sums
        self._payload: Buffer = b""

    @property
    def snapshot(self) -> Buffer:
        part = self._part
        if part is not None:
            view = self._container[part.start : part.end]
            chunks = range(0, view.nbytes, CHUNK_BYTES)
            found = [checksum(view[start : start + CHUNK_BYTES]) for start in chunks]
            _check_chunks(part, found, self._sums)
            self._payload, self._part = view, None
        return self._payload

    @snapshot.setter
    def snapshot(self, payload: Buffer) -> None:  # pyright: ignore
        raw_view(payload)
        self._payload, self._part = payload, None

    @property
    def nbytes(self) -> int:
        part = self._part
        return raw_view(self._payload).nbytes if part is None else part.end - part.start

    def __repr__(self) -> str:
        if self._part is not None:
            return f"SnapshotDataSection({self.id!r}, {self.nbytes} bytes, not read yet)"
        return super().__repr__()


def _view(data: Buffer) -> memoryview:
    try:
        return raw_view(data).toreadonly()
    except SnapshotError as error:
        raise DecodeError(
            f"a contiguous bytes-like object is needed, not {type(data).__name__}: "
            f"{error.__cause__}"
        ) from error


def _blame(error: Exception, header: Header) -> DecodeError:
    """Whatever went wrong, as a `DecodeError` that knows the container's header."""
    if not isinstance(error, DecodeError):
        cause = error.cause if isinstance(error, MigratableError) else error
        error = DecodeError(cause, where="index")
    error.version, error.writer = header.version, header.writer
    return error


def _decode(view: memoryview, header: Header, limits: Limits, lazily: bool) -> Snapshot:
    _check_header(header, limits)
    if view.nbytes != header.total_bytes:
        missing = header.total_bytes - view.nbytes
        raise DecodeError(
            f"truncated: {missing} of {header.total_bytes} bytes are missing"
            if missing > 0
            else f"{-missing} bytes stand behind the container's {header.total_bytes}",
            where=f"byte {min(view.nbytes, header.total_bytes)}",
        )
    layout = _decode_index(header, view[HEADER_BYTES : HEADER_BYTES + header.index_bytes], limits)
    sums = _decode_table(layout, view[layout.table_start :])
    small = _split(view[layout.small_start : layout.small_end], layout.small_lengths)
    _check_small(layout, small, sums)
    columns = layout.columns
    if not layout.large:
        return build(*columns[:4], small)
    sections = make_sections(columns.section_ids, layout.arrange(small, layout.large))
    end = layout.small_end
    for part in layout.large:
        unchecked = _UncheckedSection(part, view, sums)
        if end != part.start and any(view[end : part.start]):
            raise DecodeError("the bytes before it are not zero", where=str(part))
        end = part.end
        if lazily:
            sections[part.section] = unchecked
        else:
            sections[part.section].snapshot = unchecked.snapshot
    return build(*columns[:4], sections)


def _read(source: _Source, header: Header, limits: Limits) -> Snapshot:
    _check_header(header, limits)
    index = source.take(header.index_bytes, "index")
    layout = _decode_index(header, memoryview(index), limits)
    small_bytes = source.take(layout.small_end - layout.small_start, "the small sections")
    small = _split(memoryview(small_bytes), layout.small_lengths)
    large = []
    found: list[int] = []
    if layout.large:
        begin = layout.large[0].start
        memory = _memory(layout.large[-1].end - begin)
        for part in layout.large:
            source.skip_zeros(part.start - source.taken, part)
            view = memory[part.start - begin : part.end - begin]
            source.take_into(view, part, found)
            large.append(view.toreadonly())
    table = source.take(header.total_bytes - source.taken, "table of checksums")
    sums = _decode_table(layout, memoryview(table))
    _check_small(layout, small, sums)
    for part in layout.large:
        at = part.first_sum - len(small)
        _check_chunks(part, found[at : at + part.chunks], sums)
    return build(*layout.columns[:4], layout.arrange(small, large))


def _memory(count: int) -> memoryview:
    """Memory that the kernel hands out only as it is written to.

    One mapping serves all large sections, for a process may have no more than some 65,000.
    """
    try:
        return memoryview(mmap.mmap(-1, count))
    except (OSError, OverflowError, ValueError) as error:
        raise DecodeError(
            f"{count} bytes of memory are not to be had", where="the large sections"
        ) from error


class _Source:
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

    def take_into(self, view: memoryview, what: object, sums: list[int]) -> None:
        for start in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._fill(chunk, what)
            sums.append(checksum(chunk))

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


def _check_header(header: Header, limits: Limits) -> None:
    if header.version != FORMAT_VERSION or header.flags:
        raise DecodeError(
            f"{header.writer!r} wrote it in format {header.version} with features "
            f"{header.flags:#x}; vmmig {__version__} reads format {FORMAT_VERSION} with features "
            "0x0: a newer vmmig is needed",
            where="header",
        )
    if header.total_bytes > limits.max_bytes:
        raise DecodeError(
            f"it has {header.total_bytes} bytes, of {limits.max_bytes} allowed; "
            "Limits(max_bytes=...) allows more",
            where="header",
        )
    if header.index_bytes > header.total_bytes - HEADER_BYTES:
        raise DecodeError("its index is larger than the container", where="header")


def _decode_index(header: Header, index: memoryview, limits: Limits) -> _Layout:
    if checksum(index) != header.index_checksum:
        raise DecodeError("damaged: its checksum does not match", where="index")
    # No element of the one array may be an array or a map: nothing nests, nothing explodes.
    unpacker = msgpack.Unpacker(
        None,
        read_size=len(index) + 1,
        max_buffer_size=len(index) + 1,
        max_str_len=min(limits.max_id_bytes, len(index)),
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
    )
    unpacker.feed(index)
    count = unpacker.read_array_header()
    if count - 3 > limits.max_nodes:
        raise DecodeError(
            f"it has {count - 3} nodes and sections, of {limits.max_nodes} allowed; "
            "Limits(max_nodes=...) allows more",
            where="index",
        )
    head = [unpacker.unpack() for _ in range(3)]
    nodes, lengths = _unpacked("I", head[0], "children"), _unpacked("Q", head[2], "lengths")
    needed = len(nodes) + len(lengths)
    if count - 3 != needed:
        raise DecodeError(f"it needs {needed} ids and has {count - 3}", where="index")
    if sum(lengths) > header.total_bytes:
        raise DecodeError("its sections make more bytes than the container has", where="index")
    try:
        columns = _converter().structure(chain(head, unpacker), Columns)
    except ValueError as error:
        if "max_str_len" in str(error):
            raise DecodeError(
                f"an id has more than the {limits.max_id_bytes} bytes allowed; "
                "Limits(max_id_bytes=...) allows more",
                where="index",
            ) from error
        raise
    if unpacker.tell() != len(index):
        raise DecodeError("it does not hold what it says it does", where="index")
    return _layout(columns, header)


def _layout(columns: Columns, header: Header) -> _Layout:
    lengths = columns.payloads
    start = HEADER_BYTES + header.index_bytes
    large: list[_Part] = []
    if lengths and max(lengths) >= LARGE_BYTES:
        small = [length for length in lengths if length < LARGE_BYTES]
    else:
        small = lengths
    end = small_end = start + sum(small)
    sums = len(small)
    if len(small) != len(lengths):
        for section, length in enumerate(lengths):
            if length >= LARGE_BYTES:
                begin = end + -end % ALIGNMENT_BYTES
                end = begin + length
                large.append(_Part(columns, section, begin, end, sums))
                sums += _chunks(length)
    total = end + -end % 8 + 8 * sums + 8
    if total != header.total_bytes:
        raise DecodeError(
            f"its sections make {total} bytes, but the header says {header.total_bytes}",
            where="index",
        )
    return _Layout(columns, start, small_end, small, large, end, sums)


def _decode_table(layout: _Layout, data: memoryview) -> list[int]:
    table = data[-8 * layout.sums - 8 : -8]
    if _CHECKSUM.unpack(data[-8:])[0] != checksum(table):
        raise DecodeError("damaged: its checksum does not match", where="table of checksums")
    if any(data[: -8 * layout.sums - 8]):
        raise DecodeError("the bytes before it are not zero", where="table of checksums")
    return _unpacked("Q", bytes(table), "checksums").tolist()


def _split(data: memoryview, lengths: list[int]) -> list[bytes]:
    """``data`` cut into pieces: ``struct`` does it several times as fast as slicing."""
    pieces: list[bytes] = []
    start = 0
    for first in range(0, len(lengths), _SPLIT_AT_ONCE):
        batch = lengths[first : first + _SPLIT_AT_ONCE]
        code = {length: f"{length}s" for length in {*batch}}
        cutter = struct.Struct("".join([code[length] for length in batch]))
        pieces += cutter.unpack_from(data, start)
        start += cutter.size
    return pieces


def _check_small(layout: _Layout, small: list[bytes], sums: list[int]) -> None:
    found = [*map(checksum, small)]
    if found == sums[: len(small)]:
        return
    damaged = next(i for i, (a, b) in enumerate(zip(found, sums, strict=False)) if a != b)
    is_small = [length < LARGE_BYTES for length in layout.columns.payloads]
    section = [i for i, yes in enumerate(is_small) if yes][damaged]
    raise DecodeError(
        f"damaged: the checksum of its {len(small[damaged])} bytes does not match",
        where=layout.columns.section_place(section),
    )


def _check_chunks(part: _Part, found: list[int], sums: list[int]) -> None:
    expected = sums[part.first_sum : part.first_sum + part.chunks]
    if found == expected:
        return
    damaged = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    first = damaged[0] * CHUNK_BYTES
    last = min(first + CHUNK_BYTES, part.end - part.start)
    more = f", and {len(damaged) - 1} more MiB" if len(damaged) > 1 else ""
    raise DecodeError(
        f"damaged: the checksum of its bytes {first} to {last - 1} does not match{more}",
        where=str(part),
    )


def _explain_ids(columns: Columns, error: Exception) -> NoReturn:
    """Name the first id that msgpack cannot hold."""
    for ids, place in (
        (columns.ids, columns.path),
        (columns.section_ids, columns.section_place),
    ):
        for i, id in enumerate(ids):
            try:
                id.encode()
            except UnicodeEncodeError as wrong:
                raise SnapshotError(f"{place(i)}: the id is not valid Unicode: {wrong}") from wrong
    raise SnapshotError(error) from error


def _check_types(values: Any, kind: type | None, where: str) -> None:
    if not isinstance(values, list):
        raise DecodeError(f"a list is needed, not {type(values).__name__}", where=where)
    if kind is not None and not {*map(type, values)} <= {kind}:
        wrong = next(value for value in values if type(value) is not kind)
        raise DecodeError(
            f"each must be {kind.__name__}, but one is {type(wrong).__name__}", where=where
        )


def _fields(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or data.keys() != set(names):
        raise DecodeError(f"a dict of {', '.join(names)} is needed, not {type(data).__name__}")
    return data


def _chunks(length: int) -> int:
    return -(-length // CHUNK_BYTES)


def _packed(code: str, values: list[int]) -> bytes:
    column = array(code, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _unpacked(code: str, data: Any, name: str) -> memoryview:
    if type(data) is not bytes or len(data) % array(code).itemsize:
        raise DecodeError(f"its column of {name} is not what it should be", where="index")
    if sys.byteorder == "big":
        column = array(code, data)
        column.byteswap()
        return memoryview(column)
    return memoryview(data).cast(code)  # type: ignore[call-overload, no-any-return]
