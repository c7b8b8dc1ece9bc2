"""Two supervised instances behind a gateway: nobody who draws notices what happens to them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts.serve import main
from scripts.torchserve.fleet import FleetRecord
from scripts.torchserve.process import TorchServer
from tests.support.client import pixels
from tests.support.fleets import fleet_arguments, stopped_fleet
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.serving import MODEL, build_quick_archive
from tests.support.traffic import until

pytestmark = pytest.mark.slow

NUM_CLIENTS, NUM_SEEDS = 6, 4
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "store").mkdir()
    build_quick_archive(folder / "store", {}, "dir")
    with stopped_fleet(folder / "run"):
        assert main(["start", *fleet_arguments(folder), "--instances", "2"]) == 0
        yield folder


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[RunningGateway]:
    run_dirs = [folder / "run" / str(index) for index in (0, 1)]
    with running_gateway(folder / "gateway", run_dirs) as running:
        assert until(lambda: running.log, lambda log: log.count("is READY") == 2)
        yield running


class Clients:
    """Threads that draw one picture after the other, each by a seed of a few."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._url = f"{gateway.url}/predictions/{MODEL}"
        self._is_over = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.pictures: dict[int, list[bytes]] = {seed: [] for seed in range(NUM_SEEDS)}

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw while the block runs, and for a second before and after it."""
        threads = [threading.Thread(target=self._work, args=(at,)) for at in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(1)
            yield
            time.sleep(1)
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def _work(self, at: int) -> None:
        seed = at
        while not self._is_over.is_set():
            seed = (seed + 1) % NUM_SEEDS
            fields = {"prompt": "a ring", "seed": seed, "width": 64, "height": 64}
            request = urllib.request.Request(self._url, json.dumps(fields).encode())
            request.add_header("Content-Type", "application/json")
            try:
                with OPENER.open(request, timeout=240) as reply:
                    self.pictures[seed].append(reply.read())
                    self.statuses[reply.status] += 1
            except urllib.error.HTTPError as error:
                with error:
                    self.statuses[error.code] += 1

    def check(self) -> None:
        """Fail where one was refused, or two pictures of one seed differ."""
        assert set(self.statuses) == {200}, self.statuses
        first = [pixels(self.pictures[seed][0]).astype(int) for seed in range(NUM_SEEDS)]
        assert abs(first[0] - first[1]).max() > 2
        for seed, drawn in self.pictures.items():
            # Batches round differently.
            assert all(abs(pixels(each).astype(int) - first[seed]).max() <= 2 for each in drawn)


def instance(folder: Path, index: int) -> TorchServer:
    found = TorchServer.find(folder / "run" / str(index))
    assert found is not None
    return found


def num_restarts(folder: Path) -> int:
    record = FleetRecord.read(folder / "run")
    assert record is not None
    return sum(each.num_restarts for each in record.instances)


def are_ready(folder: Path) -> bool:
    servers = [TorchServer.find(folder / "run" / str(index)) for index in (0, 1)]
    return all(each is not None and each.is_ready() for each in servers)


def test_a_rolling_restart_loses_no_request(folder: Path, gateway: RunningGateway) -> None:
    before = [instance(folder, index).pid for index in (0, 1)]
    clients = Clients(gateway)
    with clients.drawing():
        assert main(["restart", "--run-dir", str(folder / "run")]) == 0
    clients.check()
    assert not set(before) & {instance(folder, index).pid for index in (0, 1)}


@pytest.mark.parametrize("victim", ["frontend", "worker"])
def test_what_hangs_is_started_again(folder: Path, gateway: RunningGateway, victim: str) -> None:
    assert until(lambda: are_ready(folder), bool, 120)
    before = num_restarts(folder)
    clients = Clients(gateway)
    with clients.drawing():
        process = psutil.Process(instance(folder, 1).pid)
        if victim == "worker":
            (process,) = process.children()
        process.suspend()
        assert until(lambda: num_restarts(folder), lambda number: number > before, 120) > before
        assert not process.is_running()
        assert until(lambda: are_ready(folder), bool, 120)
    clients.check()
    assert num_restarts(folder) == before + 1
