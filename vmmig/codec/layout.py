"""The header, the index and the table of a container, and where they put its sections."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn, cast

import attrs
import msgpack
from cattrs import Converter
from xxhash import xxh3_64_intdigest as checksum

from vmmig import __version__
from vmmig.codec.converter import make_converter
from vmmig.errors import (
    DecodeError,
    MigratableError,
    MigrateReceiveError,
    MissingExtraError,
    SnapshotError,
)
from vmmig.snapshot import MAX_NODES, Buffer, Columns, raw_view

MAGIC = b"\x89VMSNAP\n"
FORMAT_VERSION = 1
HEADER_BYTES = 96
LARGE_BYTES = 1 << 16
ALIGNMENT_BYTES = 4096
CHUNK_BYTES = 1 << 20
COMPRESSED = 1
DETACHED = 2
NOT_STORED = (1 << 64) - 1

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
    A compressed section takes memory as its bytes come out, never more than the index says, and
    8 MiB while it is decompressed; the index may say 32,768 times the size of the input, which
    only ``max_bytes`` limits.

    Attributes:
        max_nodes: Nodes and sections of the tree, together.
        max_bytes: The whole container; and what its sections have together, decompressed
            and with those that are detached.
        max_id_bytes: Any id, in UTF-8.

    >>> from vmmig.codec import dumps, loads
    >>> from vmmig.snapshot import Snapshot
    >>> big = dumps(Snapshot("a rather long id"))
    >>> loads(big, limits=Limits(max_id_bytes=8))
    Traceback (most recent call last):
    vmmig.errors.DecodeError: Failed to restore migratable component: index: an id has more than \
the 8 bytes allowed; Limits(max_id_bytes=...) allows more
    """

    max_nodes: int = MAX_NODES
    max_bytes: int = (1 << 63) - 1
    max_id_bytes: int = (1 << 32) - 1


class Header(NamedTuple):
    """A container's header.

    >>> from vmmig.codec import dumps
    >>> from vmmig.snapshot import Snapshot
    >>> read_header(dumps(Snapshot("vm"))).version
    1
    """

    version: int
    flags: int
    index_bytes: int
    total_bytes: int
    index_checksum: int
    writer: str


def read_header(data: Buffer) -> Header:
    """The header at the start of ``data``, also of a version that cannot be read further.

    Raises:
        DecodeError: There is no whole, undamaged header.

    >>> from vmmig.codec import dumps
    >>> from vmmig.snapshot import Snapshot
    >>> read_header(dumps(Snapshot("vm"))).writer
    'vmmig ...'
    """
    view = view_of(data)[:HEADER_BYTES]
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


def write_header(flags: int, index: bytes, total_bytes: int) -> bytes:
    fields = MAGIC, FORMAT_VERSION, flags, 0, len(index), total_bytes, checksum(index), _WRITER
    header = _HEADER.pack(*fields, 0)[:-8]
    return header + _CHECKSUM.pack(checksum(header))


@contextmanager
def blaming(header: Header) -> Iterator[None]:
    """Whatever goes wrong becomes a `DecodeError` that knows the container's header."""
    try:
        yield
    except DecodeError as error:
        error.version, error.writer = header.version, header.writer
        raise
    except (MigrateReceiveError, MissingExtraError):
        raise
    except Exception as error:
        cause = error.cause if isinstance(error, MigratableError) else error
        facts: Any = {"version": header.version, "writer": header.writer}
        raise DecodeError(cause, where="index", **facts) from error


def check_header(header: Header, limits: Limits) -> None:
    if header.version != FORMAT_VERSION or header.flags & ~(COMPRESSED | DETACHED):
        raise DecodeError(
            f"{header.writer!r} wrote it in format {header.version} with features "
            f"{header.flags:#x}; vmmig {__version__} reads format {FORMAT_VERSION} with features "
            "up to 0x3: a newer vmmig is needed",
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


def view_of(data: Buffer) -> memoryview:
    """A read-only view of what is given as a container."""
    try:
        return raw_view(data).toreadonly()
    except SnapshotError as error:
        raise DecodeError(
            f"a contiguous bytes-like object is needed, not {type(data).__name__}: "
            f"{error.__cause__}"
        ) from error


class Part(NamedTuple):
    """One large section: where it stands, and which of the table's checksums are its own."""

    columns: Columns
    section: int
    start: int
    end: int
    first_sum: int
    detached: bool = False

    def __str__(self) -> str:
        """Its place, for messages: takes time linear in the tree."""
        return self.columns.section_place(self.section)

    @property
    def id(self) -> str:
        return self.columns.section_ids[self.section]

    @property
    def nbytes(self) -> int:
        """What the section has; ``end - start`` is what the container has of it."""
        return cast(int, self.columns.payloads[self.section])

    @property
    def compressed(self) -> bool:
        return not self.detached and self.end - self.start < self.nbytes

    def check(self, start: int, found: list[int], sums: list[int]) -> None:
        """Compare the checksums of stored bytes from ``start``, a whole MiB, with the table's."""
        first = self.first_sum + start // CHUNK_BYTES
        expected = sums[first : first + len(found)]
        if found == expected:
            return
        damaged = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        begin = start + damaged[0] * CHUNK_BYTES
        last = min(begin + CHUNK_BYTES, self.end - self.start) - 1
        more = f", and {len(damaged) - 1} more MiB" if len(damaged) > 1 else ""
        raise DecodeError(
            f"damaged: the checksum of its bytes {begin} to {last} does not match{more}",
            where=str(self),
        )


class Layout(NamedTuple):
    """Where everything stands, as it follows from the index alone."""

    columns: Columns
    small_start: int
    small_end: int
    small_lengths: list[int]
    large: list[Part]
    table_start: int
    sums: int

    def arrange(self, small: Iterable[Any], large: Iterable[Any]) -> list[Any]:
        """What belongs to the small and to the large sections, in index order."""
        if not self.large:
            return [*small]
        rest = iter(small)
        at = {part.section: value for part, value in zip(self.large, large, strict=True)}
        sections = range(len(self.columns.section_ids))
        return [at[i] if i in at else next(rest) for i in sections]

    def parts(self) -> list[Part]:
        """Where each section stands, the small ones too, in index order."""
        small = []
        start = self.small_start
        sections = [i for i, length in enumerate(self.columns.payloads) if length < LARGE_BYTES]
        for number, (section, length) in enumerate(zip(sections, self.small_lengths, strict=True)):
            small.append(Part(self.columns, section, start, start + length, number))
            start += length
        return self.arrange(small, self.large)

    def split_small(self, data: memoryview, sums: list[int]) -> list[bytes]:
        """The small sections' bytes, checked."""
        small = _split(data, self.small_lengths)
        found = [*map(checksum, small)]
        if found == sums[: len(small)]:
            return small
        damaged = next(i for i, (a, b) in enumerate(zip(found, sums, strict=False)) if a != b)
        is_small = [length < LARGE_BYTES for length in self.columns.payloads]
        section = [i for i, yes in enumerate(is_small) if yes][damaged]
        raise DecodeError(
            f"damaged: the checksum of its {len(small[damaged])} bytes does not match",
            where=self.columns.section_place(section),
        )


def encode_index(columns: Columns, stored: list[int] | None) -> bytes:
    """The index of a tree.

    Args:
        columns: The tree's columns, with the sections' lengths as the payloads.
        stored: How many bytes of each section the container has, where that is not all.
    """
    try:
        elements = _converter().unstructure(columns)
        if stored is not None:
            elements.insert(3, _packed("Q", stored))
        return cast(bytes, msgpack.packb(elements))
    except Exception as error:
        _explain_ids(columns, error)


def decode_index(header: Header, index: memoryview, limits: Limits) -> Layout:
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
    names = count - (4 if header.flags else 3)
    if names > limits.max_nodes:
        raise DecodeError(
            f"it has {names} nodes and sections, of {limits.max_nodes} allowed; "
            "Limits(max_nodes=...) allows more",
            where="index",
        )
    head = [unpacker.unpack() for _ in range(3)]
    stored = unpacker.unpack() if header.flags else head[2]
    nodes, lengths = _unpacked("I", head[0], "children"), _unpacked("Q", head[2], "lengths")
    needed = len(nodes) + len(lengths)
    if names != needed:
        raise DecodeError(f"it needs {needed} ids and has {names}", where="index")
    stored = _unpacked("Q", stored, "stored bytes")
    if len(stored) != len(lengths):
        raise DecodeError(
            f"its columns disagree: {len(lengths)} lengths, {len(stored)} stored bytes",
            where="index",
        )
    if sum(lengths) > (limits.max_bytes if header.flags else header.total_bytes):
        raise DecodeError(
            f"its sections make {sum(lengths)} bytes, of {limits.max_bytes} allowed; "
            "Limits(max_bytes=...) allows more"
            if header.flags
            else "its sections make more bytes than the container has",
            where="index",
        )
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
    return _layout(columns, stored, header)


def encode_table(sums: list[int]) -> bytes:
    table = _packed("Q", sums)
    return table + _CHECKSUM.pack(checksum(table))


def decode_table(layout: Layout, data: memoryview) -> list[int]:
    """The checksums in the last bytes of a container."""
    table = data[-8 * layout.sums - 8 : -8]
    if _CHECKSUM.unpack(data[-8:])[0] != checksum(table):
        raise DecodeError("damaged: its checksum does not match", where="table of checksums")
    if any(data[: -8 * layout.sums - 8]):
        raise DecodeError("the bytes before it are not zero", where="table of checksums")
    return _unpacked("Q", bytes(table), "checksums").tolist()


def chunk_sums(view: memoryview) -> list[int]:
    """The checksum of each MiB."""
    starts = range(0, view.nbytes, CHUNK_BYTES)
    return [checksum(view[start : start + CHUNK_BYTES]) for start in starts]


def chunks_in(length: int) -> int:
    return -(-length // CHUNK_BYTES)


def _layout(columns: Columns, stored: memoryview, header: Header) -> Layout:
    lengths = columns.payloads
    start = HEADER_BYTES + header.index_bytes
    large: list[Part] = []
    if lengths and max(lengths) >= LARGE_BYTES:
        small = [length for length in lengths if length < LARGE_BYTES]
    else:
        small = lengths
    end = small_end = start + sum(small)
    sums = len(small)
    flags = 0
    if header.flags or len(small) != len(lengths):
        for section, (length, there) in enumerate(zip(lengths, stored, strict=True)):
            detached = there == NOT_STORED and length >= LARGE_BYTES
            if not detached and (there > length or (there < length < LARGE_BYTES)):
                raise DecodeError(
                    f"the container cannot have {there} of its {length} bytes",
                    where=columns.section_place(section),
                )
            if length >= LARGE_BYTES:
                begin = end + (-end % ALIGNMENT_BYTES if there == length else 0)
                end = begin + (0 if detached else there)
                large.append(Part(columns, section, begin, end, sums, detached))
                sums += chunks_in(end - begin)
                flags |= DETACHED if detached else COMPRESSED if there < length else 0
    if flags != header.flags:
        raise DecodeError(
            f"its sections need features {flags:#x}, but the header says {header.flags:#x}",
            where="index",
        )
    total = end + -end % 8 + 8 * sums + 8
    if total != header.total_bytes:
        raise DecodeError(
            f"its sections make {total} bytes, but the header says {header.total_bytes}",
            where="index",
        )
    return Layout(columns, start, small_end, small, large, end, sums)


def _index_out(columns: Columns) -> list[Any]:
    """The index of a container, as msgpack takes it."""
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
