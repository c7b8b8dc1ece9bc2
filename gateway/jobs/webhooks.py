"""Posts jobs that have ended to their webhooks, signed as standardwebhooks.com says.

webhook-id: the job's id          webhook-timestamp: seconds since 1970, of this try
webhook-signature: v1,BASE64      HMAC-SHA256 of "id.timestamp.body" with the secret's bytes
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from yarl import URL

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.deliveries import Deliveries
from gateway.jobs.job import Delivery
from gateway.jobs.replies import job_json
from gateway.jobs.settings import JobSettings
from gateway.jobs.webhook_targets import CheckedResolver, WebhookTargets
from handler.errors import ConfigError

__all__ = ["WebhookSender", "read_secret", "signature"]

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_TIMEOUT_S = 10.0
_MAX_SENDING = 64
# How long a gateway that stops waits for receivers to answer.
_CLOSE_S = 2.0
_PREFIX = "whsec_"
_MIN_SECRET_BYTES = 16


def read_secret(path: Path) -> bytes:
    """The secret of a file, which is made where there is none.

    Raises:
        ConfigError: it cannot be read, or is not a secret.
    """
    try:
        with contextlib.suppress(FileExistsError):
            text = _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode("ascii")
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text + "\n")
            logger.info("made %s, which says whether a webhook is ours", path)
        text = path.read_text(encoding="ascii").strip()
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"webhook_secret_file: {path} cannot be read: {error}") from error
    if len(secret) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"webhook_secret_file: {path} holds {len(secret)} bytes; must be {_MIN_SECRET_BYTES} or"
            f" more, in base64 after {_PREFIX}"
        )
    return secret


def signature(secret: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """What a receiver compares with the header webhook-signature."""
    signed = f"{message_id}.{timestamp}.".encode("ascii") + body
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode("ascii")


class WebhookSender:
    """Sends what is due."""

    def __init__(
        self,
        deliveries: Deliveries,
        settings: JobSettings,
        targets: WebhookTargets,
        secret: bytes,
        public_url: str | None,
    ) -> None:
        self._deliveries = deliveries
        self._settings = settings
        self._targets = targets
        self._secret = secret
        self._public_url = public_url
        self._due = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to send."""
        self._loop = asyncio.create_task(self._send_due(), name="webhooks")

    async def close(self) -> None:
        """Stop, a moment after; what is not told to be received is sent again later."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    def wake(self) -> None:
        """Look at once: a job has ended."""
        self._due.set()

    async def _send_due(self) -> None:
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._targets), use_dns_cache=False, force_close=True
        )
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            try:
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_S):
                            await self._due.wait()
                    self._due.clear()
                    await self._begin(session)
            finally:
                if self._sending:
                    await asyncio.wait(self._sending, timeout=_CLOSE_S)
                for task in self._sending:
                    task.cancel()
                await asyncio.gather(*self._sending, return_exceptions=True)

    async def _begin(self, session: aiohttp.ClientSession) -> None:
        """Begin to send what is due: each in a task, so that no receiver holds up another's."""
        try:
            due = await self._deliveries.take(_MAX_SENDING - len(self._sending))
        except StoreUnavailable as error:
            logger.error("%s", error)
            return
        except Exception:  # webhooks go on when whatever it was is over
            logger.exception("webhooks could not be read")
            return
        for each in due:
            task = asyncio.create_task(self._deliver(session, each))
            self._sending.add(task)
            task.add_done_callback(self._sent)
        if due:
            self.wake()  # there may be more

    def _sent(self, task: asyncio.Task[None]) -> None:
        if len(self._sending) == _MAX_SENDING:
            self.wake()
        self._sending.discard(task)

    async def _deliver(self, session: aiohttp.ClientSession, delivery: Delivery) -> None:
        try:
            problem = await self._send(session, delivery)
            if problem is not None:
                logger.warning(
                    "the webhook of %s, try %d: %s",
                    *(delivery.job.id, delivery.job.webhook_tries, problem),
                )
            await self._deliveries.end(delivery, is_received=problem is None)
        except StoreUnavailable as error:
            logger.error("%s", error)
        except Exception:  # it is due again later
            logger.exception("the webhook of %s could not be sent", delivery.job.id)

    async def _send(self, session: aiohttp.ClientSession, delivery: Delivery) -> str | None:
        """Send one; return why it was not received, without what the receiver said."""
        # What was allowed when the job was accepted may not be any more.
        if problem := self._targets.problem_of(delivery.url):
            return problem
        job = delivery.job
        now_s = time.time()
        body = json.dumps(
            {
                "type": f"image.job.{job.state.value}",
                "timestamp": datetime.fromtimestamp(now_s, UTC).isoformat(),
                "data": job_json(
                    job, expires_s=self._settings.expires_s, base_url=self._public_url
                ),
            }
        ).encode("ascii")
        timestamp = str(int(now_s))
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "diffusers-torchserve",
            "webhook-id": job.id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(self._secret, job.id, timestamp, body),
        }
        try:
            async with session.post(
                URL(delivery.url), data=body, headers=headers, allow_redirects=False
            ) as response:
                return None if 200 <= response.status < 300 else f"status {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return str(error) or type(error).__name__
