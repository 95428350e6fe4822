"""QEMU's migration stream, without QEMU: streams made by hand, and what is left of damaged ones."""

from __future__ import annotations

import gc
import io
import json
import os
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vmmig
from tests import qemu_streams as streams
from tests.qemu_streams import PAGE, filled, page
from tests.test_fuzz import changed
from vmmig.errors import DecodeError, MigratableError, RestoreError, SnapshotError
from vmmig.formats import qemu
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view

GOLDEN = streams.golden()


@pytest.fixture(autouse=True, scope="module")
def _no_descriptor_is_left() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


class Dribbling(io.RawIOBase):
    """Gives a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self._data, self._step = memoryview(data), step

    def readinto(self, buffer: Any, /) -> int:
        count = min(len(buffer), self._step, len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def read(data: bytes) -> Snapshot:
    return qemu.read_stream(io.BytesIO(data))


def written(snapshot: Snapshot) -> bytes:
    return b"".join(qemu.chunks(snapshot))


def through_a_socket(snapshot: Snapshot) -> bytes:
    """What `write_stream` writes to a socket that takes little at a time."""
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
    with ThreadPoolExecutor() as pool, far, far.makefile("rb") as file:
        reading = pool.submit(file.read)
        with near, near.makefile("wb", buffering=0) as stream:
            qemu.write_stream(snapshot, stream)
            near.shutdown(socket.SHUT_WR)
        return reading.result()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def refused(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        read(data)
    assert str(caught.value).isprintable()
    return str(caught.value)


def ram_of(snapshot: Snapshot, block: str) -> bytes:
    return bytes(raw_view(snapshot.find(["ram"]).section(block).snapshot))


def state_of(snapshot: Snapshot, device: str) -> bytes:
    return bytes(raw_view(snapshot.find([device]).section("state").snapshot))


def fields_of(snapshot: Snapshot, device: str) -> dict[str, object]:
    decoded = qemu.decode(snapshot, (device,), "state")
    assert decoded is not None
    return dict(decoded.fields)


# Reading


def test_the_tree_of_a_stream() -> None:
    snapshot = read(GOLDEN)
    assert snapshot.id == "qemu"
    assert list(snapshot.snapshots) == ["configuration", "clock", "uart", "uart/1", "ram"]
    assert state_of(snapshot, "clock") == streams.CLOCK_STATE
    assert state_of(snapshot, "uart/1") == b"\x1c"
    assert ram_of(snapshot, "pc.ram") == filled(5) + bytes(PAGE) + filled(6) + filled(7) + bytes(
        PAGE
    )
    assert ram_of(snapshot, "pc.rom") == filled(3)
    assert sorted(snapshot.snapshot_data) == [
        "stream",
        "stream-earlier-pages",
        "stream-runs",
        "vmdesc",
    ]
    # Three pages were replaced: by a zero page, by another one, and by the third version of one.
    earlier = bytes(raw_view(snapshot.section("stream-earlier-pages").snapshot))
    assert earlier == filled(2) + filled(1) + filled(4)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("footers", [True, False])
def test_the_same_bytes_come_back(footers: bool, described: bool) -> None:
    data = streams.golden(footers=footers, described=described)
    snapshot = read(data)
    assert written(snapshot) == data
    if footers or described:
        assert state_of(snapshot, "clock") == streams.CLOCK_STATE
    else:
        assert sorted(snapshot.snapshots) == ["configuration", "devices", "ram"]


def test_a_file_and_a_pipe_and_a_container_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "vm.qemu"
    path.write_bytes(GOLDEN)
    assert qemu.sniff(path)
    snapshot = qemu.read(path)
    path.write_bytes(b"")
    assert not qemu.sniff(path)
    assert not qemu.sniff(tmp_path)
    assert snapshot == read(GOLDEN) == qemu.read_stream(Dribbling(GOLDEN, 7))
    vmmig.send(snapshot, tmp_path / "vm.vmsnap")
    kept = vmmig.recv(tmp_path / "vm.vmsnap", lazily=True)
    qemu.write(kept, path)
    assert path.read_bytes() == GOLDEN
    assert {each.name for each in tmp_path.iterdir()} == {"vm.qemu", "vm.vmsnap"}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "vm.qemu"
    path.write_bytes(b"old")
    snapshot = read(GOLDEN)
    parts = json.loads(bytes(raw_view(snapshot.section("stream").snapshot)))
    del parts["parts"][-3]["child"]
    snapshot.add_data_section(SnapshotDataSection("stream", json.dumps(parts).encode()))
    with pytest.raises(MigratableError):
        qemu.write(snapshot, path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_stream_that_fails() -> None:
    class Broken(io.RawIOBase):
        def readinto(self, buffer: Any, /) -> int:
            raise ConnectionResetError("gone")

        def write(self, data: Any, /) -> int:
            raise BrokenPipeError("gone")

    class Slow(io.RawIOBase):
        def readinto(self, buffer: Any, /) -> None:
            return None

        def write(self, data: Any, /) -> None:
            return None

    with pytest.raises(DecodeError, match="gone"):
        qemu.read_stream(Broken())
    with pytest.raises(DecodeError, match="must be a blocking one"):
        qemu.read_stream(Slow())
    with pytest.raises(MigratableError, match="gone"):
        qemu.write_stream(read(GOLDEN), Broken())
    with pytest.raises(MigratableError, match="must be a blocking one"):
        qemu.write_stream(read(GOLDEN), Slow())
    stream = io.BytesIO()
    qemu.write_stream(read(GOLDEN), stream)
    assert stream.getvalue() == GOLDEN
    near, far = socket.socketpair()
    far.close()
    with near, near.makefile("wb", buffering=0) as file:
        with pytest.raises(MigratableError, match=r"could not be written: .*Broken pipe"):
            qemu.write_stream(read(GOLDEN), file)
        near.settimeout(1)
        with pytest.raises(MigratableError, match=r"could not be written: .*Broken pipe"):
            qemu.write_stream(read(GOLDEN), file)


def test_large_blocks_are_sealed_and_sparse(tmp_path: Path) -> None:
    length = 64 << 20
    data = (
        streams.head()
        + streams.section(1, 2, "ram", streams.blocks({"pc.ram": length}), version=4)
        + streams.footer(2)
        + streams.part(3, 2, [page(0, filled(1), "pc.ram"), *(page(i, None) for i in range(1, 99))])
        + streams.footer(2)
        + streams.EOF
    )
    snapshot = read(data)
    view = raw_view(snapshot.find("ram").section("pc.ram").snapshot)
    place = vmmig.sealed.descriptor_of(view)
    assert place is not None
    assert os.fstat(place[0]).st_blocks * 512 < length // 2
    assert view.readonly
    assert bytes(view[: PAGE + 1]) == filled(1) + b"\0"
    assert written(snapshot) == data
    assert os.fstat(place[0]).st_blocks * 512 < length // 2


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40, 41, 700, 1500])
@pytest.mark.parametrize("plain", [True, False])
def test_runs_of_any_length(count: int, plain: bool) -> None:
    contents = [filled(i % 255 + 1) if plain else None for i in range(count)]
    records = [page(i, content, None if i else "r") for i, content in enumerate(contents)]
    data = (
        streams.head(None)
        + streams.section(1, 1, "ram", streams.blocks({"r": (count + 2) * PAGE}), version=4)
        + streams.part(2, 1, [*records, page(count + 1, filled(1))])
        + streams.part(3, 1, [])
        + streams.EOF
    )
    for snapshot in (read(data), qemu.read_stream(Dribbling(data, 65537))):
        assert written(snapshot) == data
        assert through_a_socket(snapshot) == data
        expected = b"".join(content or bytes(PAGE) for content in contents)
        assert ram_of(snapshot, "r") == expected + bytes(PAGE) + filled(1)
        assert snapshot.section("stream-runs").nbytes == 32


def test_shared_memory_that_is_not_in_the_stream() -> None:
    data = (
        streams.head(subsections=streams.capabilities("x-ignore-shared"))
        + streams.section(
            1,
            1,
            "ram",
            streams.blocks({"m": PAGE, "rom": PAGE}, {"m": 0, "rom": 0xC0000}),
            version=4,
        )
        + streams.part(3, 1, [page(0, filled(1), "rom")])
        + streams.EOF
    )
    snapshot = read(data)
    assert written(snapshot) == data
    assert list(snapshot.snapshots["ram"].snapshot_data) == ["rom"]
    assert fields_of(snapshot, "configuration")["capabilities"] == ["x-ignore-shared"]


def test_sections_of_no_known_layout_and_what_stands_behind() -> None:
    bitmap = b"\x00\x7e\x00\x00\x00\x03bits"
    data = (
        streams.head(subsections=streams.subsection("configuration/uuid", bytes(range(16))))
        + b"\x08\x00\x01\x00\x02ab"
        + streams.section(4, 9, "early", b"before RAM")
        + streams.footer(9)
        + streams.section(1, 2, "ram", streams.blocks({"r": PAGE}), version=4)
        + streams.footer(2)
        + streams.section(1, 3, "dirty-bitmap", bitmap, instance=4)
        + streams.footer(3)
        + streams.part(2, 2, [page(0, filled(9), "r")])
        + streams.footer(2)
        + b"\x02\0\0\0\3"
        + b"more"
        + streams.footer(3)
        + streams.part(3, 2, [])
        + streams.footer(2)
        + b"\x03\0\0\0\3"
        + streams.footer(3)
        + streams.section(4, 5, "clock", streams.CLOCK_STATE)
        + streams.footer(5)
        + streams.EOF
        + streams.description([streams.CLOCK])
        + b"padding"
    )
    snapshot = read(data)
    assert written(snapshot) == data
    assert state_of(snapshot, "dirty-bitmap/4") == bitmap + b"more"
    assert state_of(snapshot, "early") == b"before RAM"
    assert fields_of(snapshot, "configuration")["uuid"] == bytes(range(16)).hex()
    assert snapshot.section("trailing").snapshot == b"padding"
    assert qemu.decode(snapshot, ("dirty-bitmap/4",), "state") is None
    assert qemu.decode(snapshot, (), "trailing") is None


def test_large_states_come_through_a_pipe() -> None:
    state = os.urandom(5 << 20)
    data = streams.head() + streams.section(4, 1, "early", state) + streams.footer(1)
    data += streams.section(1, 2, "ram", streams.blocks({"r": PAGE}), version=4)
    data += streams.footer(2) + streams.part(3, 2, [page(0, None, "r")]) + streams.footer(2)
    data += streams.section(4, 3, "late", state[1:]) + streams.footer(3) + streams.EOF
    snapshot = qemu.read_stream(Dribbling(data, 65536))
    assert state_of(snapshot, "early") == state
    assert state_of(snapshot, "late") == state[1:]
    assert written(snapshot) == data


def test_a_false_description_gives_way_to_the_footers() -> None:
    wrong = {**streams.CLOCK, "fields": streams.CLOCK["fields"][1:]}
    data = GOLDEN[: -len(streams.description([streams.CLOCK]))]
    data = streams.golden(described=False) + streams.description([wrong])
    snapshot = read(data)
    assert state_of(snapshot, "clock") == streams.CLOCK_STATE
    assert state_of(snapshot, "uart/1") == b"\x1c"
    assert written(snapshot) == data
    assert b"".join(
        value for value in fields_of(snapshot, "clock").values() if isinstance(value, bytes)
    )


# Fields


def test_fields_by_name() -> None:
    snapshot = read(GOLDEN)
    decoded = qemu.decode(snapshot, ("clock",), "state")
    assert decoded is not None
    assert (decoded.kind, decoded.version) == ("rtc", 2)
    assert decoded.fields == streams.CLOCK_FIELDS
    assert fields_of(snapshot, "uart/1") == {"lcr": 0x1C}
    assert fields_of(snapshot, "configuration")["machine"] == "pc-1"
    assert qemu.decode(snapshot, ("ram",), "pc.ram") is None
    with pytest.raises(RestoreError, match="no section 'stat'"):
        qemu.decode(snapshot, ("clock",), "stat")


def test_what_is_not_described_is_there_as_it_is() -> None:
    snapshot = read(GOLDEN)
    clock = snapshot.snapshots["clock"]
    clock.add_data_section(SnapshotDataSection("state", streams.CLOCK_STATE + b"more"))
    assert fields_of(snapshot, "clock")["undescribed"] == b"more"
    clock.add_data_section(SnapshotDataSection("state", streams.CLOCK_STATE[:10]))
    assert fields_of(snapshot, "clock") == {"ticks": 1 << 40, "undescribed": b"\xff\xff"}
    clock.add_data_section(SnapshotDataSection("state", streams.CLOCK_STATE[:-8] + bytes(8)))
    assert len(fields_of(snapshot, "clock")["undescribed"]) == 16  # type: ignore[arg-type]


DESCRIBED = ["name", "fields", "struct", "size", "array_len", "index", "type", "subsections"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "name",
                    "fields",
                    "struct",
                    "size",
                    "array_len",
                    "index",
                    "type",
                    "subsections",
                    "vmsd_name",
                    "version",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=50)
@given(JSON, JSON)
def test_any_description(fields: Any, subsections: Any) -> None:
    device = {"name": "clock", "fields": fields, "subsections": subsections}
    data = streams.golden(described=False) + streams.description([device])
    snapshot = read(data)
    assert written(snapshot) == data
    assert fields_of(snapshot, "clock")


def test_descriptions_that_would_take_for_ever() -> None:
    empty = [streams.field(f"f{i}", "uint8", 0) for i in range(1000)]
    inner: dict[str, Any] = {"fields": [*empty, streams.field("x", "uint8", 1)]}
    many = streams.field("many", "struct", 1, array_len=1 << 20, struct=inner)
    none = streams.field("none", "uint8", 0, array_len=1 << 39)
    clock = {"name": "clock", "fields": [none, many, streams.field("last", "uint8", 1)]}
    snapshot = read(streams.golden(described=False) + streams.description([clock]))
    state = SnapshotDataSection("state", bytes(1 << 20) + b"\7")
    snapshot.snapshots["clock"].add_data_section(state)
    fields = fields_of(snapshot, "clock")
    assert fields["none"] == []
    assert len(fields["undescribed"]) == (1 << 20) + 1  # type: ignore[arg-type]
    deep = json.dumps({"devices": []}).encode()[:-2] + b'{"fields":[' * 5000
    assert "description of the devices is damaged" in refused(
        streams.golden(described=False) + struct.pack(">BI", 6, len(deep)) + deep
    )


# Changes


def test_a_state_that_was_changed_is_written() -> None:
    snapshot = read(GOLDEN)
    changed = bytearray(streams.CLOCK_STATE)
    changed[7] = 9
    snapshot.snapshots["clock"].add_data_section(SnapshotDataSection("state", changed))
    again = read(written(snapshot))
    assert fields_of(again, "clock") == {**streams.CLOCK_FIELDS, "ticks": (1 << 40) + 9}
    differing = [
        name
        for name, value in fields_of(again, "clock").items()
        if value != fields_of(read(GOLDEN), "clock")[name]
    ]
    assert differing == ["ticks"]


def test_ram_that_was_changed_is_written() -> None:
    snapshot = read(GOLDEN)
    ram = bytearray(ram_of(snapshot, "pc.ram"))
    for number in range(5):
        ram[number * PAGE + number] = 0xEE
    snapshot.snapshots["ram"].add_data_section(SnapshotDataSection("pc.ram", ram))
    again = read(written(snapshot))
    assert ram_of(again, "pc.ram") == ram
    assert (
        again.snapshot_data["stream-earlier-pages"]
        == read(GOLDEN).snapshot_data["stream-earlier-pages"]
    )


def test_ram_that_the_stream_has_no_place_for() -> None:
    data = (
        streams.head()
        + streams.section(1, 1, "ram", streams.blocks({"r": 3 * PAGE}), version=4)
        + streams.part(3, 1, [page(0, filled(1), "r"), page(2, None)])
        + streams.EOF
    )
    snapshot = read(data)
    snapshot.snapshots["ram"].add_data_section(
        SnapshotDataSection("r", filled(1) + filled(2) + bytes(PAGE))
    )
    with pytest.raises(SnapshotError, match="'r', a page from 1 to 1 is not zero"):
        written(snapshot)
    snapshot.snapshots["ram"].add_data_section(SnapshotDataSection("r", filled(1)))
    with pytest.raises(SnapshotError, match="has 4096 bytes in the snapshot, and 12288"):
        written(snapshot)


def test_what_would_be_lost_is_refused() -> None:
    snapshot = read(GOLDEN)
    snapshot.add_snapshot(Snapshot("gpu"))
    snapshot.snapshots["ram"].add_data_section(SnapshotDataSection("more", b"x"))
    snapshot.snapshots["uart"].add_snapshot(Snapshot("fifo"))
    snapshot.add_data_section(SnapshotDataSection("note", b"x"))
    with pytest.raises(SnapshotError) as caught:
        written(snapshot)
    for place in ("['gpu']", "['more']", "['fifo']", "['note']"):
        assert place in str(caught.value)
    snapshot = read(GOLDEN)
    del snapshot.snapshots["uart"]
    with pytest.raises(RestoreError, match="no snapshot 'uart'"):
        written(snapshot)


@given(st.data())
def test_any_layout(data: st.DataObject) -> None:
    """A layout or runs that somebody else made end in a stream or an error."""
    snapshot = read(GOLDEN)
    name = data.draw(st.sampled_from(["stream", "stream-runs", "stream-earlier-pages"]))
    seed = bytes(raw_view(snapshot.section(name).snapshot))
    if name == "stream" and data.draw(st.booleans()):
        layout = json.loads(seed)
        one = data.draw(st.sampled_from(layout["parts"]))
        one[data.draw(st.sampled_from(sorted(one)))] = data.draw(JSON)
        other = json.dumps(layout).encode()
    else:
        other = data.draw(changed([seed]))
    snapshot.add_data_section(SnapshotDataSection(name, other))
    with suppress(MigratableError):
        assert written(snapshot)


# Refusals


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "byte 0: the stream ends here"),
        (b"QEVN\0\0\0\3", "byte 0: it does not begin with 'QEVM'"),
        (b"QEVM\0\0\0\2", "byte 4: its version is 2; only 3 is known"),
        (streams.head() + b"\x07", "no section can begin with 0x07 here"),
        (streams.head() + b"\x02\0\0\0\1", "section 1 goes on, but has not begun"),
        (streams.head(subsections=streams.capabilities("mapped-ram")), "capability 'mapped-ram'"),
        (streams.head(subsections=streams.subsection("configuration/new", b"")), "is not known"),
        (
            streams.head(
                subsections=streams.subsection("configuration/target-page-bits", b"\0\0\0\7")
            ),
            "2**7 bytes",
        ),
        (streams.head() + b"\x08\0\x08\0\4abcd", "postcopy"),
        (streams.head() + b"\x08\0\x03\0\x10" + bytes(16), "postcopy"),
        (streams.head() + b"\x04\0\0\0\1\0", "a section's name is b''"),
        (streams.head() + streams.section(4, 1, "x", b"abc"), "ends cannot be known"),
        (streams.head() + b"\x07\xff\xff\xff\xff", "no section can begin"),
        (b"QEVM\0\0\0\3\x07\xff\xff\xff\xff", "cannot have 4294967295 bytes"),
    ],
)
def test_heads_that_are_refused(data: bytes, why: str) -> None:
    assert why in refused(data)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([page(0, None)], "the first page names no RAM block"),
        ([page(0, None, "s")], "there is no RAM block 's'"),
        ([page(2, None, "r")], "page 2 is beyond the end of RAM block 'r'"),
        ([b"\0\0\0\0\0\0\0\x02\1rx"], "filled with 0x78"),
        ([b"\0\0\0\0\0\0\0\x40"], "'xbzrle'"),
        ([b"\0\0\0\0\0\0\0\x80"], "RDMA"),
        ([b"\0\0\0\0\0\0\1\0"], "'compress'"),
        ([b"\0\0\0\0\0\0\2\0"], "'multifd'"),
        ([b"\0\0\0\0\0\0\0\4"], "flags 0x4"),
        ([], "no page of RAM is in this stream"),
        ([page(0, filled(1), "r")[:-1]], "it is cut off"),
    ],
)
def test_pages_that_are_refused(records: list[bytes], why: str) -> None:
    begin = streams.section(1, 1, "ram", streams.blocks({"r": 2 * PAGE}), version=4)
    data = streams.head() + begin + streams.part(3, 1, records)
    if "cut off" in why:
        data = data[: -1 - 8]
    assert why in refused(data + (b"" if "cut off" in why else streams.EOF))


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (streams.blocks({"r": PAGE + 1}), "begins with 0x1005"),
        (struct.pack(">Q", 8), "begins with 0x8"),
        (struct.pack(">Q", PAGE | 4) + b"\1r" + struct.pack(">Q", 2 * PAGE), "cannot have 8192"),
        (struct.pack(">Q", 2 * PAGE | 4) + 2 * (b"\1r" + struct.pack(">Q", PAGE)), "twice"),
        (struct.pack(">Q", (1 << 62) | 4) + b"\1r" + struct.pack(">Q", 1 << 62), "cannot have"),
    ],
)
def test_lists_of_blocks_that_are_refused(blocks: bytes, why: str) -> None:
    assert why in refused(streams.head() + streams.section(1, 1, "ram", blocks, version=4))


def test_sections_that_are_refused() -> None:
    ram = streams.section(1, 1, "ram", streams.blocks({"r": PAGE}), version=4)
    assert "RAM begins twice" in refused(streams.head() + ram + b"\x01\0\0\0\2" + ram[5:])
    assert "section 1 begins twice" in refused(streams.head() + ram + ram)
    assert "RAM's version is 5" in refused(
        streams.head() + streams.section(1, 1, "ram", b"", version=5)
    )
    with_footer = streams.head() + ram + streams.footer(1)
    assert "section 1 ends with the footer of 2" in refused(
        streams.head() + ram + streams.footer(2)
    )
    assert "there is no footer where section 1 ends" in refused(
        with_footer + streams.part(3, 1, [page(0, None, "r")]) + streams.EOF
    )
    for end in range(len(GOLDEN) - 1, len(GOLDEN) - 200, -1):
        try:
            snapshot = read(GOLDEN[:end])
        except DecodeError:
            continue
        assert written(snapshot) == GOLDEN[:end]


# Any stream, and anything


@st.composite
def any_streams(draw: st.DrawFn) -> tuple[bytes, dict[str, bytes]]:
    """A stream, and what its RAM holds in the end."""
    lengths = draw(
        st.dictionaries(st.sampled_from("abc"), st.integers(1, 12), min_size=1, max_size=3)
    )
    footers = draw(st.booleans())
    now = {name: bytearray(count * PAGE) for name, count in lengths.items()}
    came: set[str] = set()
    data = streams.head(draw(st.sampled_from([None, "pc"])))
    data += streams.section(
        1, 1, "ram", streams.blocks({name: n * PAGE for name, n in lengths.items()}), version=4
    )
    data += streams.footer(1, footers)
    block = None
    for kind in [2] * draw(st.integers(0, 3)) + [3]:
        records = []
        for _ in range(draw(st.integers(1, 6))):
            name = draw(st.sampled_from(sorted(lengths)))
            first = draw(st.integers(0, lengths[name] - 1))
            content = draw(st.none() | st.integers(0, 255).map(filled))
            for number in range(first, min(lengths[name], first + draw(st.integers(1, 12)))):
                again = name != block or draw(st.integers(0, 9)) == 0
                records.append(page(number, content, name if again else None))
                now[name][number * PAGE : (number + 1) * PAGE] = content or bytes(PAGE)
                block = name
                came.add(name)
        data += streams.part(kind, 1, records) + streams.footer(1, footers)
    data += streams.section(4, 5, "clock", streams.CLOCK_STATE) + streams.footer(5, footers)
    data += streams.EOF + draw(st.sampled_from([b"", streams.description([streams.CLOCK])]))
    return data, {name: bytes(content) for name, content in now.items() if name in came}


@given(any_streams(), st.integers(1, 9000))
def test_any_stream_comes_back(made: tuple[bytes, dict[str, bytes]], step: int) -> None:
    data, ram = made
    snapshot = read(data)
    assert {name: ram_of(snapshot, name) for name in snapshot.snapshots["ram"].snapshot_data} == ram
    assert written(snapshot) == data
    assert qemu.read_stream(Dribbling(data, step)) == snapshot
    assert written(vmmig.loads(vmmig.dumps(snapshot))) == data


def test_little_memory_for_what_is_only_named() -> None:
    names = [f"{i:04d}" for i in range(1000)]
    begin = streams.section(1, 1, "ram", streams.blocks(dict.fromkeys(names, 1 << 30)), version=4)
    records = [page(9, None, name) for name in names]
    data = streams.head() + begin + streams.part(3, 1, records) + streams.EOF
    resident = resident_bytes()
    tracemalloc.start()
    snapshot = read(data)
    assert snapshot.snapshots["ram"].section("0999").nbytes == 1 << 30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert resident_bytes() - resident < 1 << 30


# virtio


def virtio(*, express: bool, vectors: int, queues: int, subsections: bytes = b"") -> bytes:
    """A virtio device's state on PCI."""
    config = bytearray(4096 if express else 256)
    config[0x34] = 0x40
    if express:
        config[0x40:0x42] = 0x10, 0x50 if vectors else 0
    if vectors:
        at = 0x50 if express else 0x40
        config[at : at + 4] = 0x11, 0, vectors - 1, 0x80
    state = struct.pack(">i", 2) + config + struct.pack(">4I", 1, 0, 0, 0)
    if vectors:
        state += bytes(16 * vectors) + bytes((vectors + 7) // 8) + b"\0\5"
    state += struct.pack(">BBHII3sI", 15, 1, 2, 0x44, 3, b"cfg", queues)
    for queue in range(queues):
        state += struct.pack(">IQH", 256, queue << 12, queue) + (b"\0\6" if vectors else b"")
    return state + b"own" + subsections


@given(st.booleans(), st.integers(0, 20), st.integers(0, 4))
def test_virtio_on_pci(express: bool, vectors: int, queues: int) -> None:
    rings = struct.pack(">QQ", 1, 2) * queues + bytes(16 * (1024 - queues))
    subsections = (
        streams.subsection("virtio/64bit_features", bytes(7) + b"\1")
        + streams.subsection("virtio/virtqueues", rings)
        + streams.subsection("virtio/extra_state", b"\5\7pci/one")
        + streams.subsection("virtio/started", b"\1")
    )
    state = virtio(express=express, vectors=vectors, queues=queues, subsections=subsections)
    name = "0000:00:01.0/virtio-blk"
    device = {"name": name, "fields": [streams.field("v", "virtio", len(state))]}
    snapshot = read(
        streams.head()
        + streams.section(4, 1, name, state)
        + streams.footer(1)
        + streams.EOF
        + streams.description([device])
    )
    fields = fields_of(snapshot, name)["v"]
    assert isinstance(fields, dict)
    assert len(fields["pci_config"]) == (4096 if express else 256)
    assert fields.get("config_vector") == (5 if vectors else None)
    assert (fields["status"], fields["isr"], fields["queue_sel"]) == (15, 1, 2)
    assert (fields["guest_features_lo"], fields["config"], fields["device"]) == (
        0x44,
        b"cfg",
        b"own",
    )
    assert [queue["desc"] >> 12 for queue in fields["queues"]] == [*range(queues)]
    assert all(queue.get("vector") == (6 if vectors else None) for queue in fields["queues"])
    assert fields["virtio/64bit_features"] == {"guest_features": 1}
    assert fields["virtio/virtqueues"]["vring"] == [{"avail": 1, "used": 2}] * queues
    assert fields["virtio/extra_state"] == b"\5\7pci/one"
    assert fields["virtio/started"] is True


VIRTIO = [
    virtio(express=False, vectors=2, queues=1),
    virtio(express=True, vectors=0, queues=2, subsections=streams.subsection("virtio/broken", b"")),
]


@given(changed(VIRTIO), st.booleans())
def test_any_virtio(state: bytes, mmio: bool) -> None:
    name = "virtio-mmio@0/virtio-blk" if mmio else "virtio-blk"
    described = [{"name": name, "fields": [streams.field("v", "virtio", len(state))]}]
    snapshot = read(
        streams.head()
        + streams.section(4, 1, name, state)
        + streams.footer(1)
        + streams.EOF
        + streams.description(described)
    )
    fields = fields_of(snapshot, name)["v"]
    assert fields == state or isinstance(fields, dict)
