"""How many jobs may wait, and how many bytes all may have: inside a transaction of the store's."""

from __future__ import annotations

from gateway.errors import RateLimited
from gateway.jobs.database import Transaction
from gateway.jobs.settings import JobSettings
from gateway.picture_store import StoreFull
from handler.errors import QueueFull

__all__ = ["RETRY_AFTER_S", "check_room", "make_room"]

RETRY_AFTER_S = 10


async def check_room(transaction: Transaction, settings: JobSettings, key_name: str) -> None:
    """Raise RateLimited or QueueFull, where no more jobs may wait."""
    rows = await transaction.execute(
        """
        SELECT count(*) AS num_all,
            coalesce(sum(CASE WHEN key_name = :key_name THEN 1 ELSE 0 END), 0) AS num_own
        FROM gateway_jobs WHERE state = 'queued'
        """,
        key_name=key_name,
    )
    num_all, num_own = int(rows[0]["num_all"]), int(rows[0]["num_own"])
    if num_own >= settings.max_waiting_per_key:
        raise RateLimited(
            f"{num_own} of your jobs are waiting already; allowed are"
            f" {settings.max_waiting_per_key}",
            retry_after_s=RETRY_AFTER_S,
        )
    if num_all >= settings.max_waiting:
        raise QueueFull(
            f"{num_all} jobs are waiting already; allowed are {settings.max_waiting}; try"
            " again later",
            RETRY_AFTER_S,
        )


async def make_room(
    transaction: Transaction, store_bytes: int, size_bytes: int, keep: str | None = None
) -> None:
    """Delete jobs that have ended, oldest first, until that many bytes more fit in.

    Raises:
        StoreFull: they do not fit in when all are deleted.
    """
    rows = await transaction.execute(
        "SELECT coalesce(sum(size_bytes), 0) AS total FROM gateway_jobs"
    )
    excess = int(rows[0]["total"]) + size_bytes - store_bytes
    if excess <= 0:
        return
    ended = await transaction.execute(
        "SELECT id, size_bytes FROM gateway_jobs WHERE finished_s IS NOT NULL"
        " ORDER BY finished_s, id"
    )
    for row in ended:
        if excess <= 0:
            return
        if row["id"] != keep:
            await transaction.execute("DELETE FROM gateway_jobs WHERE id = :id", id=row["id"])
            excess -= int(row["size_bytes"])
    if excess > 0:
        raise StoreFull(f"the store of jobs is full; all together may have {store_bytes} bytes")
