"""A migration stream on its way between QEMU and a snapshot, through a socket pair."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from vmmig.errors import MigratableError
from vmmig.formats.qemu import read_stream
from vmmig.formats.qemu.writing import scattered, write_to
from vmmig.snapshot import Snapshot

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_BUFFER_BYTES = 4 << 20


class _Stream:
    """One end of a socket pair for QEMU, and a thread at the other; to be used by ``with``.

    Attributes:
        fd: QEMU's end. Once QEMU has it, `handed_over` is to be called.
    """

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self.fd = self._far.fileno()
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="qemu-stream", daemon=True)

    def handed_over(self) -> None:
        """QEMU has its end: it is closed here, so that its end is the stream's."""
        self._far.close()

    def finish(self) -> None:
        """Wait until all is through.

        Raises:
            MigratableError: It is not: what came is no stream, or what was to go.
        """
        self._thread.join()
        if isinstance(self._error, MigratableError):
            raise self._error
        if self._error is not None:
            raise MigratableError(self._error) from self._error

    @property
    def broken(self) -> MigratableError | None:
        """Why the thread has ended, if not because QEMU did."""
        return self._error if isinstance(self._error, MigratableError) else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)
        self._far.close()
        self._thread.join()
        self._near.close()

    def _work(self) -> None:
        try:
            self._move()
        except BaseException as error:
            self._error = error
        finally:
            with suppress(OSError):
                self._near.shutdown(socket.SHUT_RDWR)

    def _move(self) -> None:
        raise NotImplementedError


class Capture(_Stream):
    """Reads what QEMU writes into a snapshot.

    >>> with Capture() as capture:
    ...     with socket.fromfd(capture.fd, socket.AF_UNIX, socket.SOCK_STREAM) as other:
    ...         other.sendall(b"no stream")
    ...     capture.handed_over()
    ...     capture.finish()
    Traceback (most recent call last):
    vmmig.errors.DecodeError: ...
    """

    snapshot: Snapshot

    def __init__(self) -> None:
        super().__init__()
        self._ended = False

    def readinto(self, view: memoryview) -> int:
        """Read as much as there is; 0 is the end."""
        count = self._near.recv_into(view)
        self._ended = not count
        return count

    @property
    def broken(self) -> MigratableError | None:
        """Why the thread has ended, if not because QEMU did."""
        return None if self._ended else super().broken

    def _move(self) -> None:
        self.snapshot = read_stream(self)


class Feed(_Stream):
    """Writes a snapshot to where QEMU reads.

    Raises:
        MigratableError: It is not the snapshot of a stream.

    >>> Feed(Snapshot("dice"))
    Traceback (most recent call last):
    vmmig.errors.RestoreError: ... snapshot 'dice' has no section 'stream' (it has none)
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._parts = scattered(snapshot)
        super().__init__()

    def _move(self) -> None:
        with self._near.makefile("wb", buffering=0) as file:
            write_to(file, self._parts)
