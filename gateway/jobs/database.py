"""The database behind the store of jobs, as a protocol; SQLite and PostgreSQL implement it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from handler.errors import RequestError

__all__ = ["SCHEMA", "JobDatabase", "StoreUnavailable", "Transaction"]


class StoreUnavailable(RequestError):
    """The database of jobs cannot be reached, or its disk is full."""

    status, phrase, code = 503, "Service Unavailable", "job_store_unavailable"


class Transaction(Protocol):
    """Statements that happen together or not at all."""

    async def execute(self, statement: str, **values: object) -> list[Mapping[str, Any]]:
        """Return the rows; values stand in the statement as ``:name``."""
        ...


class JobDatabase(Protocol):
    """Transactions, and the order in which jobs are drawn."""

    async def open(self) -> bool:
        """Connect, and make what is missing.

        Returns:
            Whether no other gateway can have the jobs that are being drawn: they may be taken up.
        """
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...

    def now_s(self) -> float:
        """The time that all who share it agree on, in seconds since 1970."""
        ...

    def transaction(self, *, alone: bool = False) -> AbstractAsyncContextManager[Transaction]:
        """A transaction; of those that are `alone` there is one at a time.

        Raises:
            StoreUnavailable: the database cannot be used now.
        """
        ...

    async def enqueue(self, transaction: Transaction, job_id: str, model: str) -> None:
        """Put a queued job into the order, where it is not, as a part of the transaction."""
        ...

    async def next_id(self, models: Sequence[str]) -> str | None:
        """The id of a job of one of these models that may be drawn, for whoever claims it."""
        ...

    async def claimed(self, job_id: str) -> None:
        """Take a job that `next_id` returned out of the order: it was claimed, or is over."""
        ...

    async def mend(self, transaction: Transaction) -> None:
        """Put every queued job that is due, and in no order, into the order."""
        ...


# One dialect for both: SQLite takes the affinity that each of these types implies.
SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS gateway_jobs (
        id TEXT PRIMARY KEY,
        key_name TEXT NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL,
        state TEXT NOT NULL,
        model TEXT NOT NULL,
        request BYTEA,
        summary TEXT NOT NULL,
        size_bytes BIGINT NOT NULL,
        created_s DOUBLE PRECISION NOT NULL,
        due_s DOUBLE PRECISION NOT NULL,
        started_s DOUBLE PRECISION,
        finished_s DOUBLE PRECISION,
        token TEXT,
        lease_until_s DOUBLE PRECISION,
        num_starts INTEGER NOT NULL DEFAULT 0,
        num_deaths INTEGER NOT NULL DEFAULT 0,
        picture INTEGER NOT NULL DEFAULT 0,
        step INTEGER NOT NULL DEFAULT 0,
        num_steps INTEGER NOT NULL DEFAULT 0,
        preview BYTEA,
        result TEXT,
        error TEXT,
        webhook_url TEXT,
        webhook_state TEXT,
        webhook_tries INTEGER NOT NULL DEFAULT 0,
        webhook_due_s DOUBLE PRECISION
    )
    """,
    """
    CREATE UNIQUE INDEX IF NOT EXISTS gateway_jobs_idempotency
        ON gateway_jobs (key_name, idempotency_key) WHERE idempotency_key IS NOT NULL
    """,
    "CREATE INDEX IF NOT EXISTS gateway_jobs_order ON gateway_jobs (state, created_s)",
    """
    CREATE INDEX IF NOT EXISTS gateway_jobs_webhooks ON gateway_jobs (webhook_due_s)
        WHERE webhook_state = 'pending'
    """,
    """
    CREATE TABLE IF NOT EXISTS gateway_job_pictures (
        job_id TEXT NOT NULL REFERENCES gateway_jobs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        name TEXT NOT NULL,
        content BYTEA NOT NULL,
        PRIMARY KEY (job_id, position)
    )
    """,
)
