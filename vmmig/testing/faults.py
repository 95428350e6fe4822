"""Faults to inject: components that fail, streams that misbehave, disks that are full.

Each fault is a value that says what it does; `call_faults` and `stream_faults` draw them. The
pytest fixtures ``vmmig_failing``, ``vmmig_faulty_stream`` and ``vmmig_full_disk`` give them to
tests.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import attrs
from hypothesis import strategies as st

from vmmig.errors import (
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    PauseError,
    RestoreError,
    ResumeError,
    SnapshotError,
)
from vmmig.testing.strategies import check_bound
from vmmig.traits import LiveMigratable

_METHODS = [name for name in dir(LiveMigratable) if not name.startswith("_")]
_PROMISED = {
    "pause": PauseError,
    "resume": ResumeError,
    "snapshot": SnapshotError,
    "restore": RestoreError,
    "send": MigrateSendError,
    "recv": MigrateReceiveError,
}


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

    It fulfils the traits that the component fulfils. Attributes are read from and written to the
    component itself; only special methods (those of ``len()``, ``in``, ``with``) are not there.

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
    members["__setattr__"] = lambda _, name, value: setattr(component, name, value)
    members["__delattr__"] = lambda _, name: delattr(component, name)
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
    """After ``at`` bytes the stream ends; who writes gets a BrokenPipeError.

    >>> FaultyStream(io.BytesIO(b"abcdef"), Cut(2)).read()
    b'ab'
    """

    at: int


@attrs.frozen
class Stall:
    """After ``at`` bytes nothing moves until ``release`` is set; without one it times out.

    >>> FaultyStream(io.BytesIO(b"abcdef"), Stall(2)).read()
    Traceback (most recent call last):
    TimeoutError: [Errno 110] Connection timed out
    """

    at: int
    release: threading.Event | None = None


@attrs.frozen
class Trickle:
    """Each call moves one byte.

    >>> FaultyStream(io.BytesIO(b"abcdef"), Trickle()).read(3)
    b'a'
    """


@attrs.frozen
class FlipBit:
    """Bit ``bit`` of byte ``at`` is flipped.

    >>> FaultyStream(io.BytesIO(b"abcdef"), FlipBit(at=1, bit=5)).read()
    b'aBcdef'
    """

    at: int
    bit: int = 0


@attrs.frozen
class Reorder:
    """The ``size`` bytes from ``at`` on and the ``size`` bytes behind them change places.

    >>> FaultyStream(io.BytesIO(b"abcdef"), Reorder(at=1, size=2)).read()
    b'adebcf'
    """

    at: int
    size: int = 1


@attrs.frozen
class NoSpace:
    """After ``at`` bytes there is no space left to write to; reading is as ever.

    >>> stream = FaultyStream(io.BytesIO(), NoSpace(2))
    >>> stream.write(b"abcdef")
    2
    >>> stream.write(b"cdef")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device
    """

    at: int


StreamFault = Cut | Stall | Trickle | FlipBit | Reorder | NoSpace


class _Direction:
    """How far reading, or writing, has come, and what a `Reorder` holds back."""

    def __init__(self) -> None:
        self.at = 0
        self.held = bytearray()


class FaultyStream(io.RawIOBase):
    """A raw stream with a fault on the way in, and the same one on the way out.

    As of any raw stream, a call may move less than it was asked to; `io.BufferedReader` around it
    reads in full. Around ``sock.makefile("rwb", 0)`` it is a faulty connection. Closing it leaves
    the stream below open.

    >>> stream = FaultyStream(io.BytesIO(b"abcdef"), Trickle())
    >>> io.BufferedReader(stream).read(3)
    b'abc'
    """

    def __init__(self, stream: Stream, fault: StreamFault) -> None:
        self._stream = stream
        self.fault = fault
        self._in = _Direction()
        self._out = _Direction()

    def __repr__(self) -> str:
        return f"FaultyStream({self.fault!r})"

    def readable(self) -> bool:
        """Whether the stream below can be read."""
        return hasattr(self._stream, "readinto")

    def writable(self) -> bool:
        """Whether the stream below can be written to."""
        return hasattr(self._stream, "write")

    def readinto(self, buffer: Any) -> int | None:
        """As `io.RawIOBase.readinto`."""
        way, fault = self._in, self.fault
        view = memoryview(buffer).cast("B")
        if isinstance(fault, NoSpace):
            return self._stream.readinto(view)
        if isinstance(fault, Cut) and way.at >= fault.at:
            return 0
        if isinstance(fault, Reorder) and way.at == fault.at and view and not way.held:
            way.held = self._swapped(self._up_to(2 * fault.size))
            if not way.held:
                return 0
        if way.held:
            count: int | None = min(len(view), len(way.held))
            view[:count] = way.held[:count]
            del way.held[:count]
        else:
            view = view[: self._room(way, len(view))]
            count = self._stream.readinto(view)
            self._flip(way, view[: count or 0])
        way.at += count or 0
        return count

    def write(self, data: Any) -> int | None:
        """As `io.RawIOBase.write`."""
        way, fault = self._out, self.fault
        view = memoryview(data).cast("B")
        if view and isinstance(fault, (Cut, NoSpace)) and way.at >= fault.at:
            code = errno.EPIPE if isinstance(fault, Cut) else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        piece = bytearray(view[: self._room(way, len(view))])
        if isinstance(fault, Reorder) and fault.at <= way.at < fault.at + 2 * fault.size:
            del piece[fault.at + 2 * fault.size - way.at :]
            way.held += piece
            count: int | None = len(piece)
            if len(way.held) == 2 * fault.size:
                self._write_all(self._swapped(way.held))
                way.held = bytearray()
        else:
            self._flip(way, memoryview(piece))
            count = self._stream.write(piece)
        way.at += count or 0
        return count

    def flush(self) -> None:
        """Write what a `Reorder` still holds back, because nothing to change places with came."""
        held, self._out.held = self._out.held, bytearray()
        self._write_all(held)

    def _room(self, way: _Direction, wanted: int) -> int:
        """How many bytes may move now, at most: no call reaches across the place of a fault."""
        fault = self.fault
        if isinstance(fault, Trickle):
            return min(wanted, 1)
        if isinstance(fault, FlipBit) or way.at > fault.at or not wanted:
            return wanted
        if way.at < fault.at:
            return min(wanted, fault.at - way.at)
        if isinstance(fault, Stall):
            if fault.release is None:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            fault.release.wait()
        return wanted

    def _flip(self, way: _Direction, view: memoryview) -> None:
        fault = self.fault
        if isinstance(fault, FlipBit) and 0 <= fault.at - way.at < len(view):
            view[fault.at - way.at] ^= 1 << fault.bit

    def _swapped(self, data: bytearray) -> bytearray:
        """What is held, its first ``size`` bytes last."""
        assert isinstance(self.fault, Reorder)
        return data[self.fault.size :] + data[: self.fault.size]

    def _up_to(self, size: int) -> bytearray:
        data = bytearray(size)
        done = 0
        while done < size and (count := self._stream.readinto(memoryview(data)[done:])):
            done += count
        return data[:done]

    def _write_all(self, data: bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) or 0 :]


def call_faults(
    *, methods: Sequence[str] | None = None, max_at: int = 3
) -> st.SearchStrategy[CallFault]:
    """Faults for `failing`: an OSError, or the error that the method's trait lets it raise.

    Args:
        methods: Which methods may fail; by default those of all traits a component must have.
        max_at: Which call fails at the latest.

    Raises:
        InvalidArgument: An argument is not what it should be.

    >>> from hypothesis import find
    >>> find(call_faults(), lambda fault: fault.at > 1)
    CallFault(method='pause', at=2, error=OSError(5, 'injected'))
    """
    check_bound("max_at", max_at, 1)
    names = ["pause", "resume", "snapshot", "restore"] if methods is None else methods

    def fault(method: str, at: int, promised: bool) -> CallFault:
        kind = _PROMISED.get(method, MigratableError)
        return CallFault(method, at, kind("injected")) if promised else CallFault(method, at)

    return st.builds(fault, st.sampled_from(names), st.integers(1, max_at), st.booleans())


def stream_faults(*, max_bytes: int = 1000) -> st.SearchStrategy[StreamFault]:
    """Faults for a `FaultyStream`.

    Args:
        max_bytes: Where a fault strikes at the latest.

    Raises:
        InvalidArgument: The bound is not what it should be.

    >>> from hypothesis import find
    >>> find(stream_faults(), lambda fault: isinstance(fault, FlipBit))
    FlipBit(at=0, bit=0)
    """
    check_bound("max_bytes", max_bytes, 0)
    at = st.integers(0, max_bytes)
    return st.one_of(
        st.just(Trickle()),
        st.builds(Cut, at),
        st.builds(Stall, at),
        st.builds(FlipBit, at, st.integers(0, 7)),
        st.builds(Reorder, at, st.integers(1, 64)),
        st.builds(NoSpace, at),
    )
