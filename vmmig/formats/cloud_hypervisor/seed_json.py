"""The JSON of the ``vm-migration`` crate of 2020: the whole tree in one text.

A snapshot is ``{"id": text, "snapshots": {id: snapshot}, "snapshot_data": {id: section}}``, a
section ``{"id": text, "snapshot": [byte, byte, ...]}``: two to four characters for each byte.
Every tree can be written so, of any depth.
"""

from __future__ import annotations

import os
from contextlib import suppress

from vmmig.errors import MigrateSendError
from vmmig.formats.cloud_hypervisor.folders import map_file
from vmmig.formats.cloud_hypervisor.trees import decode_tree, encode_tree
from vmmig.snapshot import Buffer, Snapshot, flatten
from vmmig.transfer import Transfer
from vmmig.transport import file

NAME = "json"
"""The format's name."""


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as a JSON object does.

    >>> sniff("no-such-file")
    False
    """
    with suppress(OSError, ValueError, TypeError):
        if os.path.isfile(path):
            with open(path, "rb") as opened:
                return opened.read(64).lstrip(b" \t\r\n").startswith(b"{")
    return False


def read(path: str | os.PathLike[str]) -> Snapshot:
    """The snapshot in a JSON file.

    Raises:
        DecodeError: It is not a snapshot's JSON; the error says where.
        MigrateReceiveError: The file is not there, or cannot be read.

    >>> path = getfixture("tmp_path") / "vm.json"
    >>> path.write_text('{"id": "vm", "snapshots": {}, "snapshot_data": {"a": 1}}')
    56
    >>> read(path)
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ...vm.json, byte 53: an object must stand here, not '1}}'
    """
    return decode_tree(map_file(path), os.fspath(path), "2020")


def write(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Write a snapshot as JSON, atomically and durably; equal ones become equal bytes.

    Raises:
        SnapshotError: The tree is not valid, or an id cannot be written as UTF-8.
        MigrateSendError: It was not written; what was there before still is.

    >>> path = getfixture("tmp_path") / "vm.json"
    >>> write(Snapshot("vm"), path)
    >>> path.read_text()
    '{"id":"vm","snapshots":{},"snapshot_data":{}}'
    """
    flatten(snapshot)
    file.send(encode_tree(snapshot, "2020"), Transfer(path, MigrateSendError))


def loads(text: Buffer) -> Snapshot:
    """The snapshot in a JSON text.

    Raises:
        DecodeError: It is not a snapshot's JSON; the error says which byte.

    >>> loads(b'{"id": "vm", "snapshots": {}, "snapshot_data": {}}')
    Snapshot('vm')
    """
    return decode_tree(text, "the JSON", "2020")


def dumps(snapshot: Snapshot) -> bytes:
    """The JSON of a snapshot.

    Raises:
        SnapshotError: The tree is not valid, or an id cannot be written as UTF-8.

    >>> dumps(Snapshot("vm"))
    b'{"id":"vm","snapshots":{},"snapshot_data":{}}'
    """
    return b"".join(encode_tree(snapshot, "2020"))
