"""In-flight batching beside processes that keep cores busy: threads as the handler chooses them.

    python -m benchmarks.neighbours            # in this process, about three minutes on two cores
    python -m benchmarks.neighbours --served   # through TorchServe as well, about ten more

In float32, `--busy` processes beside it (one by default) and none: the number of threads that the
handler chooses as it goes against all threads; served, also against two one-at-a-time workers with
a thread each, which wait for nobody. All take turns; figures are ratios of one round.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks.engine import NUM_REQUESTS, Request, mixed_requests, submit, timed
from benchmarks.report import Figure, Spread, write_report
from benchmarks.served import NUM_CLIENTS, PIPELINE, saturate
from benchmarks.served import NUM_REQUESTS as NUM_SERVED
from benchmarks.systems import one_at_a_time, ours
from demo.build import build_pipeline
from handler.acceleration.channels_last import put_channels_last
from handler.acceleration.thread_choice import ThreadChoice
from handler.engine import ForwardWrapper, InFlightEngine

CHOSEN, ALL = "threads chosen", "all threads"
WORKERS = "two workers of a thread"
_BUSY = "while True: pass"


@contextmanager
def neighbours(num_busy: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(num_busy)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


class _Side:
    """An engine on a copy of the pipeline; it learns for as long as a server would."""

    def __init__(self, pipeline: DiffusionPipeline, wrappers: Sequence[ForwardWrapper]) -> None:
        self.engine = InFlightEngine(
            copy.deepcopy(pipeline), max_rows=2 * NUM_REQUESTS, wrappers=wrappers
        )

    def images_per_s(self, requests: Sequence[Request]) -> float:
        """What it draws a second."""
        tickets = [submit(self.engine, request) for request in requests]
        seconds, _ = timed(self.engine.run)
        for ticket in tickets:
            ticket.result()
        return len(requests) / seconds


def measure_engine(
    pipeline: Any, requests: Sequence[Request], rounds: int, num_busy: int
) -> tuple[list[Figure], dict[str, object]]:
    """The engine with the threads that are chosen and with all, beside others and alone."""
    choice = ThreadChoice(torch.get_num_threads())
    sides = {CHOSEN: _Side(pipeline, [choice]), ALL: _Side(pipeline, [])}
    figures: list[Figure] = []
    left_at: dict[str, object] = {}
    for count, bound in ((num_busy, 1.0), (0, 0.99)):
        per_s: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(rounds):
            with neighbours(count):
                for name in (CHOSEN, ALL) if i % 2 else (ALL, CHOSEN):
                    per_s[name].append(sides[name].images_per_s(requests))
        ratios = tuple(a / b for a, b in zip(per_s[CHOSEN], per_s[ALL], strict=True))
        words = f"{count} busy" if count else "alone"
        figures.append(Figure(f"{words}: {CHOSEN} / {ALL}", Spread(ratios), "x", bound))
        figures += [
            Figure(f"{words}: {name}", Spread(tuple(each)), "images/s")
            for name, each in per_s.items()
        ]
        left_at[words] = choice.policy.present
    for side in sides.values():
        side.engine.close()
    return figures, {"threads_at_the_end": left_at}


def measure_served(rounds: int, num_busy: int, num_requests: int) -> list[Figure]:
    """Saturated servers beside others and alone, each ratio of one round."""
    settings = {"max_rows": 2 * NUM_CLIENTS}
    figures: list[Figure] = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fixed = {**settings, "num_threads": torch.get_num_threads()}
        alone = {"reply": "png", "num_threads": 1}
        systems = [
            ours(CHOSEN, PIPELINE, folder, settings),
            ours(ALL, PIPELINE, folder, fixed),
            one_at_a_time(WORKERS, PIPELINE, folder, num_workers=2, settings=alone),
        ]
        for count, bound in ((num_busy, 1.0), (0, None)):
            per_s: dict[str, list[float]] = {system.name: [] for system in systems}
            for i in range(rounds):
                with neighbours(count):
                    for system in systems if i % 2 else reversed(systems):
                        load = saturate(system, folder / "state", num_requests)
                        per_s[system.name].append(load.images_per_s)
            words = f"served, {count} busy" if count else "served, alone"
            for name in (CHOSEN, ALL):
                ratios = tuple(a / b for a, b in zip(per_s[name], per_s[WORKERS], strict=True))
                held = bound if name == CHOSEN else None
                figures.append(Figure(f"{words}: {name} / {WORKERS}", Spread(ratios), "x", held))
            figures += [
                Figure(f"{words}: {name}", Spread(tuple(each)), "images/s")
                for name, each in per_s.items()
            ]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side (default: 3)")
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside (default: 1)")
    parser.add_argument("--served", action="store_true", help="through TorchServe as well")
    parser.add_argument("--only-served", action="store_true", help="through TorchServe alone")
    parser.add_argument(
        "--requests", type=int, help=f"a round (default: {NUM_REQUESTS}, served {NUM_SERVED})"
    )
    arguments = parser.parse_args(argv)
    details: dict[str, object] = {"torch_threads": torch.get_num_threads()}
    figures: list[Figure] = []
    if not arguments.only_served:
        pipeline = build_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        parts = pipeline.components.items()
        put_channels_last({n: part for n, part in parts if isinstance(part, torch.nn.Module)})
        requests = mixed_requests()[: arguments.requests]
        figures, more = measure_engine(pipeline, requests, arguments.rounds, arguments.busy)
        details |= more
    if arguments.served or arguments.only_served:
        num_requests = arguments.requests or NUM_SERVED
        figures += measure_served(arguments.rounds, arguments.busy, num_requests)
    print(f"\n{write_report('neighbours', figures, details)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
