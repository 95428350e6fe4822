"""QEMU's monitor, for those who do not write coroutines."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from vmmig.errors import MigratableError

_T = TypeVar("_T")

# What goes wrong is raised; it need not be printed as well where logging is not set up.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Disconnected(MigratableError):
    """The monitor's connection is gone, or silent: what QEMU does is not known.

    >>> str(Disconnected("QEMU has closed its monitor"))
    'QEMU has closed its monitor'
    """


class Monitor:
    """A connection to QEMU's monitor, on an event loop in a thread of its own.

    Args:
        path: The monitor's unix socket.
        timeout_s: How long QEMU may take to answer a command, in seconds.

    Attributes:
        path: The socket.

    Raises:
        Disconnected: There is no QEMU, or it does not answer.

    >>> Monitor("no-such.qmp", timeout_s=1)
    Traceback (most recent call last):
    vmmig.adapters.qemu.monitor.Disconnected: no QEMU answers at 'no-such.qmp': ...
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float) -> None:
        self.path = os.fspath(path)
        self._timeout_s = timeout_s
        self._client = QMPClient()
        self._events = EventListener(("MIGRATION",))
        self._client.register_listener(self._events)
        self._turn = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect(self.path), "its greeting")
        except BaseException as error:
            self.close()
            if isinstance(error, Disconnected):
                raise Disconnected(
                    f"no QEMU answers at {self.path!r} ({error}); it must have been started with "
                    "-qmp unix:PATH,server=on,wait=off, and nobody else may be connected to it"
                ) from error
            raise

    def close(self) -> None:
        """End the connection; QEMU goes on. To close it again does nothing."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            self._run(self._client.disconnect(), "the end of the connection")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> Any:
        """What QEMU answers to a command; ``fd`` is handed over with it and stays the caller's.

        Raises:
            MigratableError: QEMU refuses it; the text is QEMU's.
            Disconnected: There is no answer.
        """
        return self._run(self._execute(command, arguments, fd), f"its answer to {command!r}")

    def wait(self, timeout_s: float) -> None:
        """Return when a migration has moved on, or after the time.

        For QEMU to say so, the migration capability ``events`` must be set.
        """
        self._run(self._event(timeout_s), "an event")

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, fd: int | None
    ) -> object:
        # One after the other: a descriptor belongs to the next command that QEMU reads.
        async with self._turn:
            if fd is not None:
                self._client.send_fd_scm(fd)
            return await self._client.execute(command, arguments)

    async def _event(self, timeout_s: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._events.get(), timeout_s)
        self._events.clear()

    def _run(self, coroutine: Coroutine[Any, Any, _T], what: str) -> _T:
        if self._loop.is_closed():
            coroutine.close()
            raise Disconnected(f"the connection to {self.path!r} is closed")
        limited = asyncio.wait_for(coroutine, self._timeout_s)
        future = asyncio.run_coroutine_threadsafe(limited, self._loop)
        try:
            return future.result()
        except ExecuteError as error:
            raise MigratableError(error) from error
        except (TypeError, ValueError) as error:
            raise MigratableError(f"this cannot be said to QEMU: {error}") from error
        except TimeoutError as error:
            raise Disconnected(f"QEMU has not given {what} within {self._timeout_s:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise Disconnected(f"QEMU has not given {what}: {_root(error)}") from error
        finally:
            future.cancel()


def _root(error: BaseException) -> str:
    while isinstance(inner := getattr(error, "exc", None) or error.__cause__, BaseException):
        error = inner
    return str(error) or type(error).__name__
