"""A fake clock and services that are closed when the test is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from handler.service.generation import GenerationService
from tests.support.clock import Clock
from tests.support.services import Make, make_service


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Iterator[Make]:
    """Make a service on a tiny pipeline that can be told to fail."""
    services = []

    def start(**options: Any) -> GenerationService:
        services.append(make_service(clock, **options))
        return services[-1]

    yield start
    for service in services:
        service.close()
