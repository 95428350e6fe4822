"""The errors of vmmig: one tree, so that ``except MigratableError`` sees every failure.

::

    MigratableError
    ├── PauseError              Failed to pause migratable component: <cause>
    ├── ResumeError             Failed to resume migratable component: <cause>
    ├── SnapshotError           Failed to snapshot migratable component: <cause>
    ├── RestoreError            Failed to restore migratable component: <cause>
    │   └── DecodeError         the bytes are not a snapshot, or one this version cannot read
    ├── MigrateSendError        Failed to send migratable component snapshot: <cause>
    │   ├── MigrationAborted    a live migration did not happen (in `vmmig.live`)
    │   └── MigrationInDoubt    only its destination knows whether it did
    ├── MigrateReceiveError     Failed to receive migratable component snapshot: <cause>
    ├── ProtocolError           a peer, or this side, breaks the migration protocol
    ├── ContractError           a component does not fulfil a trait (see `vmmig.verify`)
    ├── MissingExtraError       an optional part of vmmig is not installed
    └── MigratableErrorGroup    several of these at once, also an `ExceptionGroup`
        ├── PauseErrorGroup     (also a PauseError)
        ├── ResumeErrorGroup    (also a ResumeError)
        ├── SnapshotErrorGroup  (also a SnapshotError)
        └── RestoreErrorGroup   (also a RestoreError)

The six operations and their texts are those of Cloud Hypervisor's ``vm-migration`` crate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

_E = TypeVar("_E", bound="MigratableError")


class MigratableError(Exception):
    """Base of every error that vmmig raises.

    Args:
        cause: What went wrong: a text, or the exception that did, which then also
            becomes ``__cause__``.
        component_path: The ids from the outermost component to the one that failed,
            joined by ``/``, where it is known.
        component_states: For each component path, the state the failure left it in,
            where that is known.

    >>> error = PauseError(TimeoutError("queue is not drained"), component_path="vm/disk")
    >>> str(error)
    'Failed to pause migratable component: vm/disk: queue is not drained'
    >>> error.component_path, error.__cause__
    ('vm/disk', TimeoutError('queue is not drained'))
    """

    _prefix: ClassVar[str] = ""

    def __init__(
        self,
        cause: object,
        *,
        component_path: str | None = None,
        component_states: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(cause)
        self.component_path = component_path
        self.component_states: dict[str, str] = dict(component_states or {})
        if isinstance(cause, BaseException):
            self.__cause__ = cause

    @property
    def cause(self) -> object:
        """What was given as the cause: a text or an exception.

        >>> PauseError("busy").cause
        'busy'
        """
        return self.args[0]

    def __str__(self) -> str:
        where = f"{self.component_path}: " if self.component_path else ""
        return f"{self._prefix}{where}{_text(self.cause)}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), _picklable(self.cause), vars(self))


class PauseError(MigratableError):
    """A component could not be paused.

    >>> str(PauseError("busy"))
    'Failed to pause migratable component: busy'
    """

    _prefix = "Failed to pause migratable component: "


class ResumeError(MigratableError):
    """A component could not be resumed.

    >>> str(ResumeError("no vCPU"))
    'Failed to resume migratable component: no vCPU'
    """

    _prefix = "Failed to resume migratable component: "


class SnapshotError(MigratableError):
    """A component's snapshot could not be taken, or a tree of snapshots is not valid.

    >>> str(SnapshotError("still running"))
    'Failed to snapshot migratable component: still running'
    """

    _prefix = "Failed to snapshot migratable component: "


class RestoreError(MigratableError):
    """A component could not be restored from a snapshot.

    >>> str(RestoreError("no section 'regs'"))
    "Failed to restore migratable component: no section 'regs'"
    """

    _prefix = "Failed to restore migratable component: "


class DecodeError(RestoreError):
    """Bytes are not a snapshot, are damaged, or are of a version that cannot be read.

    Attributes:
        where: The place in the tree (``$.snapshots['cpu'].snapshot_data['regs']``) or in
            the bytes (``header``, ``index``, ``byte 4096``).
        version: The container's format version, where the header could be read.
        writer: Who wrote it, where the header could be read.

    >>> error = DecodeError("checksum does not match", where="$.snapshot_data['regs']")
    >>> str(error)
    "Failed to restore migratable component: $.snapshot_data['regs']: checksum does not match"
    """

    def __init__(
        self,
        cause: object,
        *,
        where: str | None = None,
        version: int | None = None,
        writer: str | None = None,
    ) -> None:
        super().__init__(cause)
        self.where = where
        self.version = version
        self.writer = writer

    def __str__(self) -> str:
        places = [place for place in (self.component_path, self.where) if place]
        return self._prefix + ": ".join([*places, _text(self.cause)])


class MigrateSendError(MigratableError):
    """A snapshot could not be sent.

    >>> str(MigrateSendError("connection refused"))
    'Failed to send migratable component snapshot: connection refused'
    """

    _prefix = "Failed to send migratable component snapshot: "


class MigrateReceiveError(MigratableError):
    """A snapshot could not be received.

    >>> str(MigrateReceiveError("no such file"))
    'Failed to receive migratable component snapshot: no such file'
    """

    _prefix = "Failed to receive migratable component snapshot: "


class ProtocolError(MigratableError):
    """A migration's peer, or this side, did what the wire protocol does not allow.

    Attributes:
        state: The state in which the connection was, and still is (see `vmmig.protocol`).

    >>> error = ProtocolError("State is not allowed", state="STARTED")
    >>> str(error)
    'Migration protocol broken: STARTED: State is not allowed'
    """

    _prefix = "Migration protocol broken: "

    def __init__(self, cause: object, *, state: str | None = None) -> None:
        super().__init__(cause)
        self.state = state

    def __str__(self) -> str:
        places = [place for place in (self.component_path, self.state) if place]
        return self._prefix + ": ".join([*places, _text(self.cause)])


class ContractError(MigratableError):
    """A component does not fulfil a trait.

    Attributes:
        problems: One text for each thing that is wrong.

    >>> error = ContractError("Disk is not a Pausable", problems=("pause: missing",))
    >>> print(error)
    Disk is not a Pausable:
      - pause: missing
    """

    def __init__(self, cause: object, *, problems: Sequence[str] = ()) -> None:
        super().__init__(cause)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if not self.problems:
            return super().__str__()
        return "\n  - ".join([f"{super().__str__()}:", *self.problems])


class MissingExtraError(MigratableError, ImportError):
    """An optional part of vmmig was used that is not installed.

    >>> str(MissingExtraError("the Unicorn engine", extra="unicorn"))
    "the Unicorn engine is not installed; pip install 'vmmig[unicorn]' adds it"
    """

    def __init__(self, cause: object, *, extra: str) -> None:
        super().__init__(cause)
        self.extra = extra

    def __str__(self) -> str:
        return f"{_text(self.cause)} is not installed; pip install 'vmmig[{self.extra}]' adds it"


class MigratableErrorGroup(MigratableError, ExceptionGroup[MigratableError]):
    """Several failures of one operation: also an `ExceptionGroup`, so ``except*`` works.

    >>> error = PauseErrorGroup("2 components failed", [PauseError("a"), ResumeError("b")])
    >>> isinstance(error, PauseError), [str(e.cause) for e in error.exceptions]
    (True, ['a', 'b'])
    >>> print(error)
    Failed to pause migratable component: 2 components failed:
      - Failed to pause migratable component: a
      - Failed to resume migratable component: b
    """

    def __new__(cls, cause: object, errors: Sequence[MigratableError], **_: object) -> Any:
        return super().__new__(cls, _text(cause), errors)

    def __init__(
        self,
        cause: object,
        errors: Sequence[MigratableError],
        *,
        component_path: str | None = None,
        component_states: Mapping[str, str] | None = None,
    ) -> None:
        self.component_path = component_path
        self.component_states = dict(component_states or {})

    def derive(self, excs: Sequence[Any], /) -> Any:
        return type(self)(
            self.message,
            excs,
            component_path=self.component_path,
            component_states=self.component_states,
        )

    def __str__(self) -> str:
        return "\n  - ".join([f"{super().__str__()}:", *map(str, self.exceptions)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_group, (type(self), self.message, list(self.exceptions), vars(self))


class PauseErrorGroup(MigratableErrorGroup, PauseError):
    """Several failures of one pause.

    >>> isinstance(PauseErrorGroup("2 failed", [PauseError("a")]), PauseError)
    True
    """


class ResumeErrorGroup(MigratableErrorGroup, ResumeError):
    """Several failures of one resume.

    >>> isinstance(ResumeErrorGroup("2 failed", [ResumeError("a")]), ResumeError)
    True
    """


class SnapshotErrorGroup(MigratableErrorGroup, SnapshotError):
    """Several failures of one snapshot.

    >>> isinstance(SnapshotErrorGroup("2 failed", [SnapshotError("a")]), SnapshotError)
    True
    """


class RestoreErrorGroup(MigratableErrorGroup, RestoreError):
    """Several failures of one restore.

    >>> isinstance(RestoreErrorGroup("2 failed", [RestoreError("a")]), RestoreError)
    True
    """


def relocated(error: _E, id: str, name: str) -> _E:
    """The same error, seen from the component ``id`` whose part ``name`` raised it.

    >>> str(relocated(PauseError("busy"), "vm", "disk"))
    'Failed to pause migratable component: vm/disk: busy'
    """
    copy: Any
    if isinstance(error, MigratableErrorGroup):
        parts = [
            relocated(part, id, name) for part in cast(list[MigratableError], error.exceptions)
        ]
        copy = _rebuild_group(type(error), error.message, parts, vars(error))
    else:
        copy = _rebuild(type(error), error.cause, vars(error))
    copy.component_path = f"{id}/{error.component_path or name}"
    copy.component_states = {f"{id}/{path}": s for path, s in error.component_states.items()}
    copy.__cause__ = error.__cause__
    copy.__traceback__ = error.__traceback__
    return cast(_E, copy)


def _text(cause: object) -> str:
    try:
        text = str(cause)
    except Exception:
        return f"{type(cause).__name__}, which cannot be shown"
    if isinstance(cause, KeyError) or (isinstance(cause, BaseException) and not text):
        return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    return text


def _picklable(cause: object) -> object:
    """The cause itself where it survives pickling; else what it said."""
    import pickle

    try:
        pickle.loads(pickle.dumps(cause))
    except Exception:
        return _text(cause)
    return cause


def _rebuild(cls: type[_E], cause: object, facts: dict[str, Any]) -> _E:
    error = cls.__new__(cls, cause)
    MigratableError.__init__(error, cause)
    vars(error).update(facts)
    return error


def _rebuild_group(
    cls: type[MigratableErrorGroup],
    message: str,
    errors: Sequence[MigratableError],
    facts: dict[str, Any],
) -> MigratableErrorGroup:
    group = cls(message, errors)
    vars(group).update(facts)
    return group
