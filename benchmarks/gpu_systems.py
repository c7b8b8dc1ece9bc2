"""The systems that `benchmarks.gpu` measures: each draws the same requests in its own way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.engine import own_share_of
from benchmarks.shapes import Model, call_arguments
from handler.acceleration.speed import SpeedUp
from handler.engine import InFlightEngine

__all__ = ["Run", "Work", "run_alone", "run_compiled", "run_in_flight", "run_short_request"]

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
    of_waiting: float | None = None
    """Of a short request: its seconds, of those that it takes when it waits for the others."""
    failure: str | None = None


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
    options: Any = {"mode": mode} if backend == "inductor" else {}
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


def run_short_request(work: Work, speed_up: SpeedUp, num_long: int) -> Run:
    """Ours: a request of few steps that comes when long ones have just begun, alone in its figure.

    Its seconds are told as a share of those that it takes when it waits for the others' end.
    """
    long, short = max(work.steps), max(2, min(work.steps) // 3)
    seconds = {}
    for joins in (True, False):
        engine = InFlightEngine(
            work.pipeline,
            max_rows=2 * (num_long + 1),
            buckets=speed_up.buckets,
            wrappers=speed_up.wrappers,
        )
        try:
            if joins:
                speed_up.warm_up(engine, [_short(work)])
            many = [{**r, "num_inference_steps": long} for r in work.requests(num_long)]
            tickets = [engine.submit(request) for request in many]
            while min(ticket.num_steps_done for ticket in tickets) < 2:
                engine.step()

            def until_drawn(engine: InFlightEngine = engine, joins: bool = joins) -> None:
                if not joins:
                    engine.run()
                few = {**work.requests(1)[0], "num_inference_steps": short}
                ticket = engine.submit(few)
                while not ticket.ended:
                    engine.step()
                ticket.result()

            seconds[joins], _ = work.timed(until_drawn)
        finally:
            engine.close()
    few = {**work.requests(1)[0], "num_inference_steps": short}
    run = work.run(f"{short} steps behind {num_long} x {long}", [few], seconds[True])
    return replace(run, of_waiting=seconds[True] / seconds[False])


def _short(work: Work) -> Arguments:
    """What warms up a size."""
    return {**work.requests(1)[0], "num_inference_steps": 2}
