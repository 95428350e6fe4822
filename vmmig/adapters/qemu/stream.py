"""A migration stream on its way between QEMU and a snapshot."""

from __future__ import annotations

import fcntl
import io
import os
import select
import socket
import threading
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING

from vmmig.errors import MigratableError
from vmmig.formats.qemu import read_stream
from vmmig.formats.qemu.writing import scattered, write_to
from vmmig.snapshot import Snapshot

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_BUFFER_BYTES = 4 << 20
_PIPE_BYTES = 1 << 20
_LOOK_EACH_S = 0.05


class _Stream:
    """One end of a stream for QEMU, and a thread at the other; to be used by ``with``.

    Attributes:
        fd: QEMU's end. Once QEMU has it, `handed_over` is to be called.
    """

    fd: int

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="qemu-stream", daemon=True)

    def handed_over(self) -> None:
        """QEMU has its end: it is closed here."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until all is through, once QEMU has said that it is.

        Raises:
            MigratableError: It is not: what came is no stream, or what was to go.
        """
        self._end()
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
        raise NotImplementedError

    def _work(self) -> None:
        try:
            self._move()
        except BaseException as error:
            self._error = error
        finally:
            self._close()

    def _move(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """Let QEMU see that the stream has ended."""
        raise NotImplementedError

    def _end(self) -> None:
        self._thread.join()


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
        self._near, self._far = socket.socketpair()
        self.fd = self._far.fileno()
        self._far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._ended = False

    def handed_over(self) -> None:
        self._far.close()

    def readinto(self, view: memoryview) -> int:
        """Read as much as there is; 0 is the end."""
        count = self._near.recv_into(view)
        self._ended = not count
        return count

    @property
    def broken(self) -> MigratableError | None:
        """Why the thread has ended, if not because QEMU did."""
        return None if self._ended else super().broken

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        self._far.close()
        self._thread.join()
        self._near.close()

    def _move(self) -> None:
        self.snapshot = read_stream(self)

    def _close(self) -> None:
        with suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)


class Feed(_Stream):
    """Writes a snapshot to where QEMU reads: a pipe, which may hold more than a socket.

    Raises:
        MigratableError: It is not the snapshot of a stream.

    >>> Feed(Snapshot("dice"))
    Traceback (most recent call last):
    vmmig.errors.RestoreError: ... snapshot 'dice' has no section 'stream' (it has none)
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._parts = scattered(snapshot)
        super().__init__()
        self.fd, ours = os.pipe()
        with suppress(OSError):
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._pipe = io.FileIO(ours, "w")
        # The thread may hang in a pipe that QEMU has, and does not read: it is emptied then.
        self._drain = os.dup(self.fd)
        self._over = False

    def handed_over(self) -> None:
        os.close(self.fd)
        self.fd = -1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()
        os.close(self._drain)
        if self.fd >= 0:
            self.handed_over()

    def _move(self) -> None:
        write_to(self._pipe, takewhile(lambda _: not self._over, self._parts))

    def _close(self) -> None:
        self._pipe.close()

    def _end(self) -> None:
        self._over = True
        while self._thread.is_alive():
            if select.select([self._drain], [], [], _LOOK_EACH_S)[0]:
                os.read(self._drain, _PIPE_BYTES)
        self._thread.join()
