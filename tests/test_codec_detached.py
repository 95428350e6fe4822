from __future__ import annotations

import io
import os
import struct
from typing import Any

import pytest
from hypothesis import given
from xxhash import xxh3_64_intdigest as checksum

from tests.strategies import snapshots
from tests.test_codec import LARGE, SMALL, sealed, tree
from tests.test_codec_ranges import Recorder
from vmmig.codec import LARGE_BYTES, Limits, dumps, encode, load, loads, open_ranges, read_header
from vmmig.errors import DecodeError
from vmmig.snapshot import Snapshot

import msgpack  # isort: skip

RING = b"r" * LARGE_BYTES
RAM = os.urandom(LARGE_BYTES + 4096)
ROOT = tree(ring=RING, ram=RAM, regs=b"0123")


def is_ram(view: memoryview) -> bool:
    return view.nbytes == len(RAM)


def refused(data: bytes, detached: Any, **options: Any) -> str:
    with pytest.raises(DecodeError) as info:
        loads(data, detached=detached, **options)
    with pytest.raises(DecodeError, match="Failed"):
        load(io.BytesIO(data), detached=detached, **options)
    return str(info.value)


class TestDetached:
    @given(snapshots())
    def test_every_tree_comes_back(self, root: Snapshot) -> None:
        encoding = encode(root, detach=lambda view: bool(view[0] % 2))
        data = b"".join(encoding)
        assert encoding.total_bytes == len(data)
        for lazily in (False, True):
            assert loads(data, detached=encoding.detached, lazily=lazily) == root
        assert load(io.BytesIO(data), detached=encoding.detached) == root
        if not encoding.detached:
            assert data == dumps(root)

    def test_it_is_what_the_formats_text_says(self) -> None:
        encoding = encode(ROOT, detach=is_ram)
        data = b"".join(encoding)
        columns = [
            struct.pack("<I", 0),
            struct.pack("<I", 3),
            struct.pack("<3Q", len(RAM), 4, len(RING)),
            struct.pack("<3Q", (1 << 64) - 1, 4, len(RING)),
        ]
        packed = msgpack.packb([*columns, "vm", "ram", "regs", "ring"])
        rest = b"0123" + bytes(4096 - 96 - len(packed) - 4) + RING
        writer = read_header(data).writer.encode()
        sums = [checksum(b"0123"), checksum(RING)]
        assert data == sealed(packed, rest, sums=sums, flags=2, writer=writer)
        assert [bytes(view) for view in encoding.detached] == [RAM]

    def test_the_memory_itself_is_handed_over(self) -> None:
        memory = bytearray(RAM)
        encoding = encode(tree(ram=memory), detach=is_ram)
        data = b"".join(encoding)
        back = loads(data, detached=[memory])
        assert back.section("ram").snapshot is memory
        (view,) = encoding.detached
        assert view.obj is memory

    def test_small_sections_are_never_asked_for(self) -> None:
        def fail(view: memoryview) -> bool:
            raise AssertionError(view.nbytes)

        assert b"".join(encode(SMALL, detach=fail)) == dumps(SMALL)

    def test_they_must_be_given_exactly(self) -> None:
        data = b"".join(encode(ROOT, detach=is_ram))
        assert "$.snapshot_data['ram']: 1 of its sections are detached, 0 were given" in refused(
            data, ()
        )
        assert "2 were given" in refused(data, [RAM, RAM])
        assert f"has {len(RAM)} bytes, but 1 were given" in refused(data, [b"x"])
        assert "bytes-like" in refused(data, [None])
        assert "0 of its sections are detached, 1 were given" in refused(dumps(ROOT), [RAM])
        with pytest.raises(DecodeError, match="1 of its sections are detached"):
            open_ranges(Recorder(data))

    def test_they_count(self) -> None:
        root = tree(a=RAM, b=RAM)
        data = b"".join(encode(root, detach=is_ram))
        assert len(data) < 1000
        options: Any = {"limits": Limits(max_bytes=2 * len(RAM) - 1)}
        assert "max_bytes" in refused(data, [RAM, RAM], **options)
        assert loads(data, detached=[RAM, RAM], limits=Limits(max_bytes=2 * len(RAM))) == root

    @pytest.mark.parametrize(
        ("length", "stored", "flags", "text"),
        [
            (4, (1 << 64) - 1, 2, "cannot have"),
            (4, 3, 1, "cannot have"),
            (4, 5, 2, "cannot have"),
            (1 << 16, (1 << 16) + 1, 2, "cannot have"),
            (4, 4, 2, "need features 0x0"),
            (1 << 16, (1 << 64) - 1, 1, "need features 0x2"),
            (1 << 16, (1 << 64) - 1, 3, "need features 0x2"),
            (1 << 63, (1 << 64) - 1, 2, "max_bytes"),
        ],
    )
    def test_columns_that_lie(self, length: int, stored: int, flags: int, text: str) -> None:
        columns = [struct.pack("<I", 0), struct.pack("<I", 1), struct.pack("<Q", length)]
        packed = msgpack.packb([*columns, struct.pack("<Q", stored), "a", "s"])
        assert text in refused(sealed(packed, flags=flags), [b"x" * (1 << 16)])
        for wrong in (b"", b"1234567", struct.pack("<2Q", stored, stored), None, 7):
            packed = msgpack.packb([*columns, wrong, "a", "s"])
            assert refused(sealed(packed, flags=flags), [b"x" * (1 << 16)])

    def test_every_flipped_bit_is_found(self) -> None:
        encoding = encode(tree(ram=RAM, regs=b"0123"), detach=is_ram)
        data = b"".join(encoding)
        for bit in range(8 * len(data)):
            mutable = bytearray(data)
            mutable[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DecodeError):
                loads(mutable, detached=encoding.detached)
        for end in range(len(data)):
            refused(data[:end], encoding.detached)

    def test_all_of_a_large_tree(self) -> None:
        encoding = encode(LARGE, detach=lambda _: True)
        assert encoding.total_bytes < 1000
        assert loads(b"".join(encoding), detached=encoding.detached) == LARGE
