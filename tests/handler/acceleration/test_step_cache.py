"""The step cache in flight: which forwards run, what is drawn, alone and in company."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig

from handler.acceleration import step_policy
from handler.acceleration.step_cache import StepCache
from handler.acceleration.step_policy import allowed_error, weights
from handler.engine import InFlightEngine
from handler.engine.shortcuts import Shortcuts
from handler.errors import DeadlineExceeded, PipelineFailed
from handler.pipelines.steps import shortcuts_of
from tests.support.clock import Clock
from tests.support.engine_tools import all_right, is_right, opened, solo, step_until
from tests.support.picture_tasks import task_kwargs, task_pipelines
from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared
from tests.support.toy_pipeline import ToyPipeline, ToyUNet, toy, toy_kwargs

HALF = Shortcuts(step_cache=0.5)
STEPS = (80, 70, 90, 75)


class Smooth(ToyUNet):
    """A denoiser whose output changes little from step to step, as a trained one's does."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies.mul_(1e-4)
        with torch.no_grad():
            self.leave.weight.mul_(0.1)


class Computed:
    """The rows of every forward of a denoiser."""

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        unet.enter.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))


def smooth(kind: type[ToyPipeline] = ToyPipeline) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = Smooth()
    return toy(kind, unet=unet)


@contextmanager
def caching(pipeline: Any = None, **options: Any) -> Iterator[InFlightEngine]:
    with opened(pipeline or smooth(), wrappers=[StepCache()], **options) as engine:
        yield engine


def drawn(engine: InFlightEngine, seed: int, share: float, **changes: Any) -> Any:
    scheduler = changes.pop("scheduler", None)
    ticket = engine.submit(
        toy_kwargs(seed, **changes), scheduler=scheduler, shortcuts=Shortcuts(step_cache=share)
    )
    engine.run()
    return ticket


def by_hand(seed: int, share: float, **changes: Any) -> torch.Tensor:
    """The picture of the pipeline called directly, whose planned steps are extrapolated."""
    pipeline, known, step = smooth(), list[tuple[float, torch.Tensor]](), iter(range(1000))
    forward = pipeline.unet.forward

    def skip(sample: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> Any:
        now = next(step)
        num_predicted = now - len(known)
        if allowed_error(now, changes["num_inference_steps"], share, num_predicted):
            points, values = zip(*known[-2:], strict=True)
            pairs = zip(weights(points, float(t)), values, strict=True)
            return (sum(w * v for w, v in pairs),)
        (output,) = forward(sample, t, **kwargs)
        known.append((float(t), output.clone()))
        return (output,)

    pipeline.unet.forward = skip
    return solo(pipeline, seed, **changes)


# What is computed and what is drawn


@pytest.mark.parametrize("share", [0.25, 0.5, 2 / 3])
def test_planned_steps_are_extrapolated(share: float) -> None:
    pipeline = smooth()
    computed = Computed(pipeline.unet)
    with caching(pipeline) as engine:
        ticket = drawn(engine, 0, share, num_inference_steps=80)
        assert engine.counters.answered_calls == 80 - Shortcuts(step_cache=share).least_forwards(80)
    assert len(computed.rows) == Shortcuts(step_cache=share).least_forwards(80)
    assert is_right(ticket, by_hand(0, share, num_inference_steps=80))
    assert not is_right(ticket, solo(smooth(), 0, num_inference_steps=80))


def test_a_cached_picture_is_nearer_than_one_of_fewer_steps() -> None:
    full = solo(smooth(), 0, num_inference_steps=80)
    with caching() as engine:
        cached = drawn(engine, 0, 0.5, num_inference_steps=80).result().images
    fewer = solo(smooth(), 0, num_inference_steps=HALF.least_forwards(80))
    assert (cached - full).abs().mean() < 0.5 * (fewer - full).abs().mean()


def test_a_request_without_is_equal_to_the_last_bit() -> None:
    pipeline = smooth()
    with opened(pipeline) as engine:
        plain = engine.submit(toy_kwargs(0, num_inference_steps=20))
        engine.run()
    with caching(pipeline) as engine:
        ticket = drawn(engine, 0, 0.0, num_inference_steps=20)
        assert not ticket.memory
        assert engine.counters.answered_calls == 0
    assert torch.equal(ticket.result().images, plain.result().images)


def test_rough_steps_are_computed() -> None:
    """The usual toy's outputs swing from step to step: no line goes through them."""
    with caching(toy()) as engine:
        ticket = drawn(engine, 0, 0.5, num_inference_steps=12)
        assert engine.counters.answered_calls == 0
    assert is_right(ticket, solo(toy(), 0, num_inference_steps=12))


# Company


def test_the_same_alone_and_in_company() -> None:
    expected = [by_hand(i, 0.5, num_inference_steps=n) for i, n in enumerate(STEPS)]
    with caching() as engine:
        alone = [drawn(engine, i, 0.5, num_inference_steps=n) for i, n in enumerate(STEPS)]
        answered = engine.counters.answered_calls
        together = []
        for i, n in enumerate(STEPS):
            kwargs = toy_kwargs(i, num_inference_steps=n)
            together.append(engine.submit(kwargs, shortcuts=HALF))
            # Others, with another share and with none, in the same forwards.
            engine.submit(toy_kwargs(10 + i, num_inference_steps=30 + i))
            engine.submit(toy_kwargs(20 + i), shortcuts=Shortcuts(step_cache=0.3))
            engine.step()
        engine.run()
        assert engine.counters.merged_forwards > 0
        assert engine.counters.answered_calls >= 2 * answered > 0
    assert all_right(alone, expected)
    assert all_right(together, expected)
    # Negative control: another seed's picture, and the same one with other steps left out.
    assert not is_right(together[0], by_hand(1, 0.5, num_inference_steps=STEPS[0]))
    assert not is_right(together[0], by_hand(0, 0.4, num_inference_steps=STEPS[0]))


def test_predicted_rows_leave_the_tick_and_their_request_runs_on() -> None:
    """It needs no tick of its own for a step that is predicted."""
    pipeline = smooth()
    computed = Computed(pipeline.unet)
    with caching(pipeline) as engine:
        cached = engine.submit(toy_kwargs(0, num_inference_steps=80), shortcuts=HALF)
        plain = engine.submit(toy_kwargs(1, num_inference_steps=80))
        step_until(engine, lambda: cached.ended)
        decoding = 1
        assert plain.num_steps_done == HALF.least_forwards(80) + decoding
        engine.run()
    proof = 2  # of the first group: once more alone
    assert sum(computed.rows) <= 2 * (80 + HALF.least_forwards(80)) + 4 * proof


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_what_is_remembered_is_freed_with_the_ticket(end: str) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    class Watched(StepCache):
        def after(self, call: Any, output: Any) -> None:
            super().after(call, output)
            memory = call.ticket.memory[self]
            found = [each for of in memory.outputs.values() for each in of.values]
            kept.extend(weakref.ref(tensor) for (tensor,) in found)

    def fail(step: Any) -> None:
        if end == "failed" and step.step == 9:
            raise ValueError

    with opened(smooth(), wrappers=[Watched()]) as engine:
        kwargs = toy_kwargs(0, num_inference_steps=10)
        ticket = engine.submit(kwargs, shortcuts=HALF, on_step=fail)
        step_until(engine, lambda: ticket.num_steps_done == 5)
        gc.collect()
        assert len({id(r()) for r in kept if r() is not None}) == 2, "two outputs and no more"
        if end == "cancelled":
            engine.cancel(ticket)
        step_until(engine, lambda: ticket.ended)
        gc.collect()
        assert not any(reference() is not None for reference in kept)


# Schedulers and pipelines


@pytest.mark.parametrize("name", ["heun", "KDPM2DiscreteScheduler", "pndm"])
def test_several_calls_a_step_are_all_computed(name: str) -> None:
    """Heun's guesses and PNDM's first steps lie on no line."""
    with caching() as engine:
        ticket = drawn(engine, 0, 1.0, num_inference_steps=60, scheduler=name)
        assert engine.counters.answered_calls == 0
        plain = drawn(engine, 0, 0.0, num_inference_steps=60, scheduler=name)
    assert torch.equal(ticket.result().images, plain.result().images)


@pytest.mark.parametrize(
    "name", ["euler", "dpm++", "unipc", "ddpm", "euler_a", "dpmpp_2m_sde", "deis"]
)
def test_any_other_scheduler_may_be_cached(name: str) -> None:
    with caching() as engine:
        full = drawn(engine, 0, 0.0, num_inference_steps=80, scheduler=name).result().images
        other = drawn(engine, 1, 0.0, num_inference_steps=80, scheduler=name).result().images
        cached = drawn(engine, 0, 0.5, num_inference_steps=80, scheduler=name).result().images
        # Ancestral noise and short distances may leave fewer that are close enough.
        assert 0 < engine.counters.answered_calls <= 80 - HALF.least_forwards(80)
    assert (cached - full).abs().mean() < 0.2 * (other - full).abs().mean()


def test_both_calls_of_a_step_are_predicted_together() -> None:
    """Guidance by two calls: each is predicted from its own outputs."""

    class TwoCalls(ToyPipeline):
        def denoise(self, rows: Any, t: Any, embeds: Any) -> torch.Tensor:
            halves = zip(rows.chunk(2), embeds.chunk(2), strict=True)
            return torch.cat([ToyPipeline.denoise(self, row, t, text) for row, text in halves])

    pipeline = smooth(TwoCalls)
    computed = Computed(pipeline.unet)
    with caching(pipeline) as engine:
        ticket = drawn(engine, 0, 0.5, num_inference_steps=80)
    assert len(computed.rows) == 2 * HALF.least_forwards(80)
    assert is_right(ticket, by_hand(0, 0.5, num_inference_steps=80))


def test_other_rows_begin_anew() -> None:
    """A request that loses guidance on its way is not predicted from what it was before."""

    class Losing(ToyPipeline):
        def denoise(self, rows: Any, t: Any, embeds: Any) -> torch.Tensor:
            if t > 500:
                return ToyPipeline.denoise(self, rows, t, embeds)
            half = ToyPipeline.denoise(self, rows.chunk(2)[1], t, embeds.chunk(2)[1])
            return torch.cat([half, half])

    pipeline = smooth(Losing)
    computed = Computed(pipeline.unet)
    with caching(pipeline) as engine:
        ticket = drawn(engine, 0, 1.0, num_inference_steps=40)
        full = drawn(engine, 0, 0.0, num_inference_steps=40).result().images
    assert (ticket.result().images - full).abs().max() < 0.02
    first = computed.rows.index(1)
    assert computed.rows[first : first + 3] == [1, 1, 1]


def test_a_step_that_pipelines_report_nothing_of_is_computed() -> None:
    class Silent(ToyPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("callback_on_step_end")
            return super().__call__(*args, **kwargs)

    with caching(smooth(Silent)) as engine:
        ticket = drawn(engine, 0, 1.0, num_inference_steps=20)
        assert engine.counters.answered_calls == 0
    assert is_right(ticket, solo(smooth(), 0, num_inference_steps=20))


def test_outputs_that_cannot_be_seen_are_computed() -> None:
    class Sealed:
        __slots__ = ()

    pipeline = smooth()
    forward = pipeline.unet.forward
    pipeline.unet.forward = lambda *args, **kwargs: (*forward(*args, **kwargs), Sealed())
    with caching(pipeline) as engine:
        ticket = drawn(engine, 0, 1.0, num_inference_steps=20)
        assert engine.counters.answered_calls == 0
    assert is_right(ticket, solo(smooth(), 0, num_inference_steps=20))


def test_nan_outputs_are_computed() -> None:
    def spoil(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * (float("nan") if step == 4 else 1)}

    with caching() as engine:
        kwargs = toy_kwargs(0, num_inference_steps=20, callback_on_step_end=spoil)
        ticket = engine.submit(kwargs, shortcuts=HALF)
        engine.run()
        assert isinstance(ticket.error, PipelineFailed)
        assert engine.counters.answered_calls <= 1


def test_a_deadline_counts_what_is_computed() -> None:
    """A request that computes half of its steps may meet a deadline that it would not else."""
    clock, pipeline = Clock(), smooth()

    def take_a_second(*_: object) -> None:
        clock.now_s += 1

    pipeline.unet.enter.register_forward_pre_hook(take_a_second)
    with caching(pipeline, clock=clock, max_rows=2) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=40))
        for _ in range(30):
            engine.step()
        kwargs = toy_kwargs(1, num_inference_steps=20)
        with pytest.raises(DeadlineExceeded):
            engine.submit(kwargs, deadline_s=15)
        engine.submit(kwargs, deadline_s=15, shortcuts=HALF)
        with pytest.raises(DeadlineExceeded):
            engine.submit(kwargs, deadline_s=9, shortcuts=HALF)


# diffusers' own pipelines


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every prediction: those of random weights are none to trust."""
    monkeypatch.setattr(step_policy, "MAX_ERROR", float("inf"))


def num_forwards(module: torch.nn.Module) -> list[int]:
    rows: list[int] = []
    first = next(m for m in module.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    first.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.usefixtures("trusting")
def test_a_predicted_step_needs_no_controlnet() -> None:
    pipelines = task_pipelines("stable_diffusion")
    task = "text-to-image+control:edges"
    rows = num_forwards(pipelines[task].controlnet)
    with caching(pipelines) as engine:
        kwargs = task_kwargs(pipelines, "stable_diffusion", task, 0, num_inference_steps=20)
        ticket = engine.submit(kwargs, task=task, shortcuts=HALF)
        engine.run()
        # The UNet's, and the ControlNet's before it.
        assert engine.counters.answered_calls == 2 * (20 - HALF.least_forwards(20))
    assert ticket.error is None
    assert len(rows) == HALF.least_forwards(20)


@pytest.mark.usefixtures("trusting")
def test_steps_are_computed_when_a_controlnet_begins_or_ends_to_count() -> None:
    """What it adds goes from all to nothing between two steps: no line goes through that."""
    pipelines = task_pipelines("stable_diffusion")
    task = "text-to-image+control:edges"
    changes = {"num_inference_steps": 20, "control_guidance_end": 0.5}
    unet = num_forwards(pipelines[task].unet)
    with caching(pipelines) as engine:
        kwargs = task_kwargs(pipelines, "stable_diffusion", task, 0, **changes)
        ticket = engine.submit(kwargs, task=task, shortcuts=Shortcuts(step_cache=1.0))
        engine.run()
    assert ticket.error is None
    # Three to begin with, three when it ends, and the last.
    assert len(unet) == 3 + 3 + 1


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("family", [f for f in FAMILIES if "step_cache" in shortcuts_of(shared(f))])
def test_every_family_is_the_same_alone_and_in_company(family: str) -> None:
    """Whatever its denoiser returns."""
    pipeline = build(family)

    def kwargs(index: int) -> dict[str, Any]:
        changes = {"num_inference_steps": 9 + index}
        return {**example_kwargs(family, index), **changes}

    with caching(pipeline) as engine:
        alone = []
        for index in range(2):
            alone.append(engine.submit(kwargs(index), shortcuts=HALF))
            engine.run()
        assert engine.counters.answered_calls > 0
        together = [engine.submit(kwargs(index), shortcuts=HALF) for index in range(2)]
        engine.submit(kwargs(2))
        engine.run()
    for one, other in zip(alone, together, strict=True):
        difference = (image_of(one.result()) - image_of(other.result())).abs().max()
        assert difference < 1e-4
    assert (image_of(alone[0].result()) - image_of(alone[1].result())).abs().max() > 3e-3


@pytest.mark.parametrize("family", ["kandinsky_2_2_combined", "stable_cascade_prior"])
def test_a_pipeline_that_tells_no_steps_is_refused(family: str) -> None:
    refusal = pytest.raises(ValueError, match="does not tell which step it is at")
    with caching(build(family)) as engine, refusal:
        engine.submit(example_kwargs(family, 0), shortcuts=HALF)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_picture_to_begin_with_leaves_out_the_first_times(strength: float) -> None:
    pipeline = build("stable_diffusion_img2img")
    rows = num_forwards(pipeline.unet)
    kwargs = {**example_kwargs("stable_diffusion_img2img", 0), "num_inference_steps": 30}
    with caching(pipeline) as engine:
        ticket = engine.submit({**kwargs, "strength": strength}, shortcuts=HALF)
        engine.run()
    assert ticket.error is None
    num_steps = round(30 * strength)
    assert len(rows) == HALF.least_forwards(num_steps)


@pytest.mark.usefixtures("trusting")
def test_a_lora_is_predicted_from_its_own_outputs() -> None:
    """Requests with LoRAs and without, cached, share forwards as they do otherwise."""
    pipeline = build("stable_diffusion")
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="style")
    sets: list[dict[str, float]] = [{"style": 2.0}, {}]
    with caching(pipeline) as engine:

        def submit(place: int) -> Any:
            kwargs = {**example_kwargs("stable_diffusion", 0), "num_inference_steps": 12}
            return engine.submit(kwargs, adapters=sets[place], shortcuts=HALF)

        alone = []
        for place in range(2):
            alone.append(submit(place))
            engine.run()
        together = [submit(place) for place in range(2)]
        engine.run()
    for one, other in zip(alone, together, strict=True):
        assert (image_of(one.result()) - image_of(other.result())).abs().max() < 1e-4
    assert (image_of(alone[0].result()) - image_of(alone[1].result())).abs().max() > 1e-3
