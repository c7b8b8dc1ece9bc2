"""Draw the sheets of the model card: `python -m demo.samples`, and again with `--pictures-in`."""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image, ImageDraw, ImageFont

from demo.evaluate import PIPELINE, Setting, load
from demo.sprites import Sprite, render

PROMPTS = (
    "a large red heart on a white background",
    "a small yellow star at the top of a blue background",
    "a green triangle on a pink background",
    "on black, a huge cyan ring",
    "an orange moon on the left of a purple background",
    "a white diamond, brown background",
    "pixel art of a big purple hexagon on yellow",
    "a tiny pink circle in the bottom right corner of a green background",
    "gray background with a large black cross",
    "a blue square on the right of an orange background",
    "a very shiny little brown heart on cyan, high quality",
    "a star",
)
SIDE_PX = 768
NUM_COLUMNS = 6
CELL_PX, CAPTION_PX, GAP_PX = 144, 44, 10


def captioned_sheet(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """The pictures in rows, each above its prompt."""
    width, height = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    num_columns = min(NUM_COLUMNS, len(pictures))
    num_rows = -(-len(pictures) // num_columns)
    sheet = Image.new("RGB", (num_columns * width + GAP_PX, num_rows * height + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, (prompt, picture) in enumerate(pictures):
        x = GAP_PX + index % num_columns * width
        y = GAP_PX + index // num_columns * height
        sheet.paste(picture.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + CELL_PX, y + CELL_PX), outline="#cccccc")
        pen.text((x, y + CELL_PX + 3), textwrap.fill(prompt, 25), fill="#333333", font=font)
    return sheet


def text_to_image(pipeline: DiffusionPipeline, seed: int) -> list[tuple[str, Image.Image]]:
    """All prompts, each with a seed of its own."""
    pictures = []
    for index, prompt in enumerate(PROMPTS):
        noise_of = torch.Generator().manual_seed(seed + index)
        image = pipeline(prompt, height=SIDE_PX, width=SIDE_PX, generator=noise_of).images[0]
        pictures.append((prompt, image))
    return pictures


def circle_and_mask() -> tuple[Image.Image, Image.Image]:
    """A picture to begin with, and a mask over its left half."""
    pixels = (render(Sprite("circle", "blue", "white", 7.0, 12.0, 12.0)) + 1) * 127.5
    circle = Image.fromarray(pixels.round().astype(np.uint8))
    circle = circle.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)
    left_half = Image.new("L", circle.size, 0)
    left_half.paste(255, (0, 0, SIDE_PX // 2, SIDE_PX))
    return circle, left_half


def pictures_in(pipeline: DiffusionPipeline, seed: int) -> list[tuple[str, Image.Image]]:
    """A picture, what image to image makes of it, and what inpainting makes of its left half."""
    prompt = "a red heart on a white background"
    circle, left_half = circle_and_mask()
    parts = {**pipeline.components, "requires_safety_checker": False}
    drawn = []
    for pipeline_class, given in (
        (StableDiffusionImg2ImgPipeline, {"strength": 0.9}),
        (StableDiffusionInpaintPipeline, {"mask_image": left_half}),
    ):
        task = pipeline_class(**parts)
        task.set_progress_bar_config(disable=True)
        noise_of = torch.Generator().manual_seed(seed)
        drawn.append(task(prompt, image=circle, generator=noise_of, **given).images[0])
    image_to_image, inpainted = drawn
    return [
        ("what goes in", circle),
        (f"{prompt}, strength 0.9", image_to_image),
        (f"{prompt}, mask on the left half", inpainted),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.samples", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder to draw with")
    parser.add_argument("--pictures-in", action="store_true", help="the sheet of pictures in")
    parser.add_argument("--out", type=Path, help="default: where the model card looks for it")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    args = parser.parse_args(argv)
    pipeline = load(args.pipeline, Setting("samples"))
    pictures = (pictures_in if args.pictures_in else text_to_image)(pipeline, args.seed)
    name = "pictures-in.png" if args.pictures_in else "samples.png"
    out = args.out or Path(__file__).with_name(name)
    captioned_sheet(pictures).save(out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
