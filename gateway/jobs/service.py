"""The parts of jobs, put together: store, runner, webhooks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.forwarding import Forwarder
from gateway.jobs.database import JobDatabase, StoreUnavailable
from gateway.jobs.deliveries import Deliveries
from gateway.jobs.runner import JobRunner
from gateway.jobs.settings import JobSettings
from gateway.jobs.sqlite import SqliteDatabase
from gateway.jobs.store import JobStore
from gateway.jobs.webhook_targets import WebhookTargets
from gateway.jobs.webhooks import WebhookSender, read_secret
from gateway.routing import Fleet
from gateway.settings import Settings
from handler.errors import ConfigError

__all__ = ["Jobs", "check_jobs", "open_database"]


def open_database(setting: str | None, state_dir: Path) -> JobDatabase:
    """The database that `jobs.database` means.

    Raises:
        ConfigError: it is PostgreSQL, and what is needed for that is not installed.
    """
    if setting is None or not setting.startswith(("postgresql://", "postgres://")):
        return SqliteDatabase(state_dir / "jobs.sqlite" if setting is None else Path(setting))
    try:
        from gateway.jobs.postgres import PostgresDatabase
    except ImportError as error:
        raise ConfigError(
            f"jobs.database: PostgreSQL needs {error.name}:"
            " pip install 'diffusers-torchserve[postgresql]'"
        ) from error
    return PostgresDatabase(setting)


async def check_jobs(settings: JobSettings, state_dir: Path) -> None:
    """Raise ConfigError where the secret or the database that is named cannot be used."""
    if settings.webhook_hosts:
        read_secret(_secret_file(settings, state_dir))
    database = open_database(settings.database, state_dir)
    try:
        await database.open()
    except StoreUnavailable as error:
        raise ConfigError(f"jobs.database: {error}") from error
    finally:
        await database.close()


def _secret_file(settings: JobSettings, state_dir: Path) -> Path:
    named = settings.webhook_secret_file
    return state_dir / "webhook_secret" if named is None else Path(named)


@dataclass(slots=True)
class Jobs:
    """Everything about jobs that a route may need."""

    store: JobStore
    runner: JobRunner
    webhooks: WebhookSender | None
    targets: WebhookTargets

    @classmethod
    @asynccontextmanager
    async def running(
        cls, settings: Settings, state_dir: Path, fleet: Fleet, forwarder: Forwarder
    ) -> AsyncIterator[Jobs]:
        """Jobs that are drawn for as long as the block runs.

        Raises:
            ConfigError: what the configuration names cannot be used.
            StoreUnavailable: the database cannot be reached.
        """
        of_jobs = settings.jobs
        database = open_database(of_jobs.database, state_dir)
        store = JobStore(database, of_jobs)
        targets = WebhookTargets(of_jobs.webhook_hosts)
        webhooks = None
        if of_jobs.webhook_hosts:
            secret = read_secret(_secret_file(of_jobs, state_dir))
            deliveries = Deliveries(database, of_jobs)
            webhooks = WebhookSender(deliveries, of_jobs, targets, secret, settings.public_url)
        await store.open()
        runner = JobRunner(
            store, fleet, forwarder, of_jobs, (lambda: None) if webhooks is None else webhooks.wake
        )
        runner.start()
        if webhooks is not None:
            webhooks.start()
        try:
            yield cls(store, runner, webhooks, targets)
        finally:
            await runner.close()
            if webhooks is not None:
                await webhooks.close()
            await store.close()

    def cancelled(self, job_id: str) -> None:
        """Stop drawing a job that was cancelled, and tell its webhook."""
        self.runner.stop(job_id)
        if self.webhooks is not None:
            self.webhooks.wake()
