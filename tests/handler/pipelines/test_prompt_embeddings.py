"""Prompts read whole: windows that are joined, and A1111's weights by their formula."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from handler.engine import InFlightEngine
from handler.pipelines.describe import describe
from handler.pipelines.prompt_embeddings import PromptReading, read_prompts, reads_windows
from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared

# One token a word, 75 in a window.
WORDS = ["abcdefghij"[place % 10] for place in range(180)]
LONG = " ".join(WORDS)
FIRST, SECOND, THIRD = (" ".join(WORDS[k : k + 75]) for k in (0, 75, 150))
PLAIN, WEIGHTED = PromptReading(), PromptReading(is_weighted=True)
CLIP = ["stable_diffusion", "stable_diffusion_xl"]


def encoded(
    family: str, prompt: Any, reading: PromptReading | None = None, **changes: Any
) -> tuple[torch.Tensor, ...]:
    """What the pipeline's ``encode_prompt`` returns to its call."""
    view = copy.copy(shared(family))
    if reading is not None:
        read_prompts(view, reading)
    arguments = {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
        **changes,
    }
    with torch.no_grad():
        outputs: tuple[torch.Tensor, ...] = view.encode_prompt(prompt, **arguments)
    return outputs


def skipping(family: str, prompt: str, clip_skip: int | None) -> tuple[torch.Tensor, ...]:
    """What is encoded without the last layers: of Stable Diffusion with the norm of the last."""
    if family != "stable_diffusion" or clip_skip is None:
        return encoded(family, prompt, clip_skip=clip_skip)
    pipeline = shared(family)
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        return (pipeline.text_encoder.final_layer_norm(states[-1 - clip_skip]),)


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-5)


def weighted(family: str, prompt: str, weights: Sequence[float]) -> torch.Tensor:
    """A1111's definition: the words' vectors times their weights, and the mean as it was."""
    embeds = encoded(family, prompt)[0][0]
    factors = torch.ones(77, 1)
    factors[1 : 1 + len(weights), 0] = torch.tensor(weights)
    parts = []
    for part in embeds.split(16, dim=-1):  # an encoder each
        after = part * factors
        parts.append(after * (part.mean() / after.mean()))
    return torch.cat(parts, dim=-1)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_with_clip_and_a_unet_read_windows(family: str) -> None:
    others = family == "latent_consistency" or family.startswith("stable_diffusion")
    expected = others and not family.startswith("stable_diffusion_3")
    assert reads_windows(shared(family)) == expected


@pytest.mark.parametrize("family", CLIP)
@pytest.mark.parametrize("prompt", [LONG, f"{LONG} (a:1.2)"])
def test_a_text_is_tokenized_once(
    family: str, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tokenizer = type(shared(family).tokenizer)
    call = tokenizer.__call__

    def noted(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        read.append(text)
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "__call__", noted)
    encoded(family, prompt, WEIGHTED)
    assert LONG in {each.strip() for each in read}
    num_tokenizers = 2 if family == "stable_diffusion_xl" else 1
    assert len(read) == num_tokenizers * len(set(read))


@pytest.mark.parametrize("reading", [PLAIN, WEIGHTED])
@pytest.mark.parametrize("prompt", ["a cat", "a b c"])
def test_layers_are_skipped_of_prompts_that_fit_too(prompt: str, reading: PromptReading) -> None:
    for family in CLIP:
        found = encoded(family, prompt, reading, clip_skip=1)[0]
        assert torch.equal(found, skipping(family, prompt, 1)[0])
        assert not close(found, encoded(family, prompt)[0])


@pytest.mark.parametrize("family", CLIP)
@pytest.mark.parametrize("reading", [PLAIN, WEIGHTED])
@pytest.mark.parametrize("negative", [None, "", "a b"])
def test_a_prompt_that_fits_is_encoded_as_by_the_pipeline(
    family: str, reading: PromptReading, negative: str | None
) -> None:
    for prompt in ("a cat", FIRST, "", "a: b"):
        wanted = encoded(family, prompt, negative_prompt=negative)
        assert same(encoded(family, prompt, reading, negative_prompt=negative), wanted)


@pytest.mark.parametrize("family", CLIP)
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_a_long_prompt_is_its_windows_joined(family: str, clip_skip: int | None) -> None:
    wanted = [skipping(family, each, clip_skip) for each in (FIRST, SECOND, THIRD)]
    found = encoded(family, LONG, PLAIN, clip_skip=clip_skip)
    assert found[0].shape[1] == 3 * 77
    assert close(found[0], torch.cat([each[0] for each in wanted], dim=1))
    # The other prompt is filled up with windows of nothing.
    empty = encoded(family, "", negative_prompt="")[1]
    if family == "stable_diffusion":
        assert close(found[1], torch.cat([empty] * 3, dim=1))
    else:
        assert not found[1].any()  # this one's model is told nothing by zeros
        assert close(found[2], wanted[0][2])


@pytest.mark.parametrize("family", CLIP)
def test_a_long_negative_prompt_is_read_whole(family: str) -> None:
    found = encoded(family, "a cat", PLAIN, negative_prompt=LONG)
    wanted = [encoded(family, "x", negative_prompt=each)[1] for each in (FIRST, SECOND, THIRD)]
    assert close(found[1], torch.cat(wanted, dim=1))
    parts = [encoded(family, "a cat")[0], *[encoded(family, "")[0]] * 2]
    assert close(found[0], torch.cat(parts, dim=1))


@pytest.mark.parametrize("family", CLIP)
def test_what_guidance_does_not_need_is_not_read(family: str) -> None:
    found = encoded(family, "a", PLAIN, negative_prompt=LONG, do_classifier_free_guidance=False)
    assert found[0].shape[1] == 77


@pytest.mark.parametrize("family", CLIP)
def test_weights_follow_their_definition(family: str) -> None:
    found = encoded(family, "a (b c:1.5) [d]", WEIGHTED)
    assert close(found[0], weighted(family, "a b c d", [1, 1.5, 1.5, 1 / 1.1]))
    assert same(found[1:], encoded(family, "a b c d")[1:])
    found = encoded(family, "x", WEIGHTED, negative_prompt="(a:0.3) b")
    reference = encoded(family, "x", negative_prompt="a b")
    assert torch.equal(found[0], reference[0])
    assert not close(found[1], reference[1])
    # Without weighting they are text.
    assert same(encoded(family, "a (b:1.5)", PLAIN), encoded(family, "a (b:1.5)"))


@pytest.mark.parametrize("family", CLIP)
def test_weights_in_a_later_window(family: str) -> None:
    words = [*WORDS[:75], "(a:2)", *WORDS[76:100]]
    found = encoded(family, " ".join(words), WEIGHTED)[0]
    second = " ".join(["a", *WORDS[76:100]])
    parts = [encoded(family, FIRST)[0], weighted(family, second, [2.0])]
    assert close(found, torch.cat(parts, dim=1))


@pytest.mark.parametrize("family", CLIP)
def test_a_break_begins_a_window(family: str) -> None:
    found = encoded(family, "a b BREAK c", WEIGHTED)[0]
    assert close(found, torch.cat([encoded(family, t)[0] for t in ("a b", "c")], dim=1))
    assert encoded(family, "a b BREAK c", PLAIN)[0].shape[1] == 77


@pytest.mark.parametrize("family", CLIP)
def test_the_windows_that_are_counted_are_those_that_are_encoded(family: str) -> None:
    count = describe(shared(family)).count_windows
    assert count is not None
    for prompt in (
        "",
        "a cat",
        FIRST,
        f"{FIRST} a",
        LONG,
        "a BREAK " * 12,
        "\U0001f468\u200d" * 90,
    ):
        for reading in (PLAIN, WEIGHTED):
            num_tokens = encoded(family, prompt, reading)[0].shape[1]
            assert count(prompt, reading.is_weighted) == num_tokens // 77


def test_escaped_brackets_are_characters() -> None:
    family = "stable_diffusion"
    assert close(encoded(family, r"a \(b\)", WEIGHTED)[0], encoded(family, "a (b)")[0])


@pytest.mark.parametrize("family", CLIP)
def test_several_pictures_and_prompts(family: str) -> None:
    prompts = ["(a:2) b", LONG]
    found = encoded(family, prompts, WEIGHTED, num_images_per_prompt=2)[0]
    alone = [encoded(family, each, WEIGHTED)[0] for each in prompts]
    assert found.shape[:2] == (4, 3 * 77)
    assert close(found[0:1, :77], alone[0])
    assert torch.equal(found[0], found[1])
    assert close(found[2:3], alone[1])
    assert close(found[3:4], alone[1])


def test_the_view_is_as_it_was_afterwards() -> None:
    view = copy.copy(shared("stable_diffusion"))
    before = dict(vars(view))
    read_prompts(view, PLAIN)
    view.encode_prompt(LONG, "cpu", 1, False)
    del view.encode_prompt
    assert vars(view) == before


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_long_and_weighted_prompts_in_flight(family: str) -> None:
    """Requests that read alike share forwards, and each is as alone."""
    pipeline = build(family)
    asked = [(LONG, PLAIN), ("(a:1.4) cat", WEIGHTED), (LONG, WEIGHTED), ("a cat", None)]

    def kwargs(index: int, prompt: str) -> dict[str, Any]:
        return example_kwargs(family, index) | {"prompt": prompt, "num_inference_steps": 3}

    def solo(index: int, prompt: str, reading: PromptReading | None) -> torch.Tensor:
        view = copy.copy(pipeline)
        view.scheduler = copy.deepcopy(pipeline.scheduler)
        if reading is not None:
            read_prompts(view, reading)
        return image_of(view(**kwargs(index, prompt)))

    expected = [solo(index, *each) for index, each in enumerate(asked)]
    engine = InFlightEngine(pipeline)
    tickets = [
        engine.submit(kwargs(index, prompt), prompts=reading)
        for index, (prompt, reading) in enumerate(asked)
    ]
    engine.run()
    engine.close()
    for ticket, image in zip(tickets, expected, strict=True):
        assert (image_of(ticket.result()) - image).abs().max() < 1e-4
    truncated = image_of(copy.copy(build(family))(**kwargs(0, LONG)))
    assert (expected[0] - truncated).abs().max() > 1e-4
