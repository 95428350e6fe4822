from __future__ import annotations

import io
import mmap
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import cattrs
import cattrs.preconf.json
import cattrs.preconf.msgpack
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest as checksum

from tests.golden import format_1
from tests.strategies import IDS, chain, snapshots
from vmmig import codec
from vmmig.codec import (
    CHUNK_BYTES,
    HEADER_BYTES,
    LARGE_BYTES,
    Limits,
    configure_converter,
    dump,
    dumps,
    encode,
    load,
    loads,
    make_converter,
    read_header,
)
from vmmig.errors import DecodeError, MigratableError, SnapshotError
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view


def tree(*children: Snapshot, id: str = "vm", **sections: Any) -> Snapshot:
    snapshot = Snapshot(id)
    for child in children:
        snapshot.add_snapshot(child)
    for name, payload in sections.items():
        snapshot.add_data_section(SnapshotDataSection(name, payload))
    return snapshot


SMALL = tree(tree(id="cpu", regs=b"0123456789", fpu=b"abc"), tree(id="nic"), config=b"cpus=1")
LARGE = tree(
    tree(id="ram", low=os.urandom(LARGE_BYTES), high=os.urandom(2 * CHUNK_BYTES + 5)),
    tree(id="cpu", regs=b"0123456789"),
)


def sealed(
    index: bytes,
    rest: bytes = b"",
    *,
    sums: list[int] | None = None,
    version: int = 1,
    flags: int = 0,
    zero: int = 0,
    index_bytes: int | None = None,
    total_bytes: int | None = None,
    writer: bytes = b"somebody 1",
) -> bytes:
    """A container with right checksums around whatever it says; written from the format's text."""
    table = struct.pack(f"<{len(sums or [])}Q", *(sums or []))
    padding = bytes(-(96 + len(index) + len(rest)) % 8)
    tail = rest + padding + table + struct.pack("<Q", checksum(table))
    header = struct.pack(
        "<8sHHIQQQ48s",
        b"\x89VMSNAP\n",
        version,
        flags,
        zero,
        len(index) if index_bytes is None else index_bytes,
        96 + len(index) + len(tail) if total_bytes is None else total_bytes,
        checksum(index),
        writer,
    )
    return header + struct.pack("<Q", checksum(header)) + index + tail


def index(children: list[int], sections: list[int], lengths: list[int], names: list[Any]) -> bytes:
    columns = [
        struct.pack(f"<{len(children)}I", *children),
        struct.pack(f"<{len(sections)}I", *sections),
        struct.pack(f"<{len(lengths)}Q", *lengths),
    ]
    return msgpack.packb([*columns, *names])


def both(data: bytes) -> Iterator[Callable[[], Snapshot]]:
    """The two decoders: of bytes, and of a stream."""
    yield lambda: loads(data)
    yield lambda: load(io.BytesIO(data))


def refusal(data: bytes, **options: Any) -> DecodeError:
    """What both decoders say of data that they must refuse."""
    with pytest.raises(DecodeError) as info:
        loads(data, **options)
    with pytest.raises(DecodeError):
        load(io.BytesIO(data), **options)
    assert info.value.where
    return info.value


class TestRoundTrip:
    @given(snapshots())
    def test_every_tree_comes_back(self, root: Snapshot) -> None:
        data = dumps(root)
        stream = io.BytesIO()
        dump(root, stream)
        assert stream.getvalue() == data == b"".join(encode(root))
        assert encode(root).total_bytes == len(data)
        for back in (loads(data), loads(data, lazily=True), load(io.BytesIO(data))):
            assert back == root
            assert dumps(back) == data

    @given(snapshots(), st.randoms(use_true_random=False))
    def test_equal_trees_give_equal_bytes(self, root: Snapshot, random: Any) -> None:
        other = loads(dumps(root))
        for _, node in other.walk():
            for entries in (node.snapshots, node.snapshot_data):
                shuffled = [*entries.items()]
                random.shuffle(shuffled)
                entries.clear()
                entries.update(shuffled)
        assert other == root
        assert dumps(other) == dumps(root)

    def test_any_depth(self) -> None:
        root = chain(100_000)
        data = dumps(root)
        assert loads(data) == root
        assert load(io.BytesIO(data)) == root

    def test_any_width(self) -> None:
        root = tree(*[tree(id=str(i), s=b"x" * (i % 7)) for i in range(50_000)])
        assert loads(dumps(root)) == root

    @pytest.mark.parametrize("payload", [bytearray(b"x" * 9), memoryview(b"x" * (1 << 17))])
    def test_payloads_of_other_types(self, payload: Any) -> None:
        root = tree(s=payload, t=b"y")
        assert loads(dumps(root)) == root

    def test_subclasses_of_str_are_ids(self) -> None:
        class Id(str):
            __slots__ = ()

        assert loads(dumps(Snapshot(Id("vm")))) == Snapshot("vm")

    def test_large_sections_are_views_and_page_aligned(self) -> None:
        mapping = mmap.mmap(-1, encode(LARGE).total_bytes)
        mapping[:] = dumps(LARGE)
        for lazily in (False, True):
            back = loads(mapping, lazily=lazily)
            for id in ("low", "high"):
                section = back.find("ram").section(id)
                assert isinstance(section.snapshot, memoryview)
                assert section.snapshot.obj is mapping
                assert section.snapshot.readonly
            at = mapping.find(bytes(LARGE.find("ram").section("low").snapshot))
            assert at % 4096 == 0

    def test_encoding_reads_large_sections_only_when_iterated(self) -> None:
        ram = bytearray(CHUNK_BYTES)
        encoding = encode(tree(ram=ram))
        ram[0] = 1
        (section,) = loads(b"".join(encoding)).snapshot_data.values()
        assert section == SnapshotDataSection("ram", ram)

    def test_a_pipe(self) -> None:
        reading, writing = os.pipe()
        with open(reading, "rb", 0) as source, open(writing, "wb", 0) as sink:

            def write() -> None:
                dump(LARGE, sink)
                dump(SMALL, sink)
                sink.close()

            thread = threading.Thread(target=write)
            thread.start()
            assert load(source) == LARGE
            assert load(source) == SMALL
            with pytest.raises(DecodeError, match="the stream ends at byte 0"):
                load(source)
            thread.join()

    def test_a_section_of_more_than_4_gib(self, tmp_path: Path) -> None:
        size = (4 << 30) + 4096
        ram = mmap.mmap(-1, size)
        ram[size - 1] = 7
        path = tmp_path / "big.vmsnap"
        with path.open("wb") as file:
            for chunk in encode(tree(ram=ram, cpu=b"regs")):
                if len(chunk) == CHUNK_BYTES:
                    file.seek(CHUNK_BYTES, os.SEEK_CUR)
                else:
                    file.write(chunk)
        ram.close()
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        back = loads(mapping, lazily=True)
        assert (
            repr(back.section("ram")) == f"SnapshotDataSection('ram', {size} bytes, not read yet)"
        )
        payload = back.section("ram").snapshot
        assert isinstance(payload, memoryview)
        assert (payload.nbytes, payload[-1]) == (size, 7)
        assert "not read yet" not in repr(back.section("ram"))


class TestFormat:
    """The bytes are what the module's text says, by an independent reading of it."""

    def test_a_small_container_byte_for_byte(self) -> None:
        data = dumps(tree(tree(id="b", s=b"xy"), tree(id="a"), r=b"r"))
        columns = index([2, 0, 0], [1, 0, 1], [1, 2], ["vm", "a", "b", "r", "s"])
        expected = sealed(
            columns,
            b"rxy",
            sums=[checksum(b"r"), checksum(b"xy")],
            writer=b"vmmig " + read_header(data).writer.split()[1].encode(),
        )
        assert data == expected

    @given(snapshots())
    def test_an_independent_reader_finds_the_same(self, root: Snapshot) -> None:
        data = dumps(root)
        assert data[:8] == b"\x89VMSNAP\n"
        index_bytes, total, index_sum = struct.unpack_from("<QQQ", data, 16)
        assert total == len(data)
        packed = data[96 : 96 + index_bytes]
        assert checksum(packed) == index_sum
        children, sections, lengths, *names = msgpack.unpackb(packed)
        counts = struct.unpack(f"<{len(children) // 4}I", children)
        per_node = struct.unpack(f"<{len(sections) // 4}I", sections)
        sizes = struct.unpack(f"<{len(lengths) // 8}Q", lengths)
        at = 96 + index_bytes
        payloads, sums = {}, []
        for i, size in enumerate(sizes):
            if size < 65536:
                payloads[i] = data[at : at + size]
                sums.append(checksum(payloads[i]))
                at += size
        for i, size in enumerate(sizes):
            if size >= 65536:
                at = -(-at // 4096) * 4096
                payloads[i] = data[at : at + size]
                sums += [checksum(payloads[i][j : j + 2**20]) for j in range(0, size, 2**20)]
                at += size
        at = -(-at // 8) * 8
        assert data[at:-8] == struct.pack(f"<{len(sums)}Q", *sums)
        assert struct.unpack("<Q", data[-8:])[0] == checksum(data[at:-8])
        nodes = [Snapshot(name) for name in names[: len(counts)]]
        below = iter(nodes[1:])
        section_ids = iter(names[len(counts) :])
        payload = iter(sorted(payloads.items()))
        for node, count, own in zip(nodes, counts, per_node, strict=True):
            for _ in range(count):
                node.add_snapshot(next(below))
            for _ in range(own):
                node.add_data_section(SnapshotDataSection(next(section_ids), next(payload)[1]))
        assert nodes[0] == root

    def test_format_1_loads_for_ever(self) -> None:
        data = (Path(__file__).parent / "golden" / "format-1.vmsnap").read_bytes()
        back = loads(data)
        assert read_header(data)[:2] == (1, 0)
        assert read_header(data).writer == "vmmig 0.1.0"
        assert back == format_1.tree()
        assert dumps(back)[HEADER_BYTES:] == data[HEADER_BYTES:]

    def test_a_later_version_tells_who_wrote_it(self) -> None:
        data = sealed(b"anything", version=7, writer="vmmig 9 \u2764".encode(), zero=5)
        assert read_header(data)[:2] == (7, 0)
        error = refusal(data)
        assert (error.version, error.writer) == (7, "vmmig 9 \u2764")
        assert "'vmmig 9 \u2764' wrote it in format 7" in str(error)

    def test_an_unknown_feature_is_refused(self) -> None:
        assert "features 0x4" in str(refusal(sealed(index([0], [0], [], ["vm"]), flags=4)))


class TestHostileBytes:
    @given(st.binary(max_size=300))
    def test_random_bytes(self, data: bytes) -> None:
        refusal(data)
        refusal(codec.MAGIC + data)

    @pytest.mark.parametrize("root", [SMALL, tree(ram=bytes(LARGE_BYTES))], ids=["small", "large"])
    def test_every_flipped_bit_is_found(self, root: Snapshot) -> None:
        data = dumps(root)
        start = len(data) - 4096 if len(data) > 9000 else 0
        head = range(8 * min(len(data), 300))
        for bit in {*head, *range(8 * start, 8 * len(data))}:
            mutable = bytearray(data)
            mutable[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DecodeError):
                loads(mutable)

    def test_truncation_at_every_offset(self) -> None:
        data = dumps(SMALL)
        for end in range(len(data)):
            error = refusal(data[:end])
            assert "truncated" in str(error) or end == 0
        with pytest.raises(DecodeError, match="1 bytes stand behind"):
            loads(data + b"\0")

    def test_truncation_of_large_sections(self) -> None:
        data = dumps(LARGE)
        for end in range(0, len(data), 40_009):
            assert "truncated" in str(refusal(data[:end])) or end == 0

    def test_damage_names_the_section(self) -> None:
        data = bytearray(dumps(SMALL))
        data[data.find(b"0123456789")] ^= 1
        error = refusal(bytes(data))
        assert error.where == "$.snapshots['cpu'].snapshot_data['regs']"
        data = bytearray(dumps(LARGE))
        ram = bytes(LARGE.find("ram").section("high").snapshot)
        data[data.find(ram[-5:])] ^= 1
        error = refusal(bytes(data))
        assert error.where == "$.snapshots['ram'].snapshot_data['high']"
        assert f"its bytes {2 << 20} to {(2 << 20) + 4} does not match" in str(error)

    def test_lazily_damage_is_found_when_touched_and_only_there(self) -> None:
        data = bytearray(dumps(LARGE))
        data[data.find(bytes(LARGE.find("ram").section("high").snapshot[:99]))] ^= 1
        back = loads(data, lazily=True)
        assert back.find("ram").section("low") == LARGE.find("ram").section("low")
        for _ in range(2):
            with pytest.raises(DecodeError, match="high"):
                _ = back.find("ram").section("high").snapshot
        back.find("ram").section("high").snapshot = b"mended"
        assert back.find("ram").section("high") == SnapshotDataSection("high", b"mended")

    def test_in_pieces_damage_is_found_where_it_is_and_nowhere_else(self) -> None:
        high = bytes(LARGE.find("ram").section("high").snapshot)
        data = bytearray(dumps(LARGE))
        data[data.find(high[-5:])] ^= 1
        section = loads(data, lazily=True).find("ram").section("high")
        view, check = section.in_pieces()
        assert view.nbytes == len(high)
        for start, end in ((0, 1), (1, 2 << 20), (5, 5), (0, 2 << 20)):
            check(start, end)
        for _ in range(2):
            with pytest.raises(DecodeError, match="does not match") as caught:
                check(0, len(high))
            assert caught.value.where == "$.snapshots['ram'].snapshot_data['high']"
        section.snapshot = b"mended"
        view, check = section.in_pieces()
        check(0, 6)
        assert view == b"mended"

    def test_filling_bytes_must_be_zero(self) -> None:
        before_section = dumps(tree(a=b"x", ram=bytes(LARGE_BYTES)))
        before_table = dumps(tree(ram=bytes(LARGE_BYTES + 1)))
        for data, at in ((before_section, 4095), (before_table, len(before_table) - 17)):
            changed = bytearray(data)
            assert changed[at] == 0
            changed[at] = 1
            assert "not zero" in str(refusal(bytes(changed)))

    @pytest.mark.parametrize(
        ("packed", "text"),
        [
            (index([0], [0], [], []), "needs 1 ids and has 0"),
            (index([0], [0], [], ["a", "b"]), "needs 1 ids and has 2"),
            (index([1], [0], [], ["a"]), "disagree"),
            (index([1, 0], [0], [], ["a", "b"]), "disagree"),
            (index([0], [1], [], ["a"]), "disagree"),
            (index([0, 0], [0, 0], [], ["a", "b"]), "disagree"),
            (index([], [], [], []), "disagree"),
            (index([0, 1], [0, 0], [], ["a", "b"]), "no parent"),
            (index([2, 0, 0], [0, 0, 0], [], ["a", "b", "b"]), "more than once"),
            (index([0], [0], [], [7]), "an id is not a str"),
            (index([0], [0], [], [b"vm"]), "an id is not a str"),
            (index([0], [0], [], [None]), "an id is not a str"),
            (index([0], [0], [], [[]]), "an id is not a str"),
            (index([0], [0], [], [["x"]]), "array_len"),
            (index([0], [0], [], [{"x": 1}]), "map_len"),
            (index([0], [0], [], [msgpack.ExtType(5, b"xx")]), "ext_len"),
            (index([0], [1], [1 << 63], ["a", "s"]), "make"),
            (index([0], [1], [(1 << 64) - 1], ["a", "s"]), "make"),
            (index([0], [1], [1], ["a", "s"]), "make"),
            (index([0], [0], [], ["a"]) + b"\0", "more"),
            (b"\x95" + index([0], [0], [], ["a"])[1:], "needs 1 ids and has 2"),
            (index([0], [0], [], ["a"])[:-1], ""),
            (b"\x91\xc4\x04\0\0\0\0\xa1a", ""),
            (msgpack.packb([b"\0" * 3, b"", b"", "a"]), "column of children"),
            (msgpack.packb([b"\0" * 4, "\0" * 4, b"", "a"]), "column of sections"),
            (msgpack.packb({"a": 1}), ""),
            (b"", ""),
            (b"\xc1", ""),
            (b"\xdd\xff\xff\xff\xff", "nodes and sections"),
            (b"\xdc\x00\x04" + index([0], [0], [], ["a"])[1:-2] + b"\xa1\xff", "utf-8"),
        ],
    )
    def test_columns_that_lie_with_right_checksums(self, packed: bytes, text: str) -> None:
        assert text in str(refusal(sealed(packed)))

    def test_two_sections_of_one_id(self) -> None:
        packed = index([0], [2], [0, 0], ["a", "s", "s"])
        error = refusal(sealed(packed, sums=[checksum(b"")] * 2))
        assert "$.snapshot_data['s'] is there more than once" in str(error)

    def test_ids_are_never_more_than_ids(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        for id in ("../../x", "\0", "/etc/passwd", "..", "a" * 100_000, "\ufeff", "%2e%2e"):
            root = tree(tree(id=id, **{id: b"x"}))
            assert loads(dumps(root)) == root
        assert [*tmp_path.iterdir()] == []

    @given(st.data(), snapshots(payloads=st.binary(max_size=20)))
    def test_a_mutated_index_with_right_checksums(
        self, data: st.DataObject, root: Snapshot
    ) -> None:
        whole = dumps(root)
        (size,) = struct.unpack_from("<Q", whole, 16)
        packed = bytearray(whole[96 : 96 + size])
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(packed) - 1))
            packed[at] = data.draw(st.integers(0, 255))
        sums = [
            checksum(s.snapshot) for _, node in root.walk() for s in node.snapshot_data.values()
        ]
        for decode in both(sealed(bytes(packed), whole[96 + size : len(whole)], sums=sums)):
            try:
                back = decode()
            except DecodeError:
                pass
            else:
                assert loads(dumps(back)) == back

    @pytest.mark.parametrize("total", [0, 95, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    @pytest.mark.parametrize("size", [0, 1, 1 << 40, (1 << 64) - 1])
    def test_lying_lengths(self, size: int, total: int) -> None:
        refusal(sealed(index([0], [0], [], ["a"]), index_bytes=size, total_bytes=total))

    def test_a_stream_that_promises_more_than_it_has_costs_what_it_has(self) -> None:
        huge = 1 << 40
        packed = index([0], [1], [huge], ["a", "ram"])
        start = -(-(96 + len(packed)) // 4096) * 4096
        total = start + huge + 8 * (huge >> 20) + 8
        data = sealed(packed, bytes(5000), total_bytes=total)
        tracemalloc.start()
        with pytest.raises(DecodeError, match=r"truncated|not to be had"):
            load(io.BytesIO(data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * CHUNK_BYTES

    @pytest.mark.parametrize("header", [b"\xdc\xff\xff", b"\xdd\0\x10\0\0", b"\xde\xff\xff"])
    def test_nested_bombs_do_not_explode(self, header: bytes) -> None:
        columns = index([0], [0], [], [])[1:]
        data = sealed(b"\x94" + columns + header * 4000)
        tracemalloc.start()
        refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) + (1 << 20)

    @pytest.mark.parametrize(
        "packed",
        [
            index([0], [0], [], ["a"] * 1_000_000),
            index([0] * 300_000, [0] * 300_000, [], ["a"] * 300_000),
            msgpack.packb([bytes(4_000_000), bytes(4_000_000), b"", "a"]),
            msgpack.packb([b"\0" * 4, b"\1\0\0\0", b"\0" * 8_000_000, "a", "s"]),
            msgpack.packb([bytes(3_000_001), b"", b""]),
            msgpack.packb([bytes(4), bytes(4), b"", *[0] * 3_000_000]),
            index([0], [300_000], [65536] * 300_000, ["a", *map(str, range(300_000))]),
        ],
        ids=["ids", "nodes", "no ids", "lengths", "odd", "ints", "long sections"],
    )
    def test_what_is_refused_costs_at_most_twice_its_size(self, packed: bytes) -> None:
        data = sealed(packed)
        tracemalloc.start()
        with pytest.raises(DecodeError):
            loads(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(data) + (1 << 20)

    def test_limits(self) -> None:
        data = dumps(SMALL)
        assert loads(data, limits=Limits(6, len(data), 6)) == SMALL
        assert load(io.BytesIO(data), limits=Limits(6, len(data), 6)) == SMALL
        assert "max_nodes" in str(refusal(data, limits=Limits(max_nodes=5)))
        assert "max_bytes" in str(refusal(data, limits=Limits(max_bytes=len(data) - 1)))
        assert "max_id_bytes" in str(refusal(data, limits=Limits(max_id_bytes=5)))

    @pytest.mark.parametrize("data", [None, "text", 7, memoryview(b"abcd")[::2]])
    def test_what_is_not_bytes_is_refused(self, data: Any) -> None:
        for decode in (loads, read_header):
            with pytest.raises(DecodeError, match="bytes-like"):
                decode(data)


class TestStreams:
    @given(snapshots(), st.integers(1, 7))
    def test_a_trickling_stream(self, root: Snapshot, step: int) -> None:
        data = dumps(root)
        if len(data) > 1 << 16:
            step <<= 14

        class Trickle(io.RawIOBase):
            def __init__(self) -> None:
                self.rest = memoryview(data)

            def readinto(self, buffer: Any) -> int:
                count = min(step, len(buffer), len(self.rest))
                buffer[:count], self.rest = self.rest[:count], self.rest[count:]
                return count

        class Sink(io.RawIOBase):
            def __init__(self) -> None:
                self.data = bytearray()

            def write(self, view: Any) -> int:
                self.data += view[:step]
                return min(step, len(view))

        assert load(Trickle()) == root
        sink = Sink()
        dump(root, sink)
        assert sink.data == data

    def test_streams_that_fail_or_do_not_block(self) -> None:
        class Bad(io.RawIOBase):
            def __init__(self, answer: Any) -> None:
                self.answer = answer

            def readinto(self, _: Any) -> Any:
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer

            write = readinto

        for answer, text in (
            (None, "blocking"),
            (OSError("gone"), "gone"),
            (zlib.error("inflate"), "inflate"),
            (1 << 20, f"it says to have .* {1 << 20} of"),
            (-1, "it says to have .* -1 of"),
            ("many", "not supported|it says"),
        ):
            with pytest.raises(DecodeError, match=text):
                load(Bad(answer))
            with pytest.raises(MigratableError, match=text):
                dump(SMALL, Bad(answer))
        closed = io.BytesIO()
        closed.close()
        with pytest.raises(MigratableError, match="closed"):
            dump(SMALL, closed)
        with pytest.raises(DecodeError, match="closed"):
            load(closed)
        with pytest.raises(MigratableError, match="blocking"):
            dump(SMALL, Bad(0))
        for text_stream in (io.StringIO(), None):
            with pytest.raises(MigratableError, match="could not be written"):
                dump(SMALL, text_stream)  # type: ignore[arg-type]
            with pytest.raises(DecodeError, match="the stream failed"):
                load(text_stream)  # type: ignore[arg-type]

    def test_the_large_sections_share_one_mapping(self) -> None:
        many = tree(**{f"bank-{i}": bytes([i]) * (LARGE_BYTES + i) for i in range(9)})
        back = load(io.BytesIO(dumps(many)))
        assert back == many
        (_mapping,) = {id(raw_view(s.snapshot).obj) for s in back.snapshot_data.values()}

    def test_no_place_is_spelt_that_nobody_reads(self, monkeypatch: Any) -> None:
        large = tree(ram=bytes(LARGE_BYTES), video=bytes(2 * LARGE_BYTES))
        monkeypatch.delattr("vmmig.snapshot.Columns.section_place")
        assert load(io.BytesIO(dumps(large))) == large


class TestBadTrees:
    @given(IDS)
    def test_ids_that_are_no_unicode_are_named(self, id: str) -> None:
        with pytest.raises(SnapshotError, match=r"\$.snapshots\[.*\]: the id is not valid"):
            dumps(tree(tree(id=id + "\ud800")))
        with pytest.raises(SnapshotError, match="snapshot_data"):
            dumps(tree(**{id + "\udfff": b""}))


class TestConverter:
    @given(snapshots(payloads=st.binary(max_size=20)))
    def test_snapshots_in_classes_of_ones_own(self, root: Snapshot) -> None:
        @attrs.define
        class SaveGame:
            name: str
            machine: Snapshot
            thumbnails: list[SnapshotDataSection]

        game = SaveGame("level 3", root, [SnapshotDataSection("small", b"\0\xff")])
        for module in (cattrs.preconf.msgpack, cattrs.preconf.json):
            converter = module.make_converter()
            configure_converter(converter)
            assert converter.loads(converter.dumps(game), SaveGame) == game

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("ids", [1]),
            ("ids", "a"),
            ("children", ["0"]),
            ("children", [0.0]),
            ("children", [False]),
            ("children", [-1]),
            ("sections", [-1]),
            ("sections", None),
            ("section_ids", [b"s"]),
            ("payloads", [10]),
            ("payloads", [None]),
            ("payloads", [[1, 2]]),
            ("payloads", b""),
        ],
    )
    def test_nothing_is_coerced(self, field: str, value: Any) -> None:
        converter = make_converter()
        plain = converter.unstructure(Snapshot("a", {}, {"s": SnapshotDataSection("s", b"x")}))
        assert converter.structure(plain, Snapshot).id == "a"
        with pytest.raises(MigratableError):
            converter.structure({**plain, field: value}, Snapshot)

    @pytest.mark.parametrize(
        "value",
        [None, [], "x", {}, {"id": "a"}, {"id": 1, "snapshot": b""}, {"id": "a", "snapshot": 9}],
    )
    def test_sections_are_strict_too(self, value: Any) -> None:
        with pytest.raises(DecodeError):
            make_converter().structure(value, SnapshotDataSection)

    def test_bad_text_for_bytes(self) -> None:
        converter = cattrs.preconf.json.make_converter()
        configure_converter(converter)
        with pytest.raises(DecodeError):
            converter.structure({"id": "a", "snapshot": "\x7f"}, SnapshotDataSection)
