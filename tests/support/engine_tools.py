"""What the engine's tests share: solo pictures, and an engine that is closed at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from handler.engine import InFlightEngine
from handler.engine.ticket import Ticket
from tests.support.toy_pipeline import ToyUNet, toy_kwargs

BOUND = 1e-5


def solo(pipeline: Any, seed: int = 0, scheduler: Any = None, **changes: Any) -> torch.Tensor:
    """The picture of a pipeline that no engine has touched."""
    pipeline = copy.copy(pipeline)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    images: torch.Tensor = pipeline(**toy_kwargs(seed, **changes)).images
    return images


def is_right(ticket: Ticket, expected: torch.Tensor) -> bool:
    images: torch.Tensor = ticket.result().images
    return images.shape == expected.shape and bool((images - expected).abs().max() < BOUND)


def all_right(tickets: Sequence[Ticket], expected: Sequence[torch.Tensor]) -> bool:
    return all(is_right(t, e) for t, e in zip(tickets, expected, strict=True))


@contextmanager
def opened(pipeline: Any, **options: Any) -> Iterator[InFlightEngine]:
    engine = InFlightEngine(pipeline, **options)
    try:
        yield engine
    finally:
        engine.close()


def step_until(engine: InFlightEngine, is_reached: Callable[[], bool]) -> list[Ticket]:
    ended: list[Ticket] = []
    for _ in range(100):
        if is_reached():
            return ended
        ended += engine.step()
    raise AssertionError("never reached")


class Strict(ToyUNet):
    """A denoiser that refuses what is not a number, whoever's rows it is in."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.isnan().any():
            raise FloatingPointError("not a number")
        return super().forward(sample, *args, **kwargs)


def nan_latents(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * float("nan")}
