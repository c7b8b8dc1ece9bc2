"""What the gateway costs: the same requests straight to TorchServe and through it, interleaved.

    python -m benchmarks.gateway                   # about four minutes on two cores

Each of 24 clients that are always there flips a seeded coin before every request, so that both ways
meet the same load at the same time; a request is a small picture of the demo's pipeline. The
gateway's CPU is that of its process, its looks at the instance included. Then 500 clients wait at
once for an instance that takes few at a time, and the gateway's memory is read while they do.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil
import yaml

from benchmarks.report import Figure, Spread, write_report
from benchmarks.systems import ours
from scripts.gateway_process import environment
from scripts.torchserve.options import Ports
from scripts.torchserve.process import TorchServer

__all__ = ["Clients", "gateway", "main", "way_of"]

PIPELINE = Path("demo/pipeline")
NUM_CLIENTS, NUM_WAITING = 24, 500
MAX_CPU_MS, MAX_P50_RATIO, MAX_MEMORY_MB = 2.0, 1.05, 200.0
DIRECT, THROUGH = "direct", "through the gateway"
START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Clients:
    """What a round of closed-loop clients measured: seconds of each request, by its way."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {DIRECT: [], THROUGH: []})
    num_failed: int = 0

    @property
    def p50_ratio(self) -> float:
        """The median through the gateway, over the median without it."""
        return statistics.median(self.seconds[THROUGH]) / statistics.median(self.seconds[DIRECT])


def way_of(seed: int, client: int, index: int) -> str:
    """Which way a client's next request takes: a coin, the same in every run."""
    return random.Random(f"{seed} {client} {index}").choice((DIRECT, THROUGH))


@contextmanager
def gateway(folder: Path, server: TorchServer, **settings: object) -> Iterator[tuple[str, int]]:
    """A gateway in front of `server`: its URL and its process id."""
    port = Ports.free().inference
    content = {"port": port, "run_dirs": [str(server.state_dir)], **settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gateway.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "gateway", "--config", str(folder / "gateway.yaml")]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--state-dir", str(folder)], env=environment(), stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_until_ready(url, process))
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(30)


async def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until_s and process.poll() is None:
            try:
                async with session.get(f"{url}/readyz") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError("the gateway did not start")


async def closed_loop(
    direct: str, through: str, wish: dict[str, object], seconds: float, seed: int
) -> Clients:
    """Let clients send one request after the other, for so long; what they measured."""
    measured = Clients()
    until_s = time.monotonic() + seconds
    urls = {DIRECT: direct, THROUGH: f"{through}/v1/images/generations"}

    async def client(number: int) -> None:
        async with aiohttp.ClientSession() as session:
            index = 0
            while time.monotonic() < until_s:
                way = way_of(seed, number, index)
                body = {**wish, "seed": 1000 * number + index}
                started_s = time.monotonic()
                async with session.post(urls[way], json=body) as reply:
                    content = await reply.read()
                if reply.status == 200:
                    measured.seconds[way].append(time.monotonic() - started_s)
                else:
                    measured.num_failed += 1
                assert way == DIRECT or _has_picture(content)
                index += 1

    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
    return measured


def _has_picture(content: bytes) -> bool:
    return base64.b64decode(json.loads(content)["data"][0]["b64_json"]).startswith(b"\x89PNG")


async def waiting_memory_mb(through: str, pid: int, wish: dict[str, object]) -> float:
    """Megabytes that the gateway holds at most while 500 clients wait for their pictures."""
    process, peak = psutil.Process(pid), 0.0

    async def one(session: aiohttp.ClientSession, seed: int) -> int:
        body = {**wish, "seed": seed}
        async with session.post(f"{through}/v1/images/generations", json=body) as reply:
            await reply.read()
            return reply.status

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        tasks = [asyncio.create_task(one(session, seed)) for seed in range(NUM_WAITING)]
        while not all(task.done() for task in tasks):
            peak = max(peak, process.memory_info().rss / 1e6)
            await asyncio.sleep(0.1)
        statuses = [task.result() for task in tasks]
    if set(statuses) != {200}:
        raise RuntimeError(f"clients that waited got {sorted(set(statuses))}")
    return peak


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 done, 1 a figure does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=25.0, help="of one round")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args(argv)
    wish: dict[str, object] = {
        "prompt": "a red ring on a white background",
        "num_inference_steps": options.steps,
        "width": options.size,
        "height": options.size,
    }
    with TemporaryDirectory() as folder:
        system = ours("in flight", PIPELINE, Path(folder), {"num_threads": 1})
        with system.serving(Path(folder)) as server:
            return _measure(Path(folder), server, wish, options)


def _measure(
    folder: Path, server: TorchServer, wish: dict[str, object], options: argparse.Namespace
) -> int:
    cpu_ms, ratios, memory_mb = [], [], []
    counts: list[dict[str, object]] = []
    with gateway(folder / "gateway", server) as (url, pid):
        process = psutil.Process(pid)
        asyncio.run(closed_loop(server.predictions_url, url, wish, 5.0, seed=0))
        for number in range(1, options.rounds + 1):
            before = process.cpu_times()
            clients = asyncio.run(
                closed_loop(server.predictions_url, url, wish, options.seconds, seed=number)
            )
            after = process.cpu_times()
            used_s = after.user + after.system - before.user - before.system
            cpu_ms.append(1000 * used_s / len(clients.seconds[THROUGH]))
            ratios.append(clients.p50_ratio)
            medians = {way: statistics.median(each) for way, each in clients.seconds.items()}
            number_of = {way: len(each) for way, each in clients.seconds.items()}
            counts.append({"p50_s": medians, "requests": number_of, "failed": clients.num_failed})
    few: dict[str, object] = {**wish, "num_inference_steps": 1, "width": 64, "height": 64}
    settings = {"max_in_flight": 8, "max_waiting": 1000, "max_waiting_per_key": 1000}
    with gateway(folder / "waiting", server, **settings) as (url, pid):
        memory_mb.append(asyncio.run(waiting_memory_mb(url, pid, few)))
    figures = [
        Figure("CPU of the gateway a request", Spread(tuple(cpu_ms)), "ms", at_most=MAX_CPU_MS),
        Figure(
            "p50 through the gateway, of p50 without",
            *(Spread(tuple(ratios)), "x"),
            at_most=MAX_P50_RATIO,
        ),
        Figure(
            f"memory with {NUM_WAITING} clients waiting",
            *(Spread(tuple(memory_mb)), "MB"),
            at_most=MAX_MEMORY_MB,
        ),
    ]
    write_report("gateway", figures, {"rounds": counts, "load_average": os.getloadavg()})
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
