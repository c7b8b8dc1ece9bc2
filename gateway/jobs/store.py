"""The store of jobs: accepted once, given to one gateway at a time by a lease, ended once, deleted.

add ─▶ queued ─ take ─▶ running ─ finish ─▶ succeeded, failed        sweep: a lease that was not
▲                │                                         renewed is over, and what
└─── put_back ───┘        cancel ─▶ cancelled              has ended expires
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence

from gateway.errors import NoInstance, error_body
from gateway.jobs.database import JobDatabase, Transaction
from gateway.jobs.job import Claim, Drawn, Job, NewJob, Progress, State, WebhookState
from gateway.jobs.room import RETRY_AFTER_S, check_room, make_room
from gateway.jobs.rows import find_job, get_job
from gateway.jobs.settings import JobSettings
from gateway.picture_store import StoreFull
from handler.errors import QueueFull, RequestError

__all__ = ["JobStore", "encode_error"]

# What a job takes beside what is counted byte by byte.
_BYTES_A_JOB = 2048
# A job that is taken up again and again may be what ends the gateway: it then waits in between.
_STARTS_AT_ONCE = 3
_MAX_START_DELAY_S = 30.0
# What every job that ends gets; its request is not needed any more.
_END = """
    finished_s = :now_s, request = NULL, token = NULL, lease_until_s = NULL, preview = NULL,
    webhook_due_s = :now_s,
    webhook_state = CASE WHEN webhook_state = 'waiting' THEN 'pending' ELSE webhook_state END
"""


def encode_error(error: RequestError) -> str:
    """An error as a job keeps it: the body of its reply, and its status."""
    body = error_body(error)["error"]
    assert isinstance(body, dict)
    return json.dumps({"status": error.status, **body})


class JobStore:
    """All jobs of a database."""

    def __init__(self, database: JobDatabase, settings: JobSettings) -> None:
        self._database = database
        self._settings = settings

    async def open(self) -> None:
        """Connect; take up what a gateway that is gone was drawing."""
        if await self._database.open():
            async with self._database.transaction() as transaction:
                await transaction.execute(
                    "UPDATE gateway_jobs SET state = 'queued', token = NULL, lease_until_s = NULL"
                    " WHERE state = 'running'"
                )

    async def close(self) -> None:
        """Disconnect."""
        await self._database.close()

    # For clients.

    async def find(self, key_name: str, idempotency_key: str, fingerprint: str) -> Job | None:
        """The job that was accepted with this idempotency key.

        Raises:
            Conflict: it was accepted for another body.
        """
        async with self._database.transaction() as transaction:
            return await find_job(transaction, key_name, idempotency_key, fingerprint)

    async def add(self, new: NewJob) -> tuple[Job, bool]:
        """Accept a job; tell whether it is new.

        Raises:
            Conflict: the idempotency key belongs to another body.
            RateLimited: too many jobs of this key wait.
            QueueFull: too many jobs wait, or all that wait are too large.
        """
        settings = self._settings
        async with self._database.transaction(alone=True) as transaction:
            if new.idempotency_key is not None:
                known = await find_job(
                    transaction, new.key_name, new.idempotency_key, new.fingerprint
                )
                if known is not None:
                    return known, False
            await check_room(transaction, settings, new.key_name)
            size_bytes = _BYTES_A_JOB + len(new.request) + len(new.summary)
            try:
                await make_room(transaction, settings.store_bytes, size_bytes)
            except StoreFull:
                raise QueueFull(
                    "the jobs that wait fill the store; try again later", RETRY_AFTER_S
                ) from None
            now_s = self._database.now_s()
            await transaction.execute(
                """
                INSERT INTO gateway_jobs (id, key_name, idempotency_key, fingerprint, state, model,
                    request, summary, size_bytes, created_s, due_s, webhook_url, webhook_state)
                VALUES (:id, :key_name, :idempotency_key, :fingerprint, 'queued', :model,
                    :request, :summary, :size_bytes, :now_s, :now_s, :webhook_url, :webhook_state)
                """,
                id=new.id,
                key_name=new.key_name,
                idempotency_key=new.idempotency_key,
                fingerprint=new.fingerprint,
                model=new.model,
                request=new.request,
                summary=new.summary,
                size_bytes=size_bytes,
                now_s=now_s,
                webhook_url=new.webhook_url,
                webhook_state=None if new.webhook_url is None else WebhookState.WAITING.value,
            )
            await self._database.enqueue(transaction, new.id, new.model)
            job = await get_job(transaction, new.id)
        assert job is not None
        return job, True

    async def get(self, job_id: str) -> Job | None:
        """A job; None where there is none, or not any more."""
        async with self._database.transaction() as transaction:
            return await get_job(transaction, job_id)

    async def pictures(self, job_id: str) -> list[Drawn]:
        """The pictures of a job, in their order."""
        async with self._database.transaction() as transaction:
            rows = await transaction.execute(
                "SELECT name, content FROM gateway_job_pictures WHERE job_id = :job_id"
                " ORDER BY position",
                job_id=job_id,
            )
        return [Drawn(row["name"], bytes(row["content"])) for row in rows]

    async def picture(self, job_id: str, name: str) -> bytes | None:
        """One picture of a job; None where there is none of this name, or not any more."""
        async with self._database.transaction() as transaction:
            rows = await transaction.execute(
                "SELECT content FROM gateway_job_pictures WHERE job_id = :job_id AND name = :name",
                job_id=job_id,
                name=name,
            )
        return bytes(rows[0]["content"]) if rows else None

    async def cancel(self, job_id: str) -> None:
        """End a job, unless it has ended; who draws it learns so when it renews its lease."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                f"UPDATE gateway_jobs SET state = 'cancelled', size_bytes = :size_bytes, {_END}"
                " WHERE id = :job_id AND state IN ('queued', 'running')",
                job_id=job_id,
                size_bytes=_BYTES_A_JOB,
                now_s=self._database.now_s(),
            )

    # For who draws.

    async def take(self, models: Sequence[str]) -> Claim | None:
        """A job of one of these models, for as long as its lease; None where none is due."""
        while (job_id := await self._database.next_id(models)) is not None:
            async with self._database.transaction() as transaction:
                now_s = self._database.now_s()
                rows = await transaction.execute(
                    """
                    UPDATE gateway_jobs SET state = 'running', token = :token,
                        lease_until_s = :until_s, num_starts = num_starts + 1,
                        started_s = coalesce(started_s, :now_s),
                        picture = 0, step = 0, num_steps = 0, preview = NULL
                    WHERE id = :job_id AND state = 'queued' AND due_s <= :now_s
                    RETURNING id, token, key_name, model, request, summary, created_s, num_deaths
                    """,
                    job_id=job_id,
                    token=secrets.token_hex(16),
                    now_s=now_s,
                    until_s=now_s + self._settings.lease_s,
                )
            await self._database.claimed(job_id)
            if rows:
                return Claim(**{**rows[0], "request": bytes(rows[0]["request"])})
        return None

    async def renew(self, claim: Claim, progress: Progress) -> bool:
        """Keep a job for another lease; tell whether it is still this gateway's."""
        async with self._database.transaction() as transaction:
            rows = await transaction.execute(
                """
                UPDATE gateway_jobs SET lease_until_s = :until_s, picture = :picture,
                    step = :step, num_steps = :num_steps, preview = :preview
                WHERE id = :job_id AND token = :token RETURNING id
                """,
                job_id=claim.id,
                token=claim.token,
                until_s=self._database.now_s() + self._settings.lease_s,
                picture=progress.picture,
                step=progress.step,
                num_steps=progress.num_steps,
                preview=progress.preview,
            )
        return bool(rows)

    async def put_back(self, claim: Claim, after_s: float = 0.0, *, has_died: bool = False) -> None:
        """Let a job be drawn later, by whoever has room then, if it is still this gateway's.

        `has_died`: instances have died over it.
        """
        async with self._database.transaction() as transaction:
            rows = await transaction.execute(
                """
                UPDATE gateway_jobs SET state = 'queued', token = NULL, lease_until_s = NULL,
                    due_s = :due_s, num_deaths = num_deaths + :num_died,
                    num_starts = num_starts - 1
                WHERE id = :job_id AND token = :token RETURNING id
                """,
                job_id=claim.id,
                token=claim.token,
                due_s=self._database.now_s() + after_s,
                num_died=int(has_died),
            )
            if rows and not after_s:
                await self._database.enqueue(transaction, claim.id, claim.model)

    async def succeed(self, claim: Claim, result: str, pictures: Sequence[Drawn]) -> bool:
        """End a job with its pictures; tell whether it was still this gateway's.

        Raises:
            StoreFull: the pictures do not fit into the store.
        """
        size_bytes = _BYTES_A_JOB + len(result) + sum(len(each.content) for each in pictures)
        async with self._database.transaction(alone=True) as transaction:
            if not await self._end(transaction, claim, State.SUCCEEDED, size_bytes, result=result):
                return False
            await make_room(transaction, self._settings.store_bytes, 0, keep=claim.id)
            for position, picture in enumerate(pictures):
                await transaction.execute(
                    "INSERT INTO gateway_job_pictures (job_id, position, name, content)"
                    " VALUES (:job_id, :position, :name, :content)",
                    job_id=claim.id,
                    position=position,
                    name=picture.name,
                    content=picture.content,
                )
        return True

    async def fail(self, claim: Claim, error: RequestError) -> bool:
        """End a job with an error; tell whether it was still this gateway's."""
        text = encode_error(error)
        async with self._database.transaction() as transaction:
            size_bytes = _BYTES_A_JOB + len(text)
            return await self._end(transaction, claim, State.FAILED, size_bytes, error=text)

    # In time.

    async def sweep(self) -> None:
        """Queue what lost its drawer, fail what waited for too long, delete what has expired."""
        settings = self._settings
        too_late = NoInstance(f"it could not be drawn within {settings.max_wait_s:g} s")
        async with self._database.transaction(alone=True) as transaction:
            now_s = self._database.now_s()
            await transaction.execute(
                f"""
                UPDATE gateway_jobs SET state = 'queued', token = NULL, lease_until_s = NULL,
                    due_s = :now_s + CASE
                        WHEN num_starts < {_STARTS_AT_ONCE} THEN 0.0
                        WHEN num_starts < {_STARTS_AT_ONCE + 4} THEN 2.0 * num_starts
                        ELSE {_MAX_START_DELAY_S} END
                WHERE state = 'running' AND lease_until_s <= :now_s
                """,
                now_s=now_s,
            )
            await transaction.execute(
                f"UPDATE gateway_jobs SET state = 'failed', error = :error,"
                f" size_bytes = :size_bytes, {_END}"
                " WHERE state = 'queued' AND created_s <= :before_s",
                error=encode_error(too_late),
                size_bytes=_BYTES_A_JOB,
                now_s=now_s,
                before_s=now_s - settings.max_wait_s,
            )
            await transaction.execute(
                "DELETE FROM gateway_jobs WHERE finished_s <= :before_s",
                before_s=now_s - settings.expires_s,
            )
            await self._database.mend(transaction)

    # Inside.

    async def _end(
        self,
        transaction: Transaction,
        claim: Claim,
        state: State,
        size_bytes: int,
        *,
        result: str | None = None,
        error: str | None = None,
    ) -> bool:
        rows = await transaction.execute(
            f"UPDATE gateway_jobs SET state = :state, size_bytes = :size_bytes,"
            f" result = :result, error = :error, {_END}"
            " WHERE id = :job_id AND token = :token RETURNING id",
            job_id=claim.id,
            token=claim.token,
            state=state.value,
            size_bytes=size_bytes,
            result=result,
            error=error,
            now_s=self._database.now_s(),
        )
        return bool(rows)
