"""The container of `vmmig.codec`, in a file."""

from __future__ import annotations

from pathlib import Path

from vmmig.codec import MAGIC
from vmmig.migration import recv, send
from vmmig.snapshot import Snapshot


def sniff(path: Path) -> bool:
    """Whether the file begins as a container does."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Snapshot:
    """The snapshot, mapped; each large section is checked when it is first touched.

    Raises:
        MigrateReceiveError: There is no whole, undamaged container. Asking a damaged section for
            its bytes raises a DecodeError.

    >>> path = getfixture("tmp_path") / "vm.vmsnap"
    >>> write(Snapshot("vm"), path)
    >>> sniff(path), read(path)
    (True, Snapshot('vm'))
    """
    return recv(path, lazily=True)


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a container, atomically and durably.

    Raises:
        MigrateSendError: It was not written; what was there before still is.
    """
    send(snapshot, path)
