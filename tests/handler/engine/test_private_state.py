"""What a request has to itself besides its scheduler: guiders, objects that remember, chance."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance

from handler.engine.ticket import Ticket
from handler.engine.view import make_view
from handler.pipelines.cost import Cost
from tests.support.engine_tools import all_right, is_right, opened, solo
from tests.support.pipelines import build
from tests.support.tiny_models import make_every_parameter_count
from tests.support.toy_pipeline import ToyPipeline, ToyUNet, toy, toy_kwargs

BOUND = 1e-4
WRONG = 30 * BOUND


def view_of(pipeline: Any) -> Any:
    return make_view(pipeline, Ticket(kwargs={}, cost=Cost(1, 0)))[0]


# A guider with momentum: HunyuanImage 2.1


@pytest.fixture
def hunyuan_image() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            rope_axes_dim=(4, 4),
        ).eval()
        make_every_parameter_count(transformer)
    pipeline = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        guider=AdaptiveProjectedMixGuidance(
            guidance_scale=5.0,
            adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_start_step=1,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def hunyuan_kwargs(index: int) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(100 + index)
    embeds = [torch.randn((1, 5, 16), generator=drawn) for _ in range(4)]
    mask = torch.ones((1, 5), dtype=torch.long)
    return {
        "prompt_embeds": embeds[0],
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": embeds[1],
        "negative_prompt_embeds_mask": mask,
        "prompt_embeds_2": embeds[2],
        "prompt_embeds_mask_2": mask,
        "negative_prompt_embeds_2": embeds[3],
        "negative_prompt_embeds_mask_2": mask,
        "num_inference_steps": 4 + index,
        "height": 128,
        "width": 128,
        "generator": torch.Generator().manual_seed(index),
        "output_type": "latent",
    }


@pytest.mark.parametrize("exact", [False, True])
def test_a_guiders_momentum_is_the_requests_own(hunyuan_image: Any, exact: bool) -> None:
    expected = [copy.deepcopy(hunyuan_image)(**hunyuan_kwargs(i)).images for i in range(3)]
    with opened(hunyuan_image, exact=exact) as engine:
        tickets = [engine.submit(hunyuan_kwargs(i)) for i in range(3)]
        engine.run()
        assert (engine.counters.merged_forwards > 4) is not exact
    off = [
        float((ticket.result().images - image).abs().max())
        for ticket, image in zip(tickets, expected, strict=True)
    ]
    assert max(off) <= (0.0 if exact else BOUND)
    assert hunyuan_image.guider.momentum_buffer is None, "the pipeline's own is untouched"


def test_a_shared_guider_would_show(hunyuan_image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one guider for all, as if it could not be copied, requests are off."""
    expected = [copy.deepcopy(hunyuan_image)(**hunyuan_kwargs(i)).images for i in range(3)]

    def refuse(self: Any, memo: Any) -> Any:
        raise TypeError

    monkeypatch.setattr(AdaptiveProjectedMixGuidance, "__deepcopy__", refuse, raising=False)
    with opened(hunyuan_image) as engine:
        tickets = [engine.submit(hunyuan_kwargs(i)) for i in range(3)]
        engine.run()
    off = [
        float((ticket.result().images - image).abs().max())
        for ticket, image in zip(tickets, expected, strict=True)
    ]
    assert max(off) > WRONG


# Other components


def test_what_keeps_state_is_copied_and_what_does_not_is_shared() -> None:
    pipeline = build("kandinsky_2_2_combined")
    pipeline.remembered = SimpleNamespace(seen=[], about=pipeline.unet, owner=pipeline)
    pipeline.notes = {"steps": [1, 2]}
    view = view_of(pipeline)
    assert view.remembered is not pipeline.remembered
    assert view.remembered.seen is not pipeline.remembered.seen
    assert view.remembered.about is pipeline.unet, "weights inside of it are not copied"
    assert view.remembered.owner is view
    assert view.notes == pipeline.notes
    assert view.notes["steps"] is not pipeline.notes["steps"]
    for name in ("unet", "movq", "prior_text_encoder", "prior_tokenizer", "prior_image_processor"):
        assert getattr(view, name) is getattr(pipeline, name)


def test_a_scheduler_of_two_pipelines_within_is_one_in_the_view() -> None:
    pipeline = build("kandinsky_2_2_combined")
    assert pipeline.decoder_pipe.scheduler is pipeline.scheduler
    view = view_of(pipeline)
    assert view.scheduler is not pipeline.scheduler
    assert view.decoder_pipe.scheduler is view.scheduler


def test_what_cannot_be_copied_is_shared_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Session:
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("a session cannot be pickled")

    pipeline = toy()
    pipeline.session = Session()
    with caplog.at_level(logging.WARNING):
        views = [view_of(pipeline) for _ in range(2)]
    assert all(view.session is pipeline.session for view in views)
    assert caplog.messages == ["requests share a Session, which cannot be copied"]


# Hooks


class Hooking(ToyPipeline):
    """Takes the text embeddings from a hook, as JoyImageEdit does."""

    def encode(self, prompts: list[str]) -> torch.Tensor:
        caught = []

        def catch(module: Any, inputs: Any, output: torch.Tensor) -> None:
            caught.append(output)

        handle = self.text_encoder.table.register_forward_hook(catch)
        try:
            super().encode(prompts)
        finally:
            handle.remove()
        (embeds,) = caught
        return embeds


def test_a_hook_of_the_pipelines_own_sees_no_rows_of_others() -> None:
    pipeline = toy(Hooking)
    prompts = ("a", "b", "c")
    expected = [solo(pipeline, i, prompt=prompt) for i, prompt in enumerate(prompts)]
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i, prompt=p)) for i, p in enumerate(prompts)]
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all_right(tickets, expected)


# Torch's global generators


class Careless(ToyPipeline):
    """Adds noise to each step from torch's global generator, as a scheduler without one does."""

    def denoise(self, *args: torch.Tensor) -> torch.Tensor:
        noise = super().denoise(*args)
        return noise + 0.5 * torch.randn(noise.shape)


def seeded(pipeline: Any, seed: int, **changes: Any) -> torch.Tensor:
    """The picture drawn directly, with torch's global generator at the request's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return solo(pipeline, seed, **changes)


def test_each_request_has_global_random_numbers_of_its_own() -> None:
    pipeline = toy(Careless)
    steps = [{"num_inference_steps": 3 + i} for i in range(4)]
    expected = [seeded(pipeline, i, **steps[i]) for i in range(4)]
    assert not torch.equal(solo(pipeline, 0, **steps[0]), expected[0]), "the numbers matter"
    with opened(pipeline) as engine:
        outside = torch.get_rng_state()
        tickets = []
        for i in range(4):
            tickets.append(engine.submit(toy_kwargs(i, **steps[i])))
            engine.step()
            torch.randn(3)  # others in the process draw too
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all_right(tickets, expected)
    torch.set_rng_state(outside)


@pytest.mark.parametrize("end", ["done", "cancelled", "failed"])
def test_the_generator_outside_is_left_as_it_was(end: str) -> None:
    def fail(step: Any) -> None:
        torch.randn(1)
        if end == "failed":
            raise ValueError

    with opened(toy(Careless)) as engine:
        before = torch.get_rng_state()
        ticket = engine.submit(toy_kwargs(0), on_step=fail)
        engine.step()
        assert torch.equal(torch.get_rng_state(), before)
        if end == "cancelled":
            engine.cancel(ticket)
        engine.run()
        assert torch.equal(torch.get_rng_state(), before)
    assert ticket.random_states is None


def test_a_request_without_a_generator_draws_from_the_one_outside() -> None:
    pipeline = toy(Careless)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = solo(pipeline, generator=None)
        torch.manual_seed(7)
        with opened(pipeline) as engine:
            ticket = engine.submit({**toy_kwargs(), "generator": None})
            engine.run()
    assert is_right(ticket, expected)


def test_a_list_of_generators_seeds_from_its_first() -> None:
    class Listed(Careless):
        def __call__(self, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            return super().__call__(*args, generator=generator[0], **kwargs)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    pipeline = toy(Listed)
    expected = [seeded(pipeline, seed, prompt="toy 5", generator=generators()) for seed in (5, 6)]
    with opened(pipeline) as engine:
        ticket = engine.submit(toy_kwargs(5, generator=generators()))
        engine.run()
    assert is_right(ticket, expected[0])
    assert not is_right(ticket, expected[1])


def test_a_forward_that_draws_is_run_alone_on_its_own_numbers() -> None:
    class Noisy(ToyUNet):
        def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            (noise,) = super().forward(sample, *args, **kwargs)
            return (noise + torch.randn(noise.shape),)

    pipeline = toy(unet=Noisy())
    expected = [seeded(pipeline, i) for i in range(3)]
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i)) for i in range(3)]
        engine.run()
    assert all_right(tickets, expected)
