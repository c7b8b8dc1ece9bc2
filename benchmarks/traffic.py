"""Open-loop traffic: who asks for what and when, whatever became of those before; and what it got.

An open loop sends each request at its time, as people do, so a slow server meets a growing line.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import httpx2

__all__ = [
    "CLASSES",
    "DEADLINES",
    "Outcome",
    "Summary",
    "Wish",
    "burst_times",
    "mixed_wishes",
    "percentile",
    "poisson_times",
    "saturate",
    "send_at",
    "summarise",
]

DEADLINES = (1.5, 2.0, 3.0, 5.0)
"""Times the solo latency of its class that a reply may take to be of use."""

GUIDANCES = (1.0, 5.0, 7.5, 12.0)
_PROMPTS = ("a red circle", "a small blue star", "a yellow ring on a green background", "a heart")
_QUEUE = re.compile(r"\bqueue;dur=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Wish:
    """What one request asks for."""

    prompt: str
    size_px: int
    num_steps: int
    guidance: float
    seed: int

    @property
    def kind(self) -> str:
        """Its class in the report."""
        return f"{self.size_px}px/{self.num_steps}"

    def body(self) -> dict[str, object]:
        """The JSON that asks any of the compared systems for it."""
        return {
            "prompt": self.prompt,
            "height": self.size_px,
            "width": self.size_px,
            "steps": self.num_steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }


CLASSES = (
    Wish(_PROMPTS[0], 512, 20, 7.5, 0),
    Wish(_PROMPTS[0], 640, 30, 7.5, 0),
    Wish(_PROMPTS[0], 768, 50, 7.5, 0),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; `status` is 0 where there was no reply."""

    wish: Wish
    sent_s: float
    seconds: float
    status: int
    num_bytes: int
    queue_s: float | None = None

    @property
    def is_ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True)
class Summary:
    """One load on one system. Latencies are of successful replies, in seconds."""

    offered_per_s: float
    throughput_per_s: float
    goodput_per_s: dict[str, float]
    latency_s: dict[str, dict[str, float]]
    queue_s: dict[str, float] | None
    num_requests: int
    errors: dict[str, int]
    bytes_per_reply: float


def mixed_wishes(count: int, seed: int = 0) -> list[Wish]:
    """`count` wishes of mixed prompts, sizes, steps and guidance; the same for the same seed."""
    draw = random.Random(seed)
    wishes: list[Wish] = []
    while len(wishes) < count:
        # In every block all there is: who is slow and sees few of them sees the same work.
        block = list(itertools.product(CLASSES, GUIDANCES))
        draw.shuffle(block)
        wishes += [
            Wish(draw.choice(_PROMPTS), kind.size_px, kind.num_steps, guidance, len(wishes) + i)
            for i, (kind, guidance) in enumerate(block)
        ]
    return wishes[:count]


def poisson_times(rate_per_s: float, duration_s: float, seed: int = 0) -> list[float]:
    """Arrivals that know nothing of each other, `rate_per_s` on average."""
    draw, now_s = random.Random(seed), 0.0
    times: list[float] = []
    while True:
        now_s += draw.expovariate(rate_per_s)
        if now_s >= duration_s:
            return times
        times.append(now_s)


def burst_times(rate_per_s: float, duration_s: float, size: int = 8, seed: int = 0) -> list[float]:
    """The same average, but `size` come at once; bursts arrive like single requests do above."""
    return [t for t in poisson_times(rate_per_s / size, duration_s, seed) for _ in range(size)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolated; NaN of nothing."""
    if len(values) < 2:
        return values[0] if values else math.nan
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def send_at(
    client: httpx2.AsyncClient, url: str, wishes: Sequence[Wish], times: Sequence[float]
) -> list[Outcome]:
    """Send each wish at its time from now on; returns when the last has its reply."""
    started_s = time.perf_counter()

    async def send(wish: Wish, at_s: float) -> Outcome:
        await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
        return await _send(client, url, wish, started_s)

    return list(await asyncio.gather(*(send(w, t) for w, t in zip(wishes, times, strict=True))))


async def saturate(
    client: httpx2.AsyncClient,
    url: str,
    wishes: Iterable[Wish],
    num_clients: int,
    *,
    fill_s: float,
    window_s: float,
) -> float:
    """Images per second while `num_clients` are always there, each waiting for its reply.

    Counted are the good replies of `window_s` seconds, which begin `fill_s` after the start; what
    is under way at their end is waited for and does not count.
    """
    started_s = time.perf_counter()
    ends_s = fill_s + window_s
    left = iter(wishes)

    async def one_client() -> int:
        num_counted = 0
        for wish in left:
            outcome = await _send(client, url, wish, started_s)
            done_s = outcome.sent_s + outcome.seconds
            num_counted += outcome.is_ok and fill_s < done_s <= ends_s
            if done_s > ends_s:
                break
        return num_counted

    return sum(await asyncio.gather(*(one_client() for _ in range(num_clients)))) / window_s


async def _send(client: httpx2.AsyncClient, url: str, wish: Wish, started_s: float) -> Outcome:
    sent_s = time.perf_counter()
    status, num_bytes, queue_s = 0, 0, None
    try:
        response = await client.post(url, json=wish.body())
        status, num_bytes = response.status_code, len(response.content)
        found = _QUEUE.search(response.headers.get("Server-Timing", ""))
        queue_s = None if found is None else float(found[1]) / 1000
    except httpx2.HTTPError:
        pass
    seconds = time.perf_counter() - sent_s
    return Outcome(wish, sent_s - started_s, seconds, status, num_bytes, queue_s)


def summarise(outcomes: Sequence[Outcome], duration_s: float, solo_s: dict[str, float]) -> Summary:
    """What a load of `duration_s` made of a system; `solo_s` is the solo latency by class."""
    fine = [o for o in outcomes if o.is_ok]
    # A line that is left when arrivals end is worked off afterwards: that time counts.
    busy_s = max([duration_s, *(o.sent_s + o.seconds for o in outcomes)])
    kinds = ["all", *sorted({o.wish.kind for o in outcomes})]
    latency_s = {}
    for kind in kinds:
        seconds = [o.seconds for o in fine if kind in ("all", o.wish.kind)]
        latency_s[kind] = {f"p{p}": percentile(seconds, p) for p in (50, 95, 99)}
    queues = [o.queue_s for o in fine if o.queue_s is not None]
    errors: dict[str, int] = {}
    for o in outcomes:
        if not o.is_ok:
            errors[str(o.status)] = errors.get(str(o.status), 0) + 1
    return Summary(
        offered_per_s=len(outcomes) / duration_s,
        throughput_per_s=len(fine) / busy_s,
        goodput_per_s={
            f"{k:g}": sum(o.seconds <= k * solo_s[o.wish.kind] for o in fine) / busy_s
            for k in DEADLINES
        },
        latency_s=latency_s,
        queue_s={f"p{p}": percentile(queues, p) for p in (50, 95, 99)} if queues else None,
        num_requests=len(outcomes),
        errors=errors,
        bytes_per_reply=statistics.fmean(o.num_bytes for o in fine) if fine else math.nan,
    )
