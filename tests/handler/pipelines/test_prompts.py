"""Requests as pipeline arguments, and what of a prompt the tokenizers of fifteen families drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from handler.api.request import GenerationRequest
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.pipelines.prompts import prompt_warnings
from handler.pipelines.schedulers import make_scheduler
from tests.support.pipelines import FAMILIES, build, shared
from tests.support.tiny_models import MAX_TOKENS


def request(prompt: str = "a cat", **changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": None,
        "seed": 11,
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 64,
        "num_images": 1,
        "scheduler": None,
    }
    return GenerationRequest(**{**values, **changes})


def arguments(family: str = "stable_diffusion", **changes: Any) -> dict[str, Any]:
    return pipeline_arguments(request(**changes), describe(shared(family)).parameters)


def test_the_arguments_of_a_request() -> None:
    given = arguments(negative_prompt="dog")
    generator = given.pop("generator")
    assert given == {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 64,
        "num_images_per_prompt": 1,
        "output_type": "pil",
    }
    assert generator.initial_seed() == 11
    assert generator.device == torch.device("cpu")


def test_every_picture_has_a_generator_of_its_own() -> None:
    several = arguments(num_images=3)["generator"]
    assert [g.initial_seed() for g in several] == [11, 12, 13]
    alone = arguments(seed=12)["generator"]
    noises = [torch.randn(4, generator=g) for g in (several[1], alone, several[0])]
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])


def test_two_requests_never_share_a_generator() -> None:
    assert arguments()["generator"] is not arguments()["generator"]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_pipeline_takes_is_given(family: str) -> None:
    parameters = describe(shared(family)).parameters
    given = pipeline_arguments(request(), parameters)
    assert given.keys() <= parameters
    assert "generator" in given


def test_the_largest_seed_there_is() -> None:
    assert arguments(seed=2**53 - 1)["generator"].initial_seed() == 2**53 - 1


def test_eta_changes_what_ddim_draws_and_nothing_where_it_is_left_out() -> None:
    pipeline = build("stable_diffusion")
    pipeline.scheduler = make_scheduler(pipeline, "ddim")

    def draw(**extra: float) -> np.ndarray[Any, Any]:
        return np.asarray(pipeline(**arguments(extra=extra)).images[0])

    assert np.array_equal(draw(), draw(eta=0.0))
    assert np.array_equal(draw(eta=1.0), draw(eta=1.0))
    assert not np.array_equal(draw(), draw(eta=1.0))


@pytest.mark.parametrize("length", [1, 74, 75])
def test_a_prompt_within_the_window_has_no_warning(length: int) -> None:
    # One token a character, and two special ones in CLIP's window of 77.
    assert prompt_warnings(shared("stable_diffusion"), request("a" * length)) == ()


@pytest.mark.parametrize("length", [76, 80, 300])
def test_a_longer_prompt_says_how_many_tokens_are_dropped(length: int) -> None:
    (warning,) = prompt_warnings(shared("stable_diffusion_3"), request("a" * length))
    assert warning == (
        f"the last {length - 75} tokens of the prompt were dropped: the text encoder reads 75"
    )


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_what_reads_windows_drops_nothing(family: str) -> None:
    long = request("a " * 400, negative_prompt="b " * 100)
    assert prompt_warnings(shared(family), long) == ()


def test_the_dropped_tokens_are_those_the_pipeline_does_not_read() -> None:
    """Words behind the window change nothing, the last one within it does."""
    pipeline = shared("stable_diffusion_3")
    prompts = ["a " * 74 + end for end in ("b", "b c c c", "b d", "c c c c")]
    dropped = [len(prompt_warnings(pipeline, request(prompt))) for prompt in prompts]
    with torch.no_grad():
        embedded = [
            pipeline.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=77
            )[0][:, :77]
            for prompt in prompts
        ]
    assert dropped == [0, 1, 1, 1]
    assert torch.equal(embedded[0], embedded[1])
    assert torch.equal(embedded[0], embedded[2])
    assert not torch.equal(embedded[0], embedded[3])


def test_both_prompts_are_judged() -> None:
    long = "a" * 80
    pipeline = shared("stable_diffusion_3")
    names = [w.split(" of the ")[1].split()[0] for w in _both(pipeline, long, long)]
    assert names == ["prompt", "negative_prompt"]
    assert len(_both(pipeline, "a", long)) == 1
    assert _both(pipeline, "a", "") == ()


def _both(pipeline: Any, prompt: str, negative_prompt: str) -> tuple[str, ...]:
    return prompt_warnings(pipeline, request(prompt, negative_prompt=negative_prompt))


def test_the_tokenizer_with_the_largest_window_counts() -> None:
    pipeline = build("stable_diffusion_3")
    assert MAX_TOKENS < 75
    assert prompt_warnings(pipeline, request("a" * 75)) == ()
    (warning,) = prompt_warnings(pipeline, request("a" * 80))
    assert "reads 75" in warning


def test_a_window_that_the_call_narrows() -> None:
    # T5 alone: one token a character, an end, and a mark for the word's beginning.
    pipeline = shared("pixart_sigma")
    assert prompt_warnings(pipeline, request("a" * (MAX_TOKENS - 2))) == ()
    (warning,) = prompt_warnings(pipeline, request("a" * MAX_TOKENS))
    assert (
        f"the last 2 tokens of the prompt were dropped: the text encoder reads {MAX_TOKENS - 1}"
        == warning
    )


def test_a_pipeline_without_a_tokenizer() -> None:
    assert prompt_warnings(shared("kandinsky_2_2"), request("a" * 500)) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_fails_for_its_warnings(family: str) -> None:
    for prompt in ("a", "a b " * 400, "\x00", "日本 🐈 é", " "):
        warnings = prompt_warnings(shared(family), request(prompt, negative_prompt=prompt))
        assert all("tokens of the" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("prompt", "syntax"),
    [
        ("a (red:1.3) ring on [blue] ((((bright))))", "(word:1.3), ((word)), [word]"),
        ("a (red:0.1) ring", "(word:1.3)"),
        ("a red+++ ring", "word++"),
        ("a (red ring)1.3", "(word)1.3"),
        ("a red ring <lora:style:0.8> BREAK a blue star", "<lora:name:1>, BREAK"),
        ("a [red:blue:0.5] ring", "[word], [from:to:0.5]"),
        ("a [red::5] ring", "[word], [from:to:0.5]"),
        ("a [red|blue] ring", "[word], [one|two]"),
        ("a ring AND a star", "AND"),
    ],
)
def test_syntax_that_is_read_as_plain_text_is_named(prompt: str, syntax: str) -> None:
    pipeline = shared("kandinsky_2_2")  # which has no tokenizer
    expected = f"has {syntax}: it is read as plain text"
    assert prompt_warnings(pipeline, request(prompt)) == (f"the prompt {expected}",)
    negative = prompt_warnings(pipeline, request(negative_prompt=prompt))
    assert negative == (f"the negative_prompt {expected}",)


def test_syntax_that_counts_has_no_warning() -> None:
    pipeline = shared("stable_diffusion")
    prompt = "a (red:1.3) ring [blue] ((bright)) BREAK red++ <hypernet:a:1>"
    (warning,) = prompt_warnings(pipeline, request(prompt))
    assert warning.endswith('read as plain text; "prompt_weighting": true reads A1111\'s weights')
    weighted = request(prompt, extra={"prompt_weighting": True})
    (warning,) = prompt_warnings(pipeline, weighted)
    assert warning == "the prompt has word++, <lora:name:1>: it is read as plain text"
    edited = request("a [red:blue:0.5] ring", extra={"prompt_weighting": True})
    (warning,) = prompt_warnings(pipeline, edited)
    assert warning == "the prompt has [from:to:0.5]: it is read as plain text"


@pytest.mark.parametrize("prompt", ["a red+++ ring", "a (red ring)1.3"])
def test_syntax_of_others_is_not_told_to_count_as_a1111s(prompt: str) -> None:
    (warning,) = prompt_warnings(shared("stable_diffusion"), request(prompt))
    assert warning.endswith("it is read as plain text")


@pytest.mark.parametrize(
    "prompt",
    [
        "a ring (red)",
        "C++ and 1+1",
        "the ratio 4:3",
        "(at 10:30) noon",
        "a break",
        "a - b",
        "and [10:30 noon",
    ],
)
def test_plain_text_has_no_warning(prompt: str) -> None:
    assert prompt_warnings(shared("kandinsky_2_2"), request(prompt)) == ()


def test_warnings_never_quote_the_prompt() -> None:
    assert "secret" not in str(prompt_warnings(shared("stable_diffusion"), request("secret " * 40)))
    assert "secret" not in str(prompt_warnings(shared("kandinsky_2_2"), request("(secret:1.3)")))
