"""A gateway inside the test's process, in front of instances that do what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import uvicorn
from uvicorn.server import ServerState

from gateway.app import make_app
from gateway.http_protocol import HttpProtocol
from gateway.settings import Settings
from tests.support.fake_instance import FakeInstance

__all__ = ["gateway_client", "listening"]


@asynccontextmanager
async def gateway_client(
    folder: Path,
    fakes: Sequence[FakeInstance],
    model_config: Path | None = None,
    **settings: object,
) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway that has seen its instances.

    Args:
        folder: for its state.
        fakes: its instances.
        model_config: what they run with; None: what is shipped.
        settings: those of gateway.yaml.
    """
    path = None if model_config is None else str(model_config)
    checked = Settings.from_mapping(
        {
            "run_dirs": [],
            "keys_file": str(folder / "keys"),
            "poll_s": 0.05,
            "instances": [replace(fake.settings, model_config=path) for fake in fakes],
            **settings,
        }
    )
    app = make_app(checked, folder)
    async with (
        app.router.lifespan_context(app),
        listening(app) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
    ):
        yield client


@asynccontextmanager
async def listening(app: object) -> AsyncIterator[int]:
    """The port where an application listens inside the block, over the gateway's HTTP."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=HttpProtocol,
        lifespan="off",
        timeout_keep_alive=75,
    )
    state = ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpProtocol(config, state, {}), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=10)
