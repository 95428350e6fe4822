from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from vmmig import protocol
from vmmig.errors import ProtocolError
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.protocol import (
    ALL_FEATURES,
    CHUNK_BYTES,
    COMMANDS,
    HEADER_BYTES,
    MAX_ERROR_TEXT_BYTES,
    TRANSITIONS,
    Abandon,
    Channel,
    ChannelKind,
    Complete,
    CompletePaused,
    Config,
    Connection,
    ConnectionClosed,
    ConnectionState,
    Error,
    Feature,
    Memory,
    MemoryData,
    MemoryEnd,
    MemoryFd,
    MessageLimits,
    Ok,
    PageFault,
    Role,
    Session,
    SessionOutcome,
    SessionStatus,
    Start,
    State,
    Wait,
    state_diagram,
)

PAGE = MemoryRange(0x4000, 0x1000)
ONE_PAGE = Memory(MemoryRangeTable([PAGE]))
IDENTITY = (b"session number 1", b"only we know it!")
RANGES = st.builds(MemoryRange, st.integers(0, (1 << 64) - 300), st.integers(0, 300))
TABLES = st.lists(RANGES, min_size=1, max_size=4).map(MemoryRangeTable)
EXAMPLES: dict[Any, st.SearchStrategy[Any]] = {
    Start: st.builds(Start, features=st.sampled_from([Feature(n) for n in range(8)])),
    Config: st.builds(Config, st.binary(max_size=40)),
    State: st.builds(State, st.binary(max_size=40)),
    Memory: st.builds(Memory, TABLES),
    Complete: st.just(Complete()),
    CompletePaused: st.just(CompletePaused()),
    Abandon: st.just(Abandon()),
    MemoryFd: st.builds(MemoryFd, st.integers(0, (1 << 32) - 1)),
    PageFault: st.builds(PageFault, RANGES),
    Session: st.builds(Session, *[st.binary(min_size=16, max_size=16)] * 2),
    SessionStatus: st.builds(SessionStatus, *[st.binary(min_size=16, max_size=16)] * 2),
}
OK = bytes.fromhex("0100" + 28 * "0")
GOLDEN = [
    (Start(), "01000000000000000000000000000000"),
    (MemoryFd(3), "0700000000000000040000000000000003000000"),
    (Config(b"{}"), "020000000000000002000000000000007b7d"),
    (ONE_PAGE, "0400000000000000100000000000000000400000000000000010000000000000"),
    (State(b"{}"), "030000000000000002000000000000007b7d"),
    (Complete(), "05000000000000000000000000000000"),
    (PageFault(PAGE), "0900000000000000100000000000000000400000000000000010000000000000"),
    (Abandon(), "06000000000000000000000000000000"),
]


def facts(connection: Connection) -> tuple[object, ...]:
    return (
        connection.state,
        connection.agreed,
        connection.request,
        connection.raw_bytes_left,
        connection.bytes_wanted,
        connection.descriptor_follows,
    )


def refused(connection: Connection, message: Any, match: str = ".") -> None:
    before = facts(connection)
    with pytest.raises(ProtocolError, match=match):
        connection.send(message)
    assert facts(connection) == before


def unreadable(connection: Connection, match: str = ".") -> None:
    """The next event is an error, as often as one asks."""
    before = facts(connection)
    for _ in range(2):
        with pytest.raises(ProtocolError, match=match):
            connection.next_event()
        assert facts(connection) == before
    assert connection.bytes_wanted == 0


def deliver(connection: Connection, data: bytes, sizes: Iterator[int]) -> Any:
    """Hand ``data`` over in pieces; the event that its last byte makes."""
    while data:
        assert connection.next_event() is Wait.NEED_DATA
        size = min(next(sizes), connection.bytes_wanted)
        assert 0 < size <= len(data)
        connection.receive_data(data[:size])
        data = data[size:]
    return connection.next_event()


def ones() -> Iterator[int]:
    while True:
        yield 1


class Pair:
    """Two connections and the stream between them."""

    def __init__(self, sizes: Iterator[int] | None = None, **limits: int) -> None:
        self.sender = Connection(Role.SENDER)
        self.receiver = Connection(Role.RECEIVER, limits=MessageLimits(**limits))
        self.sizes = sizes or ones()

    def auxiliary(self) -> Pair:
        pair = Pair(self.sizes)
        pair.sender, pair.receiver = self.sender.auxiliary(), self.receiver.auxiliary()
        return pair

    def ends(self, role: Role) -> tuple[Connection, Connection]:
        ends = self.sender, self.receiver
        return ends if role is Role.SENDER else (ends[1], ends[0])

    def ask(self, message: Any, role: Role = Role.SENDER) -> None:
        asker, answerer = self.ends(role)
        assert deliver(answerer, asker.send(message), self.sizes) == message
        if isinstance(message, Memory):
            raw = bytes(i % 251 for i in range(message.table.total_bytes))
            self.give(raw, Feature.CHECKSUMS in asker.agreed)
        assert asker.next_event() is Wait.NEED_DATA
        if not isinstance(message, Channel):
            assert answerer.next_event() is Wait.PAUSED

    def give(self, raw: bytes, with_checksum: bool) -> None:
        self.sender.memory_sent(len(raw))
        end = MemoryEnd(xxh3_64_intdigest(raw) if with_checksum else None)
        tail = self.sender.send(end)
        left = len(raw)
        while left:
            assert self.receiver.next_event() is Wait.NEED_DATA
            assert self.receiver.bytes_wanted == self.receiver.raw_bytes_left == left
            read = min(max(256, next(self.sizes)), left)
            self.receiver.memory_received(read)
            left -= read
        assert deliver(self.receiver, tail, self.sizes) == end

    def answer(self, response: Any, role: Role = Role.SENDER) -> Any:
        asker, answerer = self.ends(role)
        event = deliver(asker, answerer.send(response), self.sizes)
        assert asker.state == answerer.state
        assert asker.agreed == answerer.agreed
        assert asker.request is answerer.request is None
        return event

    def do(self, *messages: Any) -> Pair:
        for message in messages:
            self.ask(message)
            assert self.answer(Ok()) == Ok()
        return self


def started(features: Feature = ALL_FEATURES) -> Pair:
    pair = Pair()
    pair.ask(Start(features=features))
    assert pair.answer(Ok(features=ALL_FEATURES)) == Ok(features=features)
    return pair


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    assert protocol.__doc__
    assert textwrap.indent(state_diagram(), "    ") + "\n\n" in protocol.__doc__
    assert set(TRANSITIONS[Role.SENDER]) == set(TRANSITIONS[Role.RECEIVER]) == set(ConnectionState)


def test_abandon_is_legal_in_every_state_of_a_session() -> None:
    ends = {"ABANDONED", "CLOSED", "AUXILIARY", "MEMORY_CHANNEL", "PAGE_FAULT_CHANNEL"}
    legal = {state.name for state, moves in TRANSITIONS[Role.SENDER].items() if Abandon in moves}
    assert legal == {state.name for state in ConnectionState} - ends


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
def test_golden_vectors_in_both_roles(piece_bytes: int) -> None:
    def sizes() -> Iterator[int]:
        while True:
            yield piece_bytes

    pair = Pair(sizes())
    for message, golden in GOLDEN:
        role = Role.RECEIVER if isinstance(message, PageFault) else Role.SENDER
        asker, answerer = pair.ends(role)
        assert asker.send(message) == bytes.fromhex(golden)
        assert deliver(answerer, bytes.fromhex(golden), pair.sizes) == message
        if isinstance(message, Memory):
            pair.give(bytes(4096), with_checksum=False)
        if isinstance(message, PageFault):
            answer = Ok(page=bytes(range(256)) * 16)
            wire = bytes.fromhex("01000000000000000010000000000000") + answer.page
        else:
            answer, wire = Ok(), OK
        assert answerer.send(answer) == wire
        assert deliver(asker, wire, pair.sizes) == answer
        assert asker.state == answerer.state
    assert asker.state is ConnectionState.ABANDONED


def test_golden_error_in_both_roles() -> None:
    pair = Pair()
    pair.ask(Start())
    error = pair.receiver.send(Error("nobody will know why"))
    assert error == bytes.fromhex("0200" + 28 * "0")
    assert deliver(pair.sender, error, ones()) == Error()
    assert pair.sender.state is pair.receiver.state is ConnectionState.FAILED
    pair.do(Abandon())


def test_the_bytes_of_the_additions() -> None:
    pair = Pair()
    start = pair.sender.send(Start(features=ALL_FEATURES))
    assert start.hex() == "01000000564d07000000000000000000"
    assert deliver(pair.receiver, start, ones()) == Start(features=ALL_FEATURES)
    ok = pair.receiver.send(Ok(features=ALL_FEATURES))
    assert ok.hex() == "0100564d070000000000000000000000"
    assert deliver(pair.sender, ok, ones()) == Ok(features=ALL_FEATURES)
    session = pair.sender.send(Session(*IDENTITY))
    assert session == bytes.fromhex("00760000000000002000000000000000") + b"".join(IDENTITY)
    assert deliver(pair.receiver, session, ones()) == Session(*IDENTITY)
    pair.answer(Ok())
    pair.do(Config(b"{}"))
    pair.ask(ONE_PAGE)
    error = pair.receiver.send(Error("nein: ü"))
    assert error == bytes.fromhex("02000000000000000800000000000000") + "nein: ü".encode()
    assert deliver(pair.sender, error, ones()) == Error("nein: ü")


def test_a_checksum_follows_the_raw_bytes_where_agreed() -> None:
    pair = started().do(Config(b"{}"))
    pair.receiver.receive_data(pair.sender.send(ONE_PAGE))
    pair.receiver.next_event()
    refused(pair.sender, MemoryEnd(7), "4096 raw bytes left")
    pair.sender.memory_sent(4096)
    refused(pair.sender, MemoryEnd(), "where CHECKSUMS is agreed")
    refused(pair.sender, MemoryEnd(1 << 64), "64 bits")
    assert pair.sender.send(MemoryEnd(7)) == struct.pack("<Q", 7)
    pair.receiver.memory_received(4096)
    assert pair.receiver.bytes_wanted == 8
    assert deliver(pair.receiver, struct.pack("<Q", 7), ones()) == MemoryEnd(7)


def test_nothing_is_agreed_that_one_side_does_not_announce() -> None:
    pair = Pair()
    assert pair.sender.send(Start(features=ALL_FEATURES))
    assert deliver(pair.sender, OK, ones()) == Ok()
    assert pair.sender.agreed == Feature(0)
    refused(pair.sender, Session(*IDENTITY), "SESSIONS is not agreed")

    pair = Pair()
    pair.ask(Start())
    assert pair.receiver.send(Ok(features=ALL_FEATURES)) == OK
    header = struct.pack("<H6xQ", 0x7600, 32)
    pair.receiver.receive_data(header)
    unreadable(pair.receiver, "no command")

    assert started(Feature.CHECKSUMS).receiver.agreed == Feature.CHECKSUMS


def test_other_headers_and_paddings_are_ignored() -> None:
    receiver = Connection(Role.RECEIVER)
    receiver.receive_data(bytes.fromhex("01000000aabbccdd") + bytes(8))
    assert receiver.next_event() == Start()
    assert receiver.send(Ok(features=ALL_FEATURES)) == OK
    sender = Connection(Role.SENDER)
    sender.send(Start(features=ALL_FEATURES))
    sender.receive_data(bytes.fromhex("0100ffffffffffff") + bytes(8))
    assert sender.next_event() == Ok()
    future = Connection(Role.RECEIVER)
    future.receive_data(bytes.fromhex("01000000564dffff") + bytes(8))
    assert future.next_event() == Start(features=ALL_FEATURES)


def test_who_knows_the_token_asks_for_the_outcome_over_a_new_connection() -> None:
    pair = started()
    for outcome in SessionOutcome:
        pair.ask(SessionStatus(*IDENTITY))
        refused(pair.receiver, Ok(), "cannot be answered")
        assert pair.answer(Ok(outcome=outcome)) == Ok(outcome=outcome)
    pair.ask(SessionStatus(*IDENTITY))
    pair.sender.receive_data(struct.pack("<H6xQB", 1, 1, 9))
    unreadable(pair.sender, "9 is no outcome")
    assert b"only we know" not in repr(SessionStatus(*IDENTITY)).encode()


@given(st.text() | st.just("€" * 40_000) | st.just("\udc80 alone"))
def test_a_text_of_any_kind_comes_with_an_error(text: str) -> None:
    pair = Pair(iter([1 << 20] * 99))
    pair.ask(Start(features=ALL_FEATURES))
    error = pair.answer(Error(text))
    sent = text.encode(errors="backslashreplace").decode()
    assert sent.startswith(error.text)
    assert len(sent.encode()) - len(error.text.encode()) <= max(
        3, len(sent.encode()) - MAX_ERROR_TEXT_BYTES + 3
    )
    assert error.text == sent or len(sent.encode()) > MAX_ERROR_TEXT_BYTES


def key_of(data: st.DataObject, pair: Pair) -> tuple[Role, Any] | None:
    moves = [
        (role, key)
        for role in Role
        for key in TRANSITIONS[role][pair.ends(role)[0].state]
        if key not in (Session, SessionStatus) or Feature.SESSIONS in pair.sender.agreed
    ]
    return data.draw(st.sampled_from(moves)) if moves else None


def answer_to(data: st.DataObject, message: Any) -> Any:
    if data.draw(st.integers(0, 19)) == 0:
        return Error("")
    if isinstance(message, Start):
        return Ok(features=message.features & data.draw(st.sampled_from(list(Feature))))
    if isinstance(message, PageFault):
        return Ok(page=data.draw(st.sampled_from([b"", bytes(message.range.length)])))
    if isinstance(message, SessionStatus):
        return Ok(outcome=data.draw(st.sampled_from(SessionOutcome)))
    return Ok()


def walk(data: st.DataObject, steps: int) -> Pair:
    """A pair after a random legal conversation, all of it cut at random."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=9))
    pair = Pair(size for _ in range(1 << 20) for size in sizes)
    if data.draw(st.booleans()):
        pair = pair.auxiliary()
    for _ in range(data.draw(st.integers(0, steps))):
        chosen = key_of(data, pair)
        if chosen is None:
            break
        role, key = chosen
        asker, answerer = pair.ends(role)
        after = TRANSITIONS[role][asker.state][key]
        if key is ConnectionClosed:
            assert asker.send(ConnectionClosed()) == b""
            answerer.receive_data(b"")
            assert answerer.next_event() == ConnectionClosed()
        elif isinstance(key, ChannelKind):
            channel = Channel(key)
            assert deliver(answerer, asker.send(channel), pair.sizes) == channel
        else:
            message = data.draw(EXAMPLES[key])
            pair.ask(message, role)
            response = answer_to(data, message)
            assert pair.answer(response, role) == response
            if isinstance(response, Error):
                after = ConnectionState.FAILED
        assert asker.state is answerer.state is after
    return pair


@given(st.data())
def test_legal_conversations_end_in_the_same_state_however_they_are_cut(
    data: st.DataObject,
) -> None:
    walk(data, 12)


@given(st.data())
def test_what_is_illegal_raises_and_changes_nothing(data: st.DataObject) -> None:
    pair = walk(data, 8)
    for role in Role:
        asker = pair.ends(role)[0]
        moves = TRANSITIONS[role][asker.state]
        for key, examples in EXAMPLES.items():
            gated = key in (Session, SessionStatus) and Feature.SESSIONS not in asker.agreed
            if key not in moves or gated:
                refused(asker, data.draw(examples))
        for message in (Ok(), Error(), MemoryEnd(), MemoryEnd(1)):
            refused(asker, message)
        for moved in (asker.memory_sent, asker.memory_received):
            with pytest.raises(ProtocolError):
                moved(1)
    state = pair.sender.state
    bad = [id for id, kind in COMMANDS.items() if kind not in TRANSITIONS[Role.SENDER][state]]
    request = struct.pack("<H6xQ", data.draw(st.sampled_from([*bad, 0, 10, 65535])), 0)
    if state in (ConnectionState.CLOSED, ConnectionState.AUXILIARY):
        return
    pair.receiver.receive_data(request)
    unreadable(pair.receiver)
    if TRANSITIONS[Role.SENDER][state].keys() - {ConnectionClosed}:
        assert pair.receiver.send(Error("bad"))[:2] == b"\x02\x00"
        assert pair.receiver.state is ConnectionState.CLOSED
        assert pair.receiver.next_event() is Wait.PAUSED
        refused(pair.receiver, Error())


@given(st.data(), st.lists(st.binary(max_size=40) | st.just(OK), max_size=20))
def test_any_bytes_end_in_events_or_in_a_protocol_error(
    data: st.DataObject, pieces: list[bytes]
) -> None:
    pair = walk(data, 6)
    role = data.draw(st.sampled_from(Role))
    connection = pair.ends(role)[0]
    if data.draw(st.booleans()):
        chosen = key_of(data, pair)
        if chosen and chosen[0] is role and chosen[1] in EXAMPLES:
            connection.send(data.draw(EXAMPLES[chosen[1]]))
    for piece in pieces:
        before = facts(connection)
        try:
            connection.receive_data(piece)
        except ProtocolError:
            assert facts(connection) == before
            return
        try:
            for _ in range(len(piece) + 3):
                if isinstance(connection.next_event(), Wait | ConnectionClosed):
                    break
        except ProtocolError:
            unreadable(connection)
            return


@pytest.mark.parametrize(
    ("state", "command", "length", "match"),
    [
        (Start(), 2, 101, "max_config_bytes"),
        (Start(), 2, (1 << 64) - 1, "max_config_bytes"),
        (Config(b""), 3, 201, "max_state_bytes"),
        (Config(b""), 4, 16 * 4, "max_ranges"),
        (Config(b""), 4, 17, "multiple of 16"),
        (Start(), 7, 5, "instead of 4"),
        (Start(), 6, 1, "instead of 0"),
    ],
)
def test_a_length_is_refused_from_the_header_alone(
    state: Any, command: int, length: int, match: str
) -> None:
    pair = Pair(max_config_bytes=100, max_state_bytes=200, max_ranges=3)
    pair.do(*([Start()] if state == Start() else [Start(), state]))
    pair.receiver.receive_data(struct.pack("<H6xQ", command, length))
    unreadable(pair.receiver, match)
    with pytest.raises(ProtocolError, match="take the events first"):
        pair.receiver.receive_data(bytes(100))
    assert pair.receiver.send(Error()).hex() == "0200" + 28 * "0"


@pytest.mark.parametrize("version", [1, 2, 65535])
def test_another_version_is_refused(version: int) -> None:
    receiver = Connection(Role.RECEIVER)
    receiver.receive_data(struct.pack("<HH4xQ", 1, version, 0))
    unreadable(receiver, f"version {version}")
    refused(Connection(Role.SENDER), Start(version=version), "version")


def test_a_range_beyond_64_bits_is_refused() -> None:
    pair = Pair().do(Start(), Config(b""))
    pair.receiver.receive_data(struct.pack("<H6xQQQ", 4, 16, (1 << 64) - 1, 2))
    unreadable(pair.receiver, "64 bits")
    assert pair.receiver.send(Error())


@given(TABLES)
def test_raw_bytes_that_were_read_too_early_come_as_events(table: MemoryRangeTable) -> None:
    pair = Pair().do(Start(), Config(b""))
    data = pair.sender.send(Memory(table))
    raw = os.urandom(table.total_bytes)
    pair.sender.memory_sent(len(raw))
    pair.sender.send(MemoryEnd())
    head, rest = raw[: len(raw) // 3], raw[len(raw) // 3 :]
    pair.receiver.receive_data(data + head)
    assert pair.receiver.next_event() == Memory(table)
    if head:
        with pytest.raises(ProtocolError, match="wait in next_event"):
            pair.receiver.memory_received(1)
        assert pair.receiver.next_event() == MemoryData(head)
    assert pair.receiver.bytes_wanted == len(rest)
    if rest:
        assert pair.receiver.next_event() is Wait.NEED_DATA
        with pytest.raises(ProtocolError, match="are left"):
            pair.receiver.memory_received(len(rest) + 1)
    pair.receiver.memory_received(len(rest))
    assert pair.receiver.next_event() == MemoryEnd()
    assert pair.answer(Ok()) == Ok()


def test_an_answer_comes_only_when_one_is_awaited() -> None:
    sender = Connection(Role.SENDER)
    sender.receive_data(OK)
    unreadable(sender, "no response is awaited")
    refused(sender, Error())
    pair = Pair().do(Start(), Config(b""))
    pair.sender.send(ONE_PAGE)
    pair.sender.receive_data(OK)
    unreadable(pair.sender, "before all of it was sent")


@pytest.mark.parametrize("status", [0, 3, 65535])
def test_an_unknown_status_is_refused(status: int) -> None:
    sender = Connection(Role.SENDER)
    sender.send(Start())
    sender.receive_data(struct.pack("<H14x", status))
    unreadable(sender, f"unknown status {status}")


@pytest.mark.parametrize(("status", "length"), [(1, 1), (2, 1), (1, 1 << 63)])
def test_a_response_has_no_payload_that_is_not_agreed(status: int, length: int) -> None:
    sender = Connection(Role.SENDER)
    sender.send(Start(features=ALL_FEATURES))
    sender.receive_data(struct.pack("<H6xQ", status, length))
    unreadable(sender, "payload")


def test_an_error_may_come_before_the_raw_bytes_are_sent() -> None:
    pair = started().do(Config(b""))
    pair.receiver.receive_data(pair.sender.send(ONE_PAGE))
    pair.receiver.next_event()
    pair.sender.memory_sent(100)
    refused(pair.receiver, Ok(), "no request awaits")
    assert pair.answer(Error("no memory at 0x4000")) == Error("no memory at 0x4000")
    assert pair.sender.state is ConnectionState.CLOSED
    refused(pair.sender, Abandon())


def test_one_request_at_a_time() -> None:
    pair = Pair().do(Start(), Config(b""))
    pair.sender.send(ONE_PAGE)
    refused(pair.sender, ONE_PAGE, "before Memory is answered")
    refused(pair.sender, Abandon(), "before Memory is answered")


def test_auxiliary_connections() -> None:
    main = started(Feature.CHECKSUMS).do(Config(b""))
    memory = main.auxiliary()
    channel = memory.sender.send(Channel(ChannelKind.MEMORY))
    assert channel.hex() == "0100"
    assert deliver(memory.receiver, channel, ones()) == Channel(ChannelKind.MEMORY)
    memory.do(ONE_PAGE, ONE_PAGE)
    limit = Memory(MemoryRangeTable([MemoryRange(0, CHUNK_BYTES)]))
    over = Memory(MemoryRangeTable([MemoryRange(0, CHUNK_BYTES), MemoryRange(0, 1)]))
    refused(memory.sender, over, "at most 67108864")
    assert memory.sender.send(limit)
    request = struct.pack("<H6xQQQ", 4, 16, 0, CHUNK_BYTES + 1)
    memory.receiver.receive_data(request)
    unreadable(memory.receiver, "at most 67108864")
    faults = main.auxiliary()
    channel = faults.sender.send(Channel(ChannelKind.PAGE_FAULTS))
    assert channel.hex() == "0200"
    assert deliver(faults.receiver, channel, ones()) == Channel(ChannelKind.PAGE_FAULTS)
    for page in (bytes(4096), b""):
        faults.ask(PageFault(PAGE), Role.RECEIVER)
        refused(faults.sender, Ok(page=b"short"), "cannot be answered")
        assert faults.answer(Ok(page=page), Role.RECEIVER) == Ok(page=page)
    faults.sender.receive_data(b"")
    assert faults.sender.next_event() == ConnectionClosed()
    other = main.auxiliary().receiver
    other.receive_data(b"\x03\x00")
    unreadable(other, "3 is no channel")


def test_a_stream_may_not_end_in_the_middle() -> None:
    fresh = Connection(Role.RECEIVER)
    fresh.receive_data(b"")
    unreadable(fresh, "before the session did")
    with pytest.raises(ProtocolError, match="after the stream's end"):
        fresh.receive_data(b"x")
    cut = Connection(Role.RECEIVER)
    cut.receive_data(bytes.fromhex("0100"))
    cut.receive_data(b"")
    unreadable(cut, "in the middle")
    unanswered = Pair().do(Start(), Config(b""), State(b""))
    unanswered.sender.send(Complete())
    unanswered.sender.receive_data(b"")
    unreadable(unanswered.sender, "Complete unanswered")


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (MemoryFd(1 << 32), "32 bits"),
        (MemoryFd(-1), "32 bits"),
        (Session(b"short", bytes(16)), "16 bytes"),
        (MemoryData(b""), "nothing that can be sent"),
        ("Start", "nothing that can be sent"),
    ],
)
def test_a_message_that_is_not_valid_is_refused(message: Any, match: str) -> None:
    refused(started().sender, message, match)


def test_an_empty_table_is_not_sent_but_understood() -> None:
    pair = Pair().do(Start(), Config(b""))
    refused(pair.sender, Memory(MemoryRangeTable()), "empty table")
    pair.receiver.receive_data(struct.pack("<H6xQ", 4, 0))
    assert pair.receiver.next_event() == Memory(MemoryRangeTable())
    assert pair.receiver.next_event() == MemoryEnd()
    assert pair.receiver.send(Ok()) == OK


def test_a_descriptor_and_memory_over_a_real_socket() -> None:
    """Exact reads keep a descriptor apart, also when all has been sent before it is read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    source, destination = Connection(Role.SENDER), Connection(Role.RECEIVER)
    ram = mmap.mmap(-1, 0x6000)
    slots: dict[int, int] = {}

    def receive(connection: Connection, sock: socket.socket) -> Any:
        while (event := connection.next_event()) is Wait.NEED_DATA:
            if connection.descriptor_follows:
                data, fds, _, _ = socket.recv_fds(sock, connection.bytes_wanted, 1)
                slots[struct.unpack("<I", data)[0]] = fds[0]
            else:
                data = sock.recv(connection.bytes_wanted)
            connection.receive_data(data)
        return event

    def ask(message: Any) -> Any:
        data = source.send(message)
        if isinstance(message, MemoryFd):
            ours.sendall(data[:HEADER_BYTES])
            with os.fdopen(os.memfd_create("ram")) as memory:
                rights = array.array("i", [memory.fileno()])
                ours.sendmsg(
                    [data[HEADER_BYTES:]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                )
        else:
            ours.sendall(data)
        checksum = None
        if isinstance(message, Memory):
            for part in message.table:
                ours.sendall(bytes(range(256)) * (part.length // 256))
            source.memory_sent(message.table.total_bytes)
            checksum = xxh3_64_intdigest(bytes(range(256)) * (message.table.total_bytes // 256))
            ours.sendall(source.send(MemoryEnd(checksum)))
        assert receive(destination, theirs) == message
        if isinstance(message, Memory):
            with memoryview(ram) as view:
                for part in message.table:
                    got = theirs.recv_into(view[part.gpa : part.end], part.length)
                    destination.memory_received(got)
            assert receive(destination, theirs) == MemoryEnd(checksum)
        features = ALL_FEATURES if isinstance(message, Start) else Feature(0)
        theirs.sendall(destination.send(Ok(features=features)))
        return receive(source, ours)

    with ours, theirs, ram:
        try:
            assert ask(Start(features=ALL_FEATURES)) == Ok(features=ALL_FEATURES)
            for message in (MemoryFd(3), MemoryFd(0), Config(b"{}"), ONE_PAGE, State(b"{}")):
                assert ask(message) == Ok()
            assert ask(Complete()) == Ok()
            assert set(slots) == {0, 3}
            assert ram[0x4000:0x5000] == bytes(range(256)) * 16
            ours.close()
            assert receive(destination, theirs) == ConnectionClosed()
        finally:
            for fd in slots.values():
                os.close(fd)
