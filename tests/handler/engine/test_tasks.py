"""Several pipelines on the same modules: one engine, forwards shared by requests of all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig

from handler.engine import InFlightEngine
from handler.engine.parking import find_slots
from handler.engine.ticket import State, Ticket
from handler.errors import DeadlineExceeded
from tests.support.clock import Clock
from tests.support.engine_tools import is_right, opened, solo
from tests.support.pipelines import build, example_kwargs, image_of
from tests.support.toy_pipeline import ToyPipeline, ToyUNet, toy, toy_kwargs

# As in test_families: what is right in float32 and what a wrong argument makes.
BOUND = 1e-4
WRONG = 30 * BOUND

KINDS = {
    "stable_diffusion": diffusers.StableDiffusionPipeline,
    "stable_diffusion_img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "stable_diffusion_inpaint": diffusers.StableDiffusionInpaintPipeline,
}


def sharing() -> dict[str, Any]:
    """Three pipelines made of the same modules, tokenizer and scheduler."""
    components = build("stable_diffusion").components
    pipelines = {
        task: kind(**components, requires_safety_checker=False) for task, kind in KINDS.items()
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def alone(pipelines: Mapping[str, Any], task: str, index: int, **changes: Any) -> torch.Tensor:
    return image_of(pipelines[task](**{**example_kwargs(task, index), **changes}))


def submit(engine: InFlightEngine, task: str, index: int, **changes: Any) -> Ticket:
    return engine.submit({**example_kwargs(task, index), **changes}, task=task)


def off(ticket: Ticket, expected: torch.Tensor) -> float:
    return float((image_of(ticket.result()) - expected).abs().max())


def test_requests_of_all_tasks_share_forwards_and_equal_their_solo_runs() -> None:
    pipelines = sharing()
    asked = [(task, index) for index in range(2) for task in KINDS]
    expected = [alone(pipelines, task, index) for task, index in asked]
    rows: list[int] = []
    engine = InFlightEngine(pipelines)
    pipelines["stable_diffusion"].unet.conv_in.register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    tickets = [submit(engine, task, index) for task, index in asked]
    engine.run()
    engine.close()
    differences = [off(t, e) for t, e in zip(tickets, expected, strict=True)]
    print(f"largest difference {max(differences):.2g}")
    assert max(differences) < BOUND, differences
    # Of each task two requests, of two rows and of one: more rows are of several tasks.
    assert max(rows) == 3 * (2 + 1)
    assert min(off(t, e) for t, e in zip(tickets, expected[1:] + expected[:1], strict=True)) > WRONG


@pytest.mark.parametrize("task", KINDS)
def test_the_bound_tells_requests_of_other_tasks_apart(task: str) -> None:
    """Negative control: one changed argument, in the company of the other tasks."""
    pipelines = sharing()
    expected = alone(pipelines, task, 0)
    other = example_kwargs(task, 1)["generator"]
    with opened(pipelines) as engine:
        right = submit(engine, task, 0)
        wrong = [
            submit(engine, task, 0, generator=other),
            submit(engine, task, 0, guidance_scale=5.0),
        ]
        company = [submit(engine, each, 2) for each in KINDS]
        engine.run()
    assert off(right, expected) < BOUND
    assert min(off(ticket, expected) for ticket in wrong) > WRONG
    assert all(ticket.state is State.DONE for ticket in company)


def test_each_task_has_its_own_parameters_schedulers_and_steps() -> None:
    pipelines = sharing()
    pipelines["stable_diffusion_img2img"].scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipelines["stable_diffusion"].scheduler.config
    )
    expected = {task: alone(pipelines, task, 0) for task in KINDS}
    with opened(pipelines) as engine:
        with pytest.raises(ValueError, match=r"PipelineImg2Img|Img2ImgPipeline takes no argument"):
            submit(engine, "stable_diffusion_img2img", 0, mask_image=None)
        tickets = {task: submit(engine, task, 0) for task in KINDS}
        engine.run()
    assert all(off(tickets[task], expected[task]) < BOUND for task in KINDS)
    assert [tickets[task].task for task in KINDS] == list(KINDS)
    assert all(tickets[task].pipeline is pipelines[task] for task in KINDS)


def test_without_a_task_the_first_pipeline_draws() -> None:
    one, other = toy(), toy(Louder)
    with opened({"plain": one, "loud": other}) as engine:
        assert engine.pipeline is one
        assert dict(engine.pipelines) == {"plain": one, "loud": other}
        tickets = [engine.submit(toy_kwargs(3)), engine.submit(toy_kwargs(3), task="loud")]
        with pytest.raises(ValueError, match=r"task 'quiet'; there are \['plain', 'loud'\]"):
            engine.submit(toy_kwargs(3), task="quiet")
        engine.run()
    assert is_right(tickets[0], solo(one, 3))
    assert is_right(tickets[1], solo(other, 3))
    assert not is_right(tickets[1], solo(one, 3))


class Louder(ToyPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"guidance_scale": 9.0, **kwargs})


def test_an_engine_needs_a_pipeline() -> None:
    with pytest.raises(ValueError, match="needs a pipeline"):
        InFlightEngine({})


# Slots


def test_a_shared_module_is_one_slot_under_whatever_name() -> None:
    one, other = build("stable_diffusion_3"), build("stable_diffusion_3")
    other.register_modules(**one.components)
    other.register_modules(text_encoder=one.text_encoder_2, text_encoder_2=one.text_encoder)
    assert [slot.name for slot in find_slots(one, other)] == [s.name for s in find_slots(one)]


def test_a_module_that_only_one_pipeline_has_is_parked_too() -> None:
    pipelines = sharing()
    controlled = build("stable_diffusion_controlnet")
    controlled.register_modules(**pipelines["stable_diffusion"].components)
    names = {slot.name for slot in find_slots(*pipelines.values(), controlled)}
    assert names == {
        *("unet.forward", "text_encoder.forward", "vae.encode", "vae.decode"),
        "controlnet.forward",
    }
    slots = find_slots(*pipelines.values(), controlled, names=["controlnet", "unet"])
    assert {slot.name for slot in slots} == {"unet.forward", "controlnet.forward"}
    with pytest.raises(ValueError, match="cannot park 'controlnet'"):
        find_slots(*pipelines.values(), names=["controlnet"])


def test_pipelines_with_other_modules_of_the_same_name_are_apart() -> None:
    one, other = toy(), toy(unet=ToyUNet())
    assert one.unet is not other.unet
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight.mul_(1.5)
    with opened({"one": one, "other": other}) as engine:
        tickets = [engine.submit(toy_kwargs(i), task=t) for i in range(2) for t in ("one", "other")]
        engine.run()
    for ticket, pipeline, i in zip(tickets, [one, other] * 2, [0, 0, 1, 1], strict=True):
        assert is_right(ticket, solo(pipeline, i))
    assert not is_right(tickets[1], solo(one, 0))


def test_an_argument_left_out_is_the_default_that_another_pipeline_names() -> None:
    class Wordy(ToyPipeline):
        def denoise(self, rows: Any, t: Any, embeds: Any) -> torch.Tensor:
            noise: torch.Tensor = self.unet(rows, t, embeds, return_dict=False)[0]
            return noise

    terse = toy()
    wordy = toy(Wordy)
    wordy.register_modules(**terse.components)
    expected = [solo(terse, 0), solo(wordy, 1)]
    with opened({"terse": terse, "wordy": wordy}, modules=["unet"]) as engine:
        tickets = [engine.submit(toy_kwargs(i), task=t) for i, t in enumerate(engine.pipelines)]
        engine.run()
        assert engine.counters.merged_forwards == 3
    assert all(is_right(t, e) for t, e in zip(tickets, expected, strict=True))


# Tasks that change the shared modules


@pytest.fixture
def exclusive() -> dict[str, Any]:
    """Two pipelines on the same modules; calls of the second change them."""
    plain = toy(unet=DoublingUNet())
    doubling = toy(Doubling)
    doubling.register_modules(**plain.components)
    return {"plain": plain, "doubling": doubling}


class DoublingUNet(ToyUNet):
    """Stands for a denoiser with attention processors: what is set doubles its weights."""

    def set_attn_processor(self, factor: float) -> None:
        self.leave.weight.data.mul_(factor)


class Doubling(ToyPipeline):
    """Changes the shared denoiser for as long as a call lasts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.unet.set_attn_processor(2.0)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.unet.set_attn_processor(0.5)


def test_an_exclusive_task_runs_alone_and_the_others_share(exclusive: dict[str, Any]) -> None:
    asked = ["plain", "doubling", "plain", "plain", "doubling", "plain"]
    expected = [solo(exclusive[task], i) for i, task in enumerate(asked)]
    with opened(exclusive) as engine:
        tickets = [engine.submit(toy_kwargs(i), task=task) for i, task in enumerate(asked)]
        while engine.has_work:
            engine.step()
            running = [t.task for t in tickets if t.state is State.RUNNING]
            assert "doubling" not in running or len(running) == 1
        assert engine.counters.merged_forwards > 0, "those that may share do"
    assert all(is_right(t, e) for t, e in zip(tickets, expected, strict=True))
    assert not is_right(tickets[1], solo(exclusive["plain"], 1))


def test_an_exclusive_request_is_not_passed_for_ever(exclusive: dict[str, Any]) -> None:
    with opened(exclusive, max_overtakes=3) as engine:
        engine.submit(toy_kwargs(0), task="plain")
        engine.step()
        waiting = engine.submit(toy_kwargs(1), task="doubling")
        for i in range(30):
            engine.submit(toy_kwargs(i), task="plain")
            engine.step()
            if waiting.ended:
                break
        assert waiting.ended
        assert waiting.overtaken <= 3


def test_a_cache_on_a_shared_module_makes_all_its_tasks_exclusive() -> None:
    one = build("flux")
    one.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))
    other = diffusers.FluxImg2ImgPipeline(**one.components)
    with opened({"one": one, "other": other}) as engine:
        tickets = [engine.submit(example_kwargs("flux", i)) for i in range(2)]
        engine.step()
        assert engine.num_running == 1
        assert [ticket.is_exclusive for ticket in tickets] == [True, True]


# Adapters


def test_an_adapter_of_one_task_is_not_left_on_for_another() -> None:
    pipelines = sharing()
    unet = pipelines["stable_diffusion"].unet
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
    unet.disable_adapters()
    tasks = list(KINDS)
    plain = [alone(pipelines, task, 0) for task in tasks]
    unet.enable_adapters()
    styled = [alone(pipelines, task, 0) for task in tasks]
    unet.disable_adapters()
    with opened(pipelines) as engine:
        tickets = []
        for task in tasks:
            tickets.append(engine.submit(example_kwargs(task, 0), task=task, adapters={"a": 1.0}))
            tickets.append(submit(engine, task, 0))
        engine.run()
        assert engine.counters.merged_forwards > 0
    for place in range(len(tasks)):
        assert off(tickets[2 * place], styled[place]) < BOUND
        assert off(tickets[2 * place + 1], plain[place]) < BOUND
        assert float((styled[place] - plain[place]).abs().max()) > WRONG


# Deadlines


def test_ticks_of_another_tasks_denoiser_refuse_nobody() -> None:
    """A slow model beside a quick one: only ticks of a request's own denoiser tell its pace."""
    clock = Clock()

    class Slow(ToyUNet):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            clock.now_s += 10.0
            return super().forward(*args, **kwargs)

    with opened({"quick": toy(), "slow": toy(unet=Slow())}, clock=clock) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=40), task="slow")
        for _ in range(20):
            engine.step()
        with pytest.raises(DeadlineExceeded, match="cannot be met"):
            engine.submit(toy_kwargs(1, num_inference_steps=30), task="slow", deadline_s=5.0)
        engine.submit(toy_kwargs(1, num_inference_steps=30), task="quick", deadline_s=5.0)
