"""Every task of a model in flight with all others: each equals its solo run.

Solo: the same pipeline called directly, with no engine on it, and torch's global generator seeded
as the call's own (diffusers draws noise for a control picture of Stable Diffusion 3 from it).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from handler.engine.ticket import State, StepEnd, Ticket
from handler.errors import DeadlineExceeded
from handler.pipelines.cost import least_forwards
from handler.pipelines.tasks import pipelines_of
from tests.support.clock import Clock
from tests.support.drawings import drawing, half_mask
from tests.support.engine_tools import opened
from tests.support.picture_tasks import FAMILIES, task_kwargs, task_pipelines
from tests.support.pipelines import build, image_of

# As in test_families: what is right in float32 and what a wrong argument makes.
BOUND = 1e-4
WRONG = 30 * BOUND

TEXT, IMAGE, MASKED = "text-to-image", "image-to-image", "inpainting"
CONTROLLED = "image-to-image+control:edges"

TASKS = {
    **{
        name: [*(TEXT, IMAGE, MASKED), *(f"{t}+control:edges" for t in (TEXT, IMAGE, MASKED))]
        for name in FAMILIES
    },
    # diffusers has no class for the others.
    "stable_diffusion_3_16": [TEXT, IMAGE, MASKED, f"{TEXT}+control:edges"],
}
each_task = pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name, tasks in TASKS.items() for task in tasks]
)


@functools.cache
def model(name: str) -> Mapping[str, Any]:
    """The pipelines of a tiny model, for tests that leave them as they are."""
    return task_pipelines(name)


def kwargs_of(name: str, task: str, index: int, **changes: Any) -> dict[str, Any]:
    return task_kwargs(model(name), FAMILIES[name], task, index, **changes)


def alone(pipeline: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(kwargs["generator"].initial_seed())
        return image_of(pipeline(**kwargs))


def off(ticket: Ticket, expected: torch.Tensor) -> float:
    image = image_of(ticket.result())
    return float((image - expected).abs().max()) if image.shape == expected.shape else 1.0


@contextmanager
def forwards_of(module: Any) -> Iterator[list[int]]:
    """The rows of every real forward of `module`."""
    rows: list[int] = []
    part = next(m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    hook = part.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


@each_task
def test_a_task_equals_its_solo_runs_in_the_company_of_all_others(name: str, task: str) -> None:
    """Two calls that differ in everything, among one of each other task, arriving one a tick."""
    pipelines = model(name)
    expected = [alone(pipelines[task], kwargs_of(name, task, index)) for index in (0, 1)]
    with opened(pipelines) as engine:
        company = [
            engine.submit(kwargs_of(name, other, 2), task=other)
            for other in TASKS[name]
            if other != task
        ]
        tickets = []
        for index in (0, 1):
            tickets.append(engine.submit(kwargs_of(name, task, index), task=task))
            engine.step()
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all(each.state is State.DONE for each in company)
    differences = [off(t, e) for t, e in zip(tickets, expected, strict=True)]
    print(f"largest difference {max(differences):.2g}")
    assert max(differences) < BOUND, differences
    # Negative control: the other call's picture.
    assert min(off(tickets[0], expected[1]), off(tickets[1], expected[0])) > WRONG


@each_task
def test_exact_requests_are_equal_to_the_last_bit(name: str, task: str) -> None:
    pipelines = model(name)
    expected = alone(pipelines[task], kwargs_of(name, task, 0))
    with opened(pipelines) as engine:
        company = [engine.submit(kwargs_of(name, other, 1), task=other) for other in TASKS[name]]
        ticket = engine.submit(kwargs_of(name, task, 0), task=task, exact=True)
        engine.run()
    assert all(each.state is State.DONE for each in company)
    assert torch.equal(image_of(ticket.result()), expected)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        (IMAGE, {"strength": 0.4}),
        (IMAGE, {"image": drawing(7)}),
        (MASKED, {"image": drawing(7)}),
        (MASKED, {"mask_image": half_mask()}),
        (CONTROLLED, {"control_image": Image.new("RGB", (32, 32), "white")}),
        (CONTROLLED, {"controlnet_conditioning_scale": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_the_bound_tells_a_changed_argument(name: str, task: str, changes: dict[str, Any]) -> None:
    """Negative control, in the company of the right one."""
    pipelines = model(name)
    # All of these count for something: not all is drawn anew, and the control is heeded.
    changed = {"strength": 0.8, "controlnet_conditioning_scale": 2.0, **changes}
    usual = {**changed, **{key: kwargs_of(name, task, 1)[key] for key in changes}}
    steps = {"num_inference_steps": 5}
    expected = alone(pipelines[task], kwargs_of(name, task, 1, **usual, **steps))
    with opened(pipelines) as engine:
        right = engine.submit(kwargs_of(name, task, 1, **usual, **steps), task=task)
        wrong = engine.submit(kwargs_of(name, task, 1, **changed, **steps), task=task)
        engine.run()
    assert off(right, expected) < BOUND
    assert off(wrong, expected) > WRONG


def test_three_tasks_of_a_model_share_every_forward_of_its_denoiser() -> None:
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    same = {"num_inference_steps": 8, "strength": 1.0, "guidance_scale": 5.0}
    asked = [(task, index) for index, task in enumerate((TEXT, IMAGE, MASKED))]
    expected = [alone(pipelines[t], kwargs_of(name, t, i, **same)) for t, i in asked]
    with opened(pipelines) as engine:
        for t, i in asked:  # what differs between them is proven to be independent once
            engine.submit(kwargs_of(name, t, i, **same), task=t)
        engine.run()
        with forwards_of(pipelines[TEXT].unet) as rows:
            tickets = [engine.submit(kwargs_of(name, t, i, **same), task=t) for t, i in asked]
            engine.run()
    # Guidance doubles the row of each. Who starts from a picture encodes it first, and ends later.
    assert sum(rows) == 3 * 2 * 8
    assert rows.count(3 * 2) >= 5, rows
    assert len(rows) <= 8 + 3
    assert max(off(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND


def test_all_tasks_with_a_controlnet_share_its_forwards() -> None:
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    tasks = [f"{task}+control:edges" for task in (TEXT, IMAGE, MASKED)]
    same = {
        "num_inference_steps": 6,
        "strength": 1.0,
        "guidance_scale": 5.0,
        "controlnet_conditioning_scale": 0.7,
    }
    parts = pipelines[tasks[0]]
    with opened(pipelines) as engine:
        for _ in range(2):  # what differs between them is proven to be independent once
            for index, task in enumerate(tasks):
                engine.submit(kwargs_of(name, task, index, **same), task=task)
            with forwards_of(parts.controlnet) as rows, forwards_of(parts.unet) as denoised:
                engine.run()
    assert rows.count(6) >= 3, rows
    assert denoised == rows
    assert sum(rows) == 3 * 2 * 6


def test_encoding_is_shared_and_each_request_draws_its_own_noise() -> None:
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    same = {"guidance_scale": 5.0, "strength": 0.5, "num_inference_steps": 4}

    def kwargs(index: int) -> dict[str, Any]:
        return kwargs_of(name, IMAGE, index, **same)

    expected = [alone(pipelines[IMAGE], kwargs(index)) for index in range(4)]
    with opened(pipelines) as engine:
        with forwards_of(pipelines[IMAGE].vae.encoder) as first:
            tickets = [engine.submit(kwargs(index), task=IMAGE) for index in range(2)]
            engine.run()
        with forwards_of(pipelines[IMAGE].vae.encoder) as later:
            tickets += [engine.submit(kwargs(index), task=IMAGE) for index in range(2, 4)]
            engine.run()
    assert max(first) == 2, first
    assert later == [2]
    assert max(off(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_a_denoiser_of_nine_channels_shares_nothing_with_one_of_four(task: str) -> None:
    """Two models in one engine: their denoisers are other modules, whatever their pipelines."""
    pipelines = {**model("stable_diffusion"), "filling": build("stable_diffusion_inpaint")}
    same = {"num_inference_steps": 4, "strength": 1.0, "guidance_scale": 1.0}
    kwargs = task_kwargs(pipelines, "stable_diffusion", task, 0, **same)
    filling = {**kwargs_of("stable_diffusion", MASKED, 1, **same)}
    expected = [alone(pipelines[task], kwargs), alone(pipelines["filling"], filling)]
    with (
        opened(pipelines) as engine,
        forwards_of(pipelines[task].unet) as four,
        forwards_of(pipelines["filling"].unet) as nine,
    ):
        tickets = [
            engine.submit(task_kwargs(pipelines, "stable_diffusion", task, 0, **same), task=task),
            engine.submit(kwargs_of("stable_diffusion", MASKED, 1, **same), task="filling"),
        ]
        engine.run()
    assert max(four) == max(nine) == 1
    assert len(four) == len(nine) == 4
    assert max(off(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND


def test_controlnets_of_two_names_are_told_apart_and_share_the_denoiser() -> None:
    pipelines = task_pipelines("stable_diffusion", ("depth", "edges"))
    names = [f"{TEXT}+control:{each}" for each in ("depth", "edges")]
    same = {"num_inference_steps": 6, "guidance_scale": 5.0}

    def kwargs(name: str) -> dict[str, Any]:
        return task_kwargs(pipelines, "stable_diffusion", name, 0, **same)

    expected = [alone(pipelines[each], kwargs(each)) for each in names]
    assert float((expected[0] - expected[1]).abs().max()) > WRONG
    with opened(pipelines) as engine, forwards_of(pipelines[TEXT].unet) as rows:
        tickets = [engine.submit(kwargs(each), task=each) for each in names]
        engine.run()
    assert max(off(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND
    assert rows.count(4) >= 3, rows


@pytest.mark.parametrize("task", [IMAGE, MASKED, CONTROLLED])
def test_seeds_steps_previews_and_strength(task: str) -> None:
    """The same bytes again; as many steps are reported as `strength` leaves, each with latents."""
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    changes = {"num_inference_steps": 8, "strength": 0.5}
    steps: list[StepEnd] = []
    with opened(pipelines) as engine:
        pictures = []
        for _ in range(2):
            steps.clear()
            kwargs = kwargs_of(name, task, 0, **changes)
            ticket = engine.submit(kwargs, task=task, on_step=steps.append)
            assert least_forwards(pipelines[task], kwargs) == 4
            engine.run()
            pictures.append(image_of(ticket.result()))
    assert torch.equal(*pictures)
    assert [(each.step, each.num_steps) for each in steps] == [(n, 4) for n in (1, 2, 3, 4)]
    assert all(each.latents is not None and each.latents.shape[1] == 4 for each in steps)


@pytest.mark.parametrize("task", [IMAGE, MASKED, CONTROLLED])
def test_a_request_is_cancelled_without_harm_to_its_company(task: str) -> None:
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    expected = alone(pipelines[TEXT], kwargs_of(name, TEXT, 1))
    with opened(pipelines) as engine:
        right = engine.submit(kwargs_of(name, TEXT, 1), task=TEXT)
        cancelled = engine.submit(kwargs_of(name, task, 1), task=task)
        for _ in range(4):
            engine.step()
        assert not cancelled.ended
        assert engine.cancel(cancelled)
        engine.run()
        assert engine.num_running == 0
    assert cancelled.state is State.FAILED
    assert off(right, expected) < BOUND


def test_strength_shortens_what_a_deadline_needs() -> None:
    """At one second a tick, a hundred steps are too many; five of them are not."""
    name, pipelines = "stable_diffusion", model("stable_diffusion")
    clock = Clock()
    with opened(pipelines, clock=clock) as engine:

        def submit(strength: float, num_steps: int, deadline_s: float | None) -> Ticket:
            changes = {"num_inference_steps": num_steps, "strength": strength}
            kwargs = kwargs_of(name, IMAGE, 1, **changes)
            return engine.submit(kwargs, task=IMAGE, deadline_s=deadline_s, on_step=tick)

        def tick(end: StepEnd) -> None:
            clock.now_s += 1.0

        submit(1.0, 40, None)
        for _ in range(24):
            engine.step()
        with pytest.raises(DeadlineExceeded, match="100 steps need at least"):
            submit(1.0, 100, 30.0)
        short = submit(0.05, 100, 30.0)
        engine.run()
    assert short.state is State.DONE


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_making_the_other_tasks_leaves_the_loaded_pipeline_as_it_was(name: str) -> None:
    """Their constructors correct the scheduler's configuration, which is a copy of its own."""
    pipeline = build(name)
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(
        pipeline.scheduler.config, skip_prk_steps=False
    )
    before = dict(pipeline.scheduler.config), dict(pipeline.unet.config)
    made = pipelines_of(pipeline)
    assert len(made) == 3
    assert (dict(pipeline.scheduler.config), dict(pipeline.unet.config)) == before
