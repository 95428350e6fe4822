from __future__ import annotations

import importlib
import io
import os
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest as checksum

from tests.golden import format_1_features
from tests.strategies import snapshots
from tests.test_codec import SMALL, sealed, tree
from tests.test_codec_ranges import Recorder, touch
from vmmig.codec import (
    CHUNK_BYTES,
    LARGE_BYTES,
    Limits,
    dump,
    dumps,
    encode,
    load,
    loads,
    open_ranges,
    read_header,
)
from vmmig.errors import DecodeError, MigratableError, MissingExtraError, SnapshotError
from vmmig.snapshot import Snapshot, SnapshotDataSection

NAME = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
zstd: Any = (
    importlib.import_module(NAME)
    if os.environ.get("CI")
    else pytest.importorskip(NAME, reason="compression needs the extra zstd")
)

NOISE = os.urandom(2 * CHUNK_BYTES)
TEXT = b"".join(b"%d bottles of beer, " % i for i in range(200_000))
ROOT = tree(tree(id="cpu", regs=b"0123"), noise=NOISE, text=TEXT, zeros=bytes(3 * CHUNK_BYTES + 1))


def claim(frame: bytes, length: int, **options: Any) -> bytes:
    """A container of one section whose frame and length are what they are."""
    columns = [
        struct.pack("<I", 0),
        struct.pack("<I", 1),
        struct.pack("<Q", length),
        struct.pack("<Q", len(frame)),
    ]
    sums = [checksum(frame[i : i + CHUNK_BYTES]) for i in range(0, len(frame), CHUNK_BYTES)]
    return sealed(msgpack.packb([*columns, "a", "s"]), frame, sums=sums, flags=1, **options)


def refused(data: bytes, **options: Any) -> str:
    """What all decoders say of data that they must refuse, at the latest when it is touched."""
    said = []
    for decode in (
        lambda: loads(data, **options),
        lambda: touch(loads(data, lazily=True, **options)),
        lambda: touch(open_ranges(Recorder(data), **options)),
        lambda: load(io.BytesIO(data), **options),
    ):
        with pytest.raises(DecodeError) as info:
            decode()
        assert info.value.where
        said.append(str(info.value))
    return said[0]


class TestRoundTrip:
    @given(snapshots(), st.sampled_from(["zstd", "zstd:3"]))
    def test_every_tree_comes_back(self, root: Snapshot, compression: str) -> None:
        data = dumps(root, compression=compression)
        stream = io.BytesIO()
        dump(root, stream, compression=compression)
        assert stream.getvalue() == data
        assert encode(root, compression=compression).total_bytes == len(data)
        for back in (
            loads(data),
            loads(data, lazily=True),
            load(io.BytesIO(data)),
            open_ranges(Recorder(data)),
        ):
            assert back == root
            assert dumps(back) == dumps(root)
        if read_header(data).flags == 0:
            assert data == dumps(root)

    def test_what_does_not_shrink_is_stored_as_it_is(self) -> None:
        for size in (LARGE_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES):
            root = tree(noise=os.urandom(size))
            assert dumps(root, compression="zstd") == dumps(root)
        assert dumps(SMALL, compression="zstd") == dumps(SMALL)
        half = tree(half=os.urandom(CHUNK_BYTES // 2) + bytes(CHUNK_BYTES // 2))
        assert len(dumps(half, compression="zstd")) < len(dumps(half)) * 0.6

    def test_what_shrinks_at_first_but_not_in_all(self) -> None:
        # The sixteen samples are zeros, what lies between them is not.
        size = 16 * CHUNK_BYTES
        payload = bytearray(os.urandom(size))
        last = size - (1 << 16)
        for i in range(16):
            start = last * i // 15
            payload[start : start + (1 << 16)] = bytes(1 << 16)
        payload[: 1 << 16] = os.urandom(1 << 16)
        root = tree(first=bytes(CHUNK_BYTES), trap=payload, last=bytes(CHUNK_BYTES))
        data = dumps(root, compression="zstd")
        assert len(data) > size - size // 16
        assert loads(data) == root
        assert loads(data).section("trap").snapshot.obj is data  # type: ignore[union-attr]

    def test_frames_of_more_than_64_mib_are_held_in_a_file(self) -> None:
        unit = os.urandom(9 << 20)
        root = tree(**{f"bank-{i}": unit + bytes(2 << 20) for i in range(8)})
        tracemalloc.start()
        encoding = encode(root, compression="zstd")
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert encoding.total_bytes > 8 * len(unit)
        assert held < CHUNK_BYTES
        data = b"".join(encoding)
        assert data == b"".join(encoding) == dumps(root, compression="zstd")
        assert loads(data) == root

    def test_with_detached_ones(self) -> None:
        encoding = encode(ROOT, compression="zstd", detach=lambda view: view.nbytes == len(TEXT))
        data = b"".join(encoding)
        assert read_header(data).flags == 3
        for back in (
            loads(data, detached=encoding.detached),
            loads(data, detached=encoding.detached, lazily=True),
            load(io.BytesIO(data), detached=encoding.detached),
        ):
            assert back == ROOT

    def test_lazily_a_section_is_decompressed_when_touched(self) -> None:
        data = dumps(ROOT, compression="zstd")
        reader = Recorder(data)
        for back in (loads(data, lazily=True), open_ranges(reader)):
            section = back.section("text")
            assert repr(section) == f"SnapshotDataSection('text', {len(TEXT)} bytes, not read yet)"
            assert section == SnapshotDataSection("text", TEXT)
        assert len(reader.reads) == 3
        assert sum(count for _, count in reader.reads) < len(TEXT) // 2

    @pytest.mark.parametrize("level", range(1, 20))
    def test_every_level_can_be_read(self, level: int) -> None:
        root = tree(text=TEXT[: 2 * LARGE_BYTES])
        assert loads(dumps(root, compression=f"zstd:{level}")) == root

    @pytest.mark.parametrize(
        "compression", ["", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:x", 3]
    )
    def test_what_is_no_compression(self, compression: Any) -> None:
        with pytest.raises(SnapshotError, match="compression is 'zstd' or"):
            encode(SMALL, compression=compression)

    def test_without_the_library(self, monkeypatch: Any) -> None:
        data = dumps(ROOT, compression="zstd")
        plain = dumps(ROOT)
        for name in ("backports.zstd", "compression.zstd"):
            monkeypatch.setitem(sys.modules, name, None)
        for name in ("backports", "compression"):
            if name in sys.modules:
                monkeypatch.delattr(sys.modules[name], "zstd", raising=False)
        assert loads(plain) == ROOT
        for use in (
            lambda: encode(ROOT, compression="zstd"),
            lambda: loads(data, lazily=True),
            lambda: load(io.BytesIO(data)),
            lambda: open_ranges(Recorder(data)),
        ):
            with pytest.raises(MissingExtraError, match=r"vmmig\[zstd\]"):
                use()


class TestFormat:
    def test_it_is_what_the_formats_text_says(self) -> None:
        data = dumps(ROOT, compression="zstd")
        index_bytes, total = struct.unpack_from("<QQ", data, 16)
        assert struct.unpack_from("<HH", data, 8) == (1, 1)
        assert total == len(data)
        packed = msgpack.unpackb(data[96 : 96 + index_bytes])
        lengths, stored = (struct.unpack("<4Q", column) for column in packed[2:4])
        assert packed[4:] == ["vm", "cpu", "noise", "text", "zeros", "regs"]
        at = 96 + index_bytes
        assert data[at : at + 4] == b"0123"
        sums = [checksum(b"0123")]
        at += 4
        for expected, length, count in zip(
            (NOISE, TEXT, bytes(3 * CHUNK_BYTES + 1)), lengths, stored, strict=False
        ):
            if count == length:
                at = -(-at // 4096) * 4096
            piece = data[at : at + count]
            sums += [checksum(piece[j : j + 2**20]) for j in range(0, count, 2**20)]
            assert (piece if count == length else zstd.decompress(piece)) == expected
            assert count == length or piece[4] & 4, "a content checksum"
            at += count
        at = -(-at // 8) * 8
        assert data[at:-8] == struct.pack(f"<{len(sums)}Q", *sums)

    def test_format_1_loads_for_ever_with_every_feature(self) -> None:
        folder = Path(__file__).parent / "golden"
        for name, flags, detached in (
            ("compressed", 1, []),
            ("detached", 3, format_1_features.DETACHED),
        ):
            data = (folder / f"format-1-{name}.vmsnap").read_bytes()
            assert read_header(data)[:2] == (1, flags)
            assert loads(data, detached=detached) == format_1_features.tree()
            assert load(io.BytesIO(data), detached=detached) == format_1_features.tree()
        data = (folder / "format-1-compressed.vmsnap").read_bytes()
        assert open_ranges(Recorder(data)) == format_1_features.tree()


class TestHostileBytes:
    FRAME = zstd.compress(TEXT[:LARGE_BYTES])

    def test_a_frame_of_another_writer_is_read(self) -> None:
        assert loads(claim(self.FRAME, LARGE_BYTES)).section("s").snapshot == TEXT[:LARGE_BYTES]

    def test_frames_that_make_more_or_less_than_they_should(self) -> None:
        assert "makes only 65536 of the 65537" in refused(claim(self.FRAME, LARGE_BYTES + 1))
        longer = zstd.compress(TEXT[: LARGE_BYTES + 1])
        assert "makes more than the 65536" in refused(claim(longer, LARGE_BYTES))
        assert "cut off" in refused(claim(self.FRAME[:-1], LARGE_BYTES))
        assert "cut off" in refused(claim(b"", LARGE_BYTES))
        assert "behind its frame" in refused(claim(self.FRAME + b"\0", LARGE_BYTES))
        assert "behind its frame" in refused(claim(self.FRAME + self.FRAME, LARGE_BYTES))
        assert "not a sound frame" in refused(claim(b"x" * 99, LARGE_BYTES))
        wrong_sum = bytearray(self.FRAME)
        wrong_sum[4] |= 4
        assert refused(claim(bytes(wrong_sum) + b"1234", LARGE_BYTES))

    def test_a_bomb_is_cut_off_at_what_the_index_says(self) -> None:
        bomb = zstd.compress(bytes(256 << 20))
        assert len(bomb) < LARGE_BYTES
        data = claim(bomb, 2 * CHUNK_BYTES)
        tracemalloc.start()
        assert "makes more than the 2097152" in refused(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * CHUNK_BYTES
        for limit in (0, 1):
            options: Any = {"limits": Limits(max_bytes=(256 << 20) - limit)}
            whole = claim(bomb, 256 << 20)
            if limit:
                assert "max_bytes" in refused(whole, **options)
            else:
                assert loads(whole, lazily=True, **options).section("s").nbytes == 256 << 20

    def test_many_sections_count_together(self) -> None:
        root = tree(**{f"bank-{i}": bytes(CHUNK_BYTES) for i in range(10)})
        data = dumps(root, compression="zstd")
        assert loads(data, limits=Limits(max_bytes=10 * CHUNK_BYTES)) == root
        assert "allowed" in refused(data, limits=Limits(max_bytes=10 * CHUNK_BYTES - 1))

    def test_a_large_window_is_refused(self) -> None:
        parameter = zstd.CompressionParameter
        frame = zstd.ZstdCompressor(options={parameter.window_log: 24})
        data = frame.compress(TEXT) + frame.flush()
        assert "not a sound frame" in refused(claim(data, len(TEXT)))

    @pytest.mark.parametrize("length", [1 << 40, 1 << 62])
    def test_lying_lengths_cost_nothing(self, length: int) -> None:
        tracemalloc.start()
        said = refused(claim(self.FRAME, length))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "makes only" in said or "not to be had" in said
        assert peak < 4 * CHUNK_BYTES

    def test_every_flipped_bit_is_found(self) -> None:
        data = dumps(tree(zeros=bytes(LARGE_BYTES), regs=b"0123"), compression="zstd")
        assert len(data) < 500
        for bit in range(8 * len(data)):
            mutable = bytearray(data)
            mutable[bit // 8] ^= 1 << bit % 8
            refused(bytes(mutable))
        for end in range(len(data)):
            refused(data[:end])

    def test_damage_is_named_by_its_checksum(self) -> None:
        data = bytearray(dumps(ROOT, compression="zstd"))
        data[data.find(b"\x28\xb5\x2f\xfd") + 500] ^= 1
        said = refused(bytes(data))
        assert "$.snapshot_data['text']: damaged: the checksum of its bytes 0 to" in said

    @given(st.data())
    def test_a_mutated_frame_with_right_checksums(self, data: st.DataObject) -> None:
        frame = bytearray(self.FRAME)
        for _ in range(data.draw(st.integers(1, 4))):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
        try:
            back = load(io.BytesIO(claim(bytes(frame), LARGE_BYTES)))
        except MigratableError:
            pass
        else:
            assert back.section("s").nbytes == LARGE_BYTES
