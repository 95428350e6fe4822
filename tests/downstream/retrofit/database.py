"""An in-memory SQLite database."""

from __future__ import annotations

import sqlite3

from retrofit.still import Still, refusing
from vmmig import RestoreError, Snapshot, SnapshotError


class Database(Still):
    """Tables, indices and rows; what else a connection knows, such as a PRAGMA, is not state."""

    def __init__(self) -> None:
        self.connection = _connection()

    def execute(self, sql: str, parameters: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        return self.connection.execute(sql, parameters).fetchall()

    def snapshot(self) -> Snapshot:
        if self.connection.in_transaction or self.execute("SELECT 1 FROM sqlite_temp_master"):
            raise SnapshotError("a transaction is open or there are temporary tables")
        return self.snapshot_of(pages=self.connection.serialize())

    def restore(self, snapshot: Snapshot) -> None:
        (pages,) = snapshot.take("pages")
        with refusing():
            restored = _connection()
            restored.deserialize(pages)
            problems = restored.execute("PRAGMA integrity_check").fetchall()
        if problems != [("ok",)]:
            raise RestoreError(f"the database is damaged: {problems[0][0]}")
        self.connection.close()
        self.connection = restored


def _connection() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.text_factory = lambda text: text.decode(errors="surrogateescape")
    connection.execute("VACUUM")  # a database without a page cannot be serialized
    return connection
