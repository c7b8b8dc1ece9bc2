"""Asks instances what draws nothing, and whether their worker is READY.

READY is what the management API says of the worker; /ping is healthy long before. An instance
whose management address cannot be reached from here is asked through its inference port to cancel
a request that does not exist: that passes its worker.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping

import aiohttp
from yarl import URL

from gateway.addresses import Address
from gateway.connections import open_session

__all__ = ["WorkerCheck", "ask_worker"]

_CHECK_TIMEOUT_S = 5.0
# It is not reached, or what it says has another form than ours and TorchServe's.
_NO_ANSWER = (
    *(aiohttp.ClientError, OSError),
    *(ValueError, LookupError, TypeError, AttributeError),
)


async def ask_worker(
    session: aiohttp.ClientSession,
    address: Address,
    message: Mapping[str, object],
    timeout_s: float | None = None,
) -> tuple[int, bytes]:
    """Return the status and the body of a worker's reply to a `message`, as ``{"cancel": "id"}``.

    Raises:
        TimeoutError: there was none in time; a worker answers between two forwards.
        aiohttp.ClientError, OSError: the instance cannot be reached.
    """
    headers = {**address.headers, "Content-Type": "application/json"}
    content = json.dumps(message).encode("ascii")
    async with (
        asyncio.timeout(timeout_s),
        session.post(address.predictions, data=content, headers=headers) as reply,
    ):
        return reply.status, await reply.read()


class WorkerCheck:
    """Asks instances whether their worker is READY; keeps a connection to each."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def is_ready(self, address: Address) -> bool | None:
        """Whether the worker can take requests; None when nothing was said in time.

        A frontend that is busy may be late, so that no answer does not mean that it is gone.
        """
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                if address.management is None:
                    return await self._asks_worker(address)
                return await self._asks_management(address, address.management)
        except TimeoutError:
            return None
        except _NO_ANSWER:
            return False

    async def hears(self, address: Address) -> bool:
        """Wait until the worker answers; False where it cannot be asked, or has died over it."""
        try:
            return await self._asks_worker(address)
        except _NO_ANSWER:
            return False

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()

    async def _asks_management(self, address: Address, management: str) -> bool:
        token = address.management_token
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        base = "http://localhost" if management.startswith("unix:") else management.rstrip("/")
        url = URL(f"{base}/models/{address.model}")
        async with self._session(management).get(url, headers=headers) as reply:
            workers = json.loads(await reply.read())[0]["workers"]
        return any(worker.get("status") == "READY" for worker in workers)

    async def _asks_worker(self, address: Address) -> bool:
        message = {"cancel": f"gateway-{secrets.token_hex(8)}"}
        _, body = await ask_worker(self._session(address.url), address, message)
        content = json.loads(body)
        return bool(content.get("error", {}).get("code") == "not_found")

    def _session(self, where: str) -> aiohttp.ClientSession:
        if where not in self._sessions:
            self._sessions[where] = open_session(where)
        return self._sessions[where]
