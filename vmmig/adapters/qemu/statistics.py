"""QEMU's figures about a migration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class MigrationStatistics:
    """How far a migration is, or how it went, as QEMU counts.

    Attributes:
        status: QEMU's word: ``setup``, ``active``, ``device``, ``completed``, and others.
        ram_bytes: How much RAM the machine has; 0 until QEMU says it.
        transferred_bytes: How much of the stream is through.
        remaining_bytes: How much RAM is still to be sent.
        iteration: Which pass over the RAM this is.
        dirty_rate_bytes_per_s: How fast the guest writes to RAM that was sent already.
        rate_bytes_per_s: How fast the stream goes.
        elapsed_s: Seconds since the migration began.
        expected_downtime_s: How long the guest would stand still, were it stopped now.
        downtime_s: How long it did, at the end.
        details: All that QEMU said, by its own names.

    >>> MigrationStatistics.of({"status": "active", "total-time": 250,
    ...                         "ram": {"total": 1 << 20, "remaining": 4096}}).elapsed_s
    0.25
    """

    status: str
    ram_bytes: int
    transferred_bytes: int
    remaining_bytes: int
    iteration: int
    dirty_rate_bytes_per_s: int
    rate_bytes_per_s: float
    elapsed_s: float
    expected_downtime_s: float | None
    downtime_s: float | None
    details: Mapping[str, Any] = attrs.field(repr=False)

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> MigrationStatistics:
        """What QEMU's answer to ``query-migrate`` says.

        >>> MigrationStatistics.of({}).status
        'none'
        """
        ram = answer.get("ram", {})
        return cls(
            status=answer.get("status", "none"),
            ram_bytes=ram.get("total", 0),
            transferred_bytes=ram.get("transferred", 0),
            remaining_bytes=ram.get("remaining", 0),
            iteration=ram.get("dirty-sync-count", 0),
            dirty_rate_bytes_per_s=ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096),
            rate_bytes_per_s=ram.get("mbps", 0.0) * 1e6 / 8,
            elapsed_s=answer.get("total-time", 0) / 1000,
            expected_downtime_s=_seconds(answer.get("expected-downtime")),
            downtime_s=_seconds(answer.get("downtime")),
            details=answer,
        )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
