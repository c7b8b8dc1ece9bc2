"""What looks like a TorchServe to the gateway, and does what a test tells it."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from gateway.settings import InstanceSettings

__all__ = ["PNG", "WORKER_DIED", "FakeInstance", "Received", "running_instance"]

MODEL = "toy"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, 8, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress(b"\0" * (49 * 8)))
    + _chunk(b"IEND", b"")
)
WORKER_DIED = {"code": 500, "type": "InternalServerException", "message": "Worker died."}


@dataclass(frozen=True, slots=True)
class Received:
    """One request that it got."""

    path: str
    upstream_id: str
    fields: dict[str, Any]
    traceparent: str = ""


@dataclass(slots=True)
class FakeInstance:
    """`answer` says what becomes of a request; by default it is drawn at once."""

    url: str = ""
    is_ready: bool = True
    received: list[Received] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    open_requests: int = 0
    metrics: str = ""
    """What it says at /metrics; nothing: it has none."""
    stands_still: bool = False
    """Whether its worker does; the management API goes on."""
    answer: Callable[[Received], Any] | None = None

    @property
    def settings(self) -> InstanceSettings:
        return InstanceSettings(self.url, MODEL, management=self.url)

    async def manage(self, request: web.Request) -> web.Response:
        status = "READY" if self.is_ready else "UNLOADED"
        return web.json_response([{"workers": [{"id": "9000", "status": status}]}])

    async def tell_metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics, status=200 if self.metrics else 404)

    async def predict(self, request: web.Request) -> web.StreamResponse:
        content = json.loads(await request.read())
        while self.stands_still:
            await asyncio.sleep(0.01)
        if "cancel" in content:
            self.cancelled.append(content["cancel"])
            known = any(each.upstream_id == content["cancel"] for each in self.received)
            if not known:
                error = {"code": "not_found", "message": "no such request", "fields": {}}
                return web.json_response({"error": error}, status=404)
            return web.json_response({"cancelled": content["cancel"]})
        upstream_id = request.headers.get("X-Request-Id", "")
        traceparent = request.headers.get("traceparent", "")
        received = Received(request.path, upstream_id, content, traceparent)
        self.received.append(received)
        self.open_requests += 1
        try:
            result = None if self.answer is None else self.answer(received)
            if asyncio.iscoroutine(result):
                result = await result
        finally:
            self.open_requests -= 1
        if result == "hang up":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if result is None:
            headers = {"X-Seed": str(content.get("seed", 0))}
            return web.Response(body=PNG, content_type="image/png", headers=headers)
        if isinstance(result, bytes):
            return web.Response(body=result, content_type="text/event-stream")
        status, body, headers = result
        return web.json_response(body, status=status, headers=headers)


@asynccontextmanager
async def running_instance(**settings: Any) -> AsyncIterator[FakeInstance]:
    """Run one on a free port inside the block."""
    fake = FakeInstance(**settings)
    app = web.Application()
    app.router.add_get(f"/models/{MODEL}", fake.manage)
    app.router.add_get("/metrics", fake.tell_metrics)
    app.router.add_post(f"/predictions/{MODEL}", fake.predict)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield fake
    finally:
        await runner.cleanup()
