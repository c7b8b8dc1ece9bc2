"""One real TorchServe and one gateway in front of it for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from scripts.torchserve.process import TorchServer
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.serving import serve


@pytest.fixture(scope="session")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    yield from serve(tmp_path_factory.mktemp("instance"))


@pytest.fixture(scope="session")
def gateway(
    instance: TorchServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    aliases = {"dall-e-3": "stable_diffusion"}
    settings = {"aliases": aliases, "max_body_bytes": 1024 * 1024}
    with running_gateway(folder, [instance.state_dir], **settings) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def async_client(gateway: RunningGateway) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
