"""Snapshots looked into: opened by their index, found by a path, compared by field and page."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import attrs

from vmmig import formats, transport
from vmmig.codec import CHUNK_BYTES, LARGE_BYTES, Container, Limits, StoredSection
from vmmig.errors import MigratableError, MigrateReceiveError, MissingExtraError, RestoreError
from vmmig.memory import MemoryRangeTable
from vmmig.snapshot import Snapshot, SnapshotDataSection, SnapshotPath, raw_view
from vmmig.transfer import SCHEME, CancelToken, Options, Progress, shown_url

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAGE_BYTES = 4096

_WINDOW_BYTES = 16 << 20
_STEP = r"""\.(snapshots|snapshot_data)\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]"""

Told = Callable[[int, int], object]


@attrs.frozen
class Opened:
    """A snapshot that is opened, and what its file says of itself.

    Attributes:
        url: Where it is, without credentials.
        format: The name of its format.
        snapshot: Its tree. The sections of a container are `vmmig.codec.StoredSection`.
        nbytes: How many bytes the file has; None where it is a folder.
        version: The version of the format, where it says one.
        writer: Who wrote it, where it says so.
    """

    url: str
    format: str
    snapshot: Snapshot
    nbytes: int | None = None
    version: int | None = None
    writer: str | None = None


def open_snapshot(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    limits: Limits | None = None,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    **options: Unpack[Options],
) -> Opened:
    """Open a snapshot to look into it, reading no more of it than its index.

    Args:
        source: A file or folder of any format, or the URL of a container.
        format: The format's name; None for what it looks like.
        limits: What to refuse before memory is spent on it.
        progress: Is told how far it is, where it must be fetched as a whole.
        cancel: Ends it with an error.
        options: See `vmmig.transfer.Options`.

    Raises:
        MigrateReceiveError: It cannot be had, or its header or index is damaged.
        DecodeError: It is of no known format.

    >>> from vmmig import send
    >>> path = getfixture("tmp_path") / "vm.vmsnap"
    >>> send(Snapshot("vm"), path)
    >>> opened = open_snapshot(path)
    >>> opened.format, opened.version, opened.nbytes, opened.snapshot
    ('vmmig', 1, 128, Snapshot('vm'))
    """
    shown = shown_url(source)
    if is_file(source):
        from vmmig.transport.file import path_of

        path = path_of(source, MigrateReceiveError)
        name = format or formats.sniff(path)
        if name != "vmmig":
            snapshot = formats.read(path, name)
            nbytes = os.path.getsize(path) if os.path.isfile(path) else None
            return Opened(shown, name, snapshot, nbytes)
    elif format not in (None, "vmmig"):
        raise MigrateReceiveError(f"{shown!r}: {format} is read from a file; fetch it first")
    data = transport.recv(
        source,
        lazily=True,
        max_bytes=(limits or Limits()).max_bytes,
        progress=progress,
        cancel=cancel,
        **options,
    )
    try:
        container = Container(data, limits=limits)
    except (MigrateReceiveError, MissingExtraError):
        raise
    except MigratableError as error:
        raise MigrateReceiveError(f"{shown!r}: {error}") from error
    header = container.header
    return Opened(
        shown, "vmmig", container.snapshot, header.total_bytes, header.version, header.writer
    )


def is_file(source: str | os.PathLike[str]) -> bool:
    """Whether a path, or a ``file:`` URL, is given.

    >>> is_file("vm.vmsnap"), is_file("s3://bucket/vm.vmsnap")
    (True, False)
    """
    match = SCHEME.match(source) if isinstance(source, str) else None
    return match is None or match[1].lower() == "file"


class Place(NamedTuple):
    """A node of a tree, or one of its sections."""

    path: SnapshotPath
    section: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.section is None else self.path.section(self.section)


def locate(root: Snapshot, text: str) -> Place:
    """The node or section that is meant.

    Args:
        root: The tree.
        text: Ids joined by ``/``, which may hold ``/`` themselves; the last may be a section's.
            Or a place as errors show it: ``$.snapshots['cpu'].snapshot_data['regs']``.

    Raises:
        RestoreError: There is no such place, or more than one.

    >>> vm = Snapshot("vm")
    >>> vm.add_snapshot(Snapshot("0:2.0/nic", {}, {"mac": SnapshotDataSection("mac", b"")}))
    >>> str(locate(vm, "0:2.0/nic/mac"))
    "$.snapshots['0:2.0/nic'].snapshot_data['mac']"
    >>> locate(vm, str(locate(vm, "0:2.0/nic/mac"))) == locate(vm, "0:2.0/nic/mac")
    True
    """
    if text.startswith("$") and (place := _spelled_out(root, text)) is not None:
        return place
    found: list[Place] = []
    nearest = (root, SnapshotPath(), text)
    stack = [nearest]
    while stack:
        node, path, rest = stack.pop()
        if len(rest) < len(nearest[2]):
            nearest = node, path, rest
        if not rest:
            found.append(Place(path))
            continue
        if rest in node.snapshot_data:
            found.append(Place(path, rest))
        at = -1
        while at < len(rest):
            at = rest.find("/", at + 1)
            at = len(rest) if at < 0 else at
            if rest[:at] in node.snapshots:
                stack.append((node.snapshots[rest[:at]], path.child(rest[:at]), rest[at + 1 :]))
    if len(found) == 1:
        return found[0]
    if found:
        raise RestoreError(f"{text!r} may mean {', or '.join(map(str, found[:4]))}; write that")
    node, path, rest = nearest
    known = [repr(id) for id in [*node.snapshots, *node.snapshot_data][:8]]
    more = len(node.snapshots) + len(node.snapshot_data) - len(known)
    known += [f"{more} more"] if more else []
    raise RestoreError(
        f"there is no {rest[:200]!r} at {path} (it has {', '.join(known) or 'nothing'})"
    )


def _spelled_out(root: Snapshot, text: str) -> Place | None:
    from ast import literal_eval

    node, path, section = root, SnapshotPath(), None
    pattern = re.compile(_STEP)
    at = 1
    while at < len(text):
        step = pattern.match(text, at)
        if step is None or section is not None:
            return None
        id = literal_eval(step[2])
        if step[1] == "snapshots":
            node, path = node.find([id]), path.child(id)
        else:
            section = node.section(id).id
        at = step.end()
    return Place(path, section)


@attrs.frozen
class PageChanges:
    """Where two sections differ.

    Attributes:
        ranges: The bytes of all pages that differ, and what only one of the two has.
        compared_bytes: How many bytes were compared.
        proven_bytes: How many were taken to be equal because their checksums are.
    """

    ranges: MemoryRangeTable
    compared_bytes: int
    proven_bytes: int


def changed_pages(
    before: SnapshotDataSection,
    after: SnapshotDataSection,
    *,
    page_bytes: int = PAGE_BYTES,
    full: bool = False,
    progress: Told | None = None,
) -> PageChanges:
    """The pages in which two sections differ.

    Where both are sections of containers, the MiBs whose checksums are equal are taken to be
    equal: that holds as long as neither file is damaged, which `vmmig.codec.examine` finds out,
    and with 64-bit checksums not made by an adversary. The others are compared byte by byte,
    where they are mapped at the speed of memory. A compressed section is decompressed as a whole.

    Args:
        before: The one section.
        after: The other.
        page_bytes: What a page is.
        full: Believe no checksum, and compare every byte.
        progress: Is told how many bytes are done, and how many there are.

    Raises:
        MigratableError: A section could not be fetched or decompressed.

    >>> before = SnapshotDataSection("ram", bytes(3 * 4096))
    >>> after = SnapshotDataSection("ram", bytes(4096) + b"x" + bytes(2 * 4096 - 1))
    >>> changed_pages(before, after).ranges
    MemoryRangeTable(ranges=(MemoryRange(gpa=4096, length=4096),))
    """
    shared = min(before.nbytes, after.nbytes)
    whole = max(before.nbytes, after.nbytes)
    spans = [(0, shared)] if full else [*_unproven(before, after, shared)]
    starts: list[int] = []
    ends: list[int] = []
    compared = 0
    one, two = (_Windows(section) for section in (before, after)) if spans else (None, None)
    for first, last in spans:
        for start in range(first, last, _WINDOW_BYTES):
            stop = min(start + _WINDOW_BYTES, last)
            assert one is not None
            assert two is not None
            for at, length in _differing(one(start, stop), two(start, stop), page_bytes):
                if ends and ends[-1] == start + at:
                    ends[-1] += length
                else:
                    starts.append(start + at)
                    ends.append(start + at + length)
            compared += stop - start
            if progress is not None:
                progress(stop, whole)
    if shared < whole and ends and ends[-1] == shared:
        ends[-1] = whole
    elif shared < whole:
        starts.append(shared)
        ends.append(whole)
    return PageChanges(MemoryRangeTable.from_spans(starts, ends), compared, shared - compared)


@attrs.frozen
class Change:
    """One place where two snapshots differ.

    Attributes:
        path: The node.
        section: The section; None where it is the node itself.
        field: The field of the section, where both are decoded; ``version``, ``writer`` and
            ``kind`` in parentheses stand for what `vmmig.formats.Decoded` has.
        change: What the second did to the first.
        before: The field's value, or the section or node; None where it was added.
        after: The same of the second; None where it was removed.
        pages: Where both have the section, and it is not decoded, its bytes that differ.
    """

    path: SnapshotPath
    section: str | None
    field: str | None
    change: Literal["added", "removed", "changed"]
    before: Any = None
    after: Any = None
    pages: PageChanges | None = None

    @property
    def place(self) -> str:
        """Where it is, as text."""
        place = str(Place(self.path, self.section))
        if self.field is None:
            return place
        return place + ("" if self.field[:1] in ("(", "[") else ".") + self.field


class Comparison:
    """Where two snapshots differ: iterate over it, once, for each `Change`.

    A section below 64 KiB that is decoded on both sides is compared by field; others by the
    byte, and from 64 KiB on by the page. Each node comes before its children, in id order.

    Args:
        before: The one snapshot.
        after: The other.
        full: As for `changed_pages`, which says what is believed otherwise.
        progress: Is told, for each large section, how many bytes are done and how many it has.

    Attributes:
        compared_bytes: How many bytes were compared up to now.
        proven_bytes: How many were taken to be equal because their checksums are.

    Raises:
        MigratableError: While it is iterated over: a section could not be fetched or decompressed.

    >>> a = Snapshot("vm", {}, {"config": SnapshotDataSection("config", b'{"cpus": 1}')})
    >>> b = Snapshot("vm", {}, {"config": SnapshotDataSection("config", b'{"cpus": 2}')})
    >>> for change in Comparison(a, b):
    ...     print(change.place, change.before, change.after)
    $.snapshot_data['config'].cpus 1 2
    """

    def __init__(
        self,
        before: Snapshot,
        after: Snapshot,
        *,
        full: bool = False,
        progress: Told | None = None,
    ) -> None:
        self._roots = before, after
        self._full = full
        self._progress = progress
        self.compared_bytes = 0
        self.proven_bytes = 0

    def __iter__(self) -> Iterator[Change]:
        before, after = self._roots
        if before.id != after.id:
            yield Change(SnapshotPath(), None, "(id)", "changed", before.id, after.id)
        stack: list[tuple[SnapshotPath, Snapshot | None, Snapshot | None]] = [
            (SnapshotPath(), before, after)
        ]
        while stack:
            path, old, new = stack.pop()
            if old is None or new is None:
                yield Change(path, None, None, "added" if old is None else "removed", old, new)
                continue
            for id in sorted(old.snapshot_data.keys() | new.snapshot_data.keys()):
                one, two = old.snapshot_data.get(id), new.snapshot_data.get(id)
                if one is None or two is None:
                    yield Change(path, id, None, "added" if one is None else "removed", one, two)
                else:
                    yield from self._section(path, id, one, two)
            ids = sorted(old.snapshots.keys() | new.snapshots.keys(), reverse=True)
            stack.extend(
                (path.child(id), old.snapshots.get(id), new.snapshots.get(id)) for id in ids
            )

    def _section(
        self, path: SnapshotPath, id: str, one: SnapshotDataSection, two: SnapshotDataSection
    ) -> Iterator[Change]:
        large = max(one.nbytes, two.nbytes) >= LARGE_BYTES
        pages = changed_pages(
            one,
            two,
            page_bytes=PAGE_BYTES if large else 1,
            full=self._full,
            progress=self._progress if large else None,
        )
        self.compared_bytes += pages.compared_bytes
        self.proven_bytes += pages.proven_bytes
        if pages.ranges:
            fields = [] if large else [*_changed_fields(self._roots, path, id)]
            yield from fields or [Change(path, id, None, "changed", one, two, pages)]


def _changed_fields(
    roots: tuple[Snapshot, Snapshot], path: SnapshotPath, id: str
) -> Iterator[Change]:
    try:
        one, two = (formats.decode(root, path.ids, id) for root in roots)
    except MigratableError:
        return
    if one is None or two is None:
        return
    for name in ("kind", "version", "writer"):
        old, new = getattr(one, name), getattr(two, name)
        if old != new:
            yield Change(path, id, f"({name})", "changed", old, new)
    before, after = (dict(formats.leaves(each.fields)) for each in (one, two))
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield Change(path, id, name, "removed", before[name])
        elif name not in before:
            yield Change(path, id, name, "added", None, after[name])
        elif not _same(before[name], after[name]):
            yield Change(path, id, name, "changed", before[name], after[name])


@attrs.frozen
class PageMap:
    """What the pages of a section hold, summed up in cells for a picture.

    Attributes:
        pages: How many pages there are.
        pages_per_cell: How many stand for one cell; the last may have fewer.
        zero: For each cell, how many of its pages are all zero.
        changed: For each cell, how many differ from those of the other section.
    """

    pages: int
    pages_per_cell: int
    zero: tuple[int, ...]
    changed: tuple[int, ...]


def page_map(
    section: SnapshotDataSection,
    against: SnapshotDataSection | None = None,
    *,
    max_cells: int = 1 << 14,
    progress: Told | None = None,
) -> PageMap:
    """Which pages of a section are zero, and which differ from another section's.

    Checksums are believed as by `changed_pages`; a MiB that has the checksum of zeros is not read.

    Args:
        section: What to look at.
        against: The other; what only one of them has is changed.
        max_cells: How many cells there may be.
        progress: Is told how many bytes are done, and how many there are.

    Raises:
        MigratableError: A section could not be fetched or decompressed.

    >>> page_map(SnapshotDataSection("ram", bytes(4096) + b"x" * 4096))
    PageMap(pages=2, pages_per_cell=1, zero=(1, 0), changed=(0, 0))
    """
    total = section.nbytes
    zero_pages = bytearray(-(-total // PAGE_BYTES))
    for start, stop in _zero_spans(section, progress):
        first, last = start // PAGE_BYTES, -(-stop // PAGE_BYTES)
        zero_pages[first:last] = b"\1" * (last - first)
    changed_bits = bytearray(len(zero_pages))
    if against is not None:
        for gpa, length in changed_pages(section, against, progress=progress).ranges.pairs():
            first = gpa // PAGE_BYTES
            last = min(-(-(gpa + length) // PAGE_BYTES), len(changed_bits))
            changed_bits[first:last] = b"\1" * (last - first)
    per_cell = max(-(-len(zero_pages) // max_cells), 1)
    cells = range(0, len(zero_pages), per_cell)
    return PageMap(
        len(zero_pages),
        per_cell,
        tuple(zero_pages.count(1, at, at + per_cell) for at in cells),
        tuple(changed_bits.count(1, at, at + per_cell) for at in cells),
    )


class _Windows:
    """Parts of a section as they stand there, unchecked; mapped where that is possible."""

    def __init__(self, section: SnapshotDataSection) -> None:
        self._read = None
        if isinstance(section, StoredSection) and section.stored == "plain":
            self._read = section.read
        else:
            self._view = raw_view(section.snapshot)

    def __call__(self, start: int, stop: int) -> memoryview:
        if self._read is not None:
            return self._read(start, stop, checked=False)
        return self._view[start:stop]


def _unproven(
    before: SnapshotDataSection, after: SnapshotDataSection, shared: int
) -> Iterator[tuple[int, int]]:
    """The spans of the shared bytes that no checksums prove to be equal."""
    sums = [_sums(section) for section in (before, after)]
    if sums[0] is None or sums[1] is None or sums[0] == sums[1] == []:
        yield (0, shared)
        return
    stored = {getattr(section, "stored", None) for section in (before, after)}
    if stored != {"plain"} or (min(before.nbytes, after.nbytes) < LARGE_BYTES):
        # Only as a whole: a frame has no MiBs of its own, and a small section has one checksum.
        if not (len(stored) == 1 and before.nbytes == after.nbytes and sums[0] == sums[1]):
            yield (0, shared)
        return
    begin: int | None = None
    for i in range(-(-shared // CHUNK_BYTES)):
        start = i * CHUNK_BYTES
        sizes = {min(section.nbytes - start, CHUNK_BYTES) for section in (before, after)}
        equal = len(sizes) == 1 and sums[0][i] == sums[1][i]
        if not equal and begin is None:
            begin = start
        elif equal and begin is not None:
            yield (begin, start)
            begin = None
    if begin is not None:
        yield (begin, shared)


def _sums(section: SnapshotDataSection) -> list[int] | None:
    try:
        return section.checksums() if isinstance(section, StoredSection) else None
    except MigratableError:
        return None


def _differing(a: memoryview, b: memoryview, page_bytes: int) -> Iterator[tuple[int, int]]:
    """The runs of pages in which two equally long pieces differ: start and length."""
    if page_bytes == 1:
        yield from _differing_bytes(bytes(a), bytes(b))
        return
    from vmmig._native import address_of, libc

    memcmp = libc().memcmp
    one, two, length = address_of(a), address_of(b), a.nbytes
    if not memcmp(one, two, length):
        return
    for block in range(0, length, CHUNK_BYTES):
        end = min(block + CHUNK_BYTES, length)
        if not memcmp(one + block, two + block, end - block):
            continue
        firsts, others = (_first_words(view[block:end], page_bytes) for view in (a, b))
        if all(map(operator.ne, firsts, others)):
            yield block, end - block
            continue
        for at, x, y in zip(range(block, end, page_bytes), firsts, others, strict=True):
            size = min(page_bytes, length - at)
            if x != y or memcmp(one + at, two + at, size):
                yield at, size


def _first_words(view: memoryview, page_bytes: int) -> list[int]:
    """A few bytes of each page, which mostly tell already: asking C for each page costs more."""
    if view.nbytes % 8 or page_bytes % 8:
        return [view[at] for at in range(0, view.nbytes, page_bytes)]
    return view.cast("Q")[:: page_bytes // 8].tolist()


def _differing_bytes(a: bytes, b: bytes) -> Iterator[tuple[int, int]]:
    if a != b:
        for at, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                yield at, 1


def _zero_spans(section: SnapshotDataSection, progress: Told | None) -> Iterator[tuple[int, int]]:
    """The spans of the pages that are all zero; the last page may be cut."""
    from xxhash import xxh3_64_intdigest

    from vmmig._native import address_of, libc

    sums = _sums(section) if getattr(section, "stored", None) == "plain" else None
    of_zeros = xxh3_64_intdigest(bytes(CHUNK_BYTES))
    zeros = bytes(PAGE_BYTES)
    memcmp, nothing = libc().memcmp, address_of(zeros)
    windows: _Windows | None = None
    for i, start in enumerate(range(0, section.nbytes, CHUNK_BYTES)):
        stop = min(start + CHUNK_BYTES, section.nbytes)
        if sums and stop - start == CHUNK_BYTES and sums[i] == of_zeros:
            yield start, stop
        else:
            windows = windows or _Windows(section)
            view = windows(start, stop)
            address = address_of(view)
            words = _first_words(view, PAGE_BYTES)
            for at, word in zip(range(0, stop - start, PAGE_BYTES), words, strict=True):
                size = min(PAGE_BYTES, stop - start - at)
                if not word and not memcmp(address + at, nothing, size):
                    yield start + at, start + at + size
        if progress is not None:
            progress(stop, section.nbytes)


def _same(a: object, b: object) -> bool:
    """Equal and of one type, so that 1, 1.0 and True differ; a NaN is what it is."""
    return type(a) is type(b) and (a == b or (a != a and b != b))
