"""Workers and servers that are killed while clients wait: no client sees an error."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai import AsyncOpenAI

from scripts.torchserve.process import TorchServer
from tests.support.client import pixels
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.serving import serve
from tests.support.traffic import metrics, until

pytestmark = [pytest.mark.server, pytest.mark.slow]

FIELDS = {"num_inference_steps": 60}


@pytest.fixture(scope="module")
def instances(
    instance: TorchServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TorchServer, TorchServer]]:
    """The session's, and a second one, which is the one that is killed."""
    for second in serve(tmp_path_factory.mktemp("second")):
        yield instance, second


@pytest.fixture(scope="module")
def gateway(
    instances: tuple[TorchServer, TorchServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, [each.state_dir for each in instances]) as running:
        assert until(lambda: running.log, lambda log: log.count("is READY") == 2)
        yield running


async def draw(client: AsyncOpenAI, seed: int) -> str:
    body = {"seed": seed, **FIELDS}
    reply = await client.images.generate(prompt="a ring", size="64x64", extra_body=body)
    assert reply.data is not None
    assert reply.data[0].b64_json is not None
    return reply.data[0].b64_json


def in_flight(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_in_flight", 0.0)


def victim_of(server: TorchServer, victim: str) -> int:
    """The process id of the server, or of its worker."""
    model = server.model()
    assert model is not None
    pid = model.ready_pids[0] if victim == "worker" else server.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_killed_under_load(
    gateway: RunningGateway, instances: tuple[TorchServer, TorchServer], victim: str
) -> None:
    """The worker first: a dead server stays dead."""
    second = instances[1]
    assert until(second.is_ready, bool, timeout_s=150)
    until(lambda: gateway.log, lambda log: log.count("is READY") > log.count("is not READY") + 1)

    async def talk() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
        ) as client:
            drawing = [asyncio.create_task(draw(client, seed)) for seed in range(24)]
            await asyncio.to_thread(
                lambda: until(lambda: in_flight(second), lambda number: number > 3)
            )
            os.kill(victim_of(second, victim), signal.SIGKILL)
            drawn = await asyncio.gather(*drawing)
            again = await asyncio.gather(*(draw(client, seed) for seed in range(24)))
            return drawn, again

    drawn, again = asyncio.run(talk())
    assert "died over a request" in gateway.log
    assert len(set(drawn)) == 24
    # The seed is fixed by then, so that nobody can tell who drew it; batches round differently.
    for one, other in zip(drawn, again, strict=True):
        difference = pixels_of(one).astype(int) - pixels_of(other)
        assert np.abs(difference).max() <= 2
    assert np.abs(pixels_of(drawn[0]).astype(int) - pixels_of(drawn[1])).max() > 2


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    yield from serve(tmp_path_factory.mktemp("third"))


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_what_stands_still_is_drawn_elsewhere(
    instance: TorchServer, third: TorchServer, tmp_path: Path, victim: str
) -> None:
    """SIGSTOP: connections are accepted, and nothing ever comes back."""
    run_dirs = [third.state_dir, instance.state_dir]
    with running_gateway(tmp_path, run_dirs, silence_s=5.0) as gateway:
        until(lambda: gateway.log, lambda log: log.count("is READY") == 2)
        pid = victim_of(third, victim)

        async def talk() -> list[str]:
            async with AsyncOpenAI(
                base_url=f"{gateway.url}/v1", api_key="none", max_retries=0
            ) as client:
                drawing = [asyncio.create_task(draw(client, seed)) for seed in range(8)]
                await asyncio.to_thread(lambda: until(lambda: in_flight(third), bool))
                os.kill(pid, signal.SIGSTOP)
                return await asyncio.gather(*drawing)

        try:
            drawn = asyncio.run(talk())
            assert len(set(drawn)) == 8
            assert "said nothing for 5 s" in gateway.log
        finally:
            os.kill(pid, signal.SIGCONT)
        until(lambda: gateway.log, lambda log: "answers again" in log)
        until(lambda: gateway.log, lambda log: log.count("is READY") == 3)


def pixels_of(encoded: str) -> np.ndarray:
    return pixels(base64.b64decode(encoded))
