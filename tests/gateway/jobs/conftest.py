"""Databases of jobs for tests: a file of SQLite's, and PostgreSQL where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.jobs.database import JobDatabase
from gateway.jobs.settings import JobSettings
from gateway.jobs.sqlite import SqliteDatabase
from gateway.jobs.store import JobStore
from tests.support.clock import Clock
from tests.support.jobs import OpenStore
from tests.support.postgres import missing_postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    pytest.importorskip("procrastinate")
    with running_postgres() as url:
        yield url


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000_000.0)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=missing_postgres())])
def open_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> OpenStore:
    """Opens a store, empty at first, as often as the test says: each stands for a gateway."""
    make: Callable[[], JobDatabase]
    if request.param == "sqlite":
        make = lambda: SqliteDatabase(tmp_path / "jobs.sqlite", clock)  # noqa: E731
    else:
        url = request.getfixturevalue("postgres")
        asyncio.run(_empty(url))

        def make() -> JobDatabase:
            from gateway.jobs.postgres import PostgresDatabase

            return PostgresDatabase(url, clock)

    @asynccontextmanager
    async def open_one(**settings: Any) -> AsyncIterator[tuple[JobStore, JobDatabase]]:
        database = make()
        store = JobStore(database, JobSettings(**settings))
        await store.open()
        try:
            yield store, database
        finally:
            await store.close()

    return open_one


async def _empty(url: str) -> None:
    import psycopg

    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("DROP SCHEMA public CASCADE")
        await connection.execute("CREATE SCHEMA public")
