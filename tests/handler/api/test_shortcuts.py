"""The fields that leave parts of the computing out: defaults, refusals, metadata."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from handler.api.metadata import request_parameters
from handler.api.request import GenerationRequest
from handler.api.request_checks import check_against_pipeline
from handler.api.request_fields import parse_fields
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import ConfigError, InvalidRequest

CONFIG = HandlerConfig()
ALL = frozenset({"step_cache", "guidance_start", "guidance_end"})
TRAITS = PipelineTraits(
    schedulers=("DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"),
    size_multiple_px=8,
    parameters=frozenset({"prompt", "num_inference_steps", "guidance_scale", "height", "width"}),
    shortcuts={"text-to-image": ALL},
    several_calls=frozenset({"HeunDiscreteScheduler", "PNDMScheduler"}),
)


def parse(
    config: HandlerConfig = CONFIG,
    traits: PipelineTraits = TRAITS,
    *,
    is_form: bool = False,
    **fields: Any,
) -> GenerationRequest:
    body = {"prompt": "a", **fields}
    return parse_fields(body, config, traits, is_form=is_form, draw_seed=lambda: 1)


def problems(
    config: HandlerConfig = CONFIG, traits: PipelineTraits = TRAITS, **fields: Any
) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse(config, traits, **fields)
    return caught.value.fields


def lacking(*names: str) -> PipelineTraits:
    return dataclasses.replace(TRAITS, shortcuts={"text-to-image": ALL - set(names)})


@pytest.mark.parametrize(
    ("sent", "means"), [(0.5, 0.5), (1, 1.0), ("off", None), ("OFF", None), (0, None), (0.0, None)]
)
def test_what_may_be_sent(sent: object, means: float | None) -> None:
    assert parse(step_cache=sent).extra.get("step_cache") == means


@pytest.mark.parametrize(("sent", "means"), [("0.5", 0.5), ("off", None), ("0", None)])
def test_what_a_form_may_send(sent: str, means: float | None) -> None:
    assert parse(is_form=True, step_cache=sent).extra.get("step_cache") == means


@pytest.mark.parametrize("sent", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", sorted(ALL))
def test_what_is_out_of_range(name: str, sent: float) -> None:
    assert "is out of range; allowed: 0 to 1" in problems(**{name: sent})[name]


def test_what_is_no_number_is_told_the_word_too() -> None:
    assert problems(step_cache="on")["step_cache"] == (
        "'on' is not a number; allowed: 0 to 1, 'off'"
    )
    assert "off" not in problems(guidance_end="off")["guidance_end"].partition(";")[2]


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [("step_cache", 0, 0.5), ("guidance_start", 0, 0.5), ("guidance_end", 1, 0)],
)
def test_only_what_would_change_something_is_refused(
    name: str, neutral: float, other: float
) -> None:
    traits = lacking(name)
    assert name not in parse(traits=traits, **{name: neutral}).extra
    assert "not here" in problems(traits=traits, **{name: other})[name]


def test_by_default_everything_is_computed() -> None:
    request = parse()
    assert not ALL & request.extra.keys()
    assert not ALL & request_parameters(request).keys()


def test_the_configured_share_counts_where_none_is_sent() -> None:
    config = HandlerConfig(step_cache=0.4)
    assert parse(config).extra["step_cache"] == 0.4
    assert parse(config, step_cache=0.7).extra["step_cache"] == 0.7
    assert "step_cache" not in parse(config, step_cache="off").extra


def test_it_stands_in_the_metadata() -> None:
    request = parse(step_cache=0.5, guidance_start=0.1, guidance_end=0.8)
    recorded = request_parameters(request)
    assert {name: recorded[name] for name in ALL} == {
        "step_cache": 0.5,
        "guidance_start": 0.1,
        "guidance_end": 0.8,
    }


def test_guidance_does_not_end_before_it_begins() -> None:
    found = problems(guidance_start=0.8, guidance_end=0.2)
    assert found == {"guidance_start": "0.8 is after guidance_end, 0.2"}
    parse(guidance_start=0.5, guidance_end=0.5)


# What the pipeline, the scheduler and the server do not allow


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_pipeline_that_cannot_is_named(name: str) -> None:
    found = problems(CONFIG, lacking(name), **{name: 0.5})
    assert found[name].startswith("not here: it needs a pipeline")


def test_another_task_that_can_is_named() -> None:
    tasks = {"text-to-image": TRAITS.parameters, "inpainting": TRAITS.parameters}
    shortcuts = {"text-to-image": frozenset[str](), "inpainting": ALL}
    traits = dataclasses.replace(TRAITS, tasks=tasks, shortcuts=shortcuts)
    assert problems(CONFIG, traits, step_cache=0.5)["step_cache"].endswith("; inpainting has it")


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "Heun Karras"])
def test_several_calls_a_step_are_refused_by_the_samplers_name(scheduler: str) -> None:
    found = problems(step_cache=0.5, scheduler=scheduler)
    assert "calls the model more than once a step" in found["step_cache"]
    # Guidance may be left out all the same.
    parse(step_cache="off", scheduler=scheduler, guidance_end=0.5)


def test_several_calls_a_step_of_the_pipelines_own() -> None:
    traits = dataclasses.replace(TRAITS, several_calls=frozenset({"DDIMScheduler"}))
    assert "DDIMScheduler calls" in problems(CONFIG, traits, step_cache=0.5)["step_cache"]


def test_a_configured_share_is_left_out_where_it_cannot_be() -> None:
    config = HandlerConfig(step_cache=0.5)
    assert "step_cache" not in parse(config, scheduler="heun").extra
    assert "step_cache" not in parse(config, lacking("step_cache")).extra


def test_an_exact_server_computes_everything() -> None:
    config = HandlerConfig(exact=True)
    assert problems(config, step_cache=0.5, guidance_end=0.5).keys() == {
        "step_cache",
        "guidance_end",
    }
    parse(config, step_cache="off")


# Configuration


@pytest.mark.parametrize(("written", "means"), [(False, 0.0), ("off", 0.0), (0.5, 0.5), (1, 1.0)])
def test_what_the_configuration_may_say(written: object, means: float) -> None:
    assert HandlerConfig.from_mapping({"step_cache": written}).step_cache == means


@pytest.mark.parametrize("written", [True, "on", -1, 1.5, None])
def test_what_the_configuration_may_not_say(written: object) -> None:
    with pytest.raises(ConfigError, match="must be off or a number from 0 to 1"):
        HandlerConfig.from_mapping({"step_cache": written})


def test_an_exact_server_has_no_step_cache() -> None:
    with pytest.raises(ConfigError, match="step_cache predicts some"):
        HandlerConfig(exact=True, step_cache=0.5)


def test_a_pipeline_that_tells_no_steps_has_no_step_cache() -> None:
    with pytest.raises(ConfigError, match="step_cache: this pipeline does not tell"):
        check_against_pipeline(HandlerConfig(step_cache=0.5), lacking("step_cache"))
    check_against_pipeline(HandlerConfig(step_cache=0.5), TRAITS)
