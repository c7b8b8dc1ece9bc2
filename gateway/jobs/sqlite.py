"""The database of jobs in a file of SQLite's, for one gateway."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from gateway.jobs.database import SCHEMA, JobDatabase, StoreUnavailable, Transaction

__all__ = ["SqliteDatabase"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_BUSY_TIMEOUT_S = 10.0
_PRAGMAS = (
    # Before the first table: pages that are free are given back to the disk by `mend`.
    "PRAGMA auto_vacuum = INCREMENTAL",
    "PRAGMA journal_mode = WAL",
    # What was accepted is on the disk, whatever becomes of the machine.
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    f"PRAGMA journal_size_limit = {16 * 1024**2}",
)
_FREED_PAGES = 4096


class SqliteDatabase(JobDatabase):
    """One connection, in a thread of its own; one transaction at a time."""

    def __init__(self, path: Path, clock_s: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock_s = clock_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._one_at_a_time = asyncio.Lock()
        self._connection: sqlite3.Connection | None = None
        self._lock_fd: int | None = None

    async def open(self) -> bool:
        """Open or make the file; its folder must be there."""
        try:
            return await self._run(self._open)
        except (OSError, sqlite3.Error) as error:
            # An OSError names the file.
            text = str(error) if isinstance(error, OSError) else f"{error}: {self._path}"
            raise StoreUnavailable(f"the jobs cannot be read or kept: {text}") from error

    async def close(self) -> None:
        """Close the file."""
        await self._run(self._close)
        self._thread.shutdown()

    def now_s(self) -> float:
        """This machine's time."""
        return self._clock_s()

    @asynccontextmanager
    async def transaction(self, *, alone: bool = False) -> AsyncIterator[Transaction]:
        """A transaction; all of them are alone."""
        async with self._one_at_a_time:
            try:
                try:
                    # Whoever is cancelled waits for the statement: it may have begun one.
                    await self._run(self._execute, "BEGIN IMMEDIATE", {})
                    yield _Transaction(self)
                    await self._run(self._execute, "COMMIT", {})
                except BaseException:
                    await self._run(self._rollback)
                    raise
            except sqlite3.OperationalError as error:
                raise StoreUnavailable(
                    f"the jobs cannot be read or kept now: {error}", retry_after_s=5
                ) from error

    async def enqueue(self, transaction: Transaction, job_id: str, model: str) -> None:
        """Do nothing: the table is the order."""

    async def next_id(self, models: Sequence[str]) -> str | None:
        """The oldest that is due."""
        async with self.transaction() as transaction:
            rows = await transaction.execute(
                """
                SELECT id FROM gateway_jobs WHERE state = 'queued' AND due_s <= :now_s
                    AND model IN (SELECT value FROM json_each(:models))
                    ORDER BY created_s, id LIMIT 1
                """,
                now_s=self.now_s(),
                models=json.dumps(list(models)),
            )
        return rows[0]["id"] if rows else None

    async def claimed(self, job_id: str) -> None:
        """Do nothing: the table is the order."""

    async def mend(self, transaction: Transaction) -> None:
        """Give pages that are free back to the disk, some at a time."""
        await transaction.execute(f"PRAGMA incremental_vacuum({_FREED_PAGES})")

    async def execute(self, statement: str, values: Mapping[str, object]) -> list[dict[str, Any]]:
        """Run a statement of the present transaction."""
        return await self._run(self._execute, statement, values)

    async def _run(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Run in the thread; whoever is cancelled waits for the statement that runs."""
        work = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})
            raise

    def _open(self) -> bool:
        lock = self._path.with_name(self._path.name + ".lock")
        self._lock_fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        # Made here, so that nobody else can read it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        self._connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        self._connection.row_factory = sqlite3.Row
        for statement in (*_PRAGMAS, *SCHEMA):
            self._connection.execute(statement)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s is another gateway's too; PostgreSQL is meant for that", self._path)
            return False
        return True

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _execute(self, statement: str, values: Mapping[str, object]) -> list[dict[str, Any]]:
        assert self._connection is not None
        return [dict(row) for row in self._connection.execute(statement, dict(values))]

    def _rollback(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            self._connection.rollback()


class _Transaction:
    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    async def execute(self, statement: str, **values: object) -> list[Mapping[str, Any]]:
        return list(await self._database.execute(statement, values))
