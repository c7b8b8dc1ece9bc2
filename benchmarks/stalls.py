"""How long one request waits while those of others are encoded and decoded.

    python -m benchmarks.stalls              # about four minutes on two cores
    python -m benchmarks.stalls --cpu-time   # on a machine that others use too

A request of many steps is in flight beside others of few, which come and end all the time. What is
measured is the time between two of its denoiser's outputs: the longest against the median. Those
others come one by one, or in bursts that are encoded, and decoded, together.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.engine import NUM_REQUESTS, Request
from benchmarks.report import Figure, Spread, write_report
from demo.build import build_pipeline
from handler.acceleration.channels_last import put_channels_last
from handler.engine import ForwardWrapper, InFlightEngine
from handler.engine.parking import ModuleCall
from handler.engine.ticket import Ticket

NUM_STEPS = 60
NUM_OTHERS = NUM_REQUESTS - 1
OTHER_STEPS = 10


class Watch(ForwardWrapper):
    """When each of a ticket's denoiser calls had its output, on `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.ticket: Ticket | None = None
        self.times_s: list[float] = []

    def after(self, call: ModuleCall, output: Any) -> None:
        """Note the time, if it is the watched ticket's."""
        if call.ticket is self.ticket:
            self.times_s.append(self.clock())


def gaps_s(pipeline: Any, clock: Callable[[], float], *, in_bursts: bool) -> list[float]:
    """The seconds between two outputs of the long request's denoiser, in order."""
    watch = Watch(clock)
    engine = InFlightEngine(pipeline, max_rows=2 * NUM_REQUESTS, wrappers=[watch])
    seeds = itertools.count(1)

    def submit_other() -> Ticket:
        request = Request("a blue star", OTHER_STEPS, 7.5, next(seeds), None)
        return engine.submit({**request.kwargs(), "output_type": "pil"})

    watch.ticket = engine.submit(Request("a red circle", NUM_STEPS, 7.5, 0, None).kwargs())
    others: list[Ticket] = []
    while not watch.ticket.ended:
        others = [ticket for ticket in others if not ticket.ended]
        if in_bursts:
            others += [submit_other() for _ in range(0 if others else NUM_OTHERS)]
        elif len(others) < NUM_OTHERS:
            others.append(submit_other())
        engine.step()
    engine.close()
    return [later - earlier for earlier, later in itertools.pairwise(watch.times_s)]


def measure(pipeline: Any, rounds: int, clock: Callable[[], float]) -> list[Figure]:
    """The longest gap against the median, with others that come one by one and in bursts."""
    figures = []
    for name, in_bursts in (("one by one", False), ("in bursts of 15", True)):
        runs = [gaps_s(pipeline, clock, in_bursts=in_bursts) for _ in range(rounds)]
        longest = Spread(tuple(max(gaps) / statistics.median(gaps) for gaps in runs))
        figures += [
            Figure(f"others {name}: longest / median gap", longest, "x", at_most=2.0),
            Figure(f"others {name}: median gap", Spread(tuple(map(statistics.median, runs))), "s"),
            Figure(f"others {name}: longest gap", Spread(tuple(map(max, runs))), "s"),
        ]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stalls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time, of one thread"
    )
    arguments = parser.parse_args(argv)
    if arguments.cpu_time:
        torch.set_num_threads(1)
    elif arguments.threads:
        torch.set_num_threads(arguments.threads)
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    parts = pipeline.components.items()
    put_channels_last({n: part for n, part in parts if isinstance(part, torch.nn.Module)})
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    figures = measure(pipeline, arguments.rounds, clock)
    details: dict[str, object] = {"torch_threads": torch.get_num_threads()}
    print(f"\n{write_report('stalls', figures, details)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
