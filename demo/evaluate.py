"""Measure whether the demo pipeline draws what prompts say: `python -m demo.evaluate`.

300 fixed prompts with fixed seeds, 100 of them for combinations that training never showed, judged
term by term (demo/judge.py). With `--open` 60 prompts that leave colours, shape or all of it open.
Exit code 1: fewer are right than is required of the setting, where something is.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from demo.grammar import Wish, combinations, full_wish, phrase
from demo.judge import Score, Verdict, judge, score

PIPELINE = Path(__file__).with_name("pipeline")
NUM_SEEN, NUM_HELD_OUT, NUM_OPEN = 200, 100, 60
PROMPT_SEED = 2024
TERMS = ("shape", "color", "background", "size", "position")


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, what it asks for, the seed it is drawn with, and its side of the split."""

    prompt: str
    wish: Wish
    seed: int
    is_held_out: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """What came of a case."""

    case: Case
    verdict: Verdict
    score: Score
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Setting:
    """How pictures are drawn, and what share of them has to be right: seen and held out.

    `scheduler` is a diffusers class name, None the pipeline's own.
    """

    name: str
    num_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None
    size_px: int = 768
    required: tuple[float, float] = (0.0, 0.0)


SETTINGS = (
    Setting("the defaults: DDIM, 50 steps, guidance 7.5", required=(0.95, 0.9)),
    Setting(
        "DPM++ 2M, 20 steps",
        num_steps=20,
        scheduler="DPMSolverMultistepScheduler",
        required=(0.85, 0.85),
    ),
    Setting("UniPC, 20 steps", 20, scheduler="UniPCMultistepScheduler"),
    Setting("Euler, 20 steps", 20, scheduler="EulerDiscreteScheduler"),
    Setting("DDIM, 10 steps", 10),
    Setting("DDIM, 50 steps, guidance 3", 50, 3.0),
    Setting("DDIM, 50 steps, guidance 1", 50, 1.0),
)


def cases() -> list[Case]:
    """The fixed prompts: seen combinations at random, and every one of the held-out."""
    rng = random.Random(PROMPT_SEED)
    triples = [(t, False) for t in rng.sample(combinations(held_out=False), NUM_SEEN)]
    triples += [(t, True) for t in combinations(held_out=True)[:NUM_HELD_OUT]]
    made = []
    for seed, (triple, is_held_out) in enumerate(triples):
        wish = full_wish(rng, triple)
        made.append(Case(phrase(rng, wish, plain=True), wish, seed, is_held_out))
    return made


def open_cases() -> list[Case]:
    """As many prompts of every kind that leaves something open; nothing is held out of those."""
    rng = random.Random(PROMPT_SEED)
    made = []
    for number in range(NUM_OPEN):
        color, shape, background = rng.choice(combinations(held_out=False))
        wish = (
            Wish(shape),
            Wish(shape, color),
            Wish(shape, background=background),
            Wish(shape, size=rng.choice(("small", "large"))),
            Wish(color=color, background=background),
            Wish(),
        )[number % 6]
        prompt = phrase(rng, wish, plain=True) if wish != Wish() else ""
        made.append(Case(prompt, wish, number, is_held_out=False))
    return made


def thin_out(every: Sequence[Case], num: int) -> list[Case]:
    """`num` of the cases, evenly over both sides of the split; all where there are fewer."""
    num = min(num, len(every))
    return [every[i * len(every) // num] for i in range(num)]


def load(folder: Path, setting: Setting) -> DiffusionPipeline:
    """The pipeline in `folder`, with the setting's scheduler."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if setting.scheduler is not None:
        scheduler_class = getattr(diffusers, setting.scheduler)
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    return pipeline


def draw(
    pipeline: DiffusionPipeline, chosen: Sequence[Case], setting: Setting, batch_size: int
) -> Iterator[Drawing]:
    """Draw and judge `chosen`, several at a time: each has its own seed."""
    for first in range(0, len(chosen), batch_size):
        batch = chosen[first : first + batch_size]
        images = pipeline(
            [case.prompt for case in batch],
            height=setting.size_px,
            width=setting.size_px,
            num_inference_steps=setting.num_steps,
            guidance_scale=setting.guidance_scale,
            generator=[torch.Generator().manual_seed(case.seed) for case in batch],
        ).images
        for case, image in zip(batch, images, strict=True):
            verdict = judge(image)
            yield Drawing(case, verdict, score(case.wish, verdict), image)


def shares(drawings: Sequence[Drawing]) -> dict[str, float]:
    """The share of pictures that are right, term by term and in all."""
    num = max(len(drawings), 1)
    result = {term: sum(getattr(d.score, term) for d in drawings) / num for term in TERMS}
    result["all"] = sum(d.score.is_right for d in drawings) / num
    result["all, clean"] = sum(d.score.is_right and d.score.clean for d in drawings) / num
    return result


def table(results: Sequence[dict[str, object]]) -> str:
    """The results as a Markdown table, in percent."""
    columns = (*TERMS, "all", "all, clean")
    lines = [
        "| setting | combinations | pictures | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for result in results:
        for side in ("seen", "held_out"):
            figures = result[side]
            assert isinstance(figures, dict)
            if not figures["num"]:
                continue
            cells = " | ".join(f"{100 * figures[column]:.1f}" for column in columns)
            name = f"{result['setting']} | {side.replace('_', '-')} | {figures['num']}"
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def evaluate(
    folder: Path, setting: Setting, chosen: Sequence[Case], batch_size: int
) -> tuple[dict[str, object], list[Drawing]]:
    """Draw all of `chosen` under one setting; the figures, and the drawings."""
    pipeline = load(folder, setting)
    started_s = time.monotonic()
    drawings = list(
        tqdm(
            draw(pipeline, chosen, setting, batch_size),
            total=len(chosen),
            desc=setting.name,
            disable=not sys.stderr.isatty(),
        )
    )
    result: dict[str, object] = {"setting": setting.name, "s": time.monotonic() - started_s}
    for side, is_held_out in (("seen", False), ("held_out", True)):
        half = [d for d in drawings if d.case.is_held_out == is_held_out]
        result[side] = {"num": len(half), **shares(half)}
    result["wrong"] = [
        {
            "prompt": d.case.prompt,
            "seed": d.case.seed,
            "wish": asdict(d.case.wish),
            "verdict": asdict(d.verdict),
        }
        for d in drawings
        if not d.score.is_right
    ]
    return result, drawings


def shortfalls(result: dict[str, object], setting: Setting) -> list[str]:
    """What `setting` requires and `result` does not reach, in words."""
    found = []
    for side, required in zip(("seen", "held_out"), setting.required, strict=True):
        figures = result[side]
        assert isinstance(figures, dict)
        if figures["num"] and figures["all"] < required:
            found.append(
                f"{setting.name}: {100 * figures['all']:.1f} % of the {side.replace('_', '-')} "
                f"combinations are right, {100 * required:.0f} % are required"
            )
    return found


def contact_sheet(images: Sequence[Image.Image], num_columns: int, cell_px: int) -> Image.Image:
    """The pictures in rows, each `cell_px` wide, with a thin gap."""
    gap = 4
    num_rows = -(-len(images) // num_columns)
    step = cell_px + gap
    sheet = Image.new("RGB", (num_columns * step - gap, num_rows * step - gap), "white")
    for index, image in enumerate(images):
        cell = image.resize((cell_px, cell_px), Image.Resampling.NEAREST)
        sheet.paste(cell, (index % num_columns * step, index // num_columns * step))
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder to judge")
    parser.add_argument("--settings", type=int, default=3, help="how many of the settings to try")
    parser.add_argument(
        "--only",
        type=int,
        choices=range(len(SETTINGS)),
        help="try this one setting alone (0 = the defaults)",
    )
    parser.add_argument("--prompts", type=int, help="draw this many of them")
    parser.add_argument("--open", action="store_true", help="prompts that leave terms open")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--json", type=Path, help="write figures and failures here")
    parser.add_argument("--sheet", type=Path, help="write the last setting's pictures here")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    every = open_cases() if args.open else cases()
    chosen = every if args.prompts is None else thin_out(every, args.prompts)
    tried = SETTINGS[: args.settings] if args.only is None else (SETTINGS[args.only],)
    results, missed = [], []
    drawings: list[Any] = []
    for setting in tried:
        result, drawings = evaluate(args.pipeline, setting, chosen, args.batch_size)
        results.append(result)
        missed += [] if args.open else shortfalls(result, setting)
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.sheet is not None:
        contact_sheet([d.image for d in drawings], 10, 96).save(args.sheet)
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
