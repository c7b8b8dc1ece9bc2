"""Kills the gateway, a worker or a server again and again while jobs are drawn; none may be lost.

    python -m tests.gateway.jobs.kill --times 20 [--victim gateway worker server]

Clients post jobs all the time, each with an idempotency key under which they try again when the
gateway is away. In the end every job must have ended once, by the picture of its seed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scripts.torchserve.process import TorchServer
from tests.support.client import pixels
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.jobs import ENDED, JobClient, picture_of
from tests.support.serving import serve
from tests.support.traffic import until

__all__ = ["Report", "kill_under_load"]

_NUM_CLIENTS = 6
_SEEDS = 12
_FIELDS = {"size": "64x64", "num_inference_steps": 12}
_AWAY_S = 0.1
_END_S = 240.0
# Batches round differently; pictures of two seeds differ by far more.
_TOLERANCE = 2


@dataclass(slots=True)
class Report:
    """What became of the jobs."""

    victim: str
    num_kills: int = 0
    num_jobs: int = 0
    lost: list[str] = field(default_factory=list)
    """Jobs that are not known any more, or did not end."""
    doubled: list[str] = field(default_factory=list)
    """Posts that became two jobs, and jobs whose end was seen to change."""
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Jobs with another picture than that of their seed."""
    elapsed_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.doubled or self.failed or self.wrong)

    def __str__(self) -> str:
        return (
            f"{self.victim}: killed {self.num_kills} times in {self.elapsed_s:.0f} s;"
            f" {self.num_jobs} jobs, {len(self.lost)} lost, {len(self.doubled)} doubled,"
            f" {len(self.failed)} failed, {len(self.wrong)} with a wrong picture"
        )


class _Clients:
    """Threads that post a job, wait for its end and post the next one."""

    def __init__(self) -> None:
        self.url = ""
        self.ids: dict[str, set[str]] = {}
        self.seeds: dict[str, int] = {}
        self.ends: dict[str, list[dict[str, Any]]] = {}
        self.errors: list[BaseException] = []
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(_NUM_CLIENTS)]

    @property
    def num_ended(self) -> int:
        return len(self.ends)

    @contextmanager
    def working(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                number = next(self._numbers)
                key, seed = f"post-{number}", number % _SEEDS
                self.seeds[key] = seed
                ids = self.ids.setdefault(key, set())
                ids.add(self._trying(lambda: self._post(key, seed)))  # noqa: B023
                (job_id,) = ids
                while not self._stop.is_set() and not self._see_end(job_id):
                    time.sleep(_AWAY_S)
                # Whoever does not know whether the first answer came asks again.
                ids.add(self._trying(lambda: self._post(key, seed)))  # noqa: B023
        except BaseException as error:
            self.errors.append(error)

    def _post(self, key: str, seed: int) -> str:
        fields = {"prompt": "a ring", **_FIELDS, "seed": seed}
        reply = JobClient(self.url).ask("POST", "/v1/jobs", fields, **{"Idempotency-Key": key})
        if reply.status == 503:
            raise OSError(reply.body)
        assert reply.status == 202, reply.body
        return str(reply.json()["id"])

    def _see_end(self, job_id: str) -> bool:
        job = self._trying(lambda: JobClient(self.url).get(job_id))
        if job["state"] in ENDED:
            self.ends.setdefault(job_id, []).append(job)
        return job["state"] in ENDED

    @staticmethod
    def _trying(ask: Callable[[], Any]) -> Any:
        """Ask until the gateway is there."""
        until_s = time.monotonic() + _END_S
        while True:
            try:
                return ask()
            except OSError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(_AWAY_S)


def kill_under_load(
    victim: str,
    times: int,
    server: TorchServer,
    folder: Path,
    say: Callable[[str], object] = lambda text: None,
    **jobs: object,
) -> Report:
    """Kill `victim` that often, each time when jobs have ended since the last time."""
    report, clients, started_s = Report(victim), _Clients(), time.monotonic()
    chance = random.Random(0)
    # The earlier ones are closed with it; each had been killed.
    gateways: list[RunningGateway] = []
    open_gateways = [running_gateway(folder, [server.state_dir], jobs=jobs)]
    gateways.append(open_gateways[0].__enter__())
    clients.url = gateways[-1].url
    try:
        with clients.working():
            for _ in range(times):
                before = clients.num_ended
                until(lambda: clients.num_ended, lambda num: num >= before + 2, _END_S)  # noqa: B023
                assert not clients.errors, clients.errors
                assert clients.num_ended >= before + 2, gateways[-1].log[-3000:]
                time.sleep(chance.uniform(0.0, 0.7))
                if victim == "gateway":
                    gateways[-1].process.kill()
                    gateways[-1].process.wait()
                    open_gateways.pop().__exit__(None, None, None)
                    open_gateways.append(running_gateway(folder, [server.state_dir], jobs=jobs))
                    gateways.append(open_gateways[-1].__enter__())
                    clients.url = gateways[-1].url
                else:
                    _kill_instance(victim, server)
                report.num_kills += 1
                say(f"{victim}: killed {report.num_kills} times, {clients.num_ended} jobs ended")
        assert not clients.errors, clients.errors
        _judge(report, clients)
    finally:
        for each in open_gateways:
            each.__exit__(None, None, None)
    report.elapsed_s = time.monotonic() - started_s
    return report


def _kill_instance(victim: str, server: TorchServer) -> None:
    """A worker is started again by its server, a server by us."""
    if victim == "worker":
        model = until(
            server.model, lambda model: model is not None and bool(model.ready_pids), _END_S
        )
        assert model is not None
        os.kill(model.ready_pids[0], signal.SIGKILL)
        return
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.pid, lambda pid: pid is None)
    # Its threads may hold the ports for a while longer.
    assert not until(server.options.ports.taken, lambda taken: not taken, _END_S)
    server.start()
    server.wait_until_ready(_END_S)


def _judge(report: Report, clients: _Clients) -> None:
    """Wait for every job that was posted, and compare."""
    client = JobClient(clients.url)
    first: dict[int, np.ndarray] = {}
    for key, ids in clients.ids.items():
        report.num_jobs += 1
        if len(ids) != 1:
            report.doubled.append(key)
        for job_id in ids:
            if client.ask("GET", f"/v1/jobs/{job_id}").status != 200:
                report.lost.append(job_id)
                continue
            job = until(lambda: client.get(job_id), lambda job: job["state"] in ENDED, _END_S)  # noqa: B023
            if job["state"] not in ENDED:
                report.lost.append(job_id)
            elif job["state"] != "succeeded":
                report.failed.append(f"{job_id}: {job['error']}")
            elif any(seen != job for seen in clients.ends.get(job_id, [])):
                report.doubled.append(job_id)
            else:
                drawn = pixels(picture_of(job)).astype(int)
                seed = clients.seeds[key]
                if seed not in first:
                    first[seed] = _drawn_now(client, seed)
                if np.abs(drawn - first[seed]).max() > _TOLERANCE:
                    report.wrong.append(job_id)
    # Otherwise the comparison says nothing.
    assert np.abs(first[0] - first[1]).max() > _TOLERANCE


def _drawn_now(client: JobClient, seed: int) -> np.ndarray:
    """The picture of a seed, drawn while nothing is killed."""
    job_id = client.accepted({**_FIELDS, "seed": seed})
    return pixels(picture_of(client.ended(job_id, _END_S))).astype(int)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill each victim; return 0 where nothing was lost or doubled, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.gateway.jobs.kill", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="how often each is killed (20)")
    victims = ("gateway", "worker", "server")
    parser.add_argument("--victim", nargs="+", choices=victims, default=victims, help="(all)")
    arguments = parser.parse_args(argv)
    reports = []
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        for server in serve(Path(name)):
            for victim in arguments.victim:
                folder = Path(name) / victim
                reports.append(
                    kill_under_load(
                        victim, arguments.times, server, folder, lambda t: print(t, file=sys.stderr)
                    )
                )
                print(reports[-1], flush=True)
                for each in (reports[-1].failed, reports[-1].lost, reports[-1].doubled):
                    print("\n".join(each), file=sys.stderr)
    return 0 if all(report.is_good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
