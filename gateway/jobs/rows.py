"""Jobs as rows of the database's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.jobs.database import Transaction
from gateway.jobs.job import Job, Progress, State, WebhookState
from handler.errors import Conflict

__all__ = ["COLUMNS", "find_job", "get_job", "job_of"]

COLUMNS = """
    id, key_name, fingerprint, state, model, summary, created_s, started_s, finished_s, picture,
    step, num_steps, preview, result, error, webhook_url, webhook_state, webhook_tries
"""


async def get_job(transaction: Transaction, job_id: str) -> Job | None:
    """A job by its id."""
    rows = await transaction.execute(
        f"SELECT {COLUMNS} FROM gateway_jobs WHERE id = :job_id", job_id=job_id
    )
    return job_of(rows[0]) if rows else None


async def find_job(
    transaction: Transaction, key_name: str, idempotency_key: str, fingerprint: str
) -> Job | None:
    """A job by its idempotency key. Raises: Conflict, where it was accepted for another body."""
    rows = await transaction.execute(
        f"SELECT {COLUMNS} FROM gateway_jobs"
        " WHERE key_name = :key_name AND idempotency_key = :idempotency_key",
        key_name=key_name,
        idempotency_key=idempotency_key,
    )
    if not rows:
        return None
    job = job_of(rows[0])
    if job.fingerprint != fingerprint:
        problem = "belongs to a job with another body"
        raise Conflict(f"the Idempotency-Key {problem}", {"Idempotency-Key": problem})
    return job


def job_of(row: Mapping[str, Any]) -> Job:
    """A job of a row with COLUMNS."""
    preview = row["preview"]
    webhook_state = row["webhook_state"]
    return Job(
        id=row["id"],
        key_name=row["key_name"],
        fingerprint=row["fingerprint"],
        state=State(row["state"]),
        model=row["model"],
        summary=row["summary"],
        created_s=row["created_s"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        progress=Progress(
            row["picture"],
            row["step"],
            row["num_steps"],
            None if preview is None else bytes(preview),
        ),
        result=row["result"],
        error=row["error"],
        webhook_state=None if webhook_state is None else WebhookState(webhook_state),
        webhook_tries=row["webhook_tries"],
    )
