"""Open-loop load on running servers: in flight, without batching, and the upstream example's way.

    python -m benchmarks.load                  # about twenty minutes on two cores
    python -m benchmarks.load --speed max --seconds 60 --fractions 0.2,0.5,0.7,0.9,1.1,1.3

Each system gets, on a TorchServe of its own: its solo latencies, its capacity (a closed loop of 16
clients), then Poisson arrivals of one seeded mix at fractions of the capacity of `in flight`, and
once in bursts. All systems see the same requests at the same times; a system is spared rates above
1.3 of its own capacity, but for the one that the targets are about. Client and servers share the
machine, so what a reply costs to receive counts as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from benchmarks.report import RESULTS, Figure, Spread, write_report
from benchmarks.systems import System, one_at_a_time, ours
from benchmarks.traffic import (
    CLASSES,
    Summary,
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
NUM_SOLO = 3


@dataclass(slots=True)
class Measured:
    """One system's figures."""

    solo_s: dict[str, float] = field(default_factory=dict)
    solo_bytes: dict[str, int] = field(default_factory=dict)
    capacity_per_s: float = 0.0
    loads: dict[str, Summary] = field(default_factory=dict)


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
    url: str,
    *,
    in_flight_per_s: float | None,
    fractions: Sequence[float],
    seconds: float,
    transport: httpx2.AsyncBaseTransport | None = None,
    deadlines_s: dict[str, float] | None = None,
) -> Measured:
    """Everything about the system at `url`; without `in_flight_per_s` it is `in flight` itself."""
    measured = Measured()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(timeout=900, limits=limits, transport=transport) as client:
        for wish in CLASSES:
            done = await send_at(client, url, [wish], [0.0])
            for _ in range(NUM_SOLO):
                done += await send_at(client, url, [wish], [0.0])
            failed = [outcome.status for outcome in done if not outcome.is_ok]
            if failed:
                raise RuntimeError(f"{url} answers {failed[0]} to {wish.body()}")
            # The first one warmed it up.
            measured.solo_s[wish.kind] = sorted(o.seconds for o in done[1:])[NUM_SOLO // 2]
            measured.solo_bytes[wish.kind] = done[-1].num_bytes
        wishes = mixed_wishes(2 * NUM_CLIENTS, seed=1)
        _, took_s = await saturate(client, url, wishes, NUM_CLIENTS)
        measured.capacity_per_s = len(wishes) / took_s
        reference_per_s = in_flight_per_s or measured.capacity_per_s
        bound_s = deadlines_s or measured.solo_s
        for fraction in fractions:
            rate_per_s = fraction * reference_per_s
            is_target = fraction == TARGET_FRACTION
            if rate_per_s > MAX_OWN_LOAD * measured.capacity_per_s * 1.001 and not is_target:
                continue
            shapes = {"poisson": poisson_times, "bursts": burst_times}
            for shape, times_of in shapes.items() if is_target else [("poisson", poisson_times)]:
                times = times_of(rate_per_s, seconds)
                outcomes = await send_at(client, url, mixed_wishes(len(times)), times)
                measured.loads[f"{shape} {fraction:g}"] = summarise(outcomes, seconds, bound_s)
    return measured


def figures_of(measured: dict[str, Measured]) -> list[Figure]:
    """The targets, against the better of the upstream systems, and what they are made of."""
    mine, upstream = measured[IN_FLIGHT], [measured[name] for name in UPSTREAM]
    largest = CLASSES[-1].kind
    load = f"poisson {TARGET_FRACTION:g}"

    def ratio(ours_: float, theirs: float) -> Spread:
        return Spread((ours_ / theirs,))

    solo = ratio(mine.solo_s[largest], min(m.solo_s[largest] for m in upstream))
    capacity = ratio(mine.capacity_per_s, max(m.capacity_per_s for m in upstream))
    size = ratio(mine.solo_bytes[largest], min(m.solo_bytes[largest] for m in upstream))
    p95 = ratio(
        mine.loads[load].latency_s["all"]["p95"],
        min(m.loads[load].latency_s["all"]["p95"] for m in upstream),
    )
    figures = [
        Figure("solo latency, 768px, 50 steps: ours / upstream", solo, "x", at_most=0.5),
        Figure("saturated throughput: ours / upstream", capacity, "x", at_least=3.0),
        Figure("bytes of a 768px picture: ours / upstream", size, "x", at_most=1 / 15),
        Figure(f"p95 at {TARGET_FRACTION:g} of our capacity: ours / upstream", p95, "x", None, 0.4),
    ]
    for name, each in measured.items():
        figures += [
            Figure(f"{name}: solo, {largest}", Spread((each.solo_s[largest],)), "s"),
            Figure(f"{name}: capacity", Spread((each.capacity_per_s,)), "images/s"),
        ]
        figures += [
            Figure(f"{name}: p95, {at}", Spread((summary.latency_s["all"]["p95"],)), "s")
            for at, summary in each.loads.items()
        ]
    return figures


def draw(measured: dict[str, Measured], path: Path) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="of each load (default: 30)")
    parser.add_argument("--fractions", default="0.2,0.5,0.7,1,1.3", help="of our capacity")
    parser.add_argument("--speed", default="safe", choices=("off", "safe", "max"))
    parser.add_argument("--max-rows", type=int, default=16, help="of our engine (default: 16)")
    parser.add_argument("--cycle-ms", type=float, default=20, help="of our handler (default: 20)")
    parser.add_argument("--reply", default="array", choices=("array", "png"), help="of upstream")
    parser.add_argument("--name", default="load", help="of the files in benchmarks/results")
    arguments = parser.parse_args(argv)
    fractions = sorted({TARGET_FRACTION, *map(float, arguments.fractions.split(","))})
    measured: dict[str, Measured] = {}
    with TemporaryDirectory() as temporary:
        for system in systems(Path(temporary), arguments):
            first = measured.get(IN_FLIGHT)
            with system.serving(Path(temporary) / "state") as server:
                measured[system.name] = asyncio.run(
                    measure(
                        server.predictions_url,
                        in_flight_per_s=first and first.capacity_per_s,
                        fractions=fractions,
                        seconds=arguments.seconds,
                        deadlines_s=first and first.solo_s,
                    )
                )
    details: dict[str, Any] = {"settings": vars(arguments)}
    details["systems"] = {name: asdict(each) for name, each in measured.items()}
    path = write_report("load", figures_of(measured), details, file_name=arguments.name)
    draw(measured, RESULTS / f"{arguments.name}.png")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
