"""In-flight batching on one GPU, against diffusers one at a time, eager and compiled.

    python -m benchmarks.gpu                       # SD 1.5 512², SD 2.1 768², SDXL 1024²
    python -m benchmarks.gpu --models sd21 --in-flight 16
    python -m benchmarks.gpu --models tiny,tinyxl --device cpu --speed safe   # a dry run anywhere

Random weights in the models' exact shapes, float16, guided requests of 30, 50 and 70 steps, 50 on
average; every system gets the same ones. Operations are counted from shapes, twice a row where
guidance doubles it. The engine's own share is what its loop spends outside of the model and of the
pipelines' code, as the host sees it.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.engine import own_share_of
from benchmarks.report import Figure, Spread, write_report
from benchmarks.shapes import MODELS, Model, build, call_arguments, count_flops
from handler.acceleration.speed import SpeedUp, make_plan
from handler.config import HandlerConfig
from handler.engine import InFlightEngine

STEPS = (30, 50, 70)
# Dense, half precision, of the chip's name as torch tells it.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "4090": 165,
}
TARGETS = {
    "SD 1.5": {"speedup": 1.8},
    "SD 2.1": {"speedup": 1.15, "images_per_s": 2.2},
}

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One way of drawing the same requests."""

    name: str
    images_per_s: float
    ms_per_step: float
    """Milliseconds that a denoising step of one picture costs."""
    peak_share: float | None
    memory_gib: float
    own_share: float | None = None
    largest_difference: float | None = None
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """The requests of a model, and what they are made of."""

    model: Model
    pipeline: Any
    device: torch.device
    flops: tuple[int, int]
    peak_flops: float | None
    steps: Sequence[int]

    def requests(self, count: int) -> list[Arguments]:
        return [
            call_arguments(
                self.model, self.pipeline, num_steps=self.steps[i % len(self.steps)], seed=i
            )
            for i in range(count)
        ]

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds until the device is done."""
        self._wait()
        started_s = time.perf_counter()
        result = work()
        self._wait()
        return time.perf_counter() - started_s, result

    def run(self, name: str, requests: Sequence[Arguments], seconds: float, **more: Any) -> Run:
        num_steps = sum(r["num_inference_steps"] for r in requests)
        row, decoding = self.flops
        flops = 2 * row * num_steps + decoding * len(requests)
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return Run(
            name,
            images_per_s=len(requests) / seconds,
            ms_per_step=1000 * seconds / num_steps,
            peak_share=None if self.peak_flops is None else flops / seconds / self.peak_flops,
            memory_gib=memory / 2**30,
            **more,
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_alone(work: Work, name: str, count: int) -> tuple[Run, list[np.ndarray[Any, Any]]]:
    """The pipeline called directly, one request after the other; also its pictures."""
    start_s, _ = work.timed(lambda: work.pipeline(**_short(work)))
    requests = work.requests(count)
    seconds, pictures = work.timed(lambda: [work.pipeline(**r).images for r in requests])
    return work.run(name, requests, seconds, start_s=start_s), pictures


def run_compiled(work: Work, count: int, mode: str, backend: str = "inductor") -> Run:
    """The same with the denoiser compiled as diffusers' documentation has it."""
    unet = work.pipeline.unet
    unet.to(memory_format=torch.channels_last)
    options = {"mode": mode} if backend == "inductor" else {}
    # An instance's `forward`, as `Module.compile` would leave the module changed for good.
    unet.forward = torch.compile(unet.forward, backend=backend, **options)
    try:
        return run_alone(work, f"compiled ({mode}), one at a time", count)[0]
    finally:
        del unet.forward


def run_in_flight(
    work: Work,
    speed_up: SpeedUp,
    num_in_flight: int,
    rounds: int,
    expected: Sequence[np.ndarray[Any, Any]] = (),
) -> Run:
    """Ours: always `num_in_flight` under way, until `rounds` times as many are drawn."""
    engine = InFlightEngine(
        work.pipeline,
        max_rows=2 * num_in_flight,
        buckets=speed_up.buckets,
        wrappers=speed_up.wrappers,
    )
    try:
        start_s, _ = work.timed(lambda: speed_up.warm_up(engine, [_short(work)]))
        requests = work.requests(num_in_flight * rounds)
        # The first batch of a kind is checked against a row alone; that is no part of the figure.
        for request in work.requests(min(2, num_in_flight)):
            engine.submit({**request, "num_inference_steps": 2})
        engine.run()
        before = replace(engine.counters)

        def draw_all() -> list[Any]:
            tickets = [engine.submit(request) for request in requests]
            engine.run()
            return [ticket.result().images for ticket in tickets]

        seconds, pictures = work.timed(draw_all)
        own_share = own_share_of(engine.counters, before)
    finally:
        engine.close()
    off = [float(np.abs(p - e).max()) for p, e in zip(pictures, expected, strict=False)]
    return work.run(
        f"in flight, {num_in_flight}",
        requests,
        seconds,
        own_share=own_share,
        largest_difference=max(off, default=None),
        start_s=start_s,
    )


def measure(
    model: Model,
    device: torch.device,
    *,
    speed: str,
    in_flight: Sequence[int],
    rounds: int,
    mode: str = "reduce-overhead",
    backend: str = "inductor",
    steps: Sequence[int] = STEPS,
    peak_flops: float | None = None,
    **tools: Any,
) -> list[Run]:
    """All systems on one model. `tools` are `SpeedUp`'s compiler and recorder."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = build(model, device, dtype)
    work = Work(model, pipeline, device, count_flops(model), peak_flops, steps)
    count = len(steps) * rounds
    _forget_peak_memory()
    eager, expected = run_alone(work, "eager, one at a time", count)
    runs = [eager]
    _tell(model, eager)
    _forget_peak_memory()
    runs.append(run_compiled(work, count, mode, backend))
    _tell(model, runs[-1])
    config = HandlerConfig(speed=speed)
    plan = make_plan(config, pipeline, device, dtype)
    for num_in_flight in in_flight:
        torch.compiler.reset()
        _forget_peak_memory()
        speed_up = SpeedUp(pipeline, plan, 2 * num_in_flight, **tools)
        runs.append(run_in_flight(work, speed_up, num_in_flight, rounds, expected))
        _tell(model, runs[-1])
    return runs


def figures_of(model: Model, runs: Sequence[Run]) -> list[Figure]:
    """What a model's runs say, and their targets."""
    targets = TARGETS.get(model.name, {})
    figures = []
    for run in runs:
        title = f"{model.name} {model.size_px}px: {run.name}"
        figures.append(Figure(title, Spread((run.images_per_s,)), "images/s"))
        figures.append(Figure(f"{title}: a step", Spread((run.ms_per_step,)), "ms"))
        if run.peak_share is not None:
            figures.append(Figure(f"{title}: of peak", Spread((100 * run.peak_share,)), "%"))
    best, compiled = max(runs[2:], key=lambda run: run.images_per_s), runs[1]
    gain = Spread((best.images_per_s / compiled.images_per_s,))
    name = f"{model.name}: in flight / compiled one at a time"
    figures.append(Figure(name, gain, "x", targets.get("speedup")))
    saturated = Spread((best.images_per_s,))
    bound = targets.get("images_per_s")
    figures.append(Figure(f"{model.name}: saturated", saturated, "images/s", bound))
    own = Spread(tuple(100 * run.own_share for run in runs[2:] if run.own_share is not None))
    figures.append(Figure(f"{model.name}: the engine's own share", own, "%", at_most=5.0))
    return figures


def peak_tflops(device_name: str) -> float | None:
    """The chip's dense peak in half precision; None for a chip that is not in the table."""
    found = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def _short(work: Work) -> Arguments:
    """What warms up a size."""
    return {**work.requests(1)[0], "num_inference_steps": 2}


def _forget_peak_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _tell(model: Model, run: Run) -> None:
    facts: Mapping[str, Any] = asdict(run)
    told = {k: f"{v:.3g}" for k, v in facts.items() if isinstance(v, float)}
    print(f"{model.name}: {run.name}: {told}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", default="sd15,sd21,sdxl", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--in-flight", default="1,4,8,16", help="requests under way")
    parser.add_argument("--rounds", type=int, default=3, help="times as many are drawn")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="of the requests")
    parser.add_argument("--speed", default="max", choices=("off", "safe", "max"), help="of ours")
    parser.add_argument("--mode", default="reduce-overhead", help="of the compiled baseline")
    parser.add_argument("--backend", default="inductor", help="of the compiled baseline")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="of the chip, if it is not in the table")
    parser.add_argument("--name", default="gpu", help="of the file in benchmarks/results")
    arguments = parser.parse_args(argv)
    names = arguments.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models {','.join(unknown)}: known are {', '.join(MODELS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --models tiny is a dry run")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = arguments.peak_tflops or peak_tflops(chip)
    figures: list[Figure] = []
    details: dict[str, Any] = {"settings": vars(arguments), "chip": chip, "peak_tflops": peak}
    for name in names:
        model = MODELS[name]
        runs = measure(
            model,
            device,
            speed=arguments.speed,
            in_flight=[int(n) for n in arguments.in_flight.split(",")],
            rounds=arguments.rounds,
            mode=arguments.mode,
            backend=arguments.backend,
            steps=[int(n) for n in arguments.steps.split(",")],
            peak_flops=None if peak is None else peak * 1e12,
        )
        figures += figures_of(model, runs)
        details[model.name] = [asdict(run) for run in runs]
        _forget_peak_memory()
    path = write_report("gpu", figures, details, file_name=arguments.name)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
