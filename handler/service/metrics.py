"""Count what happens between two emissions, and hand it to TorchServe's metrics.

TorchServe reads metrics as log lines of the worker, one a value, so counts are gathered here and
emitted about once a second, and seconds of single requests when they end.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

from handler.api.result import Result
from handler.engine.forward import Counters

__all__ = ["COUNTERS", "GAUGES", "HISTOGRAMS", "Meter", "emit"]

logger = logging.getLogger(__name__)

# Name → dimensions of ours; config/metrics.yaml declares the same, plus ModelName and Level.
COUNTERS = {
    "diffusers_requests_total": ("outcome",),
    "diffusers_images_total": (),
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
}
HISTOGRAMS = {"diffusers_request_seconds": ("stage",)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One value for one metric."""

    kind: str
    name: str
    value: float
    dimensions: tuple[str, ...] = ()


class Meter:
    """What ended since the last `samples`."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._seconds: list[tuple[str, float]] = []
        self._num_images = self._num_steps = 0
        self._last = Counters()
        self._is_known = False

    def call_ended(self, outcome: str, total_s: float | None = None) -> None:
        """A call ended as `outcome`: ``ok``, an error's code, or ``disconnected``."""
        self._outcomes[outcome] += 1
        if total_s is not None:
            self._seconds.append(("total", total_s))

    def steps_done(self, num_steps: int) -> None:
        """A request ended after so many denoising steps."""
        self._num_steps += num_steps

    def images_drawn(self, result: Result) -> None:
        """A request of a call has its pictures."""
        self._num_images += len(result.images)
        timings = result.timings
        self._seconds += [
            ("queue", timings.queue_s),
            ("denoise", timings.denoise_s),
            ("decode", timings.decode_s),
        ]

    def samples(self, now: Counters, gauges: dict[str, float]) -> list[Sample]:
        """Everything since the last call, which is thereby forgotten."""
        last, self._last = self._last, dataclasses.replace(now)
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
            *(
                Sample("counter", "diffusers_requests_total", n, (outcome,))
                for outcome, n in self._outcomes.items()
            ),
            # Zeros once, so that a rare count is there to be watched before it first happens.
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
        self._outcomes.clear()
        self._seconds.clear()
        self._num_images = self._num_steps = 0
        return samples


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
