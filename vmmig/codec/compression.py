"""Zstandard (RFC 8878), one frame for each section."""

from __future__ import annotations

import io
import mmap
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any, NoReturn

from vmmig.codec.layout import CHUNK_BYTES
from vmmig.errors import DecodeError, MissingExtraError, SnapshotError
from vmmig.foreign import piece, pieces

# What RFC 8878 recommends that every decoder supports, and what level 19 needs.
_MAX_WINDOW_LOG = 23
_MAX_LEVEL = 19
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_THREADED_BYTES = 8 << 20
_HELD_BYTES = 64 << 20


def zstd() -> Any:
    """The library.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd as library
        else:
            from backports import zstd as library
    except ImportError as error:
        raise MissingExtraError("Zstandard", extra="zstd") from error
    return library


def level_of(compression: str) -> int:
    """The level that ``zstd`` or ``zstd:19`` means."""
    name, _, level = compression.partition(":") if isinstance(compression, str) else ("", "", "")
    if compression == "zstd":
        return 1
    if name == "zstd" and level.isdecimal() and 1 <= int(level) <= _MAX_LEVEL:
        return int(level)
    raise SnapshotError(
        f"compression is 'zstd' or 'zstd:1' to 'zstd:{_MAX_LEVEL}', not {compression!r}"
    )


def compress_each(views: Iterable[memoryview], level: int) -> list[memoryview]:
    """Of each view its frame, or itself where that is not smaller by a sixteenth at least.

    More than 64 MiB of frames are held in a temporary file that has no name, not in memory.

    Raises:
        MissingExtraError: The library is not installed.
        SnapshotError: The temporary file could not be written.
    """
    library = zstd()
    try:
        with _Held() as held:
            places = [_compress(library, view, level, held) for view in views]
            frames = held.view()
    except OSError as error:
        raise SnapshotError(
            f"compressed sections could not be put in a temporary file ({error}); "
            "free some space there, or let TMPDIR name another folder"
        ) from error
    return [
        view if place is None else frames[slice(*place)]
        for view, place in zip(views, places, strict=True)
    ]


class Decompression:
    """One frame, decompressed piece by piece.

    Nothing that the frame says of itself is believed: it may need a window of 8 MiB at most.

    Args:
        nbytes: How many bytes it must make.
        where: The section's place, for messages.
    """

    def __init__(self, nbytes: int, where: object) -> None:
        self._library = zstd()
        options = {self._library.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._frame = self._library.ZstdDecompressor(options=options)
        self._nbytes = nbytes
        self._made = 0
        self._where = where

    def feed(self, stored: memoryview) -> Iterator[tuple[int, bytes]]:
        """Decompress the next bytes of the frame: what they make, of 1 MiB at most, and where.

        Raises:
            DecodeError: It is no frame, needs too large a window, or makes too many bytes.
        """
        for start in range(0, stored.nbytes, CHUNK_BYTES):
            yield from self._feed(stored[start : start + CHUNK_BYTES])

    def feed_into(self, memory: memoryview, stored: memoryview) -> None:
        """As `feed`, into memory for all that the frame makes."""
        for at, data in self.feed(stored):
            memory[at : at + len(data)] = data

    def finish(self) -> None:
        """Check that the frame has ended, and has made all bytes.

        Raises:
            DecodeError: It is not so.
        """
        if not self._frame.eof:
            self._refuse("its frame is cut off")
        if self._made != self._nbytes:
            self._refuse(f"it makes only {self._made} of the {self._nbytes} bytes it should have")

    def _feed(self, stored: memoryview | bytes) -> Iterator[tuple[int, bytes]]:
        frame = self._frame
        if frame.eof:
            self._refuse("bytes stand behind its frame")
        while True:
            room = self._nbytes - self._made
            try:
                data = frame.decompress(stored, max_length=min(CHUNK_BYTES, room + 1))
            except self._library.ZstdError as error:
                where = str(self._where)
                raise DecodeError(f"not a sound frame: {error}", where=where) from error
            if len(data) > room:
                self._refuse(f"it makes more than the {self._nbytes} bytes it should have")
            self._made += len(data)
            yield self._made - len(data), data
            if frame.eof and frame.unused_data:
                self._refuse("bytes stand behind its frame")
            if frame.eof or frame.needs_input:
                return
            stored = b""

    def _refuse(self, what: str) -> NoReturn:
        raise DecodeError(what, where=str(self._where))


class _Held:
    """Compressed bytes on their way: in memory, or in a file where there are many."""

    def __init__(self) -> None:
        self.file: IO[bytes] = io.BytesIO()
        self._in_memory = True

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._in_memory:
            self.file.close()

    def write(self, data: bytes) -> None:
        if self._in_memory and self.file.tell() + len(data) > _HELD_BYTES:
            import tempfile

            memory, self.file = self.file, tempfile.TemporaryFile(prefix="vmmig-")  # noqa: SIM115
            self._in_memory = False
            memory.seek(0)
            while some := memory.read(CHUNK_BYTES):
                self.file.write(some)
        self.file.write(data)

    def view(self) -> memoryview:
        """All that was written and kept; it outlives the file."""
        if isinstance(self.file, io.BytesIO):
            return self.file.getbuffer().toreadonly()
        self.file.flush()
        if not self.file.tell():
            return memoryview(b"")
        return memoryview(mmap.mmap(self.file.fileno(), self.file.tell(), access=mmap.ACCESS_READ))


def _compress(library: Any, view: memoryview, level: int, held: _Held) -> tuple[int, int] | None:
    """Where its frame is; None where it does not shrink."""
    if not _shrinks_in_samples(library, view):
        return None
    start = held.file.tell()
    parameter = library.CompressionParameter
    options = {parameter.compression_level: level, parameter.checksum_flag: 1}
    if view.nbytes >= _THREADED_BYTES:
        options[parameter.nb_workers] = min(2, parameter.nb_workers.bounds()[1])
    frame = library.ZstdCompressor(options=options)
    most_bytes = view.nbytes - view.nbytes // 16
    for chunk in pieces(view, CHUNK_BYTES):
        held.write(frame.compress(chunk))
        if held.file.tell() - start > most_bytes:
            break
    else:
        held.write(frame.flush())
    end = held.file.tell()
    if end - start <= most_bytes:
        return start, end
    held.file.seek(start)
    held.file.truncate()
    return None


def _shrinks_in_samples(library: Any, view: memoryview) -> bool:
    """Whether pieces from all over it shrink together; a short one is not asked, but tried."""
    if view.nbytes <= _SAMPLES * _SAMPLE_BYTES:
        return True
    last = view.nbytes - _SAMPLE_BYTES
    starts = [last * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    made = sum(len(library.compress(piece(view, at, at + _SAMPLE_BYTES), 1)) for at in starts)
    return made <= _SAMPLES * _SAMPLE_BYTES * 15 // 16
