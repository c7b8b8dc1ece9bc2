"""What predicted steps and unguided steps save, and what they change in the pictures.

    python -m benchmarks.step_cache                          # about fifteen minutes on two cores
    python -m benchmarks.step_cache --prompts 8 --rounds 1   # a look
    python -m benchmarks.step_cache --rounds 0               # the pictures: also on a busy machine

The demo's trained pipeline, on an engine with the worker's wrappers. Throughput: sixteen requests
always in flight, with a step cache and without by turns. Pictures: fixed prompts and seeds, judged
term by term as `demo.evaluate` does, and compared with those of which everything was computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.engine import DEMO, NUM_REQUESTS, Request, mixed_requests
from benchmarks.report import Figure, Spread, write_report
from demo.evaluate import Case, cases, thin_out
from demo.judge import judge, score
from handler.acceleration.channels_last import put_channels_last
from handler.acceleration.guidance_interval import GuidanceInterval
from handler.acceleration.step_cache import StepCache
from handler.engine import InFlightEngine
from handler.engine.shortcuts import NONE, Shortcuts

HALF = Shortcuts(step_cache=0.5)
NUM_IMAGES = 3 * NUM_REQUESTS
SIZE_PX = 768
KINDS = ((50, None), (20, "dpm++"), (30, "euler_a"))
"""Steps and schedulers of the pictures that are judged; the last one is ancestral."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How the pictures of one line of the table are drawn."""

    name: str
    num_steps: int
    scheduler: str | None
    shortcuts: Shortcuts = NONE


@dataclass(frozen=True, slots=True)
class Drawn:
    """The pictures of a setting, (N, H, W, 3) of 0 to 255, and what they took."""

    images: np.ndarray[Any, Any]
    share_right: float
    forwards: float
    """Of the denoiser, for each picture."""
    rows: float
    """Of these, for each picture."""


def settings_of(num_steps: int, scheduler: str | None) -> list[Setting]:
    """Everything computed, which the others are compared with, then what is left out."""
    full = Setting("all computed", num_steps, scheduler)
    shares = [
        replace(full, name=f"step_cache {share:g}", shortcuts=Shortcuts(step_cache=share))
        for share in (0.25, 0.5, 0.67, 1.0)
    ]
    intervals = [
        replace(full, name=f"guidance to {end:g}", shortcuts=Shortcuts(guidance_end=end))
        for end in (0.8, 0.5)
    ]
    both = replace(
        full, name="step_cache 0.5, guidance to 0.8", shortcuts=replace(HALF, guidance_end=0.8)
    )
    return [full, *shares, *intervals, both]


def draw(pipeline: Any, chosen: Sequence[Case], setting: Setting) -> Drawn:
    """Draw and judge `chosen`, as many in flight as fit."""
    engine = _engine(pipeline)
    with _rows_of(pipeline.unet) as rows:
        tickets = [
            engine.submit(
                {
                    "prompt": case.prompt,
                    "height": SIZE_PX,
                    "width": SIZE_PX,
                    "num_inference_steps": setting.num_steps,
                    "guidance_scale": 7.5,
                    "generator": torch.Generator().manual_seed(case.seed),
                },
                scheduler=setting.scheduler,
                shortcuts=setting.shortcuts,
            )
            for case in chosen
        ]
        engine.run()
    answered = engine.counters.answered_calls
    engine.close()
    images = [ticket.result().images[0] for ticket in tickets]
    right = [score(c.wish, judge(i)).is_right for c, i in zip(chosen, images, strict=True)]
    return Drawn(
        np.stack([np.asarray(image, dtype=np.float32) for image in images]),
        sum(right) / len(right),
        setting.num_steps - answered / len(chosen),
        sum(rows) / len(chosen),
    )


def compare(
    pipeline: Any, chosen: Sequence[Case], num_steps: int, scheduler: str | None
) -> list[dict[str, object]]:
    """A line for each setting; the last draws as few steps as half a cache computes."""
    lines: list[dict[str, object]] = []
    full: Drawn | None = None
    fewer = num_steps

    def add(setting: Setting) -> Drawn:
        drawn = draw(pipeline, chosen, setting)
        off = np.abs(drawn.images - (full or drawn).images).mean((1, 2, 3))
        lines.append(
            {
                "scheduler": scheduler or "DDIM",
                "steps": num_steps,
                "setting": setting.name,
                "forwards": round(drawn.forwards, 1),
                "rows": round(drawn.rows, 1),
                "right_percent": round(100 * drawn.share_right, 1),
                "difference_of_255": round(float(off.mean()), 2),
                "of_the_worst_picture": round(float(off.max()), 2),
            }
        )
        print(lines[-1], file=sys.stderr, flush=True)  # all of it takes minutes
        return drawn

    for setting in settings_of(num_steps, scheduler):
        drawn = add(setting)
        full = full or drawn
        if setting.shortcuts == HALF:
            fewer = round(drawn.forwards)
    add(Setting(f"{fewer} steps in place of {num_steps}", fewer, scheduler))
    return lines


def table(lines: Sequence[dict[str, object]]) -> str:
    """The lines as a Markdown table."""
    names = list(lines[0])
    rows = [names, ["---"] * len(names), *([str(line[n]) for n in names] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def measure_throughput(pipeline: Any, rounds: int) -> list[Figure]:
    """Images a second with half of the steps predicted, against all computed, by turns."""
    same = [Request("a red circle on a white background", 50, 7.5, i, None) for i in range(16)]
    figures = []
    for name, requests, at_least in (
        ("50 steps, saturated", [same[i % 16] for i in range(NUM_IMAGES)], 1.6),
        ("mixed steps and schedulers", 3 * mixed_requests(), None),
    ):
        runs = [
            [_images_per_s(pipeline, requests, shortcuts) for shortcuts in (NONE, HALF)]
            for _ in range(rounds)
        ]
        gains = Spread(tuple(half / full for full, half in runs))
        figures.append(Figure(f"{name}: step_cache 0.5 / off", gains, "x", at_least))
        for place, setting in enumerate(("off", "step_cache 0.5")):
            per_s = Spread(tuple(run[place] for run in runs))
            figures.append(Figure(f"{name}: {setting}", per_s, "images/s"))
    return figures


def _images_per_s(pipeline: Any, requests: Sequence[Request], shortcuts: Shortcuts) -> float:
    """All `requests`, sixteen of them always in flight while there are as many."""
    engine = _engine(pipeline)
    started_s = time.perf_counter()
    for request in requests:
        engine.submit(request.kwargs(), scheduler=request.scheduler, shortcuts=shortcuts)
    tickets = engine.run()
    seconds = time.perf_counter() - started_s
    engine.close()
    for ticket in tickets:
        ticket.result()
    return len(requests) / seconds


def _engine(pipeline: Any) -> InFlightEngine:
    wrappers = [GuidanceInterval(), StepCache()]
    return InFlightEngine(pipeline, max_rows=2 * NUM_REQUESTS, wrappers=wrappers)


@contextmanager
def _rows_of(unet: Any) -> Iterator[list[int]]:
    rows: list[int] = []
    hook = unet.conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


def main(argv: Sequence[str] | None = None, load: Callable[[], Any] | None = None) -> int:
    """Run the command line; `load` makes another pipeline than the demo's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of throughput (default: 3)")
    parser.add_argument("--prompts", type=int, default=60, help="to judge (default: 60)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipeline = (load or _trained)()
    threads: dict[str, object] = {"torch_threads": torch.get_num_threads()}
    if arguments.rounds:
        figures = measure_throughput(pipeline, arguments.rounds)
        print(f"\n{write_report('step_cache', figures, threads)}")
    if arguments.prompts:
        lines: list[dict[str, object]] = []
        chosen = thin_out(cases(), arguments.prompts)
        for num_steps, scheduler in KINDS:
            lines += compare(pipeline, chosen, num_steps, scheduler)
        print(f"\n{table(lines)}\n")
        details = {**threads, "pictures": lines}
        path = write_report(
            "step_cache", [], details, file_name="step_cache_pictures", is_quiet=True
        )
        print(path)
    return 0


def _trained() -> Any:
    """The demo's pipeline, its convolutions as ``speed: safe`` has them."""
    pipeline: Any = DiffusionPipeline.from_pretrained(DEMO)
    pipeline.set_progress_bar_config(disable=True)
    parts = pipeline.components.items()
    put_channels_last({n: part for n, part in parts if isinstance(part, torch.nn.Module)})
    return pipeline


if __name__ == "__main__":
    raise SystemExit(main())
