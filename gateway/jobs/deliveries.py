"""Webhooks that are due: kept with their jobs, so that none is lost, and tried again."""

from __future__ import annotations

from gateway.jobs.database import JobDatabase
from gateway.jobs.job import Delivery, WebhookState
from gateway.jobs.rows import COLUMNS, job_of
from gateway.jobs.settings import JobSettings

__all__ = ["Deliveries"]

_DELIVERY_S = 60.0
_MAX_DELIVERIES = 16
_FIRST_RETRY_S, _MAX_RETRY_S = 2.0, 3600.0


class Deliveries:
    """The webhooks of all jobs of a database that have ended."""

    def __init__(self, database: JobDatabase, settings: JobSettings) -> None:
        self._database = database
        self._settings = settings

    async def take(self, max_num: int = _MAX_DELIVERIES) -> list[Delivery]:
        """Webhooks that are due; those whose end is not told in time are due again."""
        if max_num < 1:
            return []
        async with self._database.transaction() as transaction:
            now_s = self._database.now_s()
            rows = await transaction.execute(
                f"""
                UPDATE gateway_jobs
                SET webhook_due_s = :until_s, webhook_tries = webhook_tries + 1
                WHERE webhook_state = 'pending' AND webhook_due_s <= :now_s AND id IN (
                    SELECT id FROM gateway_jobs
                    WHERE webhook_state = 'pending' AND webhook_due_s <= :now_s
                    ORDER BY webhook_due_s LIMIT :max_num
                )
                RETURNING {COLUMNS}
                """,
                now_s=now_s,
                until_s=now_s + _DELIVERY_S,
                max_num=min(max_num, _MAX_DELIVERIES),
            )
        return [Delivery(job_of(row), row["webhook_url"]) for row in rows]

    async def end(self, delivery: Delivery, *, is_received: bool) -> None:
        """Say what became of a webhook; one that was not received is sent again later."""
        num_tries = delivery.job.webhook_tries
        state = WebhookState.PENDING
        if is_received:
            state = WebhookState.DELIVERED
        elif num_tries >= self._settings.webhook_tries:
            state = WebhookState.FAILED
        wait_s = min(_MAX_RETRY_S, _FIRST_RETRY_S * 3.0 ** (num_tries - 1))
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "UPDATE gateway_jobs SET webhook_state = :state, webhook_due_s = :due_s"
                " WHERE id = :job_id AND webhook_state = 'pending'",
                job_id=delivery.job.id,
                state=state.value,
                due_s=self._database.now_s() + wait_s,
            )
