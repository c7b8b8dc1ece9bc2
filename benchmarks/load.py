"""Open-loop load on running servers: in flight, without batching, and the upstream example's way.

    python -m benchmarks.load                  # about half an hour on two cores
    python -m benchmarks.load --speed max --rounds 3 --fractions 0.2,0.5,0.7,0.9,1.1,1.3

All systems are up, each on a TorchServe of its own, and take turns, so that a machine that slows
down slows them all: in every round each answers one lone request of every class, then 16 clients
that are always there. Then come Poisson arrivals of one seeded mix at fractions of the capacity of
`in flight`, and once in bursts. All see the same requests at the same times; a system is spared
rates above 1.3 of its own capacity, but for the one that the targets are about. Client and servers
share the machine, so what a reply costs to receive counts as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from benchmarks.report import RESULTS, Figure, Spread, write_report
from benchmarks.systems import System, one_at_a_time, ours
from benchmarks.traffic import (
    CLASSES,
    Outcome,
    Summary,
    Wish,
    burst_times,
    mixed_wishes,
    poisson_times,
    saturate,
    send_at,
    summarise,
)

PIPELINE = Path("demo/pipeline")
IN_FLIGHT, UNBATCHED = "in flight", "ours unbatched"
UPSTREAM = ("upstream 1 worker", "upstream 2 workers")
TARGET_FRACTION = 0.7
MAX_OWN_LOAD = 1.3
NUM_CLIENTS = 16
# Until the saturated server's requests are at all stages of their way.
FILL_S = 8.0


@dataclass(slots=True)
class Measured:
    """One system's figures; lists have one value a round."""

    solo_s: dict[str, list[float]] = field(default_factory=dict)
    solo_bytes: dict[str, int] = field(default_factory=dict)
    capacities_per_s: list[float] = field(default_factory=list)
    loads: dict[str, Summary] = field(default_factory=dict)

    @property
    def capacity_per_s(self) -> float:
        return statistics.median(self.capacities_per_s)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a system answers."""

    client: httpx2.AsyncClient
    url: str


def systems(folder: Path, arguments: argparse.Namespace) -> list[System]:
    """What is compared; `in flight` first, since the others' loads depend on its capacity."""
    speed: dict[str, object] = {"speed": arguments.speed, "cycle_ms": arguments.cycle_ms}
    speed["warm_up_sizes"] = [f"{wish.size_px}x{wish.size_px}" for wish in CLASSES]
    pixels = max(wish.size_px for wish in CLASSES) ** 2
    alone = {"max_rows": 2, "max_images": 1, "max_pixels": pixels, "max_pixels_in_flight": pixels}
    reply = {"reply": arguments.reply}
    return [
        ours(IN_FLIGHT, PIPELINE, folder, {**speed, "max_rows": arguments.max_rows}),
        ours(UNBATCHED, PIPELINE, folder, {**speed, **alone}),
        one_at_a_time(UPSTREAM[0], PIPELINE, folder, num_workers=1, settings=reply),
        one_at_a_time(
            UPSTREAM[1],
            PIPELINE,
            folder,
            num_workers=2,
            settings={**reply, "num_threads": max(1, (os.cpu_count() or 2) // 2)},
        ),
    ]


async def measure(
    targets: Mapping[str, Target],
    *,
    num_rounds: int,
    window_s: float,
    fractions: Sequence[float],
    seconds: float,
) -> dict[str, Measured]:
    """Everything about the systems, which take turns; loads are of `seconds` each."""
    measured = {name: Measured() for name in targets}
    for name, target in targets.items():
        _say(f"{name}: warming up")
        for wish in CLASSES:
            await _alone(target, wish)
    for number in range(1, num_rounds + 1):
        for name, target in targets.items():
            await _measure_round(target, measured[name], window_s)
            per_s = measured[name].capacities_per_s[-1]
            _say(f"round {number} of {num_rounds}, {name}: {per_s:.2f} images/s at most")
    mine = measured[IN_FLIGHT]
    bound_s = {kind: statistics.median(values) for kind, values in mine.solo_s.items()}
    for fraction in fractions:
        rate_per_s = fraction * mine.capacity_per_s
        is_target = fraction == TARGET_FRACTION
        shapes: dict[str, Callable[[float, float], list[float]]] = {"poisson": poisson_times}
        if is_target:
            shapes["bursts"] = burst_times
        for shape, times_of in shapes.items():
            times = times_of(rate_per_s, seconds)
            for name, target in targets.items():
                own_per_s = measured[name].capacity_per_s
                if rate_per_s > MAX_OWN_LOAD * own_per_s * 1.001 and not is_target:
                    continue
                wishes = mixed_wishes(len(times))
                outcomes = await send_at(target.client, target.url, wishes, times)
                summary = summarise(outcomes, seconds, bound_s)
                measured[name].loads[f"{shape} {fraction:g}"] = summary
                p95_s = summary.latency_s["all"]["p95"]
                _say(f"{shape}, {fraction:g} of our capacity, {name}: p95 {p95_s:.2f} s")
    return measured


def _say(line: str) -> None:
    """Show what is done: the whole takes a quarter of an hour."""
    print(line, file=sys.stderr, flush=True)


async def _measure_round(target: Target, measured: Measured, window_s: float) -> None:
    """One lone request of every class, then all clients at once."""
    for wish in CLASSES:
        outcome = await _alone(target, wish)
        measured.solo_s.setdefault(wish.kind, []).append(outcome.seconds)
        measured.solo_bytes[wish.kind] = outcome.num_bytes
    wishes = mixed_wishes(10_000, seed=1)
    per_s = await saturate(
        target.client, target.url, wishes, NUM_CLIENTS, fill_s=FILL_S, window_s=window_s
    )
    if not per_s:
        raise RuntimeError(f"{target.url} drew nothing in {window_s:g} s: --window must be longer")
    measured.capacities_per_s.append(per_s)


async def _alone(target: Target, wish: Wish) -> Outcome:
    (outcome,) = await send_at(target.client, target.url, [wish], [0.0])
    if not outcome.is_ok:
        raise RuntimeError(f"{target.url} answers {outcome.status} to {wish.body()}")
    return outcome


@asynccontextmanager
async def all_serving(
    compared: Sequence[System], state_dir: Path
) -> AsyncIterator[dict[str, Target]]:
    """Every system READY inside the block, and stopped after it."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx2.AsyncClient(timeout=900, limits=limits))
        yield {
            system.name: Target(
                client, stack.enter_context(system.serving(state_dir)).predictions_url
            )
            for system in compared
        }


def figures_of(measured: Mapping[str, Measured]) -> list[Figure]:
    """The targets, against the better of the upstream systems, and what they are made of."""
    mine, upstream = measured[IN_FLIGHT], [measured[name] for name in UPSTREAM]
    largest = CLASSES[-1].kind
    load = f"poisson {TARGET_FRACTION:g}"

    def by_round(ours_: Sequence[float], theirs: Iterable[float]) -> Spread:
        return Spread(tuple(a / b for a, b in zip(ours_, theirs, strict=True)))

    least_s = map(min, zip(*(m.solo_s[largest] for m in upstream), strict=True))
    most_per_s = map(max, zip(*(m.capacities_per_s for m in upstream), strict=True))
    solo = by_round(mine.solo_s[largest], least_s)
    capacity = by_round(mine.capacities_per_s, most_per_s)
    size = Spread((mine.solo_bytes[largest] / min(m.solo_bytes[largest] for m in upstream),))
    least_p95_s = min(m.loads[load].latency_s["all"]["p95"] for m in upstream)
    p95 = Spread((mine.loads[load].latency_s["all"]["p95"] / least_p95_s,))
    figures = [
        Figure("solo latency, 768px, 50 steps: ours / upstream", solo, "x", at_most=0.5),
        Figure("saturated throughput: ours / upstream", capacity, "x", at_least=3.0),
        Figure("bytes of a 768px picture: ours / upstream", size, "x", at_most=1 / 15),
        Figure(f"p95 at {TARGET_FRACTION:g} of our capacity: ours / upstream", p95, "x", None, 0.4),
    ]
    for name, each in measured.items():
        figures += [
            Figure(f"{name}: solo, {largest}", Spread(tuple(each.solo_s[largest])), "s"),
            Figure(f"{name}: capacity", Spread(tuple(each.capacities_per_s)), "images/s"),
        ]
        figures += [
            Figure(f"{name}: p95, {at}", Spread((summary.latency_s["all"]["p95"],)), "s")
            for at, summary in each.loads.items()
        ]
    return figures


def draw(measured: Mapping[str, Measured], path: Path) -> None:
    """Latency against load, one curve a system."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, each in measured.items():
        points = sorted(
            (summary.offered_per_s, summary.latency_s["all"])
            for at, summary in each.loads.items()
            if at.startswith("poisson")
        )
        rates = [rate for rate, _ in points]
        (line,) = axes.plot(rates, [p["p50"] for _, p in points], marker="o", label=name)
        axes.plot(rates, [p["p95"] for _, p in points], ":", marker=".", color=line.get_color())
        axes.axvline(each.capacity_per_s, color=line.get_color(), alpha=0.25)
    axes.set(xlabel="arrivals per second (Poisson)", ylabel="seconds", yscale="log")
    axes.set_title("Latency against load: median, dotted p95; thin lines: measured capacity")
    # Plain seconds in place of powers of ten.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.FuncFormatter(_labelled_minor))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _labelled_minor(seconds: float, _position: int | None) -> str:
    """Label 2 and 5 of each decade: all nine would overlap."""
    return f"{seconds:g}" if f"{seconds:e}"[0] in "25" else ""


async def _run(arguments: argparse.Namespace) -> dict[str, Measured]:
    fractions = sorted({TARGET_FRACTION, *map(float, arguments.fractions.split(","))})
    with TemporaryDirectory() as temporary:
        compared = systems(Path(temporary), arguments)
        async with all_serving(compared, Path(temporary) / "state") as targets:
            return await measure(
                targets,
                num_rounds=arguments.rounds,
                window_s=arguments.window,
                fractions=fractions,
                seconds=arguments.seconds,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="alone and saturated (default: 2)")
    parser.add_argument("--window", type=float, default=60, help="seconds saturated (default: 60)")
    parser.add_argument("--seconds", type=float, default=30, help="of each load (default: 30)")
    parser.add_argument("--fractions", default="0.2,0.5,0.7,1,1.3", help="of our capacity")
    parser.add_argument("--speed", default="safe", choices=("off", "safe", "max"))
    parser.add_argument("--max-rows", type=int, default=2 * NUM_CLIENTS, help="of our engine")
    parser.add_argument("--cycle-ms", type=float, default=20, help="of our handler (default: 20)")
    parser.add_argument("--reply", default="array", choices=("array", "png"), help="of upstream")
    parser.add_argument("--name", default="load", help="of the files in benchmarks/results")
    arguments = parser.parse_args(argv)
    measured = asyncio.run(_run(arguments))
    details: dict[str, Any] = {"settings": vars(arguments)}
    details["systems"] = {name: asdict(each) for name, each in measured.items()}
    path = write_report("load", figures_of(measured), details, file_name=arguments.name)
    draw(measured, RESULTS / f"{arguments.name}.png")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
