"""A gateway that is killed under load loses no job; the same for worker and server is a command.

`python -m tests.gateway.jobs.kill --times 20` kills all three.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.torchserve.process import TorchServer
from tests.gateway.jobs.kill import kill_under_load
from tests.support.postgres import missing_postgres

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_the_gateway_is_killed(instance: TorchServer, tmp_path: Path) -> None:
    report = kill_under_load("gateway", 5, instance, tmp_path)
    assert report.is_good, report
    assert report.num_kills == 5
    assert report.num_jobs > 10


@missing_postgres()
def test_the_gateway_is_killed_with_postgresql(
    instance: TorchServer, tmp_path: Path, postgres: str
) -> None:
    """Nobody can know that the other gateways are gone: their leases are waited for."""
    report = kill_under_load("gateway", 3, instance, tmp_path, database=postgres, lease_s=2.0)
    assert report.is_good, report
    assert report.num_jobs > 6
