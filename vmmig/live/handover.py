"""Who may run: the outcome of a migration, as either side knows it.

The rule is that two never run. The source gives up its right when it sends Complete; from then on
only the destination's word counts. The destination writes COMMITTED down before it resumes, and
ABORTED before it says so; what it has written it never takes back, except COMMITTED when the
machine could not be resumed, and before anybody was told.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

import attrs

from vmmig import transport
from vmmig.errors import MigratableError, MigrateReceiveError
from vmmig.protocol import SessionOutcome

_KEPT = 1000


class Outcome(enum.Enum):
    """How a migration ended.

    COMMITTED: the destination has the machine. ABORTED: the source has it, and the destination
    never will. IN_DOUBT: only the destination knows, and could not be asked; the source is paused.

    >>> Outcome("in doubt")
    <Outcome.IN_DOUBT: 'in doubt'>
    """

    COMMITTED = "committed"
    ABORTED = "aborted"
    IN_DOUBT = "in doubt"


@attrs.frozen
class SessionKey:
    """What names a migration's session, and the secret of who may ask for its outcome.

    >>> len(SessionKey.new().id)
    16
    """

    id: bytes
    token: bytes = attrs.field(repr=False)

    @classmethod
    def new(cls) -> SessionKey:
        """One that nobody can guess."""
        return cls(secrets.token_bytes(16), secrets.token_bytes(16))


class SessionRecord:
    """What a destination knows of its sessions; with a path, also after it was killed.

    The file is JSON; it is replaced atomically and durably. It keeps the last 1000 sessions, and
    of a token its hash. Each destination has a file of its own.

    Args:
        path: The file, which need not exist yet; None: the record ends with the process.

    Raises:
        MigrateReceiveError: There is a file, but it cannot be read, or is no such record.

    >>> record, key = SessionRecord(None), SessionKey.new()
    >>> record.write(key, SessionOutcome.PENDING)
    >>> record.outcome(key)
    <SessionOutcome.PENDING: 1>
    >>> record.outcome(SessionKey.new())
    <SessionOutcome.UNKNOWN: 0>
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._sessions: dict[str, dict[str, str]] = {}
        if self._path is not None:
            self._sessions = _loaded(self._path)

    def write(self, key: SessionKey, outcome: SessionOutcome) -> None:
        """Keep the outcome; on return it is durable where there is a path.

        Raises:
            MigrateReceiveError: It could not be written; the old one still stands.
        """
        sessions = dict(self._sessions)
        sessions.pop(key.id.hex(), None)
        sessions[key.id.hex()] = {"token_sha256": _hashed(key.token), "outcome": outcome.name}
        sessions = dict([*sessions.items()][-_KEPT:])
        if self._path is not None:
            data = json.dumps({"sessions": sessions}, indent=1).encode()
            try:
                transport.send([data], self._path, total_bytes=len(data))
            except MigratableError as error:
                raise MigrateReceiveError(f"the session's record: {error.cause}") from error
        self._sessions = sessions

    def outcome(self, key: SessionKey) -> SessionOutcome:
        """What is known of the session; UNKNOWN also to one who has not its token."""
        entry = self._sessions.get(key.id.hex())
        if entry is None or not hmac.compare_digest(entry["token_sha256"], _hashed(key.token)):
            return SessionOutcome.UNKNOWN
        return SessionOutcome[entry["outcome"]]

    def abort_pending(self) -> None:
        """Sessions that were under way when the destination was killed will never complete.

        Raises:
            MigrateReceiveError: It could not be written.
        """
        for id, entry in [*self._sessions.items()]:
            if entry["outcome"] == SessionOutcome.PENDING.name:
                self._sessions[id] = entry | {"outcome": SessionOutcome.ABORTED.name}


def _hashed(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _loaded(path: Path) -> dict[str, dict[str, str]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MigrateReceiveError(f"{str(path)!r}: the record cannot be read: {error}") from error
    try:
        value: Any = json.loads(data)
        sessions: dict[str, dict[str, str]] = {
            str(id): {
                "token_sha256": str(entry["token_sha256"]),
                "outcome": SessionOutcome[entry["outcome"]].name,
            }
            for id, entry in value["sessions"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MigrateReceiveError(
            f"{str(path)!r}: this is no record of sessions ({error!r}); name another file, but "
            "keep this one if a migration is in doubt"
        ) from error
    return sessions
