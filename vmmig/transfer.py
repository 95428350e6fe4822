"""One transfer under way: what it is asked to do, how far it is, and how it is stopped.

Every transport is given a `Transfer`; those who send and receive give a progress callback and a
`CancelToken`, and are given `Progress`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import attrs

from vmmig.errors import MigratableError

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

Stage = Literal["connecting", "transferring", "confirming", "done"]

_REPORT_EACH_S = 0.05
_HIDDEN = "***"


class Options(TypedDict, total=False):
    """What can be said about a transfer besides its URL; each scheme takes some of them.

    Attributes:
        timeout_s: How long, in seconds, to wait for the other side: until it is there, and then
            whenever it does not move. 60 by default.
        tls: A folder with ``ca-cert.pem`` and the ``client-`` or ``server-`` ``cert.pem`` and
            ``key.pem`` of this side, as Cloud Hypervisor lays it out.
        token: What an HTTP endpoint wants as the bearer token.
        storage_options: What the fsspec file system of this scheme is made with.

    >>> Options(timeout_s=5)
    {'timeout_s': 5}
    """

    timeout_s: float
    tls: str | os.PathLike[str]
    token: str
    storage_options: Mapping[str, Any]


@attrs.frozen
class Progress:
    """How far a transfer is.

    Attributes:
        url: Where to or from, without the credentials in it.
        stage: ``connecting``, ``transferring``, ``confirming`` (the bytes are through and are
            being checked or made durable), ``done``.
        done_bytes: How many bytes are through.
        total_bytes: How many there are in all, where that is known already.
        elapsed_s: Seconds since the transfer began.

    >>> Progress("tcp:host:1", "transferring", 50, 200, 2.0).rate_bytes_per_s
    25.0
    """

    url: str
    stage: Stage
    done_bytes: int
    total_bytes: int | None
    elapsed_s: float

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes a second, on the average since the transfer began."""
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0


class CancelToken:
    """Stops a transfer from another thread, or from a signal handler.

    One token may be given to many transfers, and stops them all, also those that begin later.

    >>> token = CancelToken()
    >>> token.cancel()
    >>> token.cancelled
    True
    """

    def __init__(self) -> None:
        # An RLock, for a signal handler runs in a thread that may hold it.
        self._lock = threading.RLock()
        self._callbacks: list[Callable[[], object]] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Stop what was given this token; it ends with an error within 100 ms."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Within the context, `cancel` calls ``callback``, once; at once if it came before.

        ``callback`` wakes what waits, for instance by shutting a socket down. It must not raise.

        >>> token = CancelToken()
        >>> with token.calling(lambda: print("stopping")):
        ...     token.cancel()
        stopping
        """
        with self._lock:
            too_late = self._cancelled
            if not too_late:
                self._callbacks.append(callback)
        if too_late:
            callback()
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)


class Transfer:
    """What a transport is given: where to, under which conditions, and whom to tell.

    Args:
        url: Where to or from.
        error: The class of what `failure` makes.
        total_bytes: How many bytes will be sent; None while that is unknown.
        max_bytes: More than that must not be received.
        lazily: Whether something that reads ranges may be received instead of all the bytes.
        progress: Is called with a `Progress` at each stage, and about 20 times a second.
        cancel: Ends the transfer.
        options: See `Options`.

    Attributes:
        shown_url: The URL without credentials, for errors and progress.
        attached: Sections whose bytes travel beside the container as descriptors: those that
            are sent; those that came.
        takes_attached: Whether such sections may come; else they must be refused before
            anything is confirmed.

    >>> transfer = Transfer("http://me:secret@host/vm?sig=abc", MigratableError)
    >>> transfer.failure(ValueError("GET /vm?sig=abc with me:secret was refused"))
    MigratableError("'http://***@host/vm?***': GET /vm?*** with *** was refused")
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        error: type[MigratableError],
        *,
        total_bytes: int | None = None,
        max_bytes: int = (1 << 63) - 1,
        lazily: bool = False,
        progress: Callable[[Progress], object] | None = None,
        cancel: CancelToken | None = None,
        options: Options | None = None,
    ) -> None:
        self.url = url
        self.error = error
        self.total_bytes = total_bytes
        self.max_bytes = max_bytes
        self.lazily = lazily
        self.cancel = cancel or CancelToken()
        self.options: Options = options or {}
        self.timeout_s: float = self.options.get("timeout_s", 60.0)
        self.attached: list[memoryview] = []
        self.takes_attached = False
        self.done_bytes = 0
        self.stage: Stage = "connecting"
        self.shown_url, self._secrets = _without_credentials(url)
        self._secrets += [*_texts(self.options.get("token"))]
        self._secrets += [*_texts(self.options.get("storage_options"))]
        self._progress = progress
        self._began_s = time.monotonic()
        self._next_report_s = 0.0
        self._on_accept: Callable[[memoryview], object] | None = None
        if not isinstance(self.timeout_s, (int, float)) or not self.timeout_s >= 0:
            raise self.failure(f"timeout_s is {self.timeout_s!r}; it must be seconds, 0 or more")

    def on_accept(self, callback: Callable[[memoryview], object] | None) -> None:
        """Let `accept` call this."""
        self._on_accept = callback

    def accept(self, data: memoryview) -> None:
        """All is here: see whether the caller accepts it, before the other side is told.

        To call it again does nothing.

        Raises:
            MigratableError: The caller does not.
        """
        callback, self._on_accept = self._on_accept, None
        if callback is not None:
            callback(data)

    def enter(self, stage: Stage) -> None:
        """The transfer is at this stage now.

        Raises:
            error: It was cancelled, or the progress callback failed.
        """
        self.stage = stage
        self._next_report_s = 0.0
        self.advance(0)

    def advance(self, count_bytes: int) -> None:
        """So many more bytes are through.

        Raises:
            error: The transfer was cancelled, or the progress callback failed.
        """
        self.done_bytes += count_bytes
        self.check()
        if self._progress is None or (now := time.monotonic()) < self._next_report_s:
            return
        self._next_report_s = now + _REPORT_EACH_S
        try:
            self._progress(self._event(now))
        except Exception as error:
            raise self.failure(f"the progress callback failed: {error!r}") from error

    def finish(self) -> None:
        """All is done. A cancellation comes too late now, and a callback's failure is ignored.

        What cannot be undone must not be reported as failed.
        """
        self.stage = "done"
        if self._progress is not None:
            with suppress(Exception):
                self._progress(self._event(time.monotonic()))

    def _event(self, now_s: float) -> Progress:
        elapsed_s = now_s - self._began_s
        return Progress(self.shown_url, self.stage, self.done_bytes, self.total_bytes, elapsed_s)

    def check(self) -> None:
        """Nothing, as long as the transfer goes on.

        Raises:
            error: It was cancelled.
        """
        if self.cancel.cancelled:
            raise self.failure("cancelled")

    def failure(self, cause: object) -> MigratableError:
        """The error to raise: it names the URL and hides the credentials.

        An exception becomes ``__cause__``, unless it or what caused it shows credentials.
        """
        if self.cancel.cancelled:
            cause = "cancelled"
        text = str(cause) or type(cause).__name__
        error = self.error(f"{self.shown_url!r}: {self.hidden(text)}")
        error.__cause__ = None
        if isinstance(cause, BaseException):
            from traceback import TracebackException

            shown = "".join(TracebackException.from_exception(cause, limit=0).format())
            if self.hidden(shown + repr(cause)) == shown + repr(cause):
                error.__cause__ = cause
        return error

    def hide(self, *secrets: str) -> None:
        """Let no error show these texts: credentials in another form than they were given.

        >>> transfer = Transfer("http://me:p%40ss@host/vm", MigratableError)
        >>> transfer.hide("p@ss")
        >>> transfer.hidden("p@ss is wrong")
        '*** is wrong'
        """
        self._secrets += [secret for secret in secrets if len(secret) > 1]

    def hidden(self, text: str) -> str:
        """``text`` without this transfer's credentials."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, _HIDDEN)
        return text

    def views(self, chunks: Iterable[Buffer]) -> Iterator[memoryview]:
        """The chunks as flat views of bytes.

        Raises:
            error: They cannot be had, or are not ``total_bytes`` in all. A `MigratableError`
                of the chunks comes through as it is.
        """
        came_bytes = 0
        total_bytes = self.total_bytes
        try:
            for chunk in chunks:
                view = flat_view(chunk)
                came_bytes += len(view)
                if total_bytes is not None and came_bytes > total_bytes:
                    break
                yield view
        except MigratableError:
            raise
        except Exception as error:
            raise self.failure(f"the bytes to send cannot be had: {error!r}") from error
        if total_bytes is not None and came_bytes != total_bytes:
            raise self.failure(
                f"{came_bytes} bytes came where {total_bytes} were announced; "
                "the caller must give the chunks' sum as total_bytes"
            )


def flat_view(chunk: Buffer) -> memoryview:
    """A view of a contiguous bytes-like object as unsigned bytes, without a copy.

    >>> flat_view(bytearray(b"abc")).nbytes
    3
    """
    # Before Python 3.12.7, the garbage collector crashes on a view that a PickleBuffer refers to
    # (python/cpython#77894); a view made by cast shares what the first one refers to.
    if isinstance(chunk, memoryview):
        return chunk.cast("B")
    from pickle import PickleBuffer

    return PickleBuffer(chunk).raw()


def shown_url(url: str | os.PathLike[str]) -> str:
    """The URL as it may be shown: without a user's name, a password or a query.

    >>> shown_url("https://me:secret@host/vm?signature=abc")
    'https://***@host/vm?***'
    """
    return _without_credentials(url)[0]


def _without_credentials(url: object) -> tuple[str, list[str]]:
    """The URL as it may be shown, and the texts in it that may not."""
    text = str(os.fspath(url)) if isinstance(url, (str, os.PathLike)) else str(url)
    match = SCHEME.match(text) if isinstance(url, str) else None
    if match is None or match[1].lower() == "file":
        return text, []
    secrets: list[str] = []
    rest, mark, query = text.partition("?")
    if mark:
        rest += f"?{_HIDDEN}"
        secrets += [query, *(part.partition("=")[2] for part in query.split("&"))]
    begin = re.match(r"[^:]*:(//)?", rest)
    start = begin.end() if begin else 0
    user, at, _ = rest[start:].partition("/")[0].rpartition("@")
    if at:
        rest = f"{rest[:start]}{_HIDDEN}@{rest[start + len(user) + 1 :]}"
        secrets += [user, user.partition(":")[2]]
    return rest, [secret for secret in secrets if len(secret) > 1]


def _texts(value: object) -> Iterator[str]:
    """Every text in nested options; a credential can be any of them."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and len(value) > 3:
            yield value
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
