"""Servers that people use for diffusers pipelines, side by side: the same requests, the same cores.

    python -m benchmarks.peers                      # installs what is missing; half an hour a round
    python -m benchmarks.peers --peers ours,LitServe --rounds 1 --window 10
    python -m benchmarks.peers --parts float32      # or --mixes "all different": half of it
    python -m benchmarks.peers --only-parameters    # who honours what: minutes

Two comparisons. "float32": all compute in float32, ours with `speed: safe`. "fastest": ours with
`speed: max`, which has the denoiser in bfloat16 and compiled for all sizes that are asked for,
against each other server in float32 or with its pipeline in bfloat16, whichever draws more of a
mix; so that part has all turns but one.

Servers take turns, one at a time on all cores, each with the embedded pipeline and the libraries of
this environment; their own packages are in virtual environments below ``--folder``, and what ours
has compiled, in minutes at its first start. Each round begins with another turn. Twelve clients are
always there, each waiting for its picture; ours has the `max_rows` that they need (24), and is as
it is shipped otherwise. What cannot be installed or started is named in the report and left out.
hf-serve 0.2.0 starts on Python 3.12 alone, so all of this runs there:
``make setup PYTHON=python3.12 VENV=.venv312``, then that environment's Python.

Each turn first draws one picture, which has to be diffusers' own of float32 but for a few levels of
255; of all others the size is checked, and that they are not of one colour. In float32 a parameter
is honoured when the picture is the one that diffusers draws with it, up to what two levels of 255
are; it is refused when the answer is a 4xx; and ignored when it is another picture.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
from PIL import Image

from benchmarks.peer_pictures import difference_of, expected_pictures, flaw_of, parameters_of
from benchmarks.peer_requests import MIXES, PARAMETERS, SHORT_STEPS, Fields, mixes
from benchmarks.peer_systems import (
    NUM_CLIENTS,
    PEERS,
    PRECISIONS,
    Peer,
    PeerError,
    Serving,
    install,
)
from benchmarks.report import Figure, Spread, write_report
from benchmarks.traffic import percentile
from scripts.errors import ServerError
from scripts.interrupts import signals_as_interrupts

FILL_S = 8.0
# And how long clients ask on after the window, so that nobody's work in it is done in a lull.
TAIL_S = 8.0
PARTS = ("float32", "fastest")


@dataclass(slots=True)
class Measured:
    """What a server did; lists have one value a round, some by the name of the mix."""

    images_per_s: dict[str, list[float]] = field(default_factory=dict)
    short_p95_s: dict[str, list[float]] = field(default_factory=dict)
    mean_levels: list[float] = field(default_factory=list)
    """How far a picture is from diffusers' own in float32."""
    errors: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    failure: str | None = None


Results = Mapping[str, Mapping[str, Measured]]
"""By precision, then by the server's name."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a client got; times are seconds since the first request. `problem`: no reply of 200."""

    fields: Fields
    sent_s: float
    done_s: float
    content: bytes
    problem: str | None = None


async def saturate(
    peer: Peer, serving: Serving, requests: Iterable[Fields], until_s: float
) -> list[Reply]:
    """All replies to clients who ask again until that time, and then wait for their last."""
    started_s = time.perf_counter()
    waiting = iter(requests)
    replies: list[Reply] = []
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:

        async def one_client() -> None:
            for fields in waiting:
                sent_s = time.perf_counter() - started_s
                content, problem = await _draw(client, peer, serving, fields)
                done_s = time.perf_counter() - started_s
                replies.append(Reply(fields, sent_s, done_s, content, problem))
                if done_s > until_s:
                    return

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))
    return replies


async def _draw(
    client: httpx2.AsyncClient, peer: Peer, serving: Serving, fields: Fields
) -> tuple[bytes, str | None]:
    asked = peer.ask(fields)
    try:
        url = serving.url + asked.path
        response = await client.post(url, json=asked.body, headers=dict(asked.headers))
    except httpx2.HTTPError as error:
        return b"", type(error).__name__
    return response.content, None if response.status_code == 200 else str(response.status_code)


def add(replies: Sequence[Reply], mix: str, window_s: float, measured: Measured) -> None:
    """Count pictures in the window after the fill, and all short requests; mutates `measured`.

    A picture that is waited for in the window and beside it counts by the part of its wait that is
    inside: replies to a batch come at once, and a window may hold one batch more or less.
    """
    num_drawn, short_s = 0.0, []
    for reply in replies:
        if problem := reply.problem or flaw_of(reply.content, reply.fields):
            measured.errors[problem] = measured.errors.get(problem, 0) + 1
            continue
        inside_s = min(reply.done_s, FILL_S + window_s) - max(reply.sent_s, FILL_S)
        num_drawn += max(0.0, inside_s) / (reply.done_s - reply.sent_s)
        if reply.fields["num_inference_steps"] <= SHORT_STEPS:
            short_s.append(reply.done_s - reply.sent_s)
    measured.images_per_s.setdefault(mix, []).append(num_drawn / window_s)
    measured.short_p95_s.setdefault(mix, []).append(percentile(short_s, 95))


def chosen(names: Sequence[str], parts: Sequence[str]) -> list[Peer]:
    """Whose turns the parts need: others in float32 may be their fastest."""
    return [
        peer
        for peer in PEERS
        if peer.name in names
        and (
            peer.precision in parts
            or ("fastest" in parts and not (peer.name == "ours" and peer.precision == "float32"))
        )
    ]


def turns(peers: Sequence[Peer], number: int, num_rounds: int) -> list[Peer]:
    """All of them, in a round's order: a machine that slows down slows others in each round."""
    first = (number - 1) * len(peers) // num_rounds
    return [*peers[first:], *peers[:first]]


def measure(
    peers: Sequence[Peer], environments: Path, folder: Path, arguments: argparse.Namespace
) -> Results:
    """All rounds of all peers, who take turns."""
    measured: dict[str, dict[str, Measured]] = {precision: {} for precision in PRECISIONS}
    expected = expected_pictures()
    for peer in peers:
        result = measured[peer.precision][peer.name] = Measured()
        say(f"{peer.title}: installing")
        try:
            install(peer, environments)
        except PeerError as error:
            result.failure = f"not installed: {error}"
            say(f"{peer.title}: {result.failure}")
    for number in range(1, arguments.rounds + 1):
        for peer in turns(peers, number, arguments.rounds):
            result = measured[peer.precision][peer.name]
            if result.failure is None:
                # Short: Ray has a socket below, whose path is limited to 107 characters.
                state = folder / f"{peers.index(peer)}-{number}"
                try:
                    with peer.serving(environments, state) as serving:
                        _turn(peer, serving, result, expected, arguments)
                except (PeerError, ServerError, httpx2.HTTPError) as error:
                    result.failure = f"round {number}: {error}"
                    say(f"{peer.title}: {result.failure}")
    return measured


def _turn(
    peer: Peer,
    serving: Serving,
    result: Measured,
    expected: Mapping[str, Image.Image],
    arguments: argparse.Namespace,
) -> None:
    result.mean_levels.append(difference_of(peer, serving, expected))
    # The code that reads them is the same in bfloat16.
    if peer.precision == "float32" and not result.parameters:
        result.parameters = parameters_of(peer, serving, expected)
        say(f"{peer.title}: {result.parameters}")
    if arguments.only_parameters:
        return
    for mix in arguments.mixes:
        until_s = FILL_S + arguments.window + TAIL_S
        replies = asyncio.run(saturate(peer, serving, mixes(5000)[mix], until_s))
        add(replies, mix, arguments.window, result)
        rate, p95_s = result.images_per_s[mix][-1], result.short_p95_s[mix][-1]
        say(f"{peer.title}, {mix}: {rate:.2f} images/s, short {p95_s:.1f} s")


def figures_of(measured: Results) -> list[Figure]:
    """Ours against each of the others, round by round: in float32, then each at its fastest."""
    float32, bfloat16 = (measured.get(precision, {}) for precision in PRECISIONS)
    others = list(dict.fromkeys(name for name in (*float32, *bfloat16) if name != "ours"))
    figures = []
    for mine, ours, choices in (
        ("ours", float32.get("ours"), {"": float32}),
        ("ours, speed max", bfloat16.get("ours"), {f" in {p}": measured[p] for p in measured}),
    ):
        if ours is None:
            continue
        for mix, rates in ours.images_per_s.items():
            figures.append(Figure(f"{mix}: {mine}", Spread(tuple(rates)), "images/s"))
            for name in others:
                rivals = {name + how: each[name] for how, each in choices.items() if name in each}
                if fastest := fastest_of(rivals, mix):
                    figures += _against(mix, mine, ours, fastest, rivals[fastest])
    for name, each in float32.items():
        if each.parameters:
            honoured = sum(word == "honoured" for word in each.parameters.values())
            title = f"parameters honoured, of {len(PARAMETERS)}: {name}"
            figures.append(Figure(title, Spread((honoured,)), ""))
    return figures


def fastest_of(rivals: Mapping[str, Measured], mix: str) -> str | None:
    """Which of them drew most of a mix, by the median of its rounds; None where none drew."""
    rates = {name: each.images_per_s.get(mix, []) for name, each in rivals.items()}
    able = [name for name, values in rates.items() if values and min(values) > 0]
    return max(able, key=lambda name: statistics.median(rates[name]), default=None)


def _against(mix: str, mine: str, ours: Measured, name: str, other: Measured) -> list[Figure]:
    gain = _ratios(ours.images_per_s[mix], other.images_per_s[mix])
    wait = _ratios(ours.short_p95_s[mix], other.short_p95_s[mix])
    return [
        Figure(f"{mix}: {mine} / {name}", gain, "x", at_least=1.5),
        Figure(f"{mix}: p95 of short requests, {mine} / {name}", wait, "x", at_most=0.5),
    ]


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    return Spread(tuple(a / b for a, b in zip(ours, theirs, strict=False)))


def say(line: str) -> None:
    """Show what is done: the whole takes long."""
    print(line, file=sys.stderr, flush=True)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Read an option's list of names, with commas between them."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{','.join(unknown)}: known are {', '.join(known)}")
        return names

    return read


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, known in (
        ("--peers", tuple(dict.fromkeys(peer.name for peer in PEERS))),
        ("--parts", PARTS),
        ("--mixes", MIXES),
    ):
        told = f"some of: {', '.join(known)}; all are the default"
        parser.add_argument(option, type=some_of(known), default=list(known), help=told)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of a turn and a mix")
    parser.add_argument("--only-parameters", action="store_true", help="measure no speed")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="of environments")
    arguments = parser.parse_args(argv)
    parts = ["float32"] if arguments.only_parameters else arguments.parts
    # Ended by a signal, it ends the server that is having its turn.
    with signals_as_interrupts(), TemporaryDirectory(prefix="peers-") as folder:
        measured = measure(
            chosen(arguments.peers, parts), arguments.folder.resolve(), Path(folder), arguments
        )
    details: dict[str, object] = {
        precision: {name: asdict(each) for name, each in results.items()}
        for precision, results in measured.items()
    }
    details["settings"] = {"clients": NUM_CLIENTS, "window_s": arguments.window}
    write_report("peers", figures_of(measured), details)
    everybody = [each for results in measured.values() for each in results.values()]
    return int(any(each.failure for each in everybody))


if __name__ == "__main__":
    raise SystemExit(main())
