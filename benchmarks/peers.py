"""Servers that people use for diffusers pipelines, side by side: the same requests, the same cores.

    python -m benchmarks.peers                      # installs what is missing; about half an hour
    python -m benchmarks.peers --peers ours,LitServe --rounds 1 --window 10
    python -m benchmarks.peers --only-parameters    # who honours what: minutes

Servers take turns, one at a time on all cores, each with the embedded pipeline in float32 and the
libraries of this environment; their own packages are in virtual environments below ``--folder``.
Twelve clients are always there, each waiting for its picture; ours has the `max_rows` that they
need (24), and is as it is shipped otherwise. What cannot be installed or started is named in the
report and left out. hf-serve 0.2.0 starts on Python 3.12 alone, so all of this runs there:
``make setup PYTHON=python3.12 VENV=.venv312``, then that environment's Python.

A parameter is honoured when the picture is the one that diffusers draws with it, up to what two
levels of 255 are; it is refused when the answer is a 4xx; and ignored when it is another picture.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image, UnidentifiedImageError

from benchmarks.peer_systems import (
    NUM_CLIENTS,
    PEERS,
    PIPELINE,
    Peer,
    PeerError,
    Serving,
    install,
    slug,
)
from benchmarks.report import Figure, Spread, write_report
from benchmarks.traffic import mixed_wishes, percentile

# Of 255: what rounding leaves between two ways to compute the same picture.
SAME_LEVELS = 2.0
SHORT_STEPS = 20
FILL_S = 8.0
PROMPT = "a large red heart on a cyan background"

Fields = Mapping[str, Any]

PARAMETERS: Mapping[str, Fields] = {
    "seed 7": {"seed": 7},
    "seed 0": {"seed": 0},
    "size": {"seed": 7, "height": 640, "width": 512},
    "steps": {"seed": 7, "num_inference_steps": 9},
    "guidance": {"seed": 7, "guidance_scale": 1.5},
    "negative prompt": {"seed": 7, "negative_prompt": "a red heart"},
    "scheduler": {"seed": 7, "scheduler": "DPMSolverMultistepScheduler"},
}
"""What is asked beside the prompt, 12 steps, guidance 4 and 512 px where nothing else is said."""
DEFAULTS: Fields = {
    "prompt": PROMPT,
    "height": 512,
    "width": 512,
    "num_inference_steps": 12,
    "guidance_scale": 4.0,
}


@dataclass(slots=True)
class Measured:
    """What a server did; lists have one value a round, by the name of the mix."""

    images_per_s: dict[str, list[float]] = field(default_factory=dict)
    short_p95_s: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    failure: str | None = None


def mixes(count: int) -> dict[str, list[Fields]]:
    """The two kinds of traffic: our load test's, and one in which hardly two ask for the same."""
    ours: list[Fields] = [
        {
            "prompt": wish.prompt,
            "height": wish.size_px,
            "width": wish.size_px,
            "num_inference_steps": wish.num_steps,
            "guidance_scale": wish.guidance,
            "seed": wish.seed,
        }
        for wish in mixed_wishes(count)
    ]
    draw = random.Random(0)
    mixed: list[Fields] = []
    for number in range(count):
        side = draw.choice((256, 384, 512, 640, 768))
        fields = {"height": side, "width": side, "num_inference_steps": draw.randint(10, 50)}
        scale = draw.choice((1.5, 3.0, 5.0, 7.5))
        mixed.append({"prompt": PROMPT, **fields, "guidance_scale": scale, "seed": number})
    return {"three classes": ours, "all different": mixed}


async def saturate(
    peer: Peer, serving: Serving, requests: Sequence[Fields], window_s: float, measured: Measured
) -> tuple[float, float]:
    """Pictures a second in the window, and the 95th percentile of short requests' seconds."""
    starts_s = time.perf_counter() + FILL_S
    ends_s = starts_s + window_s
    waiting = iter(requests)
    seconds: list[float] = []
    num_drawn = 0
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:

        async def one_client() -> None:
            nonlocal num_drawn
            for fields in waiting:
                sent_s = time.perf_counter()
                problem = await _problem(client, peer, serving, fields)
                done_s = time.perf_counter()
                if problem is not None:
                    measured.errors[problem] = measured.errors.get(problem, 0) + 1
                elif starts_s < done_s <= ends_s:
                    num_drawn += 1
                if problem is None and fields["num_inference_steps"] <= SHORT_STEPS:
                    seconds.append(done_s - sent_s)
                if done_s > ends_s:
                    return

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))
    return num_drawn / window_s, percentile(seconds, 95)


async def _problem(
    client: httpx2.AsyncClient, peer: Peer, serving: Serving, fields: Fields
) -> str | None:
    asked = peer.ask(fields)
    try:
        url = serving.url + asked.path
        response = await client.post(url, json=asked.body, headers=dict(asked.headers))
    except httpx2.HTTPError as error:
        return type(error).__name__
    if response.status_code != 200:
        return str(response.status_code)
    try:
        size = Image.open(io.BytesIO(response.content)).size
    except UnidentifiedImageError:
        return "no picture"
    return None if size == (fields["width"], fields["height"]) else "another size"


def parameters_of(
    peer: Peer, serving: Serving, expected: Mapping[str, Image.Image]
) -> dict[str, str]:
    """For each of `PARAMETERS`: ``honoured``, ``ignored`` or ``refused (status)``."""
    told = {}
    for name, fields in PARAMETERS.items():
        asked = peer.ask({**DEFAULTS, **fields})
        url = serving.url + asked.path
        response = httpx2.post(url, json=asked.body, headers=dict(asked.headers), timeout=600)
        if response.status_code != 200:
            told[name] = f"refused ({response.status_code})"
            continue
        picture = Image.open(io.BytesIO(response.content)).convert("RGB")
        told[name] = "honoured" if is_same(picture, expected[name]) else "ignored"
    return told


def expected_pictures() -> dict[str, Image.Image]:
    """What diffusers itself draws for each of `PARAMETERS`."""
    pipeline = DiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    drawn = {}
    for name, fields in PARAMETERS.items():
        arguments = {**DEFAULTS, **fields}
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        pipeline.scheduler = own
        if arguments.pop("scheduler", None):
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
        drawn[name] = pipeline(**arguments, generator=generator).images[0].convert("RGB")
    for name, picture in drawn.items():
        if name != "seed 7" and is_same(picture, drawn["seed 7"]):
            raise ValueError(f"{name} changes nothing, so nobody could be seen to ignore it")
    return drawn


def is_same(ours: Image.Image, theirs: Image.Image) -> bool:
    """Whether two pictures are equal up to rounding."""
    if ours.size != theirs.size:
        return False
    levels = [np.asarray(each, dtype=float) for each in (ours, theirs)]
    return bool(np.abs(levels[0] - levels[1]).max() <= SAME_LEVELS)


def measure(
    peers: Sequence[Peer], environments: Path, folder: Path, arguments: argparse.Namespace
) -> dict[str, Measured]:
    """All rounds of all peers, who take turns."""
    measured = {peer.name: Measured() for peer in peers}
    expected = expected_pictures()
    for peer in peers:
        say(f"{peer.name}: installing")
        try:
            install(peer, environments)
        except PeerError as error:
            measured[peer.name].failure = f"not installed: {error}"
            say(f"{peer.name}: {measured[peer.name].failure}")
    for number in range(1, arguments.rounds + 1):
        for peer in peers:
            result = measured[peer.name]
            if result.failure is None:
                _round(peer, result, number, expected, environments, folder, arguments)
    return measured


def _round(
    peer: Peer,
    result: Measured,
    number: int,
    expected: Mapping[str, Image.Image],
    environments: Path,
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    state = folder / f"{slug(peer.name)}-{number}"
    try:
        with peer.serving(environments, state) as serving:
            if number == 1:
                result.parameters = parameters_of(peer, serving, expected)
                say(f"{peer.name}: {result.parameters}")
            if arguments.only_parameters:
                return
            for mix, requests in mixes(5000).items():
                rate, p95_s = asyncio.run(
                    saturate(peer, serving, requests, arguments.window, result)
                )
                result.images_per_s.setdefault(mix, []).append(rate)
                result.short_p95_s.setdefault(mix, []).append(p95_s)
                say(f"round {number}, {peer.name}, {mix}: {rate:.2f} images/s, short {p95_s:.1f} s")
    except (PeerError, httpx2.HTTPError) as error:
        result.failure = f"not started: {error}"
        say(f"{peer.name}: {result.failure}")


def figures_of(measured: Mapping[str, Measured]) -> list[Figure]:
    """Ours against each of the others, round by round."""
    (_, mine), *others = measured.items()
    figures = []
    for mix, rates in mine.images_per_s.items():
        figures.append(Figure(f"{mix}: ours", Spread(tuple(rates)), "images/s"))
        for name, other in others:
            theirs = other.images_per_s.get(mix, [])
            pairs = list(zip(rates, theirs, strict=False))
            if not pairs or min(theirs) <= 0:
                continue
            gain = Spread(tuple(a / b for a, b in pairs))
            figures.append(Figure(f"{mix}: ours / {name}", gain, "x", at_least=1.5))
            waits = zip(mine.short_p95_s[mix], other.short_p95_s[mix], strict=False)
            wait = Spread(tuple(a / b for a, b in waits))
            name_of_wait = f"{mix}: p95 of short requests, ours / {name}"
            figures.append(Figure(name_of_wait, wait, "x", at_most=0.5))
    for name, each in measured.items():
        if each.parameters:
            honoured = sum(word == "honoured" for word in each.parameters.values())
            figures.append(
                Figure(
                    f"parameters honoured, of {len(PARAMETERS)}: {name}", Spread((honoured,)), ""
                )
            )
    return figures


def say(line: str) -> None:
    """Show what is done: the whole takes half an hour."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", default=",".join(names), help="some of them, ours first")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of a turn and a mix")
    parser.add_argument("--only-parameters", action="store_true", help="measure no speed")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="of environments")
    arguments = parser.parse_args(argv)
    wanted = arguments.peers.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--peers {','.join(unknown)}: known are {', '.join(names)}")
    peers = [peer for peer in PEERS if peer.name in wanted]
    with TemporaryDirectory(prefix="peers-") as folder:
        measured = measure(peers, arguments.folder.resolve(), Path(folder), arguments)
    details: dict[str, object] = {name: asdict(each) for name, each in measured.items()}
    rates = [r for each in measured.values() for v in each.images_per_s.values() for r in v]
    details["settings"] = {"clients": NUM_CLIENTS, "window_s": arguments.window}
    print(write_report("peers", figures_of(measured), details))
    say(f"median of all turns: {statistics.median(rates):.2f} images/s" if rates else "no speed")
    return int(any(each.failure for each in measured.values()))


if __name__ == "__main__":
    raise SystemExit(main())
