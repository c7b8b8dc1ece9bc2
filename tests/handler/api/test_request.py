"""One request's fields: defaults, limits, aliases, schedulers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from handler.api.request import GenerationRequest
from handler.api.request_checks import check_against_pipeline
from handler.api.request_fields import parse_fields
from handler.api.schema import MAX_SEED
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import ConfigError, InvalidRequest

CONFIG = HandlerConfig()
PARAMETERS = frozenset(
    [
        "prompt",
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "num_images_per_prompt",
    ]
)
TRAITS = PipelineTraits(
    schedulers=(
        "PNDMScheduler",
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "OddScheduler",
    ),
    size_multiple_px=8,
    parameters=PARAMETERS,
)


def parse(
    fields: Mapping[str, object],
    config: HandlerConfig = CONFIG,
    traits: PipelineTraits = TRAITS,
    *,
    is_form: bool = False,
) -> GenerationRequest:
    return parse_fields(fields, config, traits, is_form=is_form, draw_seed=lambda: 1234)


def problems(
    fields: Mapping[str, object],
    config: HandlerConfig = CONFIG,
    traits: PipelineTraits = TRAITS,
    *,
    is_form: bool = False,
) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parse(fields, config, traits, is_form=is_form)
    return caught.value.fields


def test_pictures_that_are_too_large_together() -> None:
    sizes = {"height": 512, "width": 512, "max_pixels": 512 * 512}
    config = dataclasses.replace(CONFIG, **sizes, max_pixels_in_flight=2 * 512 * 512)
    assert parse({"prompt": "a", "n": 2}, config).num_images == 2
    assert problems({"prompt": "a", "n": 3}, config) == {
        "num_images": "3 of 512x512 (height x width) are 786432 pixels; allowed are 524288 together"
    }


def test_a_prompt_is_enough() -> None:
    assert parse({"prompt": "a cat"}) == GenerationRequest(
        prompt="a cat",
        negative_prompt=None,
        seed=1234,
        num_inference_steps=50,
        guidance_scale=7.5,
        height=768,
        width=768,
        num_images=1,
        scheduler=None,
    )


def test_everything_given() -> None:
    fields = {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "seed": 5,
        "num_inference_steps": 20,
        "guidance_scale": 3,
        "height": 512,
        "width": 640,
        "num_images": 2,
        "scheduler": "ddim",
    }
    expected = GenerationRequest("a cat", "a dog", 5, 20, 3.0, 512, 640, 2, "DDIM")
    assert parse(fields) == expected
    assert parse({name: str(value) for name, value in fields.items()}, is_form=True) == expected
    assert expected.seeds == (5, 6)


@pytest.mark.parametrize("alias", ["data", "inputs", "text"])
def test_other_names_of_the_prompt(alias: str) -> None:
    assert parse({alias: "a cat"}) == parse({"prompt": "a cat"})
    assert f"prompt and {alias}" in problems({alias: "a cat", "prompt": "a cat"})["prompt"]


def test_other_names_of_the_rest() -> None:
    request = parse({"data": "a", "steps": 7, "guidance": 2, "n": 3})
    assert (request.num_inference_steps, request.guidance_scale, request.num_images) == (7, 2.0, 3)
    doubled = problems({"data": "a", "steps": 7, "num_inference_steps": 7, "n": 1, "num_images": 1})
    assert set(doubled) == {"num_inference_steps", "num_images"}


def test_null_is_absent() -> None:
    fields = dict.fromkeys(("seed", "steps", "negative_prompt", "scheduler", "height"))
    assert parse({"prompt": "a", **fields}) == parse({"prompt": "a"})


def test_every_problem_at_once() -> None:
    found = problems(
        {
            "prompt": " ",
            "negative_prompt": 5,
            "seed": -2,
            "steps": True,
            "guidance": float("nan"),
            "height": 100,
            "width": 4096,
            "n": 0,
            "scheduler": "eulr_a",
            "widht": 512,
        }
    )
    assert found == {
        "prompt": "is empty",
        "negative_prompt": "must be text, not 5",
        "seed": f"-2 is out of range; allowed: 0 to {MAX_SEED}",
        "num_inference_steps": "true is not an integer; allowed: 1 to 150",
        "guidance_scale": "nan is out of range; allowed: 0 to 30",
        "height": "100 is not a multiple of 8; nearest are 96 and 104",
        "width": "4096 is out of range; allowed: 64 to 1536",
        "num_images": "0 is out of range; allowed: 1 to 4",
        "scheduler": "'eulr_a' does not go with this pipeline; did you mean euler_a?"
        " allowed: plms, pndm, ddim, euler_a, OddScheduler",
        "widht": "unknown field; did you mean width?",
    }


PNDM_WITH_PRK = dataclasses.replace(TRAITS, least_steps={"PNDMScheduler": 4})


@pytest.mark.parametrize("scheduler", ["pndm", "PNDMScheduler", None])
def test_too_few_steps_for_a_scheduler(scheduler: str | None) -> None:
    """The pipeline's own is PNDM, too."""
    fields = {"prompt": "a"} if scheduler is None else {"prompt": "a", "scheduler": scheduler}
    expected = {"num_inference_steps": "3 is too few for PNDMScheduler; allowed: 4 to 150"}
    assert problems({**fields, "steps": 3}, traits=PNDM_WITH_PRK) == expected
    assert parse({**fields, "steps": 4}, traits=PNDM_WITH_PRK).num_inference_steps == 4
    other = {"prompt": "a", "scheduler": "ddim", "steps": 1}
    assert parse(other, traits=PNDM_WITH_PRK).num_inference_steps == 1
    expected = {"num_inference_steps": "0 is out of range; allowed: 1 to 150"}
    assert problems({**fields, "steps": 0}, traits=PNDM_WITH_PRK) == expected


@pytest.mark.parametrize("scheduler", ["pndm", None])
def test_configured_steps_too_few_for_the_scheduler_stop_the_start(scheduler: str | None) -> None:
    config = HandlerConfig(num_inference_steps=3, scheduler=scheduler)
    with pytest.raises(ConfigError, match="num_inference_steps: 3 is too few for the default"):
        check_against_pipeline(config, PNDM_WITH_PRK)
    check_against_pipeline(config, TRAITS)


def test_a_missing_prompt() -> None:
    assert problems({"seed": 1}) == {"prompt": "is missing"}
    assert problems({"seed": -2}).keys() == {"prompt", "seed"}


def test_misspelt_fields_of_the_call_are_recognised() -> None:
    assert (
        "did you mean output_format?"
        in problems({"prompt": "a", "outputformat": "png"})["outputformat"]
    )


def test_no_seed_is_drawn_for_a_bad_request_or_a_given_seed() -> None:
    def refuse() -> int:
        raise AssertionError("a seed was drawn")

    with pytest.raises(InvalidRequest):
        parse_fields({"prompt": ""}, CONFIG, TRAITS, is_form=False, draw_seed=refuse)
    given = parse_fields(
        {"prompt": "a", "seed": 0}, CONFIG, TRAITS, is_form=False, draw_seed=refuse
    )
    assert given.seed == 0


def test_seeds_of_all_pictures_stay_exact_in_json() -> None:
    assert parse({"prompt": "a", "seed": MAX_SEED}).seeds == (MAX_SEED,)
    assert parse({"prompt": "a", "seed": MAX_SEED - 1, "n": 2}).seeds[-1] == MAX_SEED
    assert "seed" in problems({"prompt": "a", "seed": MAX_SEED, "n": 2})


def test_guidance_may_be_zero() -> None:
    assert parse({"prompt": "a", "guidance_scale": 0}).guidance_scale == 0.0


def test_pixels_of_one_picture_are_limited() -> None:
    assert parse({"prompt": "a", "height": 1024, "width": 1024}).height == 1024
    found = problems({"prompt": "a", "height": 1024, "width": 1032})
    assert found == {"height": "1024x1032 (height x width) is 1056768 pixels; allowed are 1048576"}


def test_windows_of_both_prompts_are_limited() -> None:
    traits = dataclasses.replace(
        TRAITS,
        reads_weights=True,
        count_windows=lambda text, is_weighted: 1 + text.count("BREAK") * is_weighted,
    )
    many = "a " + "BREAK a " * 8
    sent = {"prompt": many, "negative_prompt": many}
    assert parse(sent, traits=traits).prompt == many.strip()
    found = problems({**sent, "prompt_weighting": True}, traits=traits)
    assert found.keys() == {"prompt", "negative_prompt"}
    assert found["prompt"].startswith("takes 9 windows of the text encoder")
    assert found["prompt"].endswith("allowed are 8")
    more = HandlerConfig(max_prompt_windows=9)
    assert parse({**sent, "prompt_weighting": True}, more, traits).is_weighted
    default = HandlerConfig(negative_prompt=many, prompt_weighting=True)
    with pytest.raises(ConfigError, match="negative_prompt: takes 9 windows"):
        check_against_pipeline(default, traits)


def test_limits_are_the_configured_ones() -> None:
    config = HandlerConfig(
        max_prompt_chars=3,
        num_inference_steps=2,
        max_num_inference_steps=2,
        min_guidance_scale=7.0,
        max_guidance_scale=8.0,
        min_size_px=512,
        max_size_px=768,
        max_images=1,
    )
    found = problems(
        {"prompt": "abcd", "steps": 3, "guidance": 6.9, "height": 256, "width": 1024, "n": 2},
        config,
    )
    assert set(found) == {
        "prompt", "num_inference_steps", "guidance_scale", "height", "width", "num_images"
    }  # fmt: skip
    assert "allowed are 3" in found["prompt"]
    assert "allowed: 7 to 8" in found["guidance_scale"]
    assert "allowed: 512 to 768" in found["height"]


@pytest.mark.parametrize(
    ("sent", "class_name"),
    [
        ("ddim", "DDIM"),
        ("DDIM", "DDIM"),
        ("DDIMScheduler", "DDIMScheduler"),
        ("Euler a", "Euler a"),
        ("euler-a", "Euler a"),
        ("OddScheduler", "OddScheduler"),
    ],
)
def test_schedulers_by_short_and_class_name(sent: str, class_name: str) -> None:
    assert parse({"prompt": "a", "scheduler": sent}).scheduler == class_name


@pytest.mark.parametrize("sent", ["euler", "EulerDiscreteScheduler", "UNet2DModel", "os.system"])
def test_only_schedulers_that_go_with_the_pipeline(sent: str) -> None:
    assert (
        "does not go with this pipeline"
        in problems({"prompt": "a", "scheduler": sent})["scheduler"]
    )


ON = {"prompt_weighting": True}
WEIGHTED = dataclasses.replace(TRAITS, reads_weights=True)


def test_weights_count_where_they_are_asked_for() -> None:
    fields = {"prompt": "a (red:1.3) ring", "prompt_weighting": True}
    assert parse(fields, traits=WEIGHTED).is_weighted
    assert not parse({**fields, "prompt_weighting": False}, traits=WEIGHTED).is_weighted
    assert not parse({"prompt": "a (red:99) ring"}, traits=WEIGHTED).is_weighted
    on = HandlerConfig(prompt_weighting=True)
    assert parse({"prompt": "a"}, on, traits=WEIGHTED).is_weighted
    assert not parse({"prompt": "a", "prompt_weighting": False}, on, traits=WEIGHTED).is_weighted
    found = problems({"prompt": "(a:99)", "negative_prompt": "((b:9):9)", **ON}, traits=WEIGHTED)
    assert found.keys() == {"prompt", "negative_prompt"}
    assert found["prompt"].startswith("a weight of 99 is out of range; allowed: -10 to 10")


def test_weights_need_an_encoder_that_reads_them() -> None:
    assert problems({"prompt": "a", **ON}).keys() == {"prompt_weighting"}
    with pytest.raises(ConfigError, match="prompt_weighting: the text encoders"):
        check_against_pipeline(HandlerConfig(prompt_weighting=True), TRAITS)


def test_configured_defaults_are_filled_in() -> None:
    config = HandlerConfig(negative_prompt="blurry", scheduler="ddim", height=512)
    request = parse({"prompt": "a"}, config)
    assert request.negative_prompt == "blurry"
    assert request.scheduler == "DDIM"
    assert (request.height, request.width) == (512, 768)
    assert parse({"prompt": "a", "negative_prompt": ""}, config).negative_prompt == ""
    assert parse({"prompt": "a", "scheduler": "pndm"}, config).scheduler == "PNDMScheduler"


def test_what_the_pipeline_does_not_take_is_an_error() -> None:
    bare = PipelineTraits(("DDIMScheduler",), 8, frozenset({"prompt"}))
    assert parse({"prompt": "a"}, traits=bare).negative_prompt is None
    found = problems({"prompt": "a", "negative_prompt": "b", "guidance": 5, "n": 2}, traits=bare)
    assert found == {
        "negative_prompt": "this pipeline has no such parameter",
        "guidance_scale": "this pipeline has no such parameter",
        "num_images": "this pipeline draws one picture a request",
    }


def test_defaults_that_do_not_fit_the_pipeline_stop_start_up() -> None:
    check_against_pipeline(HandlerConfig(scheduler="ddim", negative_prompt="b"), TRAITS)
    config = HandlerConfig(height=520, width=776, scheduler="lcm", negative_prompt="b")
    odd = PipelineTraits(("DDIMScheduler",), 16, frozenset({"prompt"}))
    with pytest.raises(ConfigError) as caught:
        check_against_pipeline(config, odd)
    assert str(caught.value).splitlines()[1:] == [
        "  height: 520 is not a multiple of 16; nearest are 512 and 528",
        "  width: 776 is not a multiple of 16; nearest are 768 and 784",
        "  scheduler: 'lcm' does not go with this pipeline; allowed: ddim",
        "  negative_prompt: this pipeline takes none",
    ]


@pytest.mark.parametrize(
    ("scheduler", "problem"),
    [
        ("eulr_a", "'eulr_a' does not go with this pipeline; did you mean euler_a? allowed: "),
        ("Euler a Karras", "'Euler a Karras': Euler a has no Karras sigmas in diffusers; its sig"),
    ],
)
def test_a_configured_sampler_is_told_what_a_requests_is(scheduler: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_against_pipeline(HandlerConfig(scheduler=scheduler), TRAITS)
    assert f"  scheduler: {problem}" in str(caught.value)
    assert problem in problems({"prompt": "a", "scheduler": scheduler})["scheduler"]


def test_loras_that_a_weighted_prompt_names_are_the_field() -> None:
    traits = dataclasses.replace(WEIGHTED, loras=frozenset({"ink", "style"}))
    tagged = parse({"prompt": "a <lora:ink:0.8> ring", **ON}, traits=traits)
    assert tagged.prompt == "a  ring"
    assert tagged.loras == {"ink": 0.8}
    both = parse({"prompt": "a <lora:ink:0.8>", "loras": {"style": 1}, **ON}, traits=traits)
    assert both.loras == {"ink": 0.8, "style": 1.0}
    assert parse({"prompt": "a <lora:ink:0.8>"}, traits=traits).loras is None


MANY = " ".join(f"<lora:l{number}:1>" for number in range(17))
MOST = [f"l{number}" for number in range(16)]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (
            {"prompt": "a <lora:ink:x>"},
            {"prompt": "the scale of <lora:ink:…> is 'x', not a number"},
        ),
        (
            {"prompt": "a <lora:ink:99999>"},
            {"prompt": "the scale of ink is 99999.0; allowed: -10 to 10"},
        ),
        ({"prompt": f"a {MANY}"}, {"prompt": "17 LoRAs are named; allowed are 16"}),
        (
            {"prompt": "a <lora:ink:1>", "loras": MOST},
            {"loras": "with those in the prompt, 17 LoRAs are named; allowed are 16"},
        ),
        ({"prompt": " <lora:ink> "}, {"prompt": "is empty but for its LoRA tags"}),
        (
            {"prompt": "a <lora:ink:1>", "loras": {"ink": 2}},
            {"loras": "'ink' has another scale in the prompt"},
        ),
    ],
)
def test_loras_in_a_prompt_are_checked_like_those_of_the_field(
    fields: dict[str, object], found: dict[str, str]
) -> None:
    traits = dataclasses.replace(WEIGHTED, loras=frozenset({"ink", *MOST}))
    assert problems({**fields, **ON}, traits=traits) == found


def test_a_lora_in_a_prompt_that_there_is_not_is_told_those_that_there_are() -> None:
    traits = dataclasses.replace(WEIGHTED, loras=frozenset({"ink", "style"}))
    found = problems({"prompt": "a <lora:ikn:1>", **ON}, traits=traits)
    assert "did you mean ink? there are ink, style" in found["loras"]
    found = problems({"prompt": "a <lora:../ink:1>", **ON}, traits=traits)
    assert "'../ink' is not the name of a LoRA" in found["prompt"]
