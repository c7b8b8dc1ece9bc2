"""Guidance in a part of the steps: which rows are computed, what is drawn, who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handler.acceleration.guidance_interval import GuidanceInterval
from handler.acceleration.step_cache import StepCache
from handler.engine.shortcuts import Shortcuts
from handler.pipelines.steps import guides_in_halves
from tests.support.engine_tools import all_right, is_right, opened, solo
from tests.support.picture_tasks import task_kwargs, task_pipelines
from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared
from tests.support.toy_pipeline import ToyPipeline, toy, toy_kwargs

MIDDLE = Shortcuts(guidance_start=0.25, guidance_end=0.75)
NEVER = Shortcuts(guidance_end=0.0)
# As in test_families: what is right in float32, and what another guidance makes.
BOUND = 1e-4
NUM_STEPS = 8


def in_part(
    seed: int, first: int, end: int, num_images: int = 1, num_steps: int = NUM_STEPS
) -> torch.Tensor:
    """The picture of the pipeline called directly, guided from step `first` to before `end`."""
    steps = iter(range(1000))

    class InPart(ToyPipeline):
        def denoise(self, rows: Any, t: Any, embeds: Any) -> torch.Tensor:
            noise = ToyPipeline.denoise(self, rows, t, embeds)
            if not first <= next(steps) < end:
                noise = torch.cat([noise.chunk(2)[1]] * 2)
            return noise

    pipeline = toy(InPart)
    return solo(pipeline, seed, num_inference_steps=num_steps, num_images_per_prompt=num_images)


def rows_of(unet: Any) -> list[int]:
    rows: list[int] = []
    unet.enter.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("num_images", [1, 2])
def test_rows_without_the_prompt_are_computed_in_the_interval_only(num_images: int) -> None:
    pipeline = toy()
    rows = rows_of(pipeline.unet)
    kwargs = toy_kwargs(0, num_inference_steps=NUM_STEPS, num_images_per_prompt=num_images)
    with opened(pipeline, wrappers=[GuidanceInterval()]) as engine:
        ticket = engine.submit(kwargs, shortcuts=MIDDLE)
        engine.run()
    assert rows == [num_images * n for n in (1, 1, 2, 2, 2, 2, 1, 1)]
    assert is_right(ticket, in_part(0, 2, 6, num_images))
    assert not is_right(ticket, in_part(0, 0, NUM_STEPS, num_images))


@pytest.mark.parametrize(
    ("start", "end", "first", "before"),
    [(0.0, 0.5, 0, 4), (0.5, 1.0, 4, 8), (0.0, 0.0, 0, 0), (1.0, 1.0, 8, 8), (0.3, 0.6, 3, 4)],
)
def test_a_step_is_guided_where_all_of_it_lies_within(
    start: float, end: float, first: int, before: int
) -> None:
    shortcuts = Shortcuts(guidance_start=start, guidance_end=end)
    guided = [step for step in range(NUM_STEPS) if shortcuts.is_guided(step, NUM_STEPS)]
    assert guided == list(range(first, before))


def test_the_whole_interval_is_equal_to_the_last_bit() -> None:
    with opened(toy(), wrappers=[GuidanceInterval()]) as engine:
        plain = engine.submit(toy_kwargs(0))
        engine.run()
        whole = engine.submit(toy_kwargs(0), shortcuts=Shortcuts(guidance_end=1.0))
        engine.run()
    assert torch.equal(plain.result().images, whole.result().images)


def test_the_same_alone_and_in_company() -> None:
    expected = [in_part(seed, 2, 6) for seed in range(3)]
    with opened(toy(), wrappers=[GuidanceInterval()]) as engine:
        tickets = []
        for seed in range(3):
            kwargs = toy_kwargs(seed, num_inference_steps=NUM_STEPS)
            tickets.append(engine.submit(kwargs, shortcuts=MIDDLE))
            engine.submit(toy_kwargs(10 + seed, guidance_scale=1.0 + seed))
            engine.step()
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all_right(tickets, expected)
    assert not is_right(tickets[0], expected[1])


def test_without_guidance_there_is_nothing_to_leave_out() -> None:
    with opened(toy(), wrappers=[GuidanceInterval()]) as engine:
        ticket = engine.submit(toy_kwargs(0, guidance_scale=1.0), shortcuts=NEVER)
        engine.run()
    assert is_right(ticket, solo(toy(), 0, guidance_scale=1.0))


def test_a_pipeline_whose_rows_stand_otherwise_is_refused() -> None:
    class Backwards(ToyPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    with opened(toy(Backwards), wrappers=[GuidanceInterval()]) as engine:
        with pytest.raises(ValueError, match="Backwards has no guided rows that stand together"):
            engine.submit(toy_kwargs(0), shortcuts=MIDDLE)
        engine.submit(toy_kwargs(0), shortcuts=Shortcuts(step_cache=0.5))


@pytest.mark.parametrize("changes", [{"guidance_start": 1.5}, {"step_cache": -0.5}])
def test_parts_are_parts(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it is from 0 to 1"):
        Shortcuts(**changes)


def test_an_interval_does_not_end_before_it_begins() -> None:
    with pytest.raises(ValueError, match=r"guidance_start is 0\.8, after guidance_end, 0\.2"):
        Shortcuts(guidance_start=0.8, guidance_end=0.2)


# With a step cache


def test_a_step_cache_begins_anew_where_guidance_does() -> None:
    """The rows without the prompt are no longer those with it: no line goes through both."""
    pipeline = toy()
    pipeline.unet.frequencies.mul_(1e-4)
    rows = rows_of(pipeline.unet)
    wrappers = [GuidanceInterval(), StepCache()]
    shortcuts = Shortcuts(step_cache=1.0, guidance_start=0.5)
    with opened(pipeline, wrappers=wrappers) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=60), shortcuts=shortcuts)
        engine.run()
        assert engine.counters.answered_calls > 10
    first = rows.index(2)
    assert rows[:first] == [1] * first
    assert rows[first : first + 3] == [2, 2, 2], "two to predict from, and one to compare"


# diffusers' own pipelines

IN_HALVES = [
    family
    for family in FAMILIES
    if guides_in_halves(type(shared(family))) and "guidance_scale" in example_kwargs(family, 0)
]


def test_the_families_that_guide_in_halves() -> None:
    assert {"stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"} <= set(IN_HALVES)
    assert not {"flux", "z_image", "stable_diffusion_pag"} & set(IN_HALVES)


@pytest.mark.parametrize("family", IN_HALVES)
def test_never_guided_is_the_picture_of_no_guidance(family: str) -> None:
    pipeline = build(family)
    with opened(pipeline, wrappers=[GuidanceInterval()]) as engine:

        def draw(guidance_scale: float, shortcuts: Shortcuts) -> tuple[torch.Tensor, int]:
            before = engine.counters.rows
            kwargs = {**example_kwargs(family, 0), "guidance_scale": guidance_scale}
            ticket = engine.submit(kwargs, shortcuts=shortcuts)
            engine.run()
            return image_of(ticket.result()), engine.counters.rows - before

        guided, all_rows = draw(5.0, Shortcuts())
        unguided, fewer_rows = draw(5.0, NEVER)
        expected, _ = draw(1.0, Shortcuts())
    assert (unguided - expected).abs().max() < BOUND
    assert (guided - expected).abs().max() > 10 * BOUND
    assert fewer_rows < all_rows


def test_a_controlnet_has_no_rows_without_the_prompt_either() -> None:
    pipelines = task_pipelines("stable_diffusion")
    task = "text-to-image+control:edges"
    controlnet = pipelines[task].controlnet
    rows: list[int] = []
    controlnet.conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with opened(pipelines, wrappers=[GuidanceInterval()]) as engine:

        def draw(guidance_scale: float, shortcuts: Shortcuts) -> torch.Tensor:
            kwargs = task_kwargs(pipelines, "stable_diffusion", task, 0)
            kwargs["guidance_scale"] = guidance_scale
            ticket = engine.submit(kwargs, task=task, shortcuts=shortcuts)
            engine.run()
            return image_of(ticket.result())

        unguided = draw(5.0, NEVER)
        assert set(rows) == {1}
        assert (unguided - draw(1.0, Shortcuts())).abs().max() < BOUND
        assert (unguided - draw(5.0, Shortcuts())).abs().max() > 10 * BOUND
