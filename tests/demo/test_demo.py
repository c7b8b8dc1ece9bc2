"""The demo pipeline: its parts, its data, and what it draws."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from PIL import Image

from demo.build import LATENT_SCALE, build_autoencoder, build_pipeline
from demo.evaluate import (
    NUM_HELD_OUT,
    NUM_OPEN,
    NUM_SEEN,
    Setting,
    cases,
    contact_sheet,
    draw,
    evaluate,
    open_cases,
    shortfalls,
    table,
    thin_out,
)
from demo.grammar import (
    HELD_OUT,
    POSITIONS,
    SIZES,
    Wish,
    combinations,
    fulfil,
    phrase,
    sample,
    vocabulary,
)
from demo.judge import judge, score
from demo.sprites import COLORS, SHAPES, SIZE_PX, Sprite, coverage, render
from demo.tokens import build_tokenizer, learn_merges
from scripts.repository import REPOSITORY

PIPELINE = REPOSITORY / "demo" / "pipeline"
MAX_SIZE_BYTES = 12_000_000


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer(vocabulary())
    for word in vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word


def test_other_text_still_has_tokens_and_survives_the_round_trip() -> None:
    tokenizer = build_tokenizer(vocabulary())
    for text in ("xylophone", "été 日本", "red42!", "Ω≈ç√"):
        tokens = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in tokens[1:-1]
        assert tokenizer.decode(tokens[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_upper_case_and_spaces_do_not_matter() -> None:
    tokenizer = build_tokenizer(vocabulary())
    assert tokenizer("A  RED Heart").input_ids == tokenizer("a red heart").input_ids


def test_merges_are_learned_in_an_order_that_replays() -> None:
    assert learn_merges(["ab"]) == [("a", "b</w>")]
    assert learn_merges([]) == []


def test_the_shipped_tokenizer_is_the_built_one(pipeline: DiffusionPipeline) -> None:
    built = build_tokenizer(vocabulary())
    assert pipeline.tokenizer.get_vocab() == built.get_vocab()
    text = "a large violet crescent in the top left corner, zzyzx"
    assert pipeline.tokenizer(text).input_ids == built(text).input_ids


def test_the_split_is_a_split() -> None:
    seen, held_out = combinations(held_out=False), combinations(held_out=True)
    assert len(held_out) == len(HELD_OUT) == 100
    assert not set(seen) & set(held_out)
    assert len(seen) + len(held_out) == len(COLORS) * (len(COLORS) - 1) * len(SHAPES)
    assert set(Counter(shape for _, shape, _ in held_out).values()) == {100 // len(SHAPES)}


def test_training_never_shows_a_held_out_combination() -> None:
    rng = random.Random(0)
    triples = combinations(held_out=False)
    for _ in range(2_000):
        sprite = sample(rng, triples).sprite
        assert (sprite.color, sprite.shape, sprite.background) not in HELD_OUT


def test_shapes_are_not_cut_off() -> None:
    rng = random.Random(1)
    triples = combinations(held_out=False)
    for _ in range(300):
        sprite = sample(rng, triples).sprite
        placed = coverage(sprite.shape, sprite.radius_px, sprite.x_px, sprite.y_px)
        centred = coverage(sprite.shape, sprite.radius_px, SIZE_PX / 2, SIZE_PX / 2)
        assert placed.sum() == pytest.approx(centred.sum(), rel=1e-3), sprite
        assert abs(render(sprite)).max() <= 1


@pytest.mark.parametrize("size", [None, *SIZES])
@pytest.mark.parametrize("position", [None, *POSITIONS])
def test_a_wish_is_fulfilled_in_the_judges_eyes(size: str | None, position: str | None) -> None:
    rng = random.Random(2)
    for _ in range(8):
        wish = Wish("heart", "red", "white", size, position)
        sprite = fulfil(rng, wish, ("red", "heart", "white"))
        pixels = ((render(sprite) + 1) * 127.5).round().astype(np.uint8)
        assert score(wish, judge(Image.fromarray(pixels))).is_right, sprite


def test_a_plain_prompt_says_every_term() -> None:
    rng = random.Random(3)
    for _ in range(200):
        text = phrase(rng, Wish("star", "red", "blue", "small", "top"), plain=True)
        assert {"star", "red", "blue", "top"} <= set(text.replace(",", " ").split()), text


def test_the_autoencoder_is_exact() -> None:
    vae = build_autoencoder()
    latents = torch.rand(2, 4, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents[:, 3] = 0
    blocks = latents[:, :3].repeat_interleave(32, dim=2).repeat_interleave(32, dim=3)
    with torch.no_grad():
        decoded = vae.decode(latents / LATENT_SCALE).sample
        encoded = vae.encode(blocks).latents * LATENT_SCALE
    assert (decoded - blocks).abs().max() < 1e-4
    assert (encoded - latents).abs().max() < 1e-4


def test_the_shipped_autoencoder_and_scheduler_are_the_built_ones(
    pipeline: DiffusionPipeline,
) -> None:
    built = build_pipeline()
    for name, value in built.vae.state_dict().items():
        assert torch.equal(pipeline.vae.state_dict()[name], value), name
    shipped, ours = (
        {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        for scheduler in (pipeline.scheduler, built.scheduler)
    )
    assert shipped == ours
    for part in ("unet", "text_encoder"):
        shapes = {n: v.shape for n, v in getattr(pipeline, part).state_dict().items()}
        assert shapes == {n: v.shape for n, v in getattr(built, part).state_dict().items()}


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_SIZE_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


def test_it_loads_with_nothing_of_ours() -> None:
    """In a process that cannot import this project, from another folder."""
    script = (
        "import sys; from diffusers import DiffusionPipeline\n"
        f"p = DiffusionPipeline.from_pretrained({str(PIPELINE)!r})\n"
        "assert type(p).__name__ == 'StableDiffusionPipeline' and p.vae_scale_factor == 32\n"
        "assert {str(m.dtype) for m in (p.unet, p.vae, p.text_encoder)} == {'torch.float32'}\n"
        "assert not any(name.split('.')[0] in ('demo', 'handler') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd="/", timeout=120)


def test_it_draws_what_the_prompts_say(pipeline: DiffusionPipeline) -> None:
    """Twelve of the evaluation's prompts at a quarter of the work."""
    setting = Setting("quick", num_steps=16, size_px=768)
    drawings = list(draw(pipeline, thin_out(cases(), 12), setting, batch_size=6))
    right = [drawing.score.is_right for drawing in drawings]
    assert sum(right) >= 11, [(d.case.prompt, d.verdict) for d in drawings if not d.score.is_right]


def test_the_seed_decides_what_the_prompt_leaves_open(pipeline: DiffusionPipeline) -> None:
    images = [
        pipeline(
            "a red circle on a white background",
            height=768,
            width=768,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert images[0].tobytes() == images[1].tobytes()
    verdicts = [judge(image) for image in images[1:]]
    assert len({(v.radius_px, v.x_px, v.y_px) for v in verdicts}) >= 3


def test_image_to_image_keeps_the_place_and_takes_the_colour(pipeline: DiffusionPipeline) -> None:
    truth = Sprite("heart", "red", "white", 8.0, 12.0, 12.0)
    pixels = ((render(truth) + 1) * 127.5).round().astype(np.uint8)
    start = Image.fromarray(pixels).resize((768, 768), Image.Resampling.NEAREST)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = other(
        "a large red heart on a white background",
        image=start,
        strength=0.5,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    verdict = judge(image)
    assert (verdict.shape, verdict.color, verdict.background) == ("heart", "red", "white")
    assert abs(verdict.x_px - 12) <= 1
    assert abs(verdict.y_px - 12) <= 1


def test_the_cases_are_fixed_and_split() -> None:
    every = cases()
    assert every == cases()
    assert len(every) == NUM_SEEN + NUM_HELD_OUT
    assert sum(case.is_held_out for case in every) == NUM_HELD_OUT
    for case in every:
        triple = (case.wish.color, case.wish.shape, case.wish.background)
        assert (triple in HELD_OUT) == case.is_held_out
    assert len({case.seed for case in every}) == len(every)


def test_open_cases_name_what_they_name_and_no_more() -> None:
    every = open_cases()
    assert every == open_cases()
    assert len(every) == NUM_OPEN
    for case in every:
        assert None in (case.wish.shape, case.wish.color, case.wish.background)
        assert (case.prompt == "") == (case.wish == Wish())
    assert sum(case.wish == Wish() for case in every) == NUM_OPEN // 6


def test_the_evaluation_counts_both_sides(tmp_path: Path) -> None:
    setting = Setting("tiny", num_steps=2, size_px=768)
    result, drawings = evaluate(PIPELINE, setting, thin_out(cases(), 3), batch_size=3)
    assert [result[side]["num"] for side in ("seen", "held_out")] == [2, 1]  # type: ignore[index]
    lines = table([result]).splitlines()
    assert lines[2].startswith("| tiny | seen | 2 |")
    assert lines[3].startswith("| tiny | held-out | 1 |")
    all_right = {"num": 4, "all": 1.0}
    half_right = {"num": 4, "all": 0.5}
    wanted = Setting("tiny", required=(0.5, 0.6))
    assert shortfalls({"seen": half_right, "held_out": all_right}, wanted) == []
    (missed,) = shortfalls({"seen": half_right, "held_out": half_right}, wanted)
    assert missed == "tiny: 50.0 % of the held-out combinations are right, 60 % are required"
    sheet = contact_sheet([d.image for d in drawings], num_columns=2, cell_px=48)
    assert sheet.size == (100, 100)
