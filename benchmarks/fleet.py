"""What a second instance gains, and what it costs: two supervised instances behind one gateway.

    python -m benchmarks.fleet                     # about ten minutes on two cores

The denoiser of both is replaced by one that sleeps, as a GPU would let the CPU wait: what is left
is all that a picture needs of the CPU, of TorchServe and of the gateway. Rounds with one and with
both instances behind the gateway alternate. Then the memory of both workers is read, with how much
of it they share.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
import psutil
import yaml

from benchmarks.gateway import gateway
from benchmarks.report import Figure, Spread, write_report
from scripts import build_archive, serve
from scripts.torchserve.options import Ports
from scripts.torchserve.process import TorchServer

__all__ = ["NAME", "PIPELINE", "SLEEPING", "fleet", "main", "write_sleeping_archive"]

PIPELINE, CONFIG = Path("demo/pipeline"), Path("config/model-config.yaml")
NAME = "bench"
NUM_CLIENTS = 40
# Pictures of each client before any counts.
NUM_FIRST = 2
# A batch of 16 rows takes 0.21 s, as those of SDXL do on a large card.
BASE_S, ROW_S = 0.05, 0.01
MIN_GAIN = 1.9
SLEEPING = f"""
import time
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput

def _sleep(self, sample, timestep, encoder_hidden_states, *args, return_dict=True, **kwargs):
    time.sleep({BASE_S} + {ROW_S} * len(sample))
    noise = torch.zeros_like(sample)
    return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

UNet2DConditionModel.forward = _sleep
"""
"""What the archive's entry file begins with."""


def write_sleeping_archive(store: Path) -> Path:
    """Pack the embedded pipeline with a denoiser that sleeps in place of its own."""
    config = yaml.safe_load(CONFIG.read_text())
    config["handler"].update(num_threads=1, speed="off")
    store.mkdir(parents=True, exist_ok=True)
    (store / "model-config.yaml").write_text(yaml.safe_dump(config))
    arguments = [
        *("--pipeline", str(PIPELINE), "--name", NAME, "--out", str(store), "--format", "dir"),
        *("--config", str(store / "model-config.yaml")),
    ]
    if build_archive.main(arguments):
        raise RuntimeError(f"cannot pack {PIPELINE}")
    entry = store / NAME / "torchserve_entry.py"
    entry.write_text(f"{SLEEPING}\n{entry.read_text()}")
    return store / NAME


@contextmanager
def fleet(store: Path, run_dir: Path) -> Iterator[tuple[TorchServer, TorchServer]]:
    """Two supervised instances inside the block."""
    ports = Ports.free()
    arguments = [
        *("--run-dir", str(run_dir), "--store", str(store), "--name", NAME),
        *("--port", str(ports.inference), "--grpc-port", "off", "--instances", "2"),
    ]
    if serve.main(["start", *arguments]):
        raise RuntimeError("the instances did not start")
    try:
        first, second = (TorchServer.find(run_dir / str(index)) for index in range(2))
        assert first is not None
        assert second is not None
        yield first, second
    finally:
        serve.main(["stop", "--run-dir", str(run_dir), "--drain-s", "0"])


async def images_a_second(url: str, wish: dict[str, object], seconds: float) -> float:
    """Let clients send one request after the other; pictures a second.

    So many seconds count, from when all clients have had two pictures each: all are under way then,
    and no longer together.
    """
    steps = int(str(wish["num_inference_steps"]))
    ended_s: list[list[float]] = [[] for _ in range(NUM_CLIENTS)]

    def begins_s() -> float:
        return max(math.inf if len(each) < NUM_FIRST else each[NUM_FIRST - 1] for each in ended_s)

    async def client(number: int) -> None:
        lengths = random.Random(number)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < begins_s() + seconds:
                num_steps = lengths.randint(steps // 2, 3 * steps // 2)
                body = {**wish, "seed": number, "num_inference_steps": num_steps}
                async with session.post(f"{url}/v1/images/generations", json=body) as reply:
                    content = await reply.read()
                    if reply.status != 200:
                        raise RuntimeError(f"{reply.status}: {content[:200]!r}")
                ended_s[number].append(time.monotonic())

    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
    begun_s = begins_s()
    return sum(begun_s < at <= begun_s + seconds for of in ended_s for at in of) / seconds


def _memory_mb(server: TorchServer) -> tuple[float, float]:
    """Of its worker: what it has, and what of that is its own alone."""
    model = server.model()
    assert model is not None
    memory = psutil.Process(model.ready_pids[0]).memory_full_info()
    return memory.rss / 1e6, memory.uss / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 done, 1 a figure does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one round that count")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args(argv)
    wish: dict[str, object] = {
        "prompt": "a red ring on a white background",
        "num_inference_steps": options.steps,
        "width": options.size,
        "height": options.size,
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_sleeping_archive(folder / "store")
        with fleet(folder / "store", folder / "run") as servers:
            return _measure(folder, servers, wish, options)


def _measure(
    folder: Path,
    servers: tuple[TorchServer, TorchServer],
    wish: dict[str, object],
    options: argparse.Namespace,
) -> int:
    run_dirs = [str(each.state_dir) for each in servers]
    one: list[float] = []
    both: list[float] = []
    with (
        gateway(folder / "one", servers[0], run_dirs=run_dirs[:1]) as (url_of_one, _),
        gateway(folder / "both", servers[0], run_dirs=run_dirs) as (url_of_both, _),
    ):
        for _ in range(options.rounds):
            one.append(asyncio.run(images_a_second(url_of_one, wish, options.seconds)))
            both.append(asyncio.run(images_a_second(url_of_both, wish, options.seconds)))
    memory = [_memory_mb(each) for each in servers]
    gains = tuple(two / single for single, two in zip(one, both, strict=True))
    figures = [
        Figure("images a second of one instance", Spread(tuple(one)), "1/s"),
        Figure("images a second of two", Spread(tuple(both)), "1/s"),
        Figure("two, of one", Spread(gains), "x", at_least=MIN_GAIN),
        Figure("memory of a worker", Spread(tuple(rss for rss, _ in memory)), "MB"),
        Figure("of that its own alone", Spread(tuple(uss for _, uss in memory)), "MB"),
    ]
    write_report("fleet", figures, {"load_average": os.getloadavg()})
    return 0 if all(figure.holds is not False for figure in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
