"""What bodies of a picture's size cost a served model: the same work with small and large ones.

    python -m benchmarks.pictures

TorchServe sends the body of every live request again in every cycle. Sixteen clients send short
requests to one server; their bodies are small, or padded with spaces in the JSON, which nothing
reads, to the size of pictures in base64. The sizes take turns, in another order each round, so that
a machine that changes its speed changes all; figures are ratios of one round.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from benchmarks.report import Figure, Spread, write_report
from benchmarks.systems import ours
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer

__all__ = ["measure_pictures"]

PIPELINE = Path("demo/pipeline")
NUM_CLIENTS = 16
NUM_REQUESTS = 32
SIZES = {"small": 0, "200 kB": 200_000, "2 MB": 2_000_000}


@dataclass(frozen=True, slots=True)
class Cost:
    """What some requests took: by the clock, and of the processor by JVM and worker."""

    wall_s: float
    cpu_s: float


def body_of(seed: int, num_bytes: int) -> bytes:
    """A short request as JSON, at least `num_bytes` long."""
    fields = {
        "prompt": "a red circle on a blue background",
        "num_inference_steps": 10 + 5 * (seed % 3),
        "seed": seed,
        "height": 256,
        "width": 256,
    }
    text = json.dumps(fields)
    return (text[:-1] + " " * (num_bytes - len(text)) + "}").encode()


def measure_pictures(rounds: int, speed: str) -> tuple[list[Figure], dict[str, object]]:
    """Wall time and processor time by size of the bodies, as ratios; memory after each round."""
    settings = {
        "max_rows": 2 * NUM_CLIENTS,
        "speed": speed,
        "min_size_px": 64,
    }
    costs: dict[str, list[Cost]] = {name: [] for name in SIZES}
    memory: dict[str, list[int]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = Options(
            archive=ours("pictures", PIPELINE, folder, settings).archive,
            state_dir=folder / "state",
            ports=Ports.free(),
            properties={"job_queue_size": "1000"},
        )
        with ThreadPoolExecutor(NUM_CLIENTS) as clients, TorchServer(options).running() as server:
            for num_bytes in SIZES.values():
                _run(clients, server, num_bytes, NUM_CLIENTS)
            for i in range(rounds):
                names = list(SIZES)
                for name in names[i % 3 :] + names[: i % 3]:
                    costs[name].append(_run(clients, server, SIZES[name], NUM_REQUESTS))
                for process, pid in _processes(server).items():
                    memory.setdefault(process, []).append(_resident_mib(pid))
    by_name = {name: [asdict(cost) for cost in of] for name, of in costs.items()}
    return _figures(costs, memory), {"costs": by_name, "memory_mib": memory}


def _figures(costs: dict[str, list[Cost]], memory: dict[str, list[int]]) -> list[Figure]:
    small = costs["small"]
    seconds = tuple(cost.wall_s for cost in small)
    figures = [Figure(f"{NUM_REQUESTS} requests, small", Spread(seconds), "s")]
    for name in list(SIZES)[1:]:
        pairs = list(zip(costs[name], small, strict=True))
        wall = tuple(a.wall_s / b.wall_s for a, b in pairs)
        cpu = tuple(a.cpu_s / b.cpu_s for a, b in pairs)
        figures.append(Figure(f"{name} / small, time", Spread(wall), "x", at_most=1.1))
        figures.append(Figure(f"{name} / small, processor time", Spread(cpu), "x"))
    return figures + [
        Figure(f"memory of the {process}", Spread(tuple(map(float, sizes))), "MiB")
        for process, sizes in memory.items()
    ]


def _run(
    clients: ThreadPoolExecutor, server: TorchServer, num_bytes: int, num_requests: int
) -> Cost:
    """What all requests cost; each client waits for its reply before it sends the next."""
    bodies = [body_of(seed, num_bytes) for seed in range(num_requests)]
    processes = _processes(server).values()
    cpu_begun_s = sum(map(_cpu_s, processes))
    begun_s = time.perf_counter()
    statuses = list(clients.map(lambda body: _post(server.predictions_url, body), bodies))
    seconds = time.perf_counter() - begun_s
    if set(statuses) != {200}:
        raise RuntimeError(f"bodies of {num_bytes} bytes: {statuses}")
    return Cost(seconds, sum(map(_cpu_s, processes)) - cpu_begun_s)


def _post(url: str, body: bytes) -> int:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=600)
    try:
        connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    return response.status


def _processes(server: TorchServer) -> dict[str, int]:
    """The process ids of the JVM and of the worker."""
    found: dict[str, int] = {}
    pending = [server.pid]
    while pending:
        pid = pending.pop()
        tasks = Path(f"/proc/{pid}/task")
        if pid is None or not tasks.exists():
            continue
        for task in tasks.iterdir():
            pending += [int(child) for child in (task / "children").read_text().split()]
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"model_service_worker" in command:
            found["worker"] = pid
        elif b"java" in command.partition(b"\0")[0]:
            found["JVM"] = pid
    return found


def _resident_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))


def _cpu_s(pid: int) -> float:
    """Seconds of processor time, in the program and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of all sizes (default: 6)")
    parser.add_argument("--speed", default="safe", choices=("off", "safe", "max"))
    arguments = parser.parse_args(argv)
    figures, details = measure_pictures(arguments.rounds, arguments.speed)
    print(f"\n{write_report('pictures', figures, details)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
