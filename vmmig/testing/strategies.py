"""Hypothesis strategies for what vmmig works with.

They generate what is nasty, and shrink to what is simple: of a tree that fails, only the nodes
that make it fail are left.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, product
from typing import Any

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from xxhash import xxh3_64_intdigest

from vmmig.codec import HEADER_BYTES, dumps
from vmmig.composite import Composite
from vmmig.memory import PAGE_BYTES, MemoryRange, MemoryRangeTable
from vmmig.snapshot import Snapshot, SnapshotDataSection
from vmmig.testing.components import Counter

_NASTY_IDS = ["", "\0", "/", "a/b", "../../x", "'", "\\", "a\u0301", "\U0001d53e", "\u202e", " "]
_NASTY_SIZES = [65535, 65536, 65537, (1 << 20) + 1]
_MAX_64 = (1 << 64) - 1


def snapshots(
    *,
    max_nodes: int = 300,
    max_section_bytes: int = 100,
    ids: st.SearchStrategy[str] | None = None,
) -> st.SearchStrategy[Snapshot]:
    """Trees of any shape: mostly small, now and then deep or wide.

    Args:
        max_nodes: The most nodes a tree has, the root included.
        max_section_bytes: The most bytes a section has; sizes at which the container changes
            its layout come up where this allows them.
        ids: The ids of nodes and sections; by default short texts of any characters.

    Raises:
        InvalidArgument: A bound is not what it should be.

    >>> from hypothesis import find
    >>> find(snapshots(max_nodes=5), lambda snapshot: snapshot.snapshot_data)
    Snapshot('', snapshot_data: ['': 0 bytes])
    """
    check_bound("max_nodes", max_nodes, 1)
    check_bound("max_section_bytes", max_section_bytes, 0)
    most = max(20, max_nodes - 13)
    names: st.SearchStrategy[Sequence[object]] = st.just(range(most))
    if ids is None:
        ids = _ids()
    else:
        names = st.lists(ids, unique=True, min_size=1, max_size=most)
    sections = st.dictionaries(ids, _payloads(0, max_section_bytes), max_size=3)
    below = st.tuples(st.integers(0, 7), ids, sections)
    shapes = ["few", "few", "few", "deep", "wide"] if max_nodes >= 40 else ["few"]
    return st.builds(
        _tree,
        ids,
        sections,
        st.lists(below, max_size=min(max_nodes - 1, 12)),
        st.sampled_from(shapes),
        st.integers(20, most),
        names,
    )


def snapshot_data_sections(
    *,
    min_bytes: int = 0,
    max_bytes: int = 100,
    ids: st.SearchStrategy[str] | None = None,
) -> st.SearchStrategy[SnapshotDataSection]:
    """Sections, with payloads of different bytes-like types.

    Args:
        min_bytes: The fewest bytes a section has.
        max_bytes: The most bytes a section has.
        ids: The sections' ids.

    Raises:
        InvalidArgument: A bound is not what it should be.

    >>> from hypothesis import find
    >>> find(snapshot_data_sections(min_bytes=2), lambda section: True)
    SnapshotDataSection('', 2 bytes: 00 00)
    """
    check_bound("min_bytes", min_bytes, 0)
    check_bound("max_bytes", max_bytes, min_bytes)
    return st.builds(
        SnapshotDataSection, _ids() if ids is None else ids, _payloads(min_bytes, max_bytes)
    )


def memory_ranges(
    *, max_gpa: int = _MAX_64, max_length: int = 1 << 30, page_bytes: int = 1
) -> st.SearchStrategy[MemoryRange]:
    """Ranges of guest-physical memory.

    Args:
        max_gpa: No range reaches beyond this address.
        max_length: The most bytes of a range.
        page_bytes: Addresses and lengths are multiples of it.

    Raises:
        InvalidArgument: A bound is not what it should be.

    >>> from hypothesis import find
    >>> find(memory_ranges(page_bytes=4096), lambda each: each.length > 5000)
    MemoryRange(gpa=0, length=8192)
    """
    check_bound("page_bytes", page_bytes, 1)
    check_bound("max_length", max_length, 0)
    check_bound("max_gpa", max_gpa, 0)
    if max_gpa > _MAX_64:
        raise InvalidArgument(f"max_gpa={max_gpa} is not within 64 bits")
    pages = (max_gpa + 1) // page_bytes
    lengths = st.integers(0, min(max_length // page_bytes, pages, _MAX_64))

    def ranges(length: int) -> st.SearchStrategy[MemoryRange]:
        last = max(0, pages - max(length, 1))

        def at(page: int, from_the_end: bool) -> MemoryRange:
            page = last - page if from_the_end else page
            return MemoryRange(page * page_bytes, length * page_bytes)

        return st.builds(at, st.one_of(st.just(0), st.integers(0, last)), st.booleans())

    return lengths.flatmap(ranges)


def memory_range_tables(
    *, max_ranges: int = 8, max_gpa: int = (1 << 32) - 1, page_bytes: int = PAGE_BYTES
) -> st.SearchStrategy[MemoryRangeTable]:
    """Tables of ranges in any order, which may overlap, as the wire protocol allows.

    Args:
        max_ranges: The most ranges of a table.
        max_gpa: No range reaches beyond this address.
        page_bytes: Addresses and lengths are multiples of it.

    Raises:
        InvalidArgument: A bound is not what it should be.

    >>> from hypothesis import find
    >>> find(memory_range_tables(), lambda table: table.total_bytes > 0)
    MemoryRangeTable(ranges=(MemoryRange(gpa=0, length=4096),))
    """
    check_bound("max_ranges", max_ranges, 0)
    ranges = memory_ranges(max_gpa=max_gpa, max_length=64 * page_bytes, page_bytes=page_bytes)
    return st.builds(MemoryRangeTable, st.lists(ranges, max_size=max_ranges))


def component_trees(*, max_components: int = 8) -> st.SearchStrategy[Composite]:
    """Machines that were never paused: composites of `Counter` components and of composites.

    The counters have any values, and now and then one part depends on another.

    Args:
        max_components: The most components below the root.

    Raises:
        InvalidArgument: A bound is not what it should be.

    >>> from hypothesis import find
    >>> [*find(component_trees(), lambda machine: machine.components).components]
    ['']
    """
    check_bound("max_components", max_components, 0)

    @st.composite
    def machines(draw: st.DrawFn) -> Composite:
        left = max_components

        def counter(name: str) -> Counter:
            part = Counter(name)
            part.add(draw(st.integers(-9, 9)))
            return part

        def composite(name: str, depth: int) -> Composite:
            nonlocal left
            parts: dict[str, Any] = {}
            needs: dict[str, list[str]] = {}
            names = st.lists(_ids(), max_size=min(left, 4), unique=True)
            for id in draw(names):
                if not left:
                    break
                left -= 1
                nested = depth < 3 and draw(st.integers(0, 3)) == 3
                parts[id] = composite(id, depth + 1) if nested else counter(id)
                others = [other for other in parts if other != id]
                needs[id] = draw(st.lists(st.sampled_from(others), max_size=1)) if others else []
            return Composite(name, parts.values(), depends_on=needs)

        return composite(draw(_ids()), 0)

    return machines()


def corrupted_containers(
    *, of: st.SearchStrategy[Snapshot] | None = None
) -> st.SearchStrategy[bytes]:
    """The bytes of a container, damaged so that `vmmig.loads` must raise a DecodeError.

    Among them are truncations, flipped bits, bytes that were added, zeroed, swapped or repeated,
    and, with every checksum right, headers and indexes that lie, and bombs. `vmmig.load` refuses
    them too, except that it may leave bytes which were added at the end in the stream.

    Args:
        of: The snapshots whose containers are damaged.

    >>> from hypothesis import find
    >>> find(corrupted_containers(), lambda data: True)
    b''
    """
    whole = (snapshots(max_nodes=12) if of is None else of).map(dumps)
    return st.one_of([_damaged(whole, change) for change in _DAMAGES])


def _damaged(
    whole: st.SearchStrategy[bytes], change: Callable[[bytes, int, int], bytes]
) -> st.SearchStrategy[bytes]:
    numbers = st.integers(0, 1 << 32)
    both = st.builds(lambda data, a, b: (data, change(data, a, b)), whole, numbers, numbers)
    return both.filter(lambda pair: pair[0] != pair[1]).map(lambda pair: pair[1])


def _truncated(data: bytes, at: int, _: int) -> bytes:
    return data[: at % len(data)]


def _flipped(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]


def _lengthened(data: bytes, at: int, byte: int) -> bytes:
    at %= len(data) + 1
    return data[:at] + bytes([byte % 256]) + data[at:]


def _zeroed(data: bytes, at: int, length: int) -> bytes:
    at %= len(data)
    length = 1 + length % min(64, len(data) - at)
    return data[:at] + bytes(length) + data[at + length :]


def _swapped(data: bytes, at: int, length: int) -> bytes:
    length = 1 + length % 16
    at %= max(1, len(data) - 2 * length)
    middle, end = at + length, at + 2 * length
    return data[:at] + data[middle:end] + data[at:middle] + data[end:]


def _repeated(data: bytes, at: int, length: int) -> bytes:
    length = 1 + length % 64
    at %= len(data)
    return data[: at + length] + data[at:]


def _lying_header(data: bytes, field: int, value: int) -> bytes:
    """One number of the header is another, and the header's checksum is right."""
    offset, code = [(8, "<H"), (10, "<H"), (12, "<I"), (16, "<Q"), (24, "<Q"), (32, "<Q")][
        field % 6
    ]
    header = bytearray(data[: HEADER_BYTES - 8])
    lies = [0, 1, 2, value, 1 << 31, 1 << 62, _MAX_64]
    struct.pack_into(
        code, header, offset, lies[value % len(lies)] % (1 << 8 * struct.calcsize(code))
    )
    return _sealed(header) + data[HEADER_BYTES:]


def _lying_index(data: bytes, at: int, bit: int) -> bytes:
    """The index counts wrong: children of a node, sections of a node, or bytes of a section."""
    (index_bytes,) = struct.unpack_from("<Q", data, 16)
    end = HEADER_BYTES + index_bytes
    index = bytearray(data[HEADER_BYTES:end])
    counts = [*_columns(index)]
    index[counts[at % len(counts)]] ^= 1 << bit % 8
    return _with_index(data, bytes(index), data[end:])


def _columns(index: bytearray) -> Iterator[int]:
    """Where the bytes of the index's three columns of numbers are."""
    start = 1 + {0xDC: 2, 0xDD: 4}.get(index[0], 0)
    for _ in range(3):
        size_bytes = {0xC4: 1, 0xC5: 2, 0xC6: 4}[index[start]]
        start += 1 + size_bytes
        end = start + int.from_bytes(index[start - size_bytes : start], "big")
        yield from range(start, end)
        start = end


def _bomb(data: bytes, kind: int, length: int) -> bytes:
    """An index of nested arrays or maps that claim to be large."""
    head = [b"\xdc\xff\xff", b"\xdd\x00\xff\xff\xff", b"\xde\xff\xff", b"\x94"][kind % 4]
    return _with_index(data, b"\x94" + head * (1 + length % 1000), b"")


def _with_index(data: bytes, index: bytes, rest: bytes) -> bytes:
    """The container with another index, and a header that is right about it."""
    header = bytearray(data[: HEADER_BYTES - 8])
    total = HEADER_BYTES + len(index) + len(rest)
    struct.pack_into("<QQQ", header, 16, len(index), total, xxh3_64_intdigest(index))
    return _sealed(header) + index + rest


def _sealed(header: bytearray) -> bytes:
    return bytes(header) + struct.pack("<Q", xxh3_64_intdigest(bytes(header)))


_DAMAGES = [
    _truncated,
    _flipped,
    _lengthened,
    _zeroed,
    _swapped,
    _repeated,
    _lying_header,
    _lying_index,
    _bomb,
]


def _ids() -> st.SearchStrategy[str]:
    return st.one_of(st.text(max_size=6), st.sampled_from(_NASTY_IDS))


def _payloads(min_bytes: int, max_bytes: int) -> st.SearchStrategy[Any]:
    data = st.binary(min_size=min_bytes, max_size=min(max_bytes, max(min_bytes, 100)))
    sizes = [size for size in _NASTY_SIZES if min_bytes <= size <= max_bytes]
    kinds = [bytes, bytes, bytes, bytearray, memoryview]
    # One choice for both: of an entry of few choices, shrinking gets rid in one step.
    forms = [*product([0, 0, 0, *sizes] if sizes else [0], kinds)]
    return st.builds(
        lambda payload, form: form[1](bytes(form[0]) if form[0] else payload),
        data,
        st.sampled_from(forms),
    )


def _tree(
    id: str,
    sections: dict[str, Any],
    below: list[tuple[int, str, dict[str, Any]]],
    shape: str,
    size: int,
    names: Sequence[object],
) -> Snapshot:
    """A tree of a root and the nodes ``below``, each under one that came before it.

    A ``deep`` or ``wide`` tree has ``size`` more nodes, called by ``names``: deep down the names
    repeat where there are fewer of them; side by side they cannot.
    """
    root = at = _node(id, sections)
    if shape == "deep":
        for name in islice(cycle(names), size):
            child = Snapshot(str(name))
            at.add_snapshot(child)
            at = child
    elif shape == "wide":
        for name in names[:size]:
            root.add_snapshot(Snapshot(str(name)))
    nodes = [at]
    for parent, name, own in below:
        place = nodes[parent % len(nodes)]
        if name not in place.snapshots:
            nodes.append(_node(name, own))
            place.add_snapshot(nodes[-1])
    return root


def _node(id: str, sections: dict[str, Any]) -> Snapshot:
    snapshot = Snapshot(id)
    for name, payload in sections.items():
        snapshot.add_data_section(SnapshotDataSection(name, payload))
    return snapshot


def check_bound(name: str, value: object, minimum: int) -> None:
    """Raise InvalidArgument unless ``value`` is an int that reaches ``minimum``.

    >>> check_bound("max_nodes", 1, 1)
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"{name}={value!r} is not an int")
    if value < minimum:
        raise InvalidArgument(f"{name}={value} is less than {minimum}")
