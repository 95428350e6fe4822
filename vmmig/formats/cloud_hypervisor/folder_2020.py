"""The snapshot folder of Cloud Hypervisor in 2020 (v0.9): `vm.json` and `memory-region-N`.

The tree is that of ``vm.json``: the root ``vm`` has the children ``cpu-manager``,
``memory-manager`` and ``device-manager``, whose sections are called ``<id>-section``. The RAM is
added as a child ``memory``, with a section for each file, of the file's name.
"""

from __future__ import annotations

import os
import re

from vmmig.errors import DecodeError, MigrateReceiveError, SnapshotError
from vmmig.formats.cloud_hypervisor.folders import (
    map_folder,
    memory_writer,
    text_writer,
    write_folder,
)
from vmmig.formats.cloud_hypervisor.trees import (
    MEMORY,
    decode_tree,
    encode_tree,
    split_memory,
    with_memory,
)
from vmmig.snapshot import Snapshot, raw_view
from vmmig.transport.file import path_of

NAME = "cloud-hypervisor-2020"
"""The format's name."""

_TREE_FILE = "vm.json"
_REGION = re.compile(r"memory-region-(0|[1-9][0-9]{0,9})", re.ASCII)

_ADDRESS = re.compile("0x[0-9a-f]+")


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether the folder at ``path`` looks like a snapshot of Cloud Hypervisor in 2020.

    >>> sniff("no-such-folder")
    False
    """
    try:
        return os.path.isfile(os.path.join(path, _TREE_FILE))
    except (OSError, ValueError, TypeError):
        return False


def read(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot in the folder ``path``; its RAM is mapped, and read where it is touched.

    Raises:
        DecodeError: A file is not what it should be; the error says which, and where.
        MigrateReceiveError: The folder, or a file in it, is not there or cannot be read.

    >>> read("no-such-folder")
    Traceback (most recent call last):
    vmmig.errors.MigrateReceiveError: ...'no-such-folder': No such file or directory; ...
    """
    folder = path_of(path, MigrateReceiveError)
    files = map_folder(folder, _is_known, required=(_TREE_FILE,))
    name = os.path.join(folder, _TREE_FILE)
    snapshot = decode_tree(files.pop(_TREE_FILE), name, "2020")
    _, inside = split_memory(snapshot, _is_region)
    if inside:
        raise DecodeError(f"{next(iter(inside))!r} is in it, which should be a file", where=name)
    return with_memory(snapshot, files, "2020")


def write(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write the folder ``path``, durably, all of it or nothing; RAM's zeros become holes.

    Args:
        snapshot: Any tree; what is in the child ``memory`` and is called ``memory-region-N``
            becomes a file of that name.
        path: Where to: nothing, or an empty folder, may be there.

    Raises:
        SnapshotError: The tree is not valid, or has the RAM of another format.
        MigrateSendError: It could not be written, and why.

    >>> folder = getfixture("tmp_path") / "vm"
    >>> write(Snapshot("vm"), folder)
    >>> read(folder)
    Snapshot('vm')
    """
    tree, regions = split_memory(snapshot, _is_region)
    if MEMORY in tree.snapshots:
        for id in tree.snapshots[MEMORY].snapshot_data:
            if _ADDRESS.fullmatch(id):
                raise SnapshotError(
                    f"the RAM has a section {id!r}, but a folder of 2020 has files of the name "
                    "memory-region-N; convert to another format"
                )
    files = {_TREE_FILE: text_writer(encode_tree(tree, "2020"))}
    for name, payload in regions.items():
        files[name] = memory_writer([raw_view(payload)])
    write_folder(path, files)


def _is_known(name: str) -> bool:
    return name == _TREE_FILE or _is_region(name)


def _is_region(name: str) -> bool:
    return _REGION.fullmatch(name) is not None
