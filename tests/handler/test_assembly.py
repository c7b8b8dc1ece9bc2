"""One assembly for the worker and for the smoke test: configuration + pipeline → service."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from handler.api.decoding import decode_pictures
from handler.api.traits import PipelineTraits
from handler.assembly import assemble, short_request
from handler.config import HandlerConfig
from handler.errors import ConfigError
from handler.loading.pipeline import LoadedPipeline
from handler.service.generation import GenerationService
from tests.support.frontend import QUICK
from tests.support.picture_tasks import make_controlnet
from tests.support.pipelines import build


def loaded(family: str = "stable_diffusion") -> LoadedPipeline:
    return LoadedPipeline(build(family), torch.device("cpu"), torch.float32)


@contextmanager
def assembled(
    family: str = "stable_diffusion", *, warm_up: bool = True, **settings: Any
) -> Iterator[GenerationService]:
    config = HandlerConfig.from_mapping({**QUICK, **settings})
    with closing(assemble(loaded(family), config, model_name="tiny", warm_up=warm_up)) as service:
        yield service


def test_what_is_assembled_draws_as_configured() -> None:
    with assembled(scheduler="euler", num_inference_steps=2, guidance_scale=1.0) as service:
        (result,) = service.draw(service.read([{"body": {"prompt": "a cat", "width": 64}}]))
        assert result.images[0].size == (64, 32)
        assert result.request.scheduler == "Euler"
        assert (result.request.num_inference_steps, result.request.guidance_scale) == (2, 1.0)
        counts = {sample.name: sample.value for sample in service.samples()}
        assert counts["diffusers_steps_total"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 36}, "height: 36 is not a multiple of 8"),
        ({"scheduler": "eulr"}, "scheduler"),
        ({"warm_up_sizes": ["32x36"]}, "warm_up_sizes: width: 36 is not a multiple of 8"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_refused_and_leaves_it_alone(
    settings: dict[str, Any], words: str
) -> None:
    pipeline = loaded()
    config = HandlerConfig.from_mapping({**QUICK, **settings})
    with pytest.raises(ConfigError, match=words):
        assemble(pipeline, config, model_name="tiny", warm_up=False)
    assert "forward" not in vars(pipeline.pipeline.unet)


def test_more_loras_than_may_be_on_need_to_be_chosen() -> None:
    packed = replace(loaded(), loras=tuple(f"l{i}" for i in range(17)))
    config = HandlerConfig.from_mapping(QUICK)
    with pytest.raises(ConfigError, match="default_loras: 17 LoRAs are packed, and at most 16"):
        assemble(packed, config, model_name="tiny", warm_up=False)
    chosen = replace(config, default_loras={})
    with closing(assemble(packed, chosen, model_name="tiny", warm_up=False)) as service:
        assert service.read([{"body": {"prompt": "a"}}])[0].loras == {}


@pytest.mark.parametrize("warm_up", [True, False])
def test_warming_up_draws_every_size_unless_told_not_to(
    warm_up: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        assembled(warm_up=warm_up, warm_up_sizes=["32x32", "64x32"]) as service,
    ):
        num_ticks = {s.name: s.value for s in service.samples()}["diffusers_ticks_total"]
    assert (num_ticks > 0) == warm_up
    assert ("warmed up" in caplog.text) == warm_up


@pytest.mark.parametrize("sizes", [None, ["32x32"]])
def test_no_picture_is_decoded_for_a_warm_up_that_is_not_drawn(
    sizes: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []

    def decode(request: Any, config: Any) -> Any:
        decoded.append(request)
        return decode_pictures(request, config)

    monkeypatch.setattr("handler.assembly.decode_pictures", decode)
    with assembled(warm_up_sizes=sizes):
        assert bool(decoded) == bool(sizes)


def test_requests_leave_out_what_they_say() -> None:
    """Sent, or configured; beside one that has everything computed."""
    with assembled(num_inference_steps=12, guidance_scale=5.0, warm_up=False) as service:

        def rows(**fields: Any) -> float:
            before = {sample.name: sample.value for sample in service.samples()}
            service.draw(service.read([{"body": {"prompt": "a cat", "seed": 1, **fields}}]))
            after = {sample.name: sample.value for sample in service.samples()}
            name = "diffusers_forward_rows_total"
            return after[name] - before.get(name, 0)

        assert rows(guidance_end=0.0) < rows()


def traits(**changes: Any) -> PipelineTraits:
    parameters = frozenset({"prompt", "num_inference_steps", "height", "width"})
    values: dict[str, Any] = {
        "schedulers": ("DDIMScheduler", "PNDMScheduler"),
        "size_multiple_px": 8,
        "parameters": parameters,
        "least_steps": {"PNDMScheduler": 4},
    }
    return PipelineTraits(**{**values, **changes})


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({}, 2),
        ({"scheduler": "pndm"}, 4),
        ({"num_inference_steps": 1, "max_num_inference_steps": 1}, 1),
    ],
)
def test_a_short_request_has_two_steps_or_what_its_scheduler_needs(
    settings: dict[str, Any], num_steps: int
) -> None:
    fields = short_request(HandlerConfig(**settings), traits(), prompt="a cat", size=(64, 32))
    assert fields == {
        "prompt": "a cat",
        "seed": 0,
        "num_inference_steps": num_steps,
        "height": 64,
        "width": 32,
    }


def test_a_short_request_asks_for_nothing_that_the_pipeline_lacks() -> None:
    fields = short_request(HandlerConfig(), traits(parameters=frozenset({"prompt"})), size=(8, 8))
    assert fields == {"prompt": "a", "seed": 0}


@pytest.mark.parametrize("family", ["stable_diffusion_inpaint", "stable_diffusion_controlnet"])
def test_what_needs_a_picture_is_warmed_up_and_drawn_with_one(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**QUICK, "height": 32, "width": 32, "min_size_px": 32}
    config = HandlerConfig.from_mapping({**settings, "warm_up_sizes": ["32x32"], "speed": "safe"})
    with (
        caplog.at_level(logging.INFO),
        closing(assemble(loaded(family), config, model_name="tiny")) as service,
    ):
        fields = short_request(config, service.traits, size=(32, 32))
        (result,) = service.draw(service.read([{"body": fields}]))
    assert result.images[0].size == (32, 32)
    assert "warming up failed" not in caplog.text
    served = next(iter(service.traits.tasks))
    assert f" serves {served}" in caplog.text


def test_every_task_is_warmed_up(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = build("stable_diffusion")
    controlnets = {name: make_controlnet(pipeline, name) for name in ("canny", "depth")}
    loaded_too = LoadedPipeline(pipeline, torch.device("cpu"), torch.float32, controlnets)
    called: list[str] = []
    for module in (pipeline.vae.encoder, *controlnets.values()):
        module.register_forward_pre_hook(lambda each, _: called.append(type(each).__name__))
    config = HandlerConfig.from_mapping(
        {**QUICK, "height": 32, "width": 32, "min_size_px": 32, "warm_up_sizes": ["32x32"]}
    )
    with closing(assemble(loaded_too, config, model_name="tiny")):
        assert "warming up failed" not in caplog.text
    assert {"Encoder", "ControlNetModel"} <= {*called}
