"""A snapshot: a tree of components, each with named sections of bytes.

The classes and their fields are those of Cloud Hypervisor's ``vm-migration`` crate. Nothing here
recurses, so a tree may be as deep as memory allows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress, islice, repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import attrs

from vmmig.errors import RestoreError, SnapshotError

if sys.version_info >= (3, 12):
    from collections.abc import Buffer as Buffer
else:
    from typing_extensions import Buffer as Buffer

if TYPE_CHECKING:
    from pickle import PickleBuffer

_V = TypeVar("_V")

MAX_NODES = 1 << 24
"""The most nodes and sections of a tree that is encoded, and by default of one decoded."""

_OUT_OF_BAND_BYTES = 1 << 16
_COMPARED_BYTES = 1 << 16
_SHOWN = 8
_PRETTY_NODES = 30
_CYCLE_CHECK = 1 << 16


def raw_view(payload: Buffer) -> memoryview:
    """A flat view of unsigned bytes over a contiguous bytes-like object, without a copy.

    Raises:
        SnapshotError: It is not bytes-like, or not contiguous.

    >>> import array
    >>> raw_view(array.array("I", [1, 2])).nbytes
    8
    """
    try:
        view = memoryview(payload)
        if view.format == "B" and view.ndim == 1 and view.contiguous:
            return view
        if "O" in view.format:
            raise TypeError("it holds references to Python objects, not their values")
        if not view.nbytes:
            return memoryview(b"")
        if view.c_contiguous:
            return view.cast("B")
        # Not for all: a memoryview of a memoryview that a PickleBuffer holds, when in a garbage
        # cycle, crashes CPython 3.11.
        from pickle import PickleBuffer

        return PickleBuffer(payload).raw()
    except (TypeError, BufferError, ValueError) as error:
        raise SnapshotError(
            f"a section holds a contiguous bytes-like object, not {type(payload).__name__}: {error}"
        ) from error


@attrs.define(eq=False, repr=False)
class SnapshotDataSection:
    """One named part of a component's state, as bytes.

    Args:
        id: The section's id, unique within its snapshot.
        snapshot: The bytes: any contiguous bytes-like object, which is kept as it is and
            never copied. What it shows must not change as long as the snapshot is in use.

    Raises:
        SnapshotError: ``snapshot`` is not a contiguous bytes-like object.

    >>> section = SnapshotDataSection("regs", b"\\x01\\x02")
    >>> section, section.nbytes
    (SnapshotDataSection('regs', 2 bytes: 01 02), 2)
    """

    id: str = ""
    snapshot: Buffer = b""

    def __attrs_post_init__(self) -> None:
        if type(self.snapshot) is not bytes:
            raw_view(self.snapshot)

    @property
    def nbytes(self) -> int:
        """The section's size in bytes."""
        return raw_view(self.snapshot).nbytes

    def in_pieces(self) -> tuple[memoryview, Callable[[int, int], None]]:
        """The bytes, for one who goes through them once, and what he calls for each piece.

        The second function is to be called before the bytes from a start to an end are used. What
        came from a file lazily is checked then, piece by piece, not as a whole beforehand.

        Raises:
            DecodeError: The second function finds the piece damaged.

        >>> view, check = SnapshotDataSection("ram", b"0123").in_pieces()
        >>> check(1, 3)
        >>> bytes(view[1:3])
        b'12'
        """
        return raw_view(self.snapshot), _check_nothing

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SnapshotDataSection):
            return NotImplemented
        return self is other or (
            self.id == other.id and _first_difference(self.snapshot, other.snapshot) is None
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        view = raw_view(self.snapshot)
        start = view[:16].hex(" ")
        dots = " ..." if view.nbytes > 16 else ""
        return f"SnapshotDataSection({_short(self.id)}, {view.nbytes} bytes: {start}{dots})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __copy__(self) -> SnapshotDataSection:
        return SnapshotDataSection(self.id, self.snapshot)

    def __deepcopy__(self, memo: dict[int, Any]) -> SnapshotDataSection:
        return SnapshotDataSection(self.id, _value(self.snapshot))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return SnapshotDataSection, (self.id, _pickled(self.snapshot, protocol))


def _check_nothing(start: int, end: int) -> None:
    """All is checked already."""


@attrs.frozen(eq=False, repr=False)
class SnapshotPath:
    """The place of a node in a tree: the ids from below the root down to it.

    It is linked to its parent's place, so that a path costs the same at any depth.

    >>> path = SnapshotPath().child("cpu-manager").child("cpu0")
    >>> path.ids, str(path)
    (('cpu-manager', 'cpu0'), "$.snapshots['cpu-manager'].snapshots['cpu0']")
    """

    parent: SnapshotPath | None = None
    id: str = ""

    def child(self, id: str) -> SnapshotPath:
        """The place of the child ``id``."""
        return SnapshotPath(self, id)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids from below the root down to this node; empty for the root itself."""
        ids = []
        place = self
        while place.parent is not None:
            ids.append(place.id)
            place = place.parent
        return tuple(reversed(ids))

    def section(self, id: str) -> str:
        """The place of a section of this node, as text."""
        return f"{self}.snapshot_data[{_short(id)}]"

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __eq__(self, other: object) -> bool:
        return self.ids == other.ids if isinstance(other, SnapshotPath) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return _place, (self.ids,)

    def __str__(self) -> str:
        steps = [f".snapshots[{_short(id)}]" for id in self.ids]
        if len(steps) > 2 * _SHOWN:
            steps[_SHOWN:-_SHOWN] = [f"...({len(steps) - 2 * _SHOWN} more)..."]
        return "$" + "".join(steps)

    def __repr__(self) -> str:
        return f"<SnapshotPath {self}>"


def _place(ids: Iterable[str]) -> SnapshotPath:
    place = SnapshotPath()
    for id in ids:
        place = place.child(id)
    return place


@attrs.define(eq=False, repr=False)
class Snapshot:
    """A component's snapshot: its own sections, and the snapshots of its sub-components.

    Nodes of the tree usually have children and no sections, leaves sections and no children.

    Args:
        id: The component's id.
        snapshots: The sub-components' snapshots, by their ids.
        snapshot_data: The component's own sections, by their ids.

    >>> vm = Snapshot("vm")
    >>> cpu = Snapshot("cpu")
    >>> cpu.add_data_section(SnapshotDataSection("regs", bytes(128)))
    >>> vm.add_snapshot(cpu)
    >>> vm
    Snapshot('vm', snapshots: ['cpu'])
    >>> vm.find("cpu").section("regs").nbytes
    128
    """

    id: str = ""
    snapshots: dict[str, Snapshot] = attrs.field(factory=dict)
    snapshot_data: dict[str, SnapshotDataSection] = attrs.field(factory=dict)

    def add_snapshot(self, snapshot: Snapshot) -> None:
        """Add a sub-component's snapshot; one of the same id is replaced.

        >>> vm = Snapshot("vm")
        >>> vm.add_snapshot(Snapshot("cpu"))
        >>> list(vm.snapshots)
        ['cpu']
        """
        self.snapshots[snapshot.id] = snapshot

    def add_data_section(self, section: SnapshotDataSection) -> None:
        """Add a section to the component's own data; one of the same id is replaced.

        >>> cpu = Snapshot("cpu")
        >>> cpu.add_data_section(SnapshotDataSection("regs", b"old"))
        >>> cpu.add_data_section(SnapshotDataSection("regs", b"new"))
        >>> cpu.snapshot_data["regs"].snapshot
        b'new'
        """
        self.snapshot_data[section.id] = section

    def section(self, id: str) -> SnapshotDataSection:
        """The component's own section ``id``.

        Raises:
            RestoreError: There is none; the error names those there are.

        >>> Snapshot("cpu").section("regs")
        Traceback (most recent call last):
        vmmig.errors.RestoreError: Failed to restore migratable component: snapshot 'cpu' has no \
section 'regs' (it has none)
        """
        try:
            return self.snapshot_data[id]
        except KeyError:
            raise RestoreError(
                f"snapshot {_short(self.id)} has no section {_short(id)} "
                f"({_what_there_is(self.snapshot_data)})"
            ) from None

    def take(self, *ids: str) -> tuple[Buffer, ...]:
        """The payloads of exactly these sections, in this order: what `restore` of a leaf needs.

        Raises:
            RestoreError: One is missing, or there is anything else, which would be lost.

        >>> cpu = Snapshot("cpu")
        >>> cpu.add_data_section(SnapshotDataSection("regs", b"0123"))
        >>> (regs,) = cpu.take("regs")
        >>> regs
        b'0123'
        >>> cpu.take()
        Traceback (most recent call last):
        vmmig.errors.RestoreError: Failed to restore migratable component: snapshot 'cpu' has \
what is not known here: section 'regs'
        """
        payloads = tuple(self.section(id).snapshot for id in ids)
        strange = [f"section {_short(id)}" for id in self.snapshot_data if id not in ids]
        strange += [f"snapshot {_short(id)}" for id in self.snapshots]
        if strange:
            raise RestoreError(
                f"snapshot {_short(self.id)} has what is not known here: {_shown(strange, str)}"
            )
        return payloads

    def find(self, path: str | Iterable[str]) -> Snapshot:
        """The node at ``path``: ids joined by ``/``, or a sequence of ids (which may hold ``/``).

        Raises:
            RestoreError: There is none; the error names the ids that are there instead.

        >>> vm = Snapshot("vm")
        >>> vm.add_snapshot(Snapshot("cpu"))
        >>> vm.find("cpu") is vm.find(["cpu"]) is vm.snapshots["cpu"], vm.find("") is vm
        (True, True)
        """
        node, place = self, SnapshotPath()
        for id in (path.split("/") if path else []) if isinstance(path, str) else path:
            if id not in node.snapshots:
                raise RestoreError(
                    f"there is no snapshot {_short(id)} at {place} "
                    f"({_what_there_is(node.snapshots)})"
                )
            node, place = node.snapshots[id], place.child(id)
        return node

    def walk(self) -> Iterator[tuple[SnapshotPath, Snapshot]]:
        """Every node with its place: the root first, each node before its children, in id order.

        Raises:
            SnapshotError: A node is its own ancestor.

        >>> vm = Snapshot("vm")
        >>> vm.add_snapshot(Snapshot("ram"))
        >>> vm.add_snapshot(Snapshot("cpu"))
        >>> [(str(path), node.id) for path, node in vm.walk()]
        [('$', 'vm'), ("$.snapshots['cpu']", 'cpu'), ("$.snapshots['ram']", 'ram')]
        """
        stack: list[tuple[SnapshotPath, Snapshot]] = [(SnapshotPath(), self)]
        seen = 0
        while stack:
            place, node = stack.pop()
            yield place, node
            if node.snapshots:
                children = sorted(node.snapshots.items(), reverse=True)
                stack.extend((place.child(id), child) for id, child in children)
            seen += 1
            if seen == _CYCLE_CHECK:
                _refuse_cycle(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        pairs: list[tuple[Snapshot, Snapshot]] = [(self, other)]
        seen = 0
        while pairs:
            a, b = pairs.pop()
            seen += 1
            if seen == _CYCLE_CHECK:
                _refuse_cycle(self)
            if a is b:
                continue
            if (
                a.id != b.id
                or a.snapshots.keys() != b.snapshots.keys()
                or a.snapshot_data != b.snapshot_data
            ):
                return False
            pairs.extend((child, b.snapshots[id]) for id, child in a.snapshots.items())
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = f"Snapshot({_short(self.id)}"
        if self.snapshots:
            text += f", snapshots: [{_shown(self.snapshots, _short)}]"
        if self.snapshot_data:
            sized = {
                f"{_short(id)}: {section.nbytes} bytes": section
                for id, section in list(self.snapshot_data.items())[: _SHOWN + 1]
            }
            more = len(self.snapshot_data) - len(sized)
            text += f", snapshot_data: [{_shown(sized, str, more)}]"
        return text + ")"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """A small tree whole, for hypothesis and IPython; of a large one only the root."""
        nodes = [*islice(self.walk(), _PRETTY_NODES + 1)]
        if len(nodes) > _PRETTY_NODES:
            nodes = nodes[:1]
        lines = [f"{'    ' * len(path.ids)}{node!r}" for path, node in nodes]
        printer.text("\n".join(lines))

    def __copy__(self) -> Snapshot:
        return Snapshot(self.id, {**self.snapshots}, {**self.snapshot_data})

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        columns = flatten(self)
        payloads = [_value(payload) for payload in columns.payloads]
        return build(*columns[:4], payloads)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        columns = flatten(self)
        payloads = [_pickled(payload, protocol) for payload in columns.payloads]
        return build, (*columns[:4], payloads)


@attrs.frozen(eq=False)
class Difference:
    """One place where two snapshots differ.

    Attributes:
        path: The node.
        section: The id of the section that differs; None where it is the node itself.
        change: What ``b`` did to ``a``. An added or removed node stands for all below it.
        before: The node or section of ``a``; None where it was added.
        after: The node or section of ``b``; None where it was removed.
        first_byte: Where both have the section, the first byte that differs.
    """

    path: SnapshotPath
    section: str | None
    change: Literal["added", "removed", "changed"]
    before: Snapshot | SnapshotDataSection | None = None
    after: Snapshot | SnapshotDataSection | None = None
    first_byte: int | None = None

    def __str__(self) -> str:
        place = str(self.path) if self.section is None else self.path.section(self.section)
        if self.change != "changed":
            return f"{place}: {self.change} {self.after or self.before!r}"
        if isinstance(self.before, SnapshotDataSection) and self.first_byte is not None:
            assert isinstance(self.after, SnapshotDataSection)
            return (
                f"{place}: changed from byte {self.first_byte} on "
                f"({self.before.nbytes} -> {self.after.nbytes} bytes)"
            )
        assert self.before is not None
        assert self.after is not None
        return f"{place}: id changed from {_short(self.before.id)} to {_short(self.after.id)}"


def diff(a: Snapshot, b: Snapshot) -> Iterator[Difference]:
    """Where ``b`` differs from ``a``, each node before its children, in id order.

    >>> a, b = Snapshot("vm"), Snapshot("vm")
    >>> b.add_snapshot(Snapshot("nic"))
    >>> a.add_data_section(SnapshotDataSection("config", b"cpus=1"))
    >>> b.add_data_section(SnapshotDataSection("config", b"cpus=2"))
    >>> for difference in diff(a, b):
    ...     print(difference)
    $.snapshot_data['config']: changed from byte 5 on (6 -> 6 bytes)
    $.snapshots['nic']: added Snapshot('nic')
    """
    stack: list[tuple[SnapshotPath, Snapshot | None, Snapshot | None]] = [(SnapshotPath(), a, b)]
    seen = 0
    while stack:
        place, before, after = stack.pop()
        seen += 1
        if seen == _CYCLE_CHECK:
            _refuse_cycle(a)
            _refuse_cycle(b)
        if before is None or after is None:
            yield Difference(place, None, "added" if before is None else "removed", before, after)
            continue
        if before.id != after.id:
            yield Difference(place, None, "changed", before, after)
        for id in sorted(before.snapshot_data.keys() | after.snapshot_data.keys()):
            old, new = before.snapshot_data.get(id), after.snapshot_data.get(id)
            if old is None or new is None:
                yield Difference(place, id, "added" if old is None else "removed", old, new)
                continue
            first = _first_difference(old.snapshot, new.snapshot)
            if first is not None or old.id != new.id:
                yield Difference(place, id, "changed", old, new, first)
        ids = sorted(before.snapshots.keys() | after.snapshots.keys(), reverse=True)
        stack.extend(
            (place.child(id), before.snapshots.get(id), after.snapshots.get(id)) for id in ids
        )


class Columns(NamedTuple):
    """A tree as flat lists: the nodes in breadth-first order, children and sections in id order.

    `flatten` makes it and `build` takes it; depth costs neither of them anything.

    >>> vm = Snapshot("vm")
    >>> vm.add_snapshot(Snapshot("cpu"))
    >>> flatten(vm)
    Columns(ids=['vm', 'cpu'], children=[1, 0], sections=[0, 0], section_ids=[], payloads=[])
    """

    ids: list[str]
    """Each node's id."""
    children: list[int]
    """How many children each node has; they follow in the same order."""
    sections: list[int]
    """How many sections each node has."""
    section_ids: list[str]
    """Each section's id, node by node."""
    payloads: list[Any]
    """Each section's bytes-like object, in the same order."""

    def path(self, node: int) -> SnapshotPath:
        """The place of the ``node``-th node, for messages: takes time linear in the tree."""
        parents = [0]
        for parent, count in enumerate(self.children):
            parents.extend(repeat(parent, count))
        ids = []
        while node > 0:
            ids.append(self.ids[node])
            node = parents[node]
        return _place(reversed(ids))

    def section_place(self, section: int) -> str:
        """The place of the ``section``-th section, for messages."""
        ends = accumulate(self.sections)
        node = next(node for node, end in enumerate(ends) if section < end)
        return self.path(node).section(self.section_ids[section])


def flatten(root: Snapshot) -> Columns:
    """The columns of the tree below ``root``; payloads are not copied.

    Raises:
        SnapshotError: A node is its own ancestor, is kept under an id that is not its own,
            or something in the tree is not what it should be; the error names the place.

    >>> flatten(Snapshot("vm")).ids
    ['vm']
    """
    nodes: list[Any] = [root]
    keys: list[Any] = [getattr(root, "id", "")]
    ahead, asked, batch = iter(nodes), 0, _CYCLE_CHECK
    try:
        while True:
            for node in islice(ahead, batch):
                if below := node.snapshots:
                    if len(below) > 1:
                        names = sorted(below)
                        keys += names
                        nodes += [below[name] for name in names]
                    else:
                        keys += below
                        nodes += below.values()
            asked += batch
            if asked >= len(nodes):
                break
            if batch == MAX_NODES:
                raise SnapshotError(f"it has more than {MAX_NODES} nodes")
            _refuse_cycle(root)
            batch = MAX_NODES
        own = [node.snapshot_data for node in nodes]
        counts = [*map(len, own)]
        if max(counts) > 1:
            own = [d if len(d) < 2 else {name: d[name] for name in sorted(d)} for d in own]
        section_keys = [name for d in own for name in d]
        sections = [d[name] for d in own for name in d]
        columns = Columns(
            [node.id for node in nodes],
            [len(node.snapshots) for node in nodes],
            counts,
            [section.id for section in sections],
            [section.snapshot for section in sections],
        )
        sound = columns.ids == keys and columns.section_ids == section_keys
        "".join(keys)
        "".join(section_keys)
    except SnapshotError:
        raise
    except Exception as error:
        _explain(root, error)
        raise SnapshotError(error) from error
    if not sound:
        _explain(root, None)
    return columns


def build(
    ids: list[str],
    children: list[int],
    per_node: list[int],
    section_ids: list[str],
    payloads: list[Any],
) -> Snapshot:
    """The tree of a `Columns`' five lists; the reverse of `flatten`.

    The payloads may also be sections, which then are taken as they are.

    Raises:
        RestoreError: The columns do not describe one tree, or two siblings share an id.

    >>> build(*flatten(Snapshot("vm"))) == Snapshot("vm")
    True
    """
    if not (
        len(ids) == len(children) == len(per_node) == sum(children) + 1
        and len(section_ids) == len(payloads) == sum(per_node)
    ):
        raise RestoreError("the columns of the tree disagree in their lengths")
    if payloads and isinstance(payloads[0], SnapshotDataSection):
        sections = payloads
    else:
        sections = make_sections(section_ids, payloads)
    nodes = [*map(object.__new__, repeat(Snapshot, len(ids)))]
    try:
        below = _grouped(children, ids, nodes, 1)
        own = _grouped(per_node, section_ids, sections, 0)
    except _TwiceError as error:
        columns = Columns(ids, children, per_node, section_ids, payloads)
        what = "snapshots" if error.values is nodes else "snapshot_data"
        place = f"{columns.path(error.group)}.{what}[{_short(error.key)}]"
        raise RestoreError(f"{place} is there more than once") from None
    # The attributes are loop targets: the fastest way there is to fill many slots.
    node: Snapshot
    for node, node.id, node.snapshots, node.snapshot_data in zip(  # noqa: B007
        nodes, ids, below, own, strict=True
    ):
        pass
    return nodes[0]


def make_sections(ids: list[str], payloads: list[Any]) -> list[SnapshotDataSection]:
    """Sections of payloads that are known to be contiguous and bytes-like.

    >>> make_sections(["a"], [b"x"])
    [SnapshotDataSection('a', 1 bytes: 78)]
    """
    sections = [*map(object.__new__, repeat(SnapshotDataSection, len(ids)))]
    section: SnapshotDataSection
    for section, section.id, section.snapshot in zip(  # noqa: B007
        sections, ids, payloads, strict=True
    ):
        pass
    return sections


class _TwiceError(Exception):
    def __init__(self, group: int, key: str, values: list[Any]) -> None:
        self.group, self.key, self.values = group, key, values


def _grouped(
    counts: list[int], keys: list[str], values: list[_V], start: int
) -> list[dict[str, _V]]:
    """For each count a dict of as many of the keys and values, which begin at ``start``.

    With a ``start`` of 1 they are nodes, each of which must stand behind its parent.
    """
    nodes = start == 1
    if max(counts) == 1 and (not nodes or not counts[-1]):
        if start:
            keys, values = keys[start:], values[start:]
        single = iter([{key: value} for key, value in zip(keys, values, strict=True)])
        return [next(single) if count else {} for count in counts]
    groups: list[dict[str, _V]] = [{} for _ in counts]
    for i in compress(range(len(counts)), counts):
        if nodes and start <= i:
            raise RestoreError(f"node {i} of the tree has no parent")
        count = counts[i]
        if count == 1:
            groups[i][keys[start]] = values[start]
            start += 1
            continue
        end = start + count
        names = keys[start:end]
        groups[i].update(zip(names, values[start:end], strict=True))
        if len(groups[i]) != count:
            twice = max(names, key=Counter(names).__getitem__)
            raise _TwiceError(i, twice, values)
        start = end
    return groups


def _refuse_cycle(root: Snapshot) -> None:
    """Raise if a node is its own ancestor: visits each node once, however often it is shared."""
    open_nodes, done = {id(root)}, set()
    stack = [(root, SnapshotPath(), iter(root.snapshots.items()))]
    while stack:
        node, place, rest = stack[-1]
        for key, child in rest:
            if id(child) in open_nodes:
                raise SnapshotError(f"the snapshot at {place.child(key)} is its own ancestor")
            if id(child) not in done:
                open_nodes.add(id(child))
                stack.append((child, place.child(key), iter(child.snapshots.items())))
                break
        else:
            open_nodes.discard(id(node))
            done.add(id(node))
            stack.pop()


def _explain(root: Any, error: Exception | None) -> None:
    """Name the first thing in the tree that is not what it should be."""
    if not isinstance(root, Snapshot):
        raise SnapshotError(f"a Snapshot is needed, not {type(root).__name__}") from error
    if not isinstance(root.id, str):
        raise SnapshotError(f"$: the id is not a str: {root.id!r}") from error
    stack, seen = [(SnapshotPath(), root)], set[int]()
    while stack:
        place, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for name, kind in (("snapshots", Snapshot), ("snapshot_data", SnapshotDataSection)):
            held = getattr(node, name)
            if not isinstance(held, Mapping):
                raise SnapshotError(
                    f"{place}.{name}: a dict is needed, not {type(held).__name__}"
                ) from error
            for key, value in held.items():
                if not isinstance(key, str):
                    wrong = "the id is not a str"
                elif not isinstance(value, kind):
                    wrong = f"a {kind.__name__} is needed, not {type(value).__name__}"
                elif value.id != key:
                    wrong = f"kept under this id, but its own id is {value.id!r}"
                else:
                    continue
                raise SnapshotError(f"{place}.{name}[{key!r}]: {wrong}") from error
        stack.extend((place.child(key), child) for key, child in node.snapshots.items())


def _first_difference(a: Buffer, b: Buffer) -> int | None:
    """The first byte at which two payloads differ; None where they do not."""
    if a is b or (type(a) is bytes and type(b) is bytes and a == b):
        return None
    a, b = raw_view(a), raw_view(b)
    shared = min(a.nbytes, b.nbytes)
    for start in range(0, shared, _COMPARED_BYTES):
        one = bytes(a[start : start + _COMPARED_BYTES])
        two = bytes(b[start : start + _COMPARED_BYTES])
        if one != two and one[: shared - start] != two[: shared - start]:
            return start + next(i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y)
    return None if a.nbytes == b.nbytes else shared


def _value(payload: Buffer) -> Buffer:
    """The payload as a value of its own: copied unless nothing can change it."""
    if type(payload) is bytes:
        return payload
    view = raw_view(payload)
    return payload if type(view.obj) is bytes else bytes(view)


def _pickled(payload: Buffer, protocol: int) -> Buffer | PickleBuffer:
    view = raw_view(payload)
    if protocol >= 5 and view.nbytes >= _OUT_OF_BAND_BYTES:
        from pickle import PickleBuffer

        return PickleBuffer(view)
    return payload if type(payload) is bytes else bytes(view)


def _short(id: object) -> str:
    text = repr(id)
    return text if len(text) <= 80 else f"{text[:60]}...({len(text)} characters)"


def _shown(ids: Iterable[str], show: Any, more: int = 0) -> str:
    ids = list(ids)
    shown = [show(id) for id in ids[:_SHOWN]]
    more += len(ids) - len(shown)
    return ", ".join(shown) + (f", ... {more} more" if more else "")


def _what_there_is(ids: Sequence[str] | dict[str, Any]) -> str:
    return f"it has {_shown(ids, _short)}" if ids else "it has none"
