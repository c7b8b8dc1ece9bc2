"""Draw the sample sheet of the model card: `python -m demo.samples`."""

import argparse
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from demo.evaluate import PIPELINE, Setting, load

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
NUM_COLUMNS = 6
CELL_PX, CAPTION_PX, GAP_PX = 144, 44, 10


def captioned_sheet(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """The pictures in rows, each above its prompt."""
    width, height = CELL_PX + GAP_PX, CELL_PX + CAPTION_PX + GAP_PX
    num_rows = -(-len(pictures) // NUM_COLUMNS)
    sheet = Image.new("RGB", (NUM_COLUMNS * width + GAP_PX, num_rows * height + GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, (prompt, picture) in enumerate(pictures):
        x = GAP_PX + index % NUM_COLUMNS * width
        y = GAP_PX + index // NUM_COLUMNS * height
        sheet.paste(picture.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + CELL_PX, y + CELL_PX), outline="#cccccc")
        pen.text((x, y + CELL_PX + 3), textwrap.fill(prompt, 25), fill="#333333", font=font)
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.samples", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder to draw with")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("samples.png"))
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    args = parser.parse_args(argv)
    pipeline = load(args.pipeline, Setting("samples"))
    pictures = []
    for index, prompt in enumerate(PROMPTS):
        noise_of = torch.Generator().manual_seed(args.seed + index)
        image = pipeline(prompt, height=768, width=768, generator=noise_of).images[0]
        pictures.append((prompt, image))
    captioned_sheet(pictures).save(args.out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
