"""Faults to inject: components that fail, streams that misbehave, disks that are full.

Each fault is a value that says what it does; `call_faults` and `stream_faults` draw them. The
pytest fixtures ``vmmig_failing``, ``vmmig_faulty_stream`` and ``vmmig_full_disk`` give them to
tests.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import attrs
from hypothesis import strategies as st

from vmmig.errors import MigratableError
from vmmig.traits import LiveMigratable

_METHODS = [name for name in dir(LiveMigratable) if not name.startswith("_")]


@attrs.frozen
class CallFault:
    """The ``at``-th call of a method raises, and does nothing else.

    >>> CallFault("pause", at=2)
    CallFault(method='pause', at=2, error=OSError(5, 'injected'))
    """

    method: str
    at: int = 1
    error: Exception = attrs.field(factory=lambda: OSError(errno.EIO, "injected"), eq=repr)


def failing(component: Any, fault: CallFault) -> Any:
    """The component, except that one call fails; everything else reaches the original.

    It fulfils the traits that the component fulfils.

    Raises:
        MigratableError: The component has no such method.

    >>> from vmmig.testing.components import Counter
    >>> counter = failing(Counter(), CallFault("pause", at=2))
    >>> counter.pause()
    >>> counter.pause()
    Traceback (most recent call last):
    OSError: [Errno 5] injected
    >>> counter.value
    0
    """
    if not callable(getattr(component, fault.method, None)):
        raise MigratableError(f"{type(component).__name__} has no method {fault.method!r} to fail")
    calls = 0

    def delegate(name: str) -> Callable[..., Any]:
        def method(_: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if name == fault.method:
                calls += 1
                if calls == fault.at:
                    raise fault.error
            return getattr(component, name)(*args, **kwargs)

        return method

    names = {fault.method, *(name for name in _METHODS if hasattr(component, name))}
    members: dict[str, Any] = {name: delegate(name) for name in names}
    members["__getattr__"] = lambda _, name: getattr(component, name)
    members["__repr__"] = lambda _: f"failing({component!r}, {fault!r})"
    return type(f"Failing{type(component).__name__}", (), members)()


class Stream(Protocol):
    """What a `FaultyStream` goes through to: a binary file, pipe or socket file, unbuffered."""

    def readinto(self, buffer: Any, /) -> int | None:
        """As `io.RawIOBase.readinto`."""

    def write(self, data: Any, /) -> int | None:
        """As `io.RawIOBase.write`."""


@attrs.frozen
class Cut:
    """After ``at`` bytes the stream ends; who writes gets a BrokenPipeError."""

    at: int


@attrs.frozen
class Stall:
    """After ``at`` bytes nothing comes: it waits for ``release``, or without one times out."""

    at: int
    release: threading.Event | None = None


@attrs.frozen
class Trickle:
    """Each call moves one byte."""


@attrs.frozen
class FlipBit:
    """Bit ``bit`` of byte ``at`` is flipped."""

    at: int
    bit: int = 0


@attrs.frozen
class Reorder:
    """The ``size`` bytes from ``at`` on and the ``size`` bytes behind them change places."""

    at: int
    size: int = 1


@attrs.frozen
class NoSpace:
    """After ``at`` bytes there is no space left to write to."""

    at: int


StreamFault = Cut | Stall | Trickle | FlipBit | Reorder | NoSpace


class FaultyStream:
    """A stream with a fault, on the way in and on the way out.

    >>> import io
    >>> stream = FaultyStream(io.BytesIO(b"abcdef"), FlipBit(at=1, bit=5))
    >>> stream.read()
    b'aBcdef'
    >>> FaultyStream(io.BytesIO(b"abcdef"), Reorder(at=1, size=2)).read()
    b'adebcf'
    """

    def __init__(self, stream: Stream, fault: StreamFault) -> None:
        self._stream = stream
        self.fault = fault
        self._at = 0
        self._held = b""

    def __repr__(self) -> str:
        return f"FaultyStream({self.fault!r})"

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase.readinto`."""
        view = memoryview(buffer).cast("B")
        room = self._room(len(view), reading=True)
        view = view[:room]
        if not room:
            return 0
        if self._held:
            count = min(len(view), len(self._held))
            view[:count], self._held = self._held[:count], self._held[count:]
        elif isinstance(self.fault, Reorder) and self._at == self.fault.at:
            self._held = self._swapped(self._exactly(2 * self.fault.size))
            return self.readinto(view) if self._held else 0
        else:
            count = self._stream.readinto(view) or 0
            self._flip(view[:count])
        self._at += count
        return count

    def read(self, size: int = -1) -> bytes:
        """As `io.RawIOBase.read`."""
        data = bytearray()
        while size < 0 or len(data) < size:
            piece = bytearray(min(65536, size - len(data)) if size >= 0 else 65536)
            count = self.readinto(piece)
            if not count:
                break
            data += piece[:count]
        return bytes(data)

    def write(self, data: Any) -> int:
        """As `io.RawIOBase.write`."""
        view = memoryview(data).cast("B")
        room = self._room(len(view), reading=False)
        piece = bytearray(view[:room])
        self._flip(memoryview(piece))
        if isinstance(self.fault, Reorder) and self._at >= self.fault.at and piece:
            end = self.fault.at + 2 * self.fault.size
            if self._at < end:
                piece = piece[: end - self._at]
                self._held += piece
                if self._at + len(piece) == end:
                    self._all(self._swapped(self._held))
                    self._held = b""
                self._at += len(piece)
                return len(piece)
        self._all(piece)
        self._at += len(piece)
        return len(piece)

    def flush(self) -> None:
        """Write what a reordering has held back because its end did not come."""
        held, self._held = self._held, b""
        self._all(held)

    def _all(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view.nbytes:
            view = view[self._stream.write(view) or 0 :]

    def _room(self, wanted: int, *, reading: bool) -> int:
        """How many bytes the fault lets through now."""
        fault = self.fault
        if isinstance(fault, Trickle):
            return min(wanted, 1)
        if isinstance(fault, Reorder) and self._at < fault.at:
            return min(wanted, fault.at - self._at)
        if not isinstance(fault, (Cut, Stall, NoSpace)) or (reading and isinstance(fault, NoSpace)):
            return wanted
        if self._at < fault.at or not wanted:
            return min(wanted, fault.at - self._at)
        if isinstance(fault, NoSpace):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if isinstance(fault, Cut):
            if reading:
                return 0
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if fault.release is None:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        fault.release.wait()
        return wanted

    def _flip(self, view: memoryview) -> None:
        fault = self.fault
        if isinstance(fault, FlipBit) and 0 <= fault.at - self._at < len(view):
            view[fault.at - self._at] ^= 1 << fault.bit

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        done = 0
        while done < size:
            count = self._stream.readinto(memoryview(data)[done:])
            if not count:
                break
            done += count
        return bytes(data[:done])

    def _swapped(self, data: bytes) -> bytes:
        assert isinstance(self.fault, Reorder)
        return data[self.fault.size :] + data[: self.fault.size]


def call_faults(
    *, methods: list[str] | None = None, max_at: int = 3
) -> st.SearchStrategy[CallFault]:
    """Faults for `failing`.

    Args:
        methods: Which methods may fail; by default those of all traits a component must have.
        max_at: Which call fails at the latest.

    >>> from hypothesis import find
    >>> find(call_faults(), lambda fault: fault.at > 1).at
    2
    """
    names = methods or ["pause", "resume", "snapshot", "restore"]
    return st.builds(CallFault, method=st.sampled_from(names), at=st.integers(1, max_at))


def stream_faults(*, max_bytes: int = 1000) -> st.SearchStrategy[StreamFault]:
    """Faults for a `FaultyStream`.

    Args:
        max_bytes: Where a fault strikes at the latest.

    >>> from hypothesis import find
    >>> find(stream_faults(), lambda fault: isinstance(fault, FlipBit))
    FlipBit(at=0, bit=0)
    """
    at = st.integers(0, max_bytes)
    return st.one_of(
        st.just(Trickle()),
        st.builds(Cut, at),
        st.builds(Stall, at),
        st.builds(FlipBit, at, st.integers(0, 7)),
        st.builds(Reorder, at, st.integers(1, 64)),
        st.builds(NoSpace, at),
    )
