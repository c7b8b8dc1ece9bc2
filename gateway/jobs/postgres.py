"""The database of jobs in PostgreSQL, for several gateways; procrastinate keeps their order.

The table of jobs says what is true; procrastinate's queue only says what may be looked at next. An
entry of it that was lost is put there again by `mend`, one that is left over finds nothing to do.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from procrastinate.jobs import Job as Entry
from procrastinate.jobs import Status
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from gateway.jobs.database import SCHEMA, JobDatabase, StoreUnavailable, Transaction

__all__ = ["PostgresDatabase"]

logger = logging.getLogger(__name__)

_NAMED = re.compile(r"(?<!:):([a-z_]+)")
_TASK = "gateway.draw"
_LOCK = 0x6A6F6273
"""What gateways that share the database agree to lock."""
_POOL_SIZE = 8
_CONNECT_TIMEOUT_S = 10.0
_SILENT_S = 60.0


class PostgresDatabase(JobDatabase):
    """A pool of connections that procrastinate uses too."""

    def __init__(self, url: str, clock_s: Callable[[], float] | None = None) -> None:
        self._clock_s = clock_s
        self._offset_s = 0.0
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[dict[str, Any]]] = (
            AsyncConnectionPool(
                url,
                min_size=1,
                max_size=_POOL_SIZE,
                timeout=_CONNECT_TIMEOUT_S,
                open=False,
                check=AsyncConnectionPool.check_connection,
                kwargs={"row_factory": dict_row, "application_name": "gateway"},
            )
        )
        self._app = App(connector=PsycopgConnector())
        self._worker_id: int | None = None
        self._entries: dict[str, int] = {}

    async def open(self) -> bool:
        """Connect, make the tables, and agree on the time."""
        with _unavailable():
            await self._pool.open(wait=True, timeout=_CONNECT_TIMEOUT_S)
        await self._app.open_async(self._pool)
        async with self.transaction(alone=True) as transaction:
            for statement in SCHEMA:
                await transaction.execute(statement)
            rows = await transaction.execute("SELECT to_regclass('procrastinate_jobs') AS known")
            if rows[0]["known"] is None:
                await transaction.execute(self._app.schema_manager.get_schema())
            rows = await transaction.execute(
                "SELECT CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION) AS now_s"
            )
            self._offset_s = rows[0]["now_s"] - time.time()
        with _unavailable():
            self._worker_id = await self._app.job_manager.register_worker()
        return False

    async def close(self) -> None:
        """Close all connections."""
        if self._worker_id is not None:
            try:
                with _unavailable():
                    await self._app.job_manager.unregister_worker(self._worker_id)
            except StoreUnavailable as error:
                logger.warning("%s", error)
        await self._app.close_async()
        await self._pool.close()

    def now_s(self) -> float:
        """The database's time."""
        return time.time() + self._offset_s if self._clock_s is None else self._clock_s()

    @asynccontextmanager
    async def transaction(self, *, alone: bool = False) -> AsyncIterator[Transaction]:
        """A transaction of one connection."""
        with _unavailable():
            async with self._pool.connection() as connection, connection.transaction():
                transaction = _Transaction(connection)
                if alone:
                    await transaction.execute("SELECT pg_advisory_xact_lock(:lock)", lock=_LOCK)
                yield transaction

    async def enqueue(self, transaction: Transaction, job_id: str, model: str) -> None:
        """Defer it in procrastinate's queue of the model."""
        assert isinstance(transaction, _Transaction)
        entry = Entry(queue=model, lock=None, queueing_lock=job_id, task_name=_TASK)
        connection = transaction.connection
        with suppress(AlreadyEnqueued):
            async with connection.transaction():
                await self._app.job_manager.defer_job_async(entry, connection=connection)

    async def next_id(self, models: Sequence[str]) -> str | None:
        """What procrastinate gives to nobody else."""
        assert self._worker_id is not None
        with _unavailable():
            entry = await self._app.job_manager.fetch_job(list(models), self._worker_id)
        if entry is None:
            return None
        assert entry.id is not None
        job_id = str(entry.queueing_lock)
        self._entries[job_id] = entry.id
        return job_id

    async def claimed(self, job_id: str) -> None:
        """Delete procrastinate's entry."""
        with _unavailable():
            await self._delete(self._entries.pop(job_id))

    async def mend(self, transaction: Transaction) -> None:
        """Say that this gateway lives, put what is missing into the queue, and clean it."""
        manager = self._app.job_manager
        assert self._worker_id is not None
        with _unavailable():
            await manager.update_heartbeat(self._worker_id)
            for entry in await manager.get_stalled_jobs(
                task_name=_TASK, seconds_since_heartbeat=_SILENT_S
            ):
                assert entry.id is not None
                await self._delete(entry.id)
            await manager.prune_stalled_workers(_SILENT_S)
        rows = await transaction.execute(
            """
            SELECT id, model FROM gateway_jobs WHERE state = 'queued' AND due_s <= :now_s
                AND NOT EXISTS (
                    SELECT 1 FROM procrastinate_jobs
                    WHERE queueing_lock = gateway_jobs.id AND status = 'todo'
                )
                ORDER BY created_s, id
            """,
            now_s=self.now_s(),
        )
        for row in rows:
            await self.enqueue(transaction, row["id"], row["model"])

    async def _delete(self, entry_id: int) -> None:
        await self._app.job_manager.finish_job_by_id_async(
            entry_id, Status.ABORTED, delete_job=True
        )


class _Transaction:
    def __init__(self, connection: psycopg.AsyncConnection[dict[str, Any]]) -> None:
        self.connection = connection

    async def execute(self, statement: str, **values: object) -> list[Mapping[str, Any]]:
        query = _in_psycopgs_style(statement) if values else statement
        cursor = await self.connection.execute(query, values or None)
        return list(await cursor.fetchall()) if cursor.description is not None else []


def _in_psycopgs_style(statement: str) -> str:
    return _NAMED.sub(r"%(\1)s", statement.replace("%", "%%"))


class _unavailable:  # noqa: N801
    """Make a StoreUnavailable of whatever says that the database cannot be used."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (psycopg.OperationalError, PoolTimeout, ConnectorException)):
            raise StoreUnavailable(
                "the database of jobs cannot be used now", retry_after_s=5
            ) from error
