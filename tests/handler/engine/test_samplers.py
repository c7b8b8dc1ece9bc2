"""Samplers in flight: each as in its solo run, whatever runs beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handler.api.samplers import samplers_of
from handler.engine import InFlightEngine
from handler.errors import InvalidRequest
from handler.pipelines.schedulers import compatible_schedulers, make_scheduler, seed_noise
from tests.support.pipelines import build, example_kwargs, image_of, shared

BOUND = 1e-4
SAMPLERS = samplers_of(compatible_schedulers(shared("stable_diffusion")))
# Every sampler once, and once with the last of the schedules that it has flags for.
NAMES = [
    name
    for sampler, sigmas in SAMPLERS.items()
    for name in (sampler, *(f"{sampler} {each}" for each in sigmas if each in ("karras", "beta")))
]


def kwargs_of(index: int, **changes: Any) -> dict[str, Any]:
    return {**example_kwargs("stable_diffusion", index), "num_inference_steps": 3, **changes}


def solo(pipeline: Any, name: str, kwargs: dict[str, Any]) -> torch.Tensor:
    """The picture of the pipeline called directly, with the scheduler of that name."""
    own = pipeline.scheduler
    pipeline.scheduler = make_scheduler(pipeline, name)
    seed_noise(pipeline.scheduler, kwargs["generator"])
    torch.manual_seed(kwargs["generator"].initial_seed())
    try:
        return image_of(pipeline(**kwargs))
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("part", range(4))
def test_samplers_of_every_kind_share_one_batch(part: int) -> None:
    names = NAMES[part::4]
    pipeline = build("stable_diffusion")
    expected = [solo(pipeline, name, kwargs_of(index)) for index, name in enumerate(names)]
    engine = InFlightEngine(pipeline, max_rows=32)
    tickets = [engine.submit(kwargs_of(index), scheduler=name) for index, name in enumerate(names)]
    engine.run()
    engine.close()
    assert engine.counters.merged_forwards > 0
    for name, ticket, image in zip(names, tickets, expected, strict=True):
        assert (image_of(ticket.result()) - image).abs().max() < BOUND, name


def test_the_noise_of_dpmpp_sde_is_the_requests_own() -> None:
    """Alone, in company and as one of several pictures."""
    name = "DPM++ SDE Karras"
    engine = InFlightEngine(build("stable_diffusion"), max_rows=16)

    def drawn(*seeds: int) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        generator = generators if len(seeds) > 1 else generators[0]
        kwargs = kwargs_of(0, generator=generator, num_images_per_prompt=len(seeds))
        return engine.submit(kwargs, scheduler=name)

    alone = drawn(5)
    engine.run()
    company = [drawn(seed) for seed in (7, 5, 9)]
    several = drawn(4, 5)
    engine.run()
    engine.close()
    wanted = image_of(alone.result())
    assert (image_of(company[1].result()) - wanted).abs().max() < BOUND
    assert (image_of(several.result())[1] - wanted[0]).abs().max() < BOUND
    assert (image_of(company[0].result()) - wanted).abs().max() > BOUND


@pytest.mark.parametrize("scheduler", [None, "DDIM", "DPM++ 2M ddim_uniform"])
def test_as_many_steps_as_in_training_are_refused_before_they_fail(scheduler: str | None) -> None:
    pipeline = build("stable_diffusion")
    engine = InFlightEngine(pipeline)
    with pytest.raises(InvalidRequest) as error:
        engine.submit(kwargs_of(0, num_inference_steps=1000), scheduler=scheduler)
    assert "allowed: 1 to" in error.value.fields["num_inference_steps"]
    engine.submit(kwargs_of(0, num_inference_steps=1000), scheduler="DDIM sgm_uniform")
    engine.close()


def test_steps_so_close_that_two_have_one_timestep_are_drawn_in_flight() -> None:
    """The pipeline called directly fails at its last step."""
    pipeline = build("stable_diffusion")
    kwargs = kwargs_of(0, num_inference_steps=60)
    with pytest.raises(IndexError):
        solo(pipeline, "DPM++ 2M beta", kwargs)
    engine = InFlightEngine(pipeline)
    ticket = engine.submit(kwargs_of(0, num_inference_steps=60), scheduler="DPM++ 2M beta")
    engine.run()
    engine.close()
    assert torch.isfinite(image_of(ticket.result())).all()
