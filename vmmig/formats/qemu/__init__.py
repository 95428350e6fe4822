"""QEMU's migration stream, as ``migrate`` writes it to a file, a pipe or a socket.

`read` makes a `Snapshot` of it, and `write` the identical bytes of that::

    qemu
    ├── configuration           state: the machine's type, and what else changes the stream
    ├── ram                     a section for each block of RAM: what it holds in the end
    ├── <device>                state; a child for each device in the stream's order, with
    │                           ``/<instance>`` behind its name where that is not 0
    └── its own sections:
        stream                  JSON: the parts of the stream in their order
        stream-runs             the order and the kinds of the pages of RAM
        stream-earlier-pages    those versions of pages that later ones replaced
        vmdesc                  QEMU's description of the devices, JSON
        trailing                what stands behind the stream

A section of `stream-runs` are two little-endian numbers of 8 bytes for each run of consecutive
pages of one kind: the first page's header as the stream has it, and how many pages there are,
with the index of the block in the upper 4 bytes.

The states of the devices have no lengths in the stream. They are found by the description, and
checked by the footers; without a description, by the footers alone. Where there are neither, all
devices are one child ``devices``. A block of RAM that is not in the stream, as with the
capability ``x-ignore-shared``, has no section.

Streams of QEMU 2.4 and newer are read, and older ones in version 3. Refused, by name, are the
capabilities ``multifd``, ``xbzrle``, ``compress``, ``mapped-ram`` and postcopy, and RDMA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs

from vmmig.codec import ReadableStream, WritableStream
from vmmig.errors import DecodeError, MigrateSendError
from vmmig.formats import Decoded
from vmmig.formats.qemu import configuration, description, wire, writing
from vmmig.formats.qemu.reading import Reader
from vmmig.snapshot import Snapshot, raw_view
from vmmig.transfer import Transfer
from vmmig.transport import file, recv

_HEAD = wire.MAGIC + wire.VERSION.to_bytes(4, "big")


def sniff(path: Path) -> bool:
    """Whether the file begins as a migration stream does.

    >>> sniff(Path(__file__))
    False
    """
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return stream.read(len(_HEAD)) == _HEAD
    except (OSError, ValueError):
        pass
    return False


def read(path: Path) -> Snapshot:
    """The snapshot of a stream in a file.

    RAM is copied once, without the interpreter's touching each page; what is zero in it takes no
    memory. Where there are memfds, each large block is sealed as by `vmmig.sealed_copy`.

    Raises:
        MigrateReceiveError: There is no such file, or it cannot be read.
        DecodeError: It is no stream that can be read; the error says at which byte.

    >>> read(Path(__file__))
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ... byte 0: it does not begin with 'QEVM': ...
    """
    return Reader(wire.Window(recv(path))).snapshot()


def read_stream(stream: ReadableStream) -> Snapshot:
    """The snapshot of a stream that comes from a pipe or a socket; it is read to its end.

    RAM goes to its place as it comes; the stream itself is never held whole.

    Args:
        stream: What `vmmig.codec.load` reads from; it must block.

    Raises:
        DecodeError: It is no stream that can be read, or the reading failed.

    >>> import io
    >>> read_stream(io.BytesIO(b"QEVM\\0\\0\\0\\3"))
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ... byte 8: the stream ends here, within a section ...
    """

    def readinto(view: memoryview) -> int:
        try:
            count = stream.readinto(view)
        except Exception as error:
            raise DecodeError(f"the stream could not be read: {error}") from error
        if count is None:
            raise DecodeError("the stream gives nothing: it must be a blocking one")
        return count

    return Reader(wire.Window(memoryview(b""), readinto)).snapshot()


def chunks(snapshot: Snapshot) -> Iterator[bytes | memoryview]:
    """The bytes of a snapshot's stream, about 1 MiB at a time.

    The devices' states and the pages of RAM may have changed since it was read. It is the
    identical stream where they have not; a page that was zero and is not becomes a plain one.

    Raises:
        MigratableError: It is not the snapshot of a stream, or has what a stream cannot carry.

    >>> b"".join(chunks(Snapshot("vm")))
    Traceback (most recent call last):
    vmmig.errors.RestoreError: ... snapshot 'vm' has no section 'stream' (it has none)
    """
    return writing.chunks(snapshot)


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot's stream to a file, atomically and durably; see `chunks`.

    Raises:
        MigratableError: It was not written, and what was there before still is.
    """
    file.send(chunks(snapshot), Transfer(path, MigrateSendError))


def write_stream(snapshot: Snapshot, stream: WritableStream) -> None:
    """Write a snapshot's stream to a pipe or a socket; see `chunks`.

    Args:
        stream: What `vmmig.codec.dump` writes to; it must block.

    Raises:
        MigratableError: It was not written, or not all of it.

    >>> import io
    >>> write_stream(Snapshot("vm"), io.BytesIO())
    Traceback (most recent call last):
    vmmig.errors.RestoreError: ...
    """
    writing.write_to(stream, writing.scattered(snapshot))


def decode(root: Snapshot, path: tuple[str, ...], section_id: str) -> Decoded | None:
    """A device's fields by QEMU's names, from its own description of them.

    Subsections are dicts under their names; ``undescribed`` is what the description does not
    describe. None for RAM, and for what has no description.

    Raises:
        DecodeError: The description is damaged.
        RestoreError: There is no such section.

    >>> decode(Snapshot("qemu"), ("cpu",), "state")
    Traceback (most recent call last):
    vmmig.errors.RestoreError: ... there is no snapshot 'cpu' at $ (it has none)
    """
    section = root.find(path).section(section_id)
    if len(path) != 1 or section_id != "state":
        return None
    (child,) = path
    if child == "configuration":
        _, found = configuration.read(wire.Window(raw_view(section.snapshot)))
        return Decoded("configuration", None, None, attrs.asdict(found))
    if "vmdesc" not in root.snapshot_data:
        return None
    known = description.known(bytes(raw_view(root.section("vmdesc").snapshot)))
    name, _, instance = child.rpartition("/")
    device = known.get((child, 0))
    if device is None and instance.isdecimal():
        device = known.get((name, int(instance)))
    if device is None:
        return None
    kind, version = device.get("vmsd_name"), device.get("version")
    return Decoded(
        kind if isinstance(kind, str) else child,
        version if isinstance(version, int) else None,
        None,
        description.decode(device, bytes(raw_view(section.snapshot))),
    )
