"""Live migration's wire protocol, sans I/O: Cloud Hypervisor's (v53), with vmmig's additions.

A `Connection` eats bytes and yields messages, and turns messages into bytes; the socket is its
driver's. All integers are little-endian.

**Messages.** A request is ``u16 command | u8[6] headers | u64 length`` and a payload of ``length``
bytes. One response answers each: ``u16 status | u8[6] padding | u64 length`` and a payload. Status
1 is `Ok`, 2 `Error`. A Memory request's payload is its table, ``u64 gpa, u64 length`` for each
range; behind it, not counted in ``length``, come the raw bytes of all ranges in the table's order.
An auxiliary connection begins with the two bytes of a `Channel`, which nothing answers.

====== ============== ====== ====================================================
id     message        length payload
====== ============== ====== ====================================================
1      Start          0      headers[0:2]: the protocol's version
2      Config         n      JSON
3      State          n      JSON
4      Memory         16 k   k ranges; then their raw bytes
5      Complete       0      the destination resumes, then answers
6      Abandon        0      the destination drops the session
7      MemoryFd       4      u32 slot, sent apart, with one descriptor (SCM_RIGHTS)
8      CompletePaused 0      as Complete, but the destination stays paused
9      PageFault      16     one range, asked for by the destination
0x7600 Session        32     vmmig's: 16 bytes session id, 16 bytes token
0x7601 SessionStatus  32     vmmig's: the same
====== ============== ====== ====================================================

**States.** Both sides are in the same state whenever no request is unanswered: the sender of a
request moves on when it reads Ok, the receiver when it sends Ok. Error ends the session: the state
is FAILED; it is CLOSED where the stream can no longer be followed, because the request could not be
read, or its raw bytes have not all passed. `TRANSITIONS` is this diagram (`state_diagram`)::

    stateDiagram-v2
        ESTABLISHED --> STARTED: Start
        ESTABLISHED --> ABANDONED: Abandon
        STARTED --> SESSION_NAMED: Session
        STARTED --> STATUS_ASKED: SessionStatus
        STARTED --> MEMORY_FDS_RECEIVED: MemoryFd
        STARTED --> CONFIGURED: Config
        STARTED --> ABANDONED: Abandon
        SESSION_NAMED --> MEMORY_FDS_RECEIVED: MemoryFd
        SESSION_NAMED --> CONFIGURED: Config
        SESSION_NAMED --> ABANDONED: Abandon
        MEMORY_FDS_RECEIVED --> MEMORY_FDS_RECEIVED: MemoryFd
        MEMORY_FDS_RECEIVED --> CONFIGURED: Config
        MEMORY_FDS_RECEIVED --> ABANDONED: Abandon
        CONFIGURED --> CONFIGURED: Memory
        CONFIGURED --> STATE_RECEIVED: State
        CONFIGURED --> ABANDONED: Abandon
        STATE_RECEIVED --> COMPLETED: Complete, CompletePaused
        STATE_RECEIVED --> ABANDONED: Abandon
        COMPLETED --> COMPLETED: SessionStatus, PageFault (by the receiver)
        COMPLETED --> ABANDONED: Abandon
        COMPLETED --> CLOSED: ConnectionClosed
        STATUS_ASKED --> STATUS_ASKED: SessionStatus
        STATUS_ASKED --> ABANDONED: Abandon
        STATUS_ASKED --> CLOSED: ConnectionClosed
        FAILED --> ABANDONED: Abandon
        FAILED --> CLOSED: ConnectionClosed
        ABANDONED --> CLOSED: ConnectionClosed
        AUXILIARY --> MEMORY_CHANNEL: Channel MEMORY
        AUXILIARY --> PAGE_FAULT_CHANNEL: Channel PAGE_FAULTS
        MEMORY_CHANNEL --> MEMORY_CHANNEL: Memory
        MEMORY_CHANNEL --> CLOSED: ConnectionClosed
        PAGE_FAULT_CHANNEL --> CLOSED: ConnectionClosed
        PAGE_FAULT_CHANNEL --> PAGE_FAULT_CHANNEL: PageFault (by the receiver)

**vmmig's additions** are used only when both sides announce them; until then, and with a peer that
announces nothing, every byte is Cloud Hypervisor's. Config's JSON stays untouched: an announcement
there would come after the memory's descriptors, and would need a parser in this layer.

- *Announcement.* Start's headers[2:6], which Cloud Hypervisor ignores, hold ``56 4D`` ("VM") and a
  u16 of `Feature` bits. The response to a Start that has it, and to no other, holds in its padding
  the same two bytes, then a u16 of those bits that both sides know, then two zero bytes. These are
  the agreed features of the session, and of its auxiliary connections, which announce nothing.
  Bits that a side does not know, it does not answer.
- *Error text* (bit 0). The payload of an Error is a text in UTF-8, of 64 KiB at most. An Error in
  response to a Start that announced this bit has it too, and announces it.
- *Checksums* (bit 1). Behind each Memory request's raw bytes follows a u64: the 64-bit XXH3, with
  seed 0, of these bytes as they were sent.
- *Sessions* (bit 2). Session, sent once, directly after Start's Ok, gives the session an id and a
  token: the id names it in records, the token is a secret, and who shows it may ask what became of
  the session. For that a source opens a new connection and sends Start, then SessionStatus as often
  as needed. Ok has one byte of payload, a `SessionOutcome`. A source that has read Complete's Ok
  asks once on the session's own connection: so the destination learns that the source knows.

A Start and the channel of an auxiliary connection begin with the same two bytes. What a new
connection is follows from the session's state: auxiliary ones are opened between Config's Ok and
State, one that asks for a session's outcome only after Complete.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

import attrs

from vmmig.errors import MigratableError, ProtocolError
from vmmig.memory import MemoryRange, MemoryRangeTable

PROTOCOL_VERSION = 0
"""What Start tells; a receiver accepts this version and the one before."""

HEADER_BYTES = 16
CHUNK_BYTES = 64 << 20
"""The most raw bytes of one Memory request on an auxiliary connection."""

MAX_ERROR_TEXT_BYTES = 64 << 10

_HEADER = struct.Struct("<H6sQ")
_START = struct.Struct("<H2sH")
_ANNOUNCEMENT = struct.Struct("<2sH2x")
_RANGE = struct.Struct("<QQ")
_SLOT = struct.Struct("<I")
_CHANNEL = struct.Struct("<H")
_CHECKSUM = struct.Struct("<Q")
_MAGIC = b"VM"
_SECRET_BYTES = 16
_PLAIN = bytes(6)
_OK, _ERROR = 1, 2


class Role(enum.Enum):
    """Which side of a migration a connection is on.

    >>> Role.SENDER.peer
    <Role.RECEIVER: 'receiver'>
    """

    SENDER = "sender"
    RECEIVER = "receiver"

    @property
    def peer(self) -> Role:
        """The other one."""
        return Role.RECEIVER if self is Role.SENDER else Role.SENDER


class ConnectionState(enum.Enum):
    """How far a connection has come; the module's documentation has the diagram.

    >>> Connection(Role.SENDER).state
    <ConnectionState.ESTABLISHED: 1>
    """

    ESTABLISHED = enum.auto()
    STARTED = enum.auto()
    SESSION_NAMED = enum.auto()
    MEMORY_FDS_RECEIVED = enum.auto()
    CONFIGURED = enum.auto()
    STATE_RECEIVED = enum.auto()
    COMPLETED = enum.auto()
    STATUS_ASKED = enum.auto()
    FAILED = enum.auto()
    ABANDONED = enum.auto()
    CLOSED = enum.auto()
    AUXILIARY = enum.auto()
    MEMORY_CHANNEL = enum.auto()
    PAGE_FAULT_CHANNEL = enum.auto()


class Feature(enum.IntFlag):
    """vmmig's additions to the protocol, as they are announced.

    >>> Feature.CHECKSUMS in ALL_FEATURES
    True
    """

    ERROR_TEXT = 1
    CHECKSUMS = 2
    SESSIONS = 4


NO_FEATURES = Feature(0)
ALL_FEATURES = Feature.ERROR_TEXT | Feature.CHECKSUMS | Feature.SESSIONS


class ChannelKind(enum.Enum):
    """What an auxiliary connection is for.

    >>> ChannelKind.PAGE_FAULTS.value
    2
    """

    MEMORY = 1
    PAGE_FAULTS = 2


class SessionOutcome(enum.Enum):
    """What became of a session, as its destination knows it.

    UNKNOWN: no such session, or another token. PENDING: it may still complete. COMMITTED: it was
    completed. ABORTED: it was not, and never will be.

    >>> SessionOutcome(2)
    <SessionOutcome.COMMITTED: 2>
    """

    UNKNOWN = 0
    PENDING = 1
    COMMITTED = 2
    ABORTED = 3


class Wait(enum.Enum):
    """What `Connection.next_event` answers when there is no event.

    NEED_DATA: read `Connection.bytes_wanted` bytes. PAUSED: it is this side's turn to send, or
    nothing will come any more.

    >>> Connection(Role.RECEIVER).next_event(), Connection(Role.SENDER).next_event()
    (<Wait.NEED_DATA: 1>, <Wait.PAUSED: 2>)
    """

    NEED_DATA = enum.auto()
    PAUSED = enum.auto()


@attrs.frozen
class Start:
    """The first request: the protocol's version, and the additions that the sender knows.

    >>> Start()
    Start(version=0, features=<Feature: 0>)
    """

    version: int = PROTOCOL_VERSION
    features: Feature = NO_FEATURES


@attrs.frozen
class Config:
    """The machine's configuration: JSON, which this layer does not read.

    >>> len(Config(b"{}").configuration)
    2
    """

    configuration: bytes


@attrs.frozen
class State:
    """The state of the paused machine: JSON, which this layer does not read.

    >>> len(State(b"{}").state)
    2
    """

    state: bytes


@attrs.frozen
class Memory:
    """Ranges of memory; their raw bytes follow, and do not pass through the `Connection`.

    >>> Memory(MemoryRangeTable([MemoryRange(0x4000, 0x1000)])).table.total_bytes
    4096
    """

    table: MemoryRangeTable


@attrs.frozen
class MemoryData:
    """Raw bytes of a Memory request that were given to `Connection.receive_data`; more may follow.

    >>> len(MemoryData(bytes(4096)).data)
    4096
    """

    data: bytes


@attrs.frozen
class MemoryEnd:
    """All raw bytes of a Memory request have passed.

    Attributes:
        checksum: Their 64-bit XXH3 with seed 0 where `Feature.CHECKSUMS` is agreed, else None.

    >>> MemoryEnd()
    MemoryEnd(checksum=None)
    """

    checksum: int | None = None


@attrs.frozen
class Complete:
    """All is sent: the destination resumes the machine, then answers.

    >>> Complete()
    Complete()
    """


@attrs.frozen
class CompletePaused:
    """All is sent: the destination answers, and its machine stays paused.

    >>> CompletePaused()
    CompletePaused()
    """


@attrs.frozen
class Abandon:
    """The sender gives up: the destination drops the session.

    >>> Abandon()
    Abandon()
    """


@attrs.frozen
class MemoryFd:
    """The memory of one slot, handed over as a descriptor, over a unix socket.

    The header and the slot are two messages to the kernel: the descriptor goes with the second.

    >>> MemoryFd(3).slot
    3
    """

    slot: int


@attrs.frozen
class PageFault:
    """The destination needs this page now.

    >>> PageFault(MemoryRange(0x4000, 0x1000)).range.gpa
    16384
    """

    range: MemoryRange


@attrs.frozen
class Session:
    """The session's id, and the secret token of who may ask for its outcome; 16 bytes each.

    >>> Session(bytes(16), b"only we know it.")
    Session(id=b'\\x00\\x00...')
    """

    id: bytes
    token: bytes = attrs.field(repr=False)


@attrs.frozen
class SessionStatus:
    """What became of the session of this id? Asked over a new connection, with its token.

    >>> SessionStatus(b"number 123456789", b"only we know it.")
    SessionStatus(id=b'number 123456789')
    """

    id: bytes
    token: bytes = attrs.field(repr=False)


@attrs.frozen
class Ok:
    """The request was fulfilled.

    Attributes:
        features: In response to Start: the additions that the receiver knows. Those that Start
            announced too are sent, and are then agreed.
        page: In response to PageFault: the page's bytes, or none where it was written to memory
            that both sides share.
        outcome: In response to SessionStatus.

    >>> Ok()
    Ok(features=<Feature: 0>, page=b'', outcome=None)
    """

    features: Feature = NO_FEATURES
    page: bytes = b""
    outcome: SessionOutcome | None = None


@attrs.frozen
class Error:
    """The request was refused or failed, and the session is over.

    Attributes:
        text: Why. It is cut to 64 KiB, and dropped where `Feature.ERROR_TEXT` is not agreed.

    >>> Error("no such slot").text
    'no such slot'
    """

    text: str = ""


@attrs.frozen
class Channel:
    """The first two bytes of an auxiliary connection: what it is for.

    >>> Channel(ChannelKind.MEMORY)
    Channel(kind=<ChannelKind.MEMORY: 1>)
    """

    kind: ChannelKind


@attrs.frozen
class ConnectionClosed:
    """The stream has ended where it may end.

    >>> ConnectionClosed()
    ConnectionClosed()
    """


Request: TypeAlias = (
    Start
    | Config
    | State
    | Memory
    | Complete
    | Abandon
    | MemoryFd
    | CompletePaused
    | PageFault
    | Session
    | SessionStatus
)
Response: TypeAlias = Ok | Error
Message: TypeAlias = Request | Response | MemoryEnd | Channel | ConnectionClosed
Event: TypeAlias = Message | MemoryData

COMMANDS: Mapping[int, type[Request]] = {
    1: Start,
    2: Config,
    3: State,
    4: Memory,
    5: Complete,
    6: Abandon,
    7: MemoryFd,
    8: CompletePaused,
    9: PageFault,
    0x7600: Session,
    0x7601: SessionStatus,
}
"""What each command of a request is."""

_IDS = {kind: id for id, kind in COMMANDS.items()}
_FIXED_BYTES: Mapping[type[Request], int] = {
    Start: 0,
    Complete: 0,
    Abandon: 0,
    CompletePaused: 0,
    MemoryFd: _SLOT.size,
    PageFault: _RANGE.size,
    Session: 2 * _SECRET_BYTES,
    SessionStatus: 2 * _SECRET_BYTES,
}
_Key: TypeAlias = type[Request] | type[ConnectionClosed] | ChannelKind
_S = ConnectionState
_ABANDON: dict[_Key, ConnectionState] = {Abandon: _S.ABANDONED}
_CLOSE: dict[_Key, ConnectionState] = {ConnectionClosed: _S.CLOSED}

TRANSITIONS: Mapping[Role, Mapping[ConnectionState, Mapping[_Key, ConnectionState]]] = {
    Role.SENDER: {
        _S.ESTABLISHED: {Start: _S.STARTED, **_ABANDON},
        _S.STARTED: {
            Session: _S.SESSION_NAMED,
            SessionStatus: _S.STATUS_ASKED,
            MemoryFd: _S.MEMORY_FDS_RECEIVED,
            Config: _S.CONFIGURED,
            **_ABANDON,
        },
        _S.SESSION_NAMED: {
            MemoryFd: _S.MEMORY_FDS_RECEIVED,
            Config: _S.CONFIGURED,
            **_ABANDON,
        },
        _S.MEMORY_FDS_RECEIVED: {
            MemoryFd: _S.MEMORY_FDS_RECEIVED,
            Config: _S.CONFIGURED,
            **_ABANDON,
        },
        _S.CONFIGURED: {Memory: _S.CONFIGURED, State: _S.STATE_RECEIVED, **_ABANDON},
        _S.STATE_RECEIVED: {
            Complete: _S.COMPLETED,
            CompletePaused: _S.COMPLETED,
            **_ABANDON,
        },
        _S.COMPLETED: {SessionStatus: _S.COMPLETED, **_ABANDON, **_CLOSE},
        _S.STATUS_ASKED: {SessionStatus: _S.STATUS_ASKED, **_ABANDON, **_CLOSE},
        _S.FAILED: {**_ABANDON, **_CLOSE},
        _S.ABANDONED: _CLOSE,
        _S.CLOSED: {},
        _S.AUXILIARY: {
            ChannelKind.MEMORY: _S.MEMORY_CHANNEL,
            ChannelKind.PAGE_FAULTS: _S.PAGE_FAULT_CHANNEL,
        },
        _S.MEMORY_CHANNEL: {Memory: _S.MEMORY_CHANNEL, **_CLOSE},
        _S.PAGE_FAULT_CHANNEL: _CLOSE,
    },
    Role.RECEIVER: {
        **{state: {} for state in ConnectionState},
        _S.COMPLETED: {PageFault: _S.COMPLETED, **_CLOSE},
        _S.STATUS_ASKED: _CLOSE,
        _S.FAILED: _CLOSE,
        _S.ABANDONED: _CLOSE,
        _S.MEMORY_CHANNEL: _CLOSE,
        _S.PAGE_FAULT_CHANNEL: {PageFault: _S.PAGE_FAULT_CHANNEL, **_CLOSE},
    },
}
"""What each role may send in each state, and the state once it is done."""


def state_diagram() -> str:
    """`TRANSITIONS` as a Mermaid state diagram.

    >>> print(state_diagram())
    stateDiagram-v2
        ESTABLISHED --> STARTED: Start
        ...
    """
    edges: dict[tuple[str, str], list[str]] = {}
    for role, table in TRANSITIONS.items():
        for state, moves in table.items():
            for key, after in moves.items():
                name = f"Channel {key.name}" if isinstance(key, ChannelKind) else key.__name__
                if role is Role.RECEIVER and key is not ConnectionClosed:
                    name += " (by the receiver)"
                names = edges.setdefault((state.name, after.name), [])
                if name not in names:
                    names.append(name)
    lines = [f"    {a} --> {b}: {', '.join(names)}" for (a, b), names in edges.items()]
    return "\n".join(["stateDiagram-v2", *lines])


@attrs.frozen
class MessageLimits:
    """What a `Connection` refuses from a header alone, before it keeps anything of the payload.

    Attributes:
        max_config_bytes: The payload of Config.
        max_state_bytes: The payload of State.
        max_ranges: The table of one Memory request; a range takes 16 bytes. A migration over one
            connection may send a range for every page that changed.

    >>> MessageLimits(max_ranges=1000).max_ranges
    1000
    """

    max_config_bytes: int = 64 << 20
    max_state_bytes: int = 1 << 30
    max_ranges: int = 1 << 22


_DEFAULT_LIMITS = MessageLimits()


class Connection:
    """One side of one connection of a migration; neither thread-safe nor in need of closing.

    A driver takes `next_event` until it answers a `Wait`, and then reads or sends. It may read
    less than `bytes_wanted`. It may read more only where no MemoryFd can come (TCP), and then
    takes the raw bytes of Memory that it read too early as `MemoryData`.

    Whatever raises ProtocolError has changed nothing: the state is as it was, and bytes that were
    not understood are still there, so that the same call raises again.

    Args:
        role: The side of the migration; the sender is the source.
        limits: What to refuse of what the peer sends.

    >>> sender, receiver = Connection(Role.SENDER), Connection(Role.RECEIVER)
    >>> receiver.receive_data(sender.send(Start(features=ALL_FEATURES)))
    >>> receiver.next_event().version
    0
    >>> sender.receive_data(receiver.send(Ok(features=Feature.CHECKSUMS)))
    >>> sender.next_event().features, sender.state.name
    (<Feature.CHECKSUMS: 2>, 'STARTED')
    """

    def __init__(self, role: Role, *, limits: MessageLimits = _DEFAULT_LIMITS) -> None:
        self._role = role
        self._limits = limits
        self._state = ConnectionState.ESTABLISHED
        self._agreed = NO_FEATURES
        self._buffer = bytearray()
        self._ended = False
        self._request: Request | None = None
        self._is_asker = False
        self._raw_bytes: int | None = None

    @property
    def role(self) -> Role:
        """The side of the migration.

        >>> Connection(Role.SENDER).role.name
        'SENDER'
        """
        return self._role

    @property
    def state(self) -> ConnectionState:
        """How far the connection is; a request that is not answered has not moved it.

        >>> Connection(Role.RECEIVER).state.name
        'ESTABLISHED'
        """
        return self._state

    @property
    def agreed(self) -> Feature:
        """The additions that both sides have announced.

        >>> Connection(Role.SENDER).agreed
        <Feature: 0>
        """
        return self._agreed

    @property
    def request(self) -> Request | None:
        """The request of either side that is not answered yet.

        >>> connection = Connection(Role.SENDER)
        >>> _ = connection.send(Start())
        >>> connection.request
        Start(version=0, features=<Feature: 0>)
        """
        return self._request

    @property
    def raw_bytes_left(self) -> int:
        """How many raw bytes of the Memory request on its way have not passed yet.

        Those that wait in `next_event` as `MemoryData` are counted.

        >>> connection = Connection(Role.SENDER).auxiliary()
        >>> _ = connection.send(Channel(ChannelKind.MEMORY))
        >>> _ = connection.send(Memory(MemoryRangeTable([MemoryRange(0, 4096)])))
        >>> connection.raw_bytes_left
        4096
        """
        return self._raw_bytes or 0

    @property
    def bytes_wanted(self) -> int:
        """How many bytes of the stream complete what comes next.

        That is the rest of a header, a payload, a Memory request's raw bytes, or a checksum: never
        more than one of them, so that who reads no more never takes a descriptor's message along.
        0 where an event or an error waits, where it is this side's turn, or where all is over.

        >>> connection = Connection(Role.RECEIVER)
        >>> connection.bytes_wanted
        16
        >>> connection.receive_data(Connection(Role.SENDER).send(Start())[:10])
        >>> connection.bytes_wanted
        6
        """
        if self._ended or not self._is_listening():
            return 0
        try:
            return max(0, self._unit_bytes() - len(self._buffer))
        except ProtocolError:
            return 0

    @property
    def descriptor_follows(self) -> bool:
        """Whether what comes next is a MemoryFd's slot, to be read with its descriptor.

        >>> sender, receiver = Connection(Role.SENDER), Connection(Role.RECEIVER)
        >>> for request in (Start(), MemoryFd(3)):
        ...     data = sender.send(request)
        ...     receiver.receive_data(data[:HEADER_BYTES])
        ...     if isinstance(request, Start):
        ...         _ = receiver.next_event()
        ...         sender.receive_data(receiver.send(Ok()))
        ...         _ = sender.next_event()
        >>> receiver.descriptor_follows, receiver.bytes_wanted
        (True, 4)
        """
        if len(self._buffer) != HEADER_BYTES or self._request is not None:
            return False
        return self.bytes_wanted > 0 and self._header()[0] is MemoryFd

    def auxiliary(self) -> Connection:
        """The same side of a further connection of this session, still without its `Channel`.

        >>> further = Connection(Role.RECEIVER).auxiliary()
        >>> further.state.name, further.bytes_wanted
        ('AUXILIARY', 2)
        """
        connection = Connection(self._role, limits=self._limits)
        connection._state = ConnectionState.AUXILIARY
        connection._agreed = self._agreed
        return connection

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes that were read; none at all mean that the stream has ended.

        Raises:
            ProtocolError: The stream had ended before, or an event, an error or this side's turn
                waits already with bytes behind it: what is kept stays below one message and one
                ``data``.

        >>> Connection(Role.RECEIVER).receive_data(bytes(3))
        """
        if self._ended and data:
            self._fail("bytes came after the stream's end")
        if self._state is ConnectionState.CLOSED and data:
            self._fail("bytes came after the connection's end")
        if data and self._buffer and not self.bytes_wanted:
            self._fail("more bytes were given while those before wait; take the events first")
        if data:
            self._buffer += data
        else:
            self._ended = True

    def next_event(self) -> Event | Wait:
        """What the peer has sent next, or what to wait for.

        Raises:
            ProtocolError: The peer sent what the protocol does not allow here, or more than the
                limits, or ended the stream where it may not end. A receiver may still answer
                a request that it could not read with `Error`.

        >>> connection = Connection(Role.RECEIVER)
        >>> connection.receive_data(Connection(Role.SENDER).send(Abandon()))
        >>> connection.next_event(), connection.next_event()
        (Abandon(), <Wait.PAUSED: 2>)
        """
        if not self._is_listening():
            if self._request is None and self._state is not ConnectionState.CLOSED:
                if self._buffer:
                    self._fail("the peer sent bytes, but no response is awaited")
                if self._ended:
                    return self._end()
            return Wait.PAUSED
        unit_bytes = self._unit_bytes()
        if self._raw_bytes and not self._is_asker and self._buffer:
            return self._take_raw()
        if len(self._buffer) < unit_bytes:
            return self._end() if self._ended else Wait.NEED_DATA
        if self._request is None:
            return self._take_request(unit_bytes)
        if self._is_asker:
            return self._take_response(unit_bytes)
        return self._take_memory_end(unit_bytes)

    def memory_received(self, n_bytes: int) -> None:
        """The driver has read that many raw bytes of the Memory request itself.

        Raises:
            ProtocolError: More than are left, or raw bytes wait in `next_event`.

        >>> Connection(Role.RECEIVER).memory_received(1)
        Traceback (most recent call last):
        vmmig.errors.ProtocolError: Migration protocol broken: ESTABLISHED: 1 raw bytes were \
received, but 0 are left
        """
        left = 0 if self._is_asker else self.raw_bytes_left
        if not 0 <= n_bytes <= left:
            self._fail(f"{n_bytes} raw bytes were received, but {left} are left")
        if self._buffer and n_bytes:
            self._fail("raw bytes that came before wait in next_event")
        if left:
            self._raw_bytes = left - n_bytes

    def memory_sent(self, n_bytes: int) -> None:
        """The driver has sent that many raw bytes of the Memory request.

        Raises:
            ProtocolError: More than are left.

        >>> Connection(Role.SENDER).memory_sent(0)
        """
        left = self.raw_bytes_left if self._is_asker else 0
        if not 0 <= n_bytes <= left:
            self._fail(f"{n_bytes} raw bytes were sent, but {left} are left")
        if left:
            self._raw_bytes = left - n_bytes

    def send(self, message: Message) -> bytes:
        """The bytes of ``message``, which the driver must then send, all of them.

        After `Memory`, the raw bytes follow, told by `memory_sent`, and then `MemoryEnd`.
        `MemoryFd` is sent in two parts: first `HEADER_BYTES`, then the rest with the descriptor.

        Raises:
            ProtocolError: The protocol does not allow it here, or the message is not valid.

        >>> Connection(Role.SENDER).send(Start()).hex()
        '01000000000000000000000000000000'
        """
        match message:
            case Ok() | Error():
                return self._send_response(message)
            case MemoryEnd():
                return self._send_memory_end(message)
            case Channel(kind):
                after = self._move(self._role, kind)
                data = _CHANNEL.pack(kind.value)
            case ConnectionClosed():
                after = self._move(self._role, ConnectionClosed)
                data = b""
            case _:
                return self._send_request(message)
        self._refuse_while_asked(type(message).__name__)
        self._state = after
        return data

    # What is on its way: nothing, a request of the peer, or a request of this side; for Memory,
    # _raw_bytes is a number until its MemoryEnd has passed.

    def _fail(self, cause: str) -> NoReturn:
        raise ProtocolError(cause, state=self._state.name)

    def _is_listening(self) -> bool:
        """Whether the peer may speak now."""
        if self._request is None:
            return bool(TRANSITIONS[self._role.peer][self._state].keys() - {ConnectionClosed})
        return self._is_asker or self._raw_bytes is not None

    def _move(self, role: Role, key: _Key) -> ConnectionState:
        """The state after ``role`` has sent ``key``."""
        after = TRANSITIONS[role][self._state].get(key)
        name = f"Channel {key.name}" if isinstance(key, ChannelKind) else key.__name__
        if after is None:
            self._fail(f"{name} is not allowed here")
        needed = _needed(key)
        if needed not in self._agreed:
            self._fail(f"{name} is not allowed, for {needed.name} is not agreed")
        return after

    def _unit_bytes(self) -> int:
        """How long what comes next is, as far as that is known yet."""
        if self._request is None:
            if self._state is ConnectionState.AUXILIARY:
                return _CHANNEL.size
            if len(self._buffer) < HEADER_BYTES:
                return HEADER_BYTES
            return HEADER_BYTES + self._header()[2]
        if self._is_asker:
            if len(self._buffer) < HEADER_BYTES:
                return HEADER_BYTES
            return HEADER_BYTES + self._response_header()[2]
        if self._raw_bytes:
            return self._raw_bytes if not self._buffer else len(self._buffer)
        return _CHECKSUM.size if Feature.CHECKSUMS in self._agreed else 0

    def _header(self) -> tuple[type[Request], bytes, int]:
        """The checked header of the request in the buffer."""
        command, headers, length = _HEADER.unpack_from(self._buffer)
        kind = COMMANDS.get(command)
        if kind is None or _needed(kind) not in self._agreed:
            self._fail(f"{command} is no command that is known here")
        self._move(self._role.peer, kind)
        limits = self._limits
        fixed = _FIXED_BYTES.get(kind)
        if fixed is not None:
            if length != fixed:
                self._fail(f"{kind.__name__} has a payload of {length} bytes instead of {fixed}")
        elif kind is Memory:
            if length % _RANGE.size:
                self._fail(f"Memory's table has {length} bytes, no multiple of {_RANGE.size}")
            if length // _RANGE.size > limits.max_ranges:
                self._too_large(kind, length // _RANGE.size, "max_ranges", limits.max_ranges)
        elif kind is Config:
            if length > limits.max_config_bytes:
                self._too_large(kind, length, "max_config_bytes", limits.max_config_bytes)
        elif length > limits.max_state_bytes:
            self._too_large(kind, length, "max_state_bytes", limits.max_state_bytes)
        if kind is Start:
            (version,) = _SLOT.unpack(headers[:2] + bytes(2))
            if not 0 <= PROTOCOL_VERSION - version <= 1:
                self._fail(f"the protocol's version {version} is not spoken here")
        return kind, headers, length

    def _too_large(self, kind: type, size: int, limit: str, most: int) -> NoReturn:
        self._fail(
            f"{kind.__name__} has {size} of the {most} allowed by "
            f"MessageLimits({limit}=...), which can allow more"
        )

    def _take_request(self, unit_bytes: int) -> Request | Channel:
        if self._state is ConnectionState.AUXILIARY:
            (value,) = _CHANNEL.unpack_from(self._buffer)
            try:
                kind = ChannelKind(value)
            except ValueError:
                self._fail(f"{value} is no channel of an auxiliary connection")
            after = self._move(self._role.peer, kind)
            del self._buffer[:unit_bytes]
            self._state = after
            return Channel(kind)
        command, headers, _ = self._header()
        request = self._decoded(command, headers, self._payload(unit_bytes))
        del self._buffer[:unit_bytes]
        self._begin(request, is_asker=False)
        return request

    def _payload(self, unit_bytes: int) -> bytes:
        with memoryview(self._buffer) as view, view[HEADER_BYTES:unit_bytes] as payload:
            return payload.tobytes()

    def _decoded(self, kind: type[Request], headers: bytes, payload: bytes) -> Request:
        if kind is Start:
            version, magic, bits = _START.unpack(headers)
            return Start(version, _features(magic, bits))
        if kind is Memory:
            table = self._table(payload)
            self._check_chunk(table)
            return Memory(table)
        if kind is PageFault:
            return PageFault(self._table(payload).ranges[0])
        if kind is MemoryFd:
            return MemoryFd(*_SLOT.unpack(payload))
        if kind is Session or kind is SessionStatus:
            return kind(payload[:_SECRET_BYTES], payload[_SECRET_BYTES:])
        if kind is Config or kind is State:
            return kind(payload)
        return kind()  # type: ignore[call-arg]

    def _table(self, payload: bytes) -> MemoryRangeTable:
        try:
            return MemoryRangeTable.from_bytes(payload)
        except MigratableError as error:
            self._fail(str(error))

    def _check_chunk(self, table: MemoryRangeTable) -> None:
        if self._state is ConnectionState.MEMORY_CHANNEL and table.total_bytes > CHUNK_BYTES:
            self._fail(
                f"Memory of {table.total_bytes} bytes on an auxiliary connection, "
                f"where a chunk has at most {CHUNK_BYTES}"
            )

    def _begin(self, request: Request, *, is_asker: bool) -> None:
        self._request = request
        self._is_asker = is_asker
        if isinstance(request, Memory):
            self._raw_bytes = request.table.total_bytes

    def _take_raw(self) -> MemoryData:
        assert self._raw_bytes
        with memoryview(self._buffer) as view, view[: self._raw_bytes] as raw:
            data = raw.tobytes()
        del self._buffer[: len(data)]
        self._raw_bytes -= len(data)
        return MemoryData(data)

    def _take_memory_end(self, unit_bytes: int) -> MemoryEnd:
        checksum = _CHECKSUM.unpack_from(self._buffer)[0] if unit_bytes else None
        del self._buffer[:unit_bytes]
        self._raw_bytes = None
        return MemoryEnd(checksum)

    def _end(self) -> ConnectionClosed:
        if self._buffer or self._request is not None:
            what = f", with {type(self._request).__name__} unanswered" if self._request else ""
            self._fail(f"the stream ended in the middle{what}")
        after = TRANSITIONS[self._role.peer][self._state].get(ConnectionClosed)
        if after is None:
            self._fail("the stream ended before the session did")
        self._state = after
        return ConnectionClosed()

    def _response_header(self) -> tuple[int, Feature, int]:
        """The checked status, announcement and length of the response in the buffer."""
        request = self._request
        status, padding, length = _HEADER.unpack_from(self._buffer)
        features = NO_FEATURES
        if isinstance(request, Start):
            features = _features(*_ANNOUNCEMENT.unpack(padding)) & request.features
        name = type(request).__name__
        if status == _OK:
            if self._raw_bytes is not None:
                self._fail("Memory was answered with Ok before all of it was sent")
            lengths: Sequence[int] = _answer_lengths(request)
        elif status == _ERROR:
            has_text = Feature.ERROR_TEXT in self._agreed | features
            lengths = range(MAX_ERROR_TEXT_BYTES + 1) if has_text else (0,)
        else:
            self._fail(f"{name} was answered with the unknown status {status}")
        if length not in lengths:
            self._fail(f"the response to {name} has a payload of {length} bytes, not {lengths[-1]}")
        return status, features, length

    def _take_response(self, unit_bytes: int) -> Response:
        status, features, _ = self._response_header()
        payload = self._payload(unit_bytes)
        if status == _ERROR:
            del self._buffer[:unit_bytes]
            self._fail_session()
            return Error(payload.decode(errors="backslashreplace"))
        response = Ok(features)
        if isinstance(self._request, PageFault):
            response = Ok(page=payload)
        elif isinstance(self._request, SessionStatus):
            try:
                response = Ok(outcome=SessionOutcome(payload[0]))
            except ValueError:
                self._fail(f"{payload[0]} is no outcome of a session")
        del self._buffer[:unit_bytes]
        self._finish(features)
        return response

    def _finish(self, features: Feature) -> None:
        """The request was answered with Ok."""
        assert self._request is not None
        asker = self._role if self._is_asker else self._role.peer
        if isinstance(self._request, Start):
            self._agreed = features
        self._state = TRANSITIONS[asker][self._state][type(self._request)]
        self._request = None

    def _fail_session(self) -> None:
        """The request was answered with Error, or could not even be read."""
        in_step = self._request is not None and self._raw_bytes is None
        self._state = ConnectionState.FAILED if in_step else ConnectionState.CLOSED
        self._request = self._raw_bytes = None

    def _send_request(self, request: Request) -> bytes:
        kind = type(request)
        if kind not in _IDS:
            self._fail(f"{kind.__name__} is nothing that can be sent")
        self._move(self._role, kind)
        self._refuse_while_asked(kind.__name__)
        headers, payload = _PLAIN, b""
        match request:
            case Start(version, features):
                if not 0 <= PROTOCOL_VERSION - version <= 1:
                    self._fail(f"the protocol's version {version} is not spoken here")
                headers = _START.pack(version, _MAGIC if features else bytes(2), features)
            case Config(payload) | State(payload):
                pass
            case Memory(table):
                if not len(table):
                    self._fail("an empty table sends no Memory request")
                self._check_chunk(table)
                payload = table.to_bytes()
            case MemoryFd(slot):
                if not 0 <= slot < 1 << 32:
                    self._fail(f"slot {slot} is not within 32 bits")
                payload = _SLOT.pack(slot)
            case PageFault(page):
                payload = MemoryRangeTable([page]).to_bytes()
            case Session(id, token) | SessionStatus(id, token):
                if not len(id) == len(token) == _SECRET_BYTES:
                    self._fail(f"a session's id and token have {_SECRET_BYTES} bytes each")
                payload = id + token
            case _:
                pass
        data = _HEADER.pack(_IDS[kind], headers, len(payload)) + payload
        self._begin(request, is_asker=True)
        return data

    def _refuse_while_asked(self, name: str) -> None:
        if self._request is not None:
            self._fail(f"{name} cannot go before {type(self._request).__name__} is answered")

    def _send_memory_end(self, end: MemoryEnd) -> bytes:
        if not self._is_asker or self._raw_bytes is None:
            self._fail("MemoryEnd is not allowed here, for no Memory is being sent")
        if self._raw_bytes:
            self._fail(f"Memory has {self._raw_bytes} raw bytes left to send")
        if (end.checksum is not None) != (Feature.CHECKSUMS in self._agreed):
            self._fail("MemoryEnd has a checksum where CHECKSUMS is agreed, and only there")
        if end.checksum is not None and not 0 <= end.checksum < 1 << 64:
            self._fail(f"the checksum {end.checksum} is not within 64 bits")
        self._raw_bytes = None
        return b"" if end.checksum is None else _CHECKSUM.pack(end.checksum)

    def _send_response(self, response: Response) -> bytes:
        request = None if self._is_asker else self._request
        if isinstance(response, Error):
            return self._send_error(response, request)
        if request is None or self._raw_bytes is not None:
            self._fail("Ok is not allowed here, for no request awaits it")
        announced = request.features if isinstance(request, Start) else NO_FEATURES
        features = response.features & announced
        payload = response.page
        if response.outcome is not None:
            payload += bytes([response.outcome.value])
        fits = (
            (isinstance(request, Start) or not response.features)
            and (isinstance(request, PageFault) or not response.page)
            and isinstance(request, SessionStatus) == (response.outcome is not None)
        )
        if not fits or len(payload) not in _answer_lengths(request):
            self._fail(f"{type(request).__name__} cannot be answered with this Ok")
        self._finish(features)
        return _HEADER.pack(_OK, _announcement(features), len(payload)) + payload

    def _send_error(self, error: Error, request: Request | None) -> bytes:
        if request is None and not self._has_bad_request():
            self._fail("Error is not allowed here, for no request awaits it")
        features = request.features if isinstance(request, Start) else NO_FEATURES
        features &= Feature.ERROR_TEXT
        text = b""
        if Feature.ERROR_TEXT in self._agreed | features:
            text = error.text.encode(errors="backslashreplace")[:MAX_ERROR_TEXT_BYTES]
            text = text.decode(errors="ignore").encode()
        self._fail_session()
        return _HEADER.pack(_ERROR, _announcement(features), len(text)) + text

    def _has_bad_request(self) -> bool:
        """Whether the peer has sent, as a request, what cannot be read as one."""
        if self._request is not None or not self._buffer or not self._is_listening():
            return False
        try:
            unit_bytes = self._unit_bytes()
            if len(self._buffer) >= unit_bytes and self._state is not ConnectionState.AUXILIARY:
                kind, headers, _ = self._header()
                self._decoded(kind, headers, self._payload(unit_bytes))
        except ProtocolError:
            return True
        return False


def _needed(key: _Key) -> Feature:
    """What must be agreed before ``key`` may be sent."""
    return Feature.SESSIONS if key is Session or key is SessionStatus else NO_FEATURES


def _features(magic: bytes, bits: int) -> Feature:
    """What an announcement announces; what is none announces nothing."""
    return Feature(bits) & ALL_FEATURES if magic == _MAGIC else NO_FEATURES


def _announcement(features: Feature) -> bytes:
    return _ANNOUNCEMENT.pack(_MAGIC, features) if features else _PLAIN


def _answer_lengths(request: Request | None) -> tuple[int, ...]:
    """How long the payload of an Ok can be."""
    if isinstance(request, PageFault):
        return (0, request.range.length)
    return (1,) if isinstance(request, SessionStatus) else (0,)
