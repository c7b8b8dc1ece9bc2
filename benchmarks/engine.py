"""What in-flight batching gains and costs, against the pipeline called directly, in one run.

    python -m benchmarks.engine            # in this process, about three minutes on two cores
    python -m benchmarks.engine --served   # through TorchServe as well, about six more
    python -m benchmarks.engine --served --pictures   # and with large bodies

The pipeline is the demo's architecture with random weights: a UNet of 4.4 M parameters on
24×24 latents. The two sides take turns, so that a machine that changes its speed changes both;
figures are ratios of one round's two sides.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.lora_loading import measure_loading
from benchmarks.loras import measure_loras
from benchmarks.report import Figure, Spread, write_report
from demo.build import build_pipeline
from handler.engine import InFlightEngine
from handler.engine.forward import Counters
from handler.engine.ticket import Ticket
from handler.pipelines.schedulers import make_scheduler

DEMO = "demo/pipeline"
NUM_REQUESTS = 16
ROW_COUNTS = (1, 2, 4, 8, 16)
LATENT_SIDES = (24, 48, 96)
SCHEDULERS = (None, "euler_a", "dpm++", "unipc")


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the pipeline, as many times as it is asked for."""

    prompt: str
    num_steps: int
    guidance: float
    seed: int
    scheduler: str | None

    def kwargs(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.num_steps,
            "guidance_scale": self.guidance,
            "generator": torch.Generator().manual_seed(self.seed),
            "output_type": "np",
        }


def mixed_requests(seed: int = 0) -> list[Request]:
    """Sixteen requests of 10 to 50 steps, guidance 1, 5 and 7.5, four schedulers."""
    draw = random.Random(seed)
    return [
        Request(
            prompt=f"a {draw.choice(['red', 'blue', 'green'])} circle on a white background",
            num_steps=draw.choice([10, 20, 30, 40, 50]),
            guidance=draw.choice([1.0, 5.0, 7.5]),
            seed=i,
            scheduler=SCHEDULERS[i % len(SCHEDULERS)],
        )
        for i in range(NUM_REQUESTS)
    ]


def draw_alone(pipeline: Any, request: Request) -> np.ndarray[Any, Any]:
    """The picture (1, H, W, 3) that the unmodified pipeline draws of `request` by itself."""
    view = copy.copy(pipeline)
    if request.scheduler is not None:
        view.scheduler = make_scheduler(pipeline, request.scheduler)
    else:
        view.scheduler = copy.deepcopy(pipeline.scheduler)
    return np.asarray(view(**request.kwargs()).images)


def submit(engine: InFlightEngine, request: Request) -> Ticket:
    return engine.submit(request.kwargs(), scheduler=request.scheduler)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started_s = time.perf_counter()
    result = work()
    return time.perf_counter() - started_s, result


def own_share_of(counters: Counters, before: Counters | None = None) -> float:
    """The share of the ticks' seconds that is neither a model's nor a pipeline's: the engine's own.

    Of the ticks since `counters` stood as in `before`.
    """
    before = before or Counters()
    tick_s = counters.tick_s - before.tick_s
    forward_s = counters.forward_s - before.forward_s
    pipeline_s = counters.pipeline_s - before.pipeline_s
    return (tick_s - forward_s - pipeline_s) / tick_s


def measure_throughput(pipeline: Any, rounds: int) -> tuple[list[Figure], dict[str, object]]:
    """The same mixed requests one at a time and in flight."""
    requests = mixed_requests()
    ratios, alone_per_s, together_per_s = [], [], []
    for _ in range(rounds):
        alone_s, _ = timed(lambda: [draw_alone(pipeline, r) for r in requests])
        engine = InFlightEngine(pipeline, max_rows=2 * NUM_REQUESTS)
        for request in requests:
            submit(engine, request)
        together_s, _ = timed(engine.run)
        engine.close()
        ratios.append(alone_s / together_s)
        alone_per_s.append(len(requests) / alone_s)
        together_per_s.append(len(requests) / together_s)
    figures = [
        Figure("in flight / one at a time, images/s", Spread(tuple(ratios)), "x", at_least=1.8),
        Figure("one at a time", Spread(tuple(alone_per_s)), "images/s"),
        Figure("in flight", Spread(tuple(together_per_s)), "images/s"),
    ]
    return figures, {"requests": [repr(r) for r in requests]}


def measure_difference(pipeline: Any) -> list[Figure]:
    """How far pictures in flight are from those drawn alone.

    Of a trained pipeline: what random weights draw is clamped to black and white.
    """
    requests = mixed_requests()
    engine = InFlightEngine(pipeline, max_rows=2 * NUM_REQUESTS)
    tickets = [submit(engine, request) for request in requests]
    engine.run()
    engine.close()
    together = [ticket.result().images for ticket in tickets]
    alone = [draw_alone(pipeline, request) for request in requests]
    off = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))
    control = min(float(np.abs(a - b).max()) for a, b in itertools.pairwise(alone))
    return [
        Figure("largest difference of a pixel in [0, 1]", Spread((off,)), "", at_most=1e-4),
        Figure("the same between two requests, at least", Spread((control,)), "", at_least=1e-2),
    ]


def measure_overhead(pipeline: Any, rounds: int) -> list[Figure]:
    """What one request pays for the engine, and what a tick of sixteen spends on itself."""
    request = Request("a red circle", 50, 7.5, 0, None)
    engine = InFlightEngine(pipeline)
    ratios = []
    for i in range(rounds):
        # Who goes first takes turns too: the second finds warmer caches.
        def direct() -> float:
            return timed(lambda: draw_alone(pipeline, request))[0]

        def through_engine() -> float:
            submit(engine, request)
            return timed(engine.run)[0]

        if i % 2:
            direct_s, engine_s = direct(), through_engine()
        else:
            engine_s, direct_s = through_engine(), direct()
        ratios.append(engine_s / direct_s)
    engine.close()
    shares = []
    for _ in range(max(1, rounds // 3)):
        busy = InFlightEngine(pipeline, max_rows=2 * NUM_REQUESTS)
        for mixed in mixed_requests():
            submit(busy, mixed)
        busy.run()
        shares.append(100 * own_share_of(busy.counters))
        busy.close()
    return [
        Figure("one request: engine / direct, seconds", Spread(tuple(ratios)), "x", at_most=1.03),
        Figure("of a tick of 16, the engine's own", Spread(tuple(shares)), "%", at_most=2.0),
    ]


def measure_overtaking(pipeline: Any, rounds: int) -> list[Figure]:
    """A 10-step request that comes when eight 50-step ones are 5 steps under way."""
    long = [Request("a blue star", 50, 7.5, i, None) for i in range(8)]
    short = Request("a red circle", 10, 7.5, 99, None)
    ratios = []
    for _ in range(rounds):
        joining_s = _seconds_to_short(pipeline, long, short, joins=True)
        waiting_s = _seconds_to_short(pipeline, long, short, joins=False)
        ratios.append(joining_s / waiting_s)
    name = "10 steps behind 8 x 50: in flight / after the batch"
    return [Figure(name, Spread(tuple(ratios)), "x", at_most=0.35)]


def _seconds_to_short(
    pipeline: Any, long: Sequence[Request], short: Request, *, joins: bool
) -> float:
    """From the arrival of `short` to its picture, joining the batch or waiting for its end."""
    engine = InFlightEngine(pipeline, max_rows=2 * (len(long) + 1))
    running = [submit(engine, request) for request in long]
    while running[0].num_steps_done < 5:
        engine.step()

    def until_short_is_drawn() -> None:
        if not joins:
            engine.run()
        ticket = submit(engine, short)
        while not ticket.ended:
            engine.step()
        ticket.result()

    seconds, _ = timed(until_short_is_drawn)
    engine.close()
    return seconds


def measure_rows(
    pipeline: Any, rounds: int, sides: Sequence[int] = LATENT_SIDES
) -> tuple[list[Figure], dict[str, object]]:
    """What a row of the UNet costs in company, from small latents to such as fill the machine."""
    per_row_s: dict[int, dict[int, list[float]]] = {
        side: {rows: [] for rows in ROW_COUNTS} for side in sides
    }
    for _ in range(rounds):
        for side, of_side in per_row_s.items():
            for rows, seconds in of_side.items():
                best_s = min(_forward_s(pipeline.unet, rows, side) for _ in range(3))
                seconds.append(best_s / rows)
    scale = pipeline.vae_scale_factor
    figures = [
        Figure(
            f"UNet, {side * scale} px: a row among 2 / among {ROW_COUNTS[-1]}, seconds",
            Spread(tuple(a / b for a, b in zip(of[2], of[ROW_COUNTS[-1]], strict=True))),
            "x",
        )
        for side, of in per_row_s.items()
    ]
    table = {
        f"{side * scale} px": {str(n): round(1000 * min(s), 3) for n, s in of.items()}
        for side, of in per_row_s.items()
    }
    return figures, {"unet_ms_a_row_by_rows": table}


@torch.no_grad()
def _forward_s(unet: Any, rows: int, side: int) -> float:
    sample = torch.zeros(rows, unet.config.in_channels, side, side)
    text = torch.zeros(rows, 77, unet.config.cross_attention_dim)
    return timed(lambda: unet(sample, torch.zeros(rows), encoder_hidden_states=text))[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--loras", action="store_true", help="only what LoRAs cost")
    parser.add_argument("--served", action="store_true", help="through TorchServe as well")
    parser.add_argument("--pictures", action="store_true", help="with --served: large bodies too")
    parser.add_argument("--speed", default="safe", choices=("off", "safe", "max"), help="if served")
    arguments = parser.parse_args(argv)
    if arguments.pictures and not arguments.served:
        parser.error("--pictures needs --served")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.loras:
        of_loras = measure_loras(mixed_requests(), arguments.rounds)
        of_loras += measure_loading(arguments.rounds)
        threads: dict[str, object] = {"torch_threads": torch.get_num_threads()}
        print(f"\n{write_report('engine', of_loras, threads, file_name='engine-loras')}")
        return 0
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    draw_alone(pipeline, Request("warm up", 2, 7.5, 0, None))
    figures, details = measure_throughput(pipeline, arguments.rounds)
    trained = DiffusionPipeline.from_pretrained(DEMO)
    trained.set_progress_bar_config(disable=True)
    figures += measure_difference(trained)
    figures += measure_overhead(pipeline, 3 * arguments.rounds)
    figures += measure_overtaking(pipeline, arguments.rounds)
    of_rows, rows_table = measure_rows(pipeline, arguments.rounds)
    figures += of_rows
    details |= rows_table
    if arguments.served:
        from benchmarks.served import measure_served

        figures += measure_served(arguments.rounds, arguments.speed)
        if arguments.pictures:
            from benchmarks.pictures import measure_pictures

            of_pictures, costs = measure_pictures(2 * arguments.rounds, arguments.speed)
            figures += of_pictures
            details |= costs
    details["torch_threads"] = torch.get_num_threads()
    is_shipped = not arguments.served or arguments.speed == "safe"
    file_name = "engine" if is_shipped else f"engine-{arguments.speed}"
    path = write_report("engine", figures, details, file_name=file_name)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
