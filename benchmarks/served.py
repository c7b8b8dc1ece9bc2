"""In-flight batching through a real TorchServe, saturated, against one request at a time."""

from __future__ import annotations

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from benchmarks.report import Figure, Spread
from benchmarks.systems import System, one_at_a_time, ours
from benchmarks.traffic import percentile

__all__ = ["NUM_CLIENTS", "NUM_REQUESTS", "PIPELINE", "Load", "measure_served", "saturate"]

PIPELINE = Path("demo/pipeline")
NUM_CLIENTS = 16
NUM_REQUESTS = 48
SHORT_STEPS = 10


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request of the load got."""

    num_steps: int
    seconds: float
    status: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a saturated server made of all requests."""

    images_per_s: float
    short_p95_s: float


def measure_served(rounds: int, speed: str) -> list[Figure]:
    """Images per second of a saturated server, and how long its 10-step requests take."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = {"reply": "png"}
        systems = [
            ours("in flight", PIPELINE, folder, {"max_rows": 2 * NUM_CLIENTS, "speed": speed}),
            one_at_a_time("one worker", PIPELINE, folder, num_workers=1, settings=alone),
            one_at_a_time(
                "two workers", PIPELINE, folder, num_workers=2, settings={**alone, "num_threads": 1}
            ),
        ]
        runs = [[saturate(system, folder / "state") for system in systems] for _ in range(rounds)]
    speedups, waits = [], []
    for in_flight, *others in runs:
        best = max(others, key=lambda load: load.images_per_s)
        speedups.append(in_flight.images_per_s / best.images_per_s)
        waits.append(in_flight.short_p95_s / min(load.short_p95_s for load in others))
    figures = [
        Figure("served: in flight / better of 1, 2 workers", Spread(tuple(speedups)), "x", 1.5),
        Figure("served: p95 of 10 steps, the same ratio", Spread(tuple(waits)), "x", at_most=0.6),
    ]
    for i, system in enumerate(systems):
        per_s = Spread(tuple(run[i].images_per_s for run in runs))
        figures.append(Figure(f"served: {system.name}", per_s, "images/s"))
        p95_s = Spread(tuple(run[i].short_p95_s for run in runs))
        figures.append(Figure(f"served: {system.name}, p95 of 10 steps", p95_s, "s"))
    return figures


def saturate(system: System, state_dir: Path, num_requests: int = NUM_REQUESTS) -> Load:
    """All requests through `NUM_CLIENTS` clients that each wait for their reply."""
    draw = random.Random(0)
    bodies: list[dict[str, object]] = [
        {
            "prompt": "a red circle on a blue background",
            "steps": draw.choice([SHORT_STEPS, 20, 30, 40, 50]),
            "guidance": draw.choice([1.0, 5.0, 7.5]),
            "seed": seed,
            "height": 768,
            "width": 768,
        }
        for seed in range(num_requests)
    ]
    # Should this be interrupted, the server goes first, and the clients wait for nothing more.
    with ThreadPoolExecutor(NUM_CLIENTS) as clients, system.serving(state_dir) as server:
        for _ in range(2):
            _post(server.predictions_url, bodies[0])
        started_s = time.perf_counter()
        replies = list(clients.map(lambda b: _post(server.predictions_url, b), bodies))
        seconds = time.perf_counter() - started_s
    failed = [reply.status for reply in replies if reply.status != 200]
    if failed:
        raise RuntimeError(f"{system.name}: {len(failed)} of {len(replies)} failed: {failed}")
    short_s = [reply.seconds for reply in replies if reply.num_steps == SHORT_STEPS]
    return Load(len(replies) / seconds, percentile(short_s, 95))


def _post(url: str, body: dict[str, object]) -> Reply:
    parts = urlsplit(url)
    started_s = time.perf_counter()
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", parts.path, json.dumps(body), headers)
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    steps = body["steps"]
    assert isinstance(steps, int)
    return Reply(steps, time.perf_counter() - started_s, response.status)
