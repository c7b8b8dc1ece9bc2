"""gateway.asking, of what answers and is no worker of ours."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.addresses import Address
from gateway.asking import WorkerCheck


@pytest.mark.parametrize("has_management", [True, False])
@pytest.mark.parametrize(
    "said", ["[]", '["READY"]', '{"error": "unauthorized"}', '{"error": null}', "it works"]
)
def test_what_another_program_says_is_not_ready(said: str, has_management: bool) -> None:
    async def say(request: web.Request) -> web.Response:
        return web.Response(text=said)

    async def check() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", say)
        async with TestServer(app) as server:
            url = str(server.make_url("")).rstrip("/")
            address = Address(url, "toy", url if has_management else None)
            worker = WorkerCheck()
            try:
                assert await worker.is_ready(address) is False
                assert await worker.hears(address) is False
            finally:
                await worker.close()

    asyncio.run(asyncio.wait_for(check(), 60))
