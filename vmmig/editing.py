"""Snapshots changed: sections dropped, renamed and replaced, and fields set."""

from __future__ import annotations

from collections.abc import Iterable

from vmmig import formats
from vmmig.errors import RestoreError
from vmmig.inspection import Place, locate
from vmmig.snapshot import Buffer, Snapshot, SnapshotDataSection


def edited(
    snapshot: Snapshot,
    *,
    fields: Iterable[tuple[str, str, object]] = (),
    replaced: Iterable[tuple[str, Buffer]] = (),
    dropped: Iterable[str] = (),
    renamed: Iterable[tuple[str, str]] = (),
) -> Snapshot:
    """A changed copy of a snapshot; sections that are not touched are shared with it.

    Every place is one of ``snapshot``, as `vmmig.inspection.locate` reads it, whatever else is
    done. Drops go before renames, so that a name that was dropped can be taken again.

    Args:
        snapshot: The tree, which stays as it is.
        fields: Places of sections, a decoded field of each, and its new value, of the old type.
        replaced: Places of sections, and their new bytes.
        dropped: Places of nodes or sections that shall not be there.
        renamed: Places of nodes or sections, and their new ids.

    Raises:
        RestoreError: There is no such place or field, a value has another type, or a new id is
            taken already.

    >>> vm = Snapshot("vm", {}, {"config": SnapshotDataSection("config", b'{"cpus": 1}')})
    >>> changed = edited(vm, fields=[("config", "cpus", 2)], renamed=[("config", "settings")])
    >>> changed.section("settings").snapshot
    b'{"cpus": 2}'
    """
    root = _copied(snapshot)
    sections = [(_section(snapshot, text), payload) for text, payload in replaced]
    values = [(_section(snapshot, text), field, value) for text, field, value in fields]
    drops = [locate(snapshot, text) for text in dropped]
    renames = [(locate(snapshot, text), id) for text, id in renamed]
    for (path, id), payload in sections:
        root.find(path).add_data_section(SnapshotDataSection(id or "", payload))
    for (path, id), field, value in values:
        payload = formats.set_field(root, path.ids, id or "", field, value)
        root.find(path).add_data_section(SnapshotDataSection(id or "", payload))
    for path, id in drops:
        if id is not None:
            root.find(path).snapshot_data.pop(id, None)
        elif path.parent is None:
            raise RestoreError("the root cannot be dropped")
        else:
            root.find(path.parent).snapshots.pop(path.id, None)
    # The deepest first, for then the places above are still called what they were.
    for place, new in sorted(renames, key=lambda each: _depth(each[0]), reverse=True):
        _rename(root, place, new)
    return root


def _depth(place: Place) -> tuple[int, bool]:
    return len(place.path.ids), place.section is not None


def _rename(root: Snapshot, place: Place, new: str) -> None:
    node = root.find(place.path)
    if place.section is not None:
        if new in node.snapshot_data:
            raise RestoreError(f"{place}: there is a section {new!r} already")
        section = node.snapshot_data.pop(place.section)
        node.add_data_section(SnapshotDataSection(new, section.snapshot))
        return
    node.id = new
    if place.path.parent is not None:
        parent = root.find(place.path.parent)
        if new in parent.snapshots:
            raise RestoreError(f"{place}: there is a snapshot {new!r} already")
        parent.add_snapshot(parent.snapshots.pop(place.path.id))


def _section(root: Snapshot, text: str) -> Place:
    place = locate(root, text)
    if place.section is None:
        raise RestoreError(f"{text!r} is a snapshot, where a section is needed")
    return place


def _copied(root: Snapshot) -> Snapshot:
    """The nodes, and not the sections, which nothing changes."""
    copy = Snapshot(root.id, {}, dict(root.snapshot_data))
    stack = [(root, copy)]
    while stack:
        old, new = stack.pop()
        for id, child in old.snapshots.items():
            new.snapshots[id] = Snapshot(child.id, {}, dict(child.snapshot_data))
            stack.append((child, new.snapshots[id]))
    return copy
