"""One real TorchServe for the whole session, with the embedded pipeline at a size that is quick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.torchserve.process import TorchServer
from tests.support.serving import serve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def url(server: TorchServer) -> str:
    """Where prompts are posted."""
    return server.predictions_url
