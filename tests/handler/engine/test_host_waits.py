"""In a steady tick the engine asks the device for nothing: the host may run ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from handler.engine import InFlightEngine
from tests.support.forward_tools import batched, call, column, run, slot_of
from tests.support.host_waits import Wait, host_waits, ours
from tests.support.pipelines import FAMILIES, build, example_kwargs

NUM_STEPS = 9
NUM_REQUESTS = 3
# Those whose requests run one at a time share no forwards.
SHARING = [family for family in FAMILIES if family != "stable_diffusion_pag"]


def in_step(family: str, index: int) -> dict[str, Any]:
    """A request that is like its neighbours in all but its seed."""
    kwargs = {**example_kwargs(family, 0), "num_inference_steps": NUM_STEPS}
    if family == "z_image":  # whose embeddings of no text at all have no rows that could differ
        kwargs["negative_prompt"] = "dog"
    return {**kwargs, "generator": torch.Generator().manual_seed(index)}


@contextmanager
def denoising(family: str, **options: Any) -> Iterator[InFlightEngine]:
    """An engine with requests that go in step, past all that is new to it."""
    engine = InFlightEngine(build(family), **options)
    tickets = [engine.submit(in_step(family, i)) for i in range(NUM_REQUESTS)]
    while min(ticket.num_steps_done for ticket in tickets) < 3:
        engine.step()
        assert engine.has_work
    try:
        yield engine
    finally:
        engine.close()


def waits_of_a_tick(engine: InFlightEngine) -> list[Wait]:
    merged = engine.counters.merged_forwards
    with host_waits() as waits:
        engine.step()
    assert engine.counters.merged_forwards > merged
    assert engine.num_running == NUM_REQUESTS
    return ours(waits)


# These report no steps, so that nothing tells when they denoise.
STEPPING = [f for f in SHARING if f not in ("kandinsky_2_2_combined", "stable_cascade_prior")]


@pytest.mark.parametrize("family", STEPPING)
def test_a_steady_tick_waits_for_nothing(family: str) -> None:
    with denoising(family, proves_ahead=True) as engine:
        assert waits_of_a_tick(engine) == []


def test_looking_at_every_tick_is_seen() -> None:
    """The control: what compares arguments in each tick waits in each."""
    with denoising("stable_diffusion", proves_ahead=False) as engine:
        assert {wait.call for wait in waits_of_a_tick(engine)} == {"tolist"}


def test_pipelines_on_the_cpu_are_looked_at_in_every_tick() -> None:
    with denoising("stable_diffusion") as engine:
        assert waits_of_a_tick(engine) != []


def first_step_for_all(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * timestep.reshape(-1)[0]


def last_step_for_all(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * timestep.reshape(-1)[-1]


def each_its_own(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * timestep.reshape(-1, 1)


@pytest.mark.parametrize("body", [first_step_for_all, last_step_for_all, each_its_own])
def test_what_went_in_step_is_right_when_it_no_longer_does(body: Any) -> None:
    """A proof that was made on equal steps must not be taken for one of all others."""
    forward, slot = batched(proves_ahead=True), slot_of(body)
    for steps in ((4, 4, 4), (4, 4, 4), (6, 5, 3)):
        calls = [
            call(slot, value, timestep=torch.tensor(step))
            for value, step in zip((1.0, 2.0, 3.0), steps, strict=True)
        ]
        expected = [column(slot.module.body(*each.bound.args)) for each in calls]
        assert run(forward, calls) == expected
    is_right = body is each_its_own
    slot.module.rows.clear()
    run(forward, [call(slot, 1.0, timestep=torch.tensor(n)) for n in (9, 8)])
    assert slot.module.rows == ([2] if is_right else [1, 1])
