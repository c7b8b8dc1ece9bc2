"""Metrics: what happened between two emissions, counted and written to TorchServe's cache.

TorchServe reads metrics as log lines of the worker, one a value, so counts are gathered here and
emitted about once a second, and seconds of single requests when they end.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.api.result import Result
from handler.engine.forward import Counters
from handler.errors import DeadlineExceeded, EngineFault, OutOfMemory, QueueFull

__all__ = ["COUNTERS", "GAUGES", "HISTOGRAMS", "Load", "Meter", "Sample", "emit"]

logger = logging.getLogger(__name__)

# Name → dimensions of ours; config/metrics.yaml declares the same, plus ModelName and Level.
COUNTERS = {
    "diffusers_requests_total": ("outcome",),
    "diffusers_images_total": (),
    "diffusers_task_images_total": ("task",),
    "diffusers_lora_images_total": ("lora",),
    "diffusers_steps_total": (),
    "diffusers_ticks_total": (),
    "diffusers_tick_seconds_total": (),
    "diffusers_forwards_total": (),
    "diffusers_forward_rows_total": (),
    "diffusers_out_of_memory_retries_total": (),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "diffusers_requests_in_flight": (),
    "diffusers_requests_waiting": (),
    "diffusers_rows_in_flight": (),
    "diffusers_max_rows": (),
    "diffusers_max_waiting": (),
    "diffusers_worker_start_time_seconds": (),
    "diffusers_worker_info": (
        *("version", "archive", "pipeline", "source"),
        *("torch", "diffusers", "device"),
    ),
    "diffusers_worker_memory_bytes": (),
    "diffusers_gpu_memory_bytes": ("kind",),
}
# What an operator watches for; the others are counted once they happen.
_OUTCOMES = dict.fromkeys(
    (
        *("ok", "disconnected"),
        *(error.code for error in (DeadlineExceeded, EngineFault, OutOfMemory, QueueFull)),
    ),
    0,
)
HISTOGRAMS = {"diffusers_request_seconds": ("stage",)}


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine holds: requests in flight and waiting, and the rows of those in flight."""

    num_running: int
    num_waiting: int
    num_rows: int

    @property
    def is_idle(self) -> bool:
        """Whether the engine holds nothing."""
        return not (self.num_running or self.num_waiting)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value for one metric."""

    kind: str
    name: str
    value: float
    dimensions: tuple[str, ...] = ()


class Meter:
    """Counts what ended since the last `samples`."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._seconds: list[tuple[str, float]] = []
        self._num_images = self._num_steps = 0
        self._by_task: Counter[str] = Counter()
        self._by_lora: Counter[str] = Counter()
        self._last = Counters()
        self._is_known = False

    def request_ended(self, outcome: str, total_s: float | None = None) -> None:
        """Count a request that ended as `outcome`: ``ok``, ``flagged``, or an error's code."""
        self._outcomes[outcome] += 1
        if total_s is not None:
            self._seconds.append(("total", total_s))

    def steps_done(self, num_steps: int) -> None:
        """Count the denoising steps of a ticket that ended."""
        self._num_steps += num_steps

    def images_drawn(self, result: Result) -> None:
        """Count the pictures of one ticket, and the time that each stage took."""
        num_images = len(result.images)
        self._num_images += num_images
        self._by_task[result.request.engine_task] += num_images
        for name in result.request.loras or ():
            self._by_lora[name] += num_images
        timings = result.timings
        self._seconds += [
            ("queue", timings.queue_s),
            ("denoise", timings.denoise_s),
            ("decode", timings.decode_s),
        ]

    def samples(self, now: Counters, load: Load) -> list[Sample]:
        """Return everything since the last time, which is thereby forgotten, and the gauges."""
        last, self._last = self._last, dataclasses.replace(now)
        gauges = {
            "diffusers_requests_in_flight": float(load.num_running),
            "diffusers_requests_waiting": float(load.num_waiting),
            "diffusers_rows_in_flight": float(load.num_rows),
        }
        counts = {
            "diffusers_images_total": self._num_images,
            "diffusers_steps_total": self._num_steps,
            "diffusers_ticks_total": now.ticks - last.ticks,
            "diffusers_tick_seconds_total": now.tick_s - last.tick_s,
            "diffusers_forwards_total": now.forwards - last.forwards,
            "diffusers_forward_rows_total": now.rows - last.rows,
            "diffusers_out_of_memory_retries_total": now.out_of_memory_retries
            - last.out_of_memory_retries,
        }
        samples = [
            # Zeros once, so that a rare count is there to be watched before it first happens.
            *_by("diffusers_requests_total", {} if self._is_known else _OUTCOMES),
            *_by("diffusers_requests_total", self._outcomes),
            *_by("diffusers_task_images_total", self._by_task),
            *_by("diffusers_lora_images_total", self._by_lora),
            *(
                Sample("counter", name, value)
                for name, value in counts.items()
                if value or not self._is_known
            ),
            *(Sample("gauge", name, value) for name, value in gauges.items()),
            *(
                Sample("histogram", "diffusers_request_seconds", seconds, (stage,))
                for stage, seconds in self._seconds
            ),
        ]
        self._is_known = True
        for counted in (self._outcomes, self._by_task, self._by_lora):
            counted.clear()
        self._seconds.clear()
        self._num_images = self._num_steps = 0
        return samples


def _by(name: str, counts: Mapping[str, int]) -> list[Sample]:
    return [Sample("counter", name, number, (label,)) for label, number in counts.items()]


def emit(samples: list[Sample], sink: Any, model_name: str) -> None:
    """Write `samples` to TorchServe's metrics cache; one that is not declared there is skipped."""
    from ts.metrics.metric_type_enum import MetricTypes

    for sample in samples:
        try:
            metric = sink.get_metric(sample.name, MetricTypes(sample.kind))
        except Exception:  # TorchServe raises its own errors, which differ between its caches
            logger.debug("the metric %s is not declared in metrics_config", sample.name)
            continue
        metric.add_or_update(sample.value, [*sample.dimensions, model_name, "Model"])
