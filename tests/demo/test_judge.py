"""The judge against rendered truth and against planted errors."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from demo.grammar import POSITIONS, SIZES, Wish, combinations, fulfil
from demo.judge import judge, score
from demo.sprites import COLORS, SHAPES, Sprite, render

TRIPLES = combinations(held_out=False) + combinations(held_out=True)


def picture(sprite: Sprite, noise: float = 0.0) -> Image.Image:
    rng = np.random.default_rng(0)
    values = (render(sprite) + 1) * 127.5
    values = values + rng.normal(0, 1, values.shape) * noise
    pixels = np.clip(values.round(), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((768, 768), Image.Resampling.NEAREST)


def truths(num: int) -> list[tuple[Wish, Sprite]]:
    rng = random.Random(5)
    made = []
    for index in range(num):
        color, shape, background = rng.choice(TRIPLES)
        size = rng.choice((None, *SIZES))
        position = rng.choice((None, *POSITIONS))
        wish = Wish(tuple(SHAPES)[index % len(SHAPES)], color, background, size, position)
        made.append((wish, fulfil(rng, wish, (color, wish.shape or shape, background))))
    return made


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_rendered_truth_is_all_right(noise: float) -> None:
    for wish, sprite in truths(60):
        verdict = judge(picture(sprite, noise))
        outcome = score(wish, verdict)
        assert outcome.is_right, (wish, sprite, verdict)
        assert noise or outcome.clean, (sprite, verdict)


def test_a_clean_picture_is_read_back_exactly() -> None:
    for _, sprite in truths(50):
        verdict = judge(picture(sprite))
        read = Sprite(
            verdict.shape,
            verdict.color or "",
            verdict.background or "",
            verdict.radius_px,
            verdict.x_px,
            verdict.y_px,
        )
        assert read == sprite
        assert verdict.misfit < 0.02


@pytest.mark.parametrize("field", ["shape", "color", "background"])
def test_a_wrong_term_is_found(field: str) -> None:
    names = list(SHAPES if field == "shape" else COLORS)
    for wish, sprite in truths(20):
        for name in names:
            if name in (sprite.shape, sprite.color, sprite.background):
                continue
            wrong = judge(picture(replace(sprite, **{field: name}), noise=4.0))
            outcome = score(wish, wrong)
            assert not getattr(outcome, field), (wish, name, wrong)


def test_a_wrong_size_is_found() -> None:
    for radius in (7.0, 7.5, 8.0, 8.5):
        verdict = judge(picture(Sprite("star", "red", "white", radius, 12, 12)))
        assert not score(Wish(size="small"), verdict).size
    for radius in (4.5, 5.0, 5.5, 6.0):
        verdict = judge(picture(Sprite("star", "red", "white", radius, 12, 12)))
        assert not score(Wish(size="large"), verdict).size


@pytest.mark.parametrize(
    ("position", "x_px", "y_px"),
    [("left", 15, 12), ("right", 9, 12), ("top", 12, 15), ("bottom", 12, 9)],
)
def test_a_wrong_place_is_found(position: str, x_px: float, y_px: float) -> None:
    for sprite in (
        Sprite("heart", "pink", "black", 5, x_px, y_px),
        Sprite("heart", "pink", "black", 5, 12, 12),
    ):
        assert not score(Wish(position=position), judge(picture(sprite))).position


def test_an_empty_picture_shows_nothing() -> None:
    verdict = judge(Image.new("RGB", (768, 768), COLORS["blue"]))
    assert not score(Wish(shape=verdict.shape), verdict).shape


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    verdict = judge(Image.fromarray(noise))
    assert not score(Wish(shape=verdict.shape), verdict).shape


def test_a_mutilated_shape_is_not_clean() -> None:
    """Half a heart is no heart, and a heart with a hole is no clean one."""
    whole = Sprite("heart", "red", "white", 8, 12, 12)
    for box in ((0, 0, 384, 768), (320, 320, 448, 480)):
        image = picture(whole)
        image.paste(COLORS["white"], box)
        verdict = judge(image)
        assert not score(Wish(shape="heart"), verdict).clean
        assert box[0] or not score(Wish(shape="heart"), verdict).shape


def test_a_colour_between_two_names_is_neither() -> None:
    image = picture(Sprite("circle", "black", "white", 8, 12, 12))
    image.paste((128, 255, 0), (0, 0, 96, 768))
    image.paste((128, 255, 0), (672, 0, 768, 768))
    image.paste((128, 255, 0), (0, 0, 768, 96))
    image.paste((128, 255, 0), (0, 672, 768, 768))
    assert judge(image).background is None
