"""Whether a pipeline's requests in flight equal the same pipeline called directly, and merge."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from handler.engine import InFlightEngine
from handler.engine.parking import find_slots
from handler.engine.ticket import Ticket
from handler.errors import RequestError
from tests.support.every_pipeline.direct import (
    Failed,
    Outcome,
    Request,
    direct_call,
    in_one_line,
    make_requests,
    seed_everything,
)
from tests.support.every_pipeline.inputs import Inputs
from tests.support.every_pipeline.outputs import Arrays, arrays_of, difference
from tests.support.every_pipeline.recipe import NotBuildable, Recipe, build, call_arguments
from tests.support.every_pipeline.stand_ins import stand_ins

__all__ = ["BOUND", "WRONG", "Verdict", "judge"]

BOUND = 1e-4
"""What rounding may make, as for the families in tests/handler/engine."""

BOUND_IN_DOUBLE = 1e-7
"""The same in float64, for pipelines that enlarge rounding; parts of them stay in float32."""

WRONG = 30 * BOUND
"""What another seed must make at the least, or equality would say nothing."""


@dataclass
class Verdict:
    """What was found out about one pipeline class."""

    name: str
    outcome: Outcome
    why: str = ""
    largest_difference: float | None = None
    control_difference: float | None = None
    prompt_difference: float | None = None
    merged_forwards: int = 0
    seconds: float = 0.0


@dataclass
class _Flight:
    """How requests in flight fared: how far each is from its direct call, and in what company."""

    gaps: list[float]
    num_merged: int
    most_running: int


class _TimeIsUp(BaseException):
    """The time limit of a class has passed. No `Exception`, so that no pipeline swallows it."""


def judge(kind: type[DiffusionPipeline], recipe: Recipe, limit_s: float = 60.0) -> Verdict:
    """Build `kind`, call it directly, run the same calls in flight, and compare."""
    started = time.perf_counter()
    verdict = Verdict(kind.__name__, Outcome.NOT_BUILT)
    try:
        with _time_limit(limit_s), stand_ins(kind):
            _judge(kind, recipe, verdict)
    except Failed as failed:
        verdict.outcome, verdict.why = failed.outcome, failed.why
    except _TimeIsUp:
        verdict.why = f"took longer than {limit_s:g} s"
    except Exception as error:  # the engine's own, or the pipeline's at an unusual place
        verdict.outcome, verdict.why = Outcome.REFUSED, in_one_line(error)
    verdict.seconds = time.perf_counter() - started
    return verdict


def _judge(kind: type[DiffusionPipeline], recipe: Recipe, verdict: Verdict) -> None:
    try:
        pipeline = build(kind, recipe)
    except NotBuildable as error:
        raise Failed(Outcome.NOT_BUILT, str(error)) from error
    except Exception as error:
        raise Failed(Outcome.NOT_BUILT, f"building: {in_one_line(error)}") from error
    requests = make_requests(pipeline, recipe)
    verdict.control_difference = _control(pipeline, recipe, requests[0])
    verdict.prompt_difference = _prompt_control(pipeline, recipe, requests[0])
    denoisers = _denoisers(pipeline)
    flight = _fly(pipeline, recipe, requests, denoisers)
    verdict.merged_forwards = flight.num_merged
    verdict.largest_difference = max(flight.gaps)
    if verdict.largest_difference > BOUND:
        if not _is_rounding(kind, recipe, requests):
            worst = requests[flight.gaps.index(verdict.largest_difference)]
            raise Failed(Outcome.DIFFERENT, _why_different(pipeline, recipe, worst))
        verdict.why = "in double precision; in single its steps enlarge what rounding makes"
    if not _is_still_itself(pipeline, recipe, requests[0]):
        raise Failed(Outcome.DIFFERENT, "the pipeline called directly afterwards")
    if verdict.prompt_difference is not None and verdict.prompt_difference < BOUND:
        verdict.why = "; ".join(filter(None, (verdict.why, "another prompt changes nothing")))
    verdict.outcome = Outcome.MERGED if verdict.merged_forwards else Outcome.ALONE
    if verdict.outcome is Outcome.ALONE:
        verdict.why = "; ".join(
            filter(None, (verdict.why, _why_alone(pipeline, recipe, denoisers, flight)))
        )


def _fly(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    requests: Sequence[Request],
    denoisers: Sequence[str],
) -> _Flight:
    """Run `requests` in flight, all modules parked, and some again with the denoisers alone."""
    flight = _in_flight(pipeline, recipe, requests, None)
    flight.num_merged = 0
    if denoisers:
        # With nothing else parked, what is merged are the denoiser's forwards.
        again = _in_flight(pipeline, recipe, requests[:2], denoisers)
        flight.num_merged = again.num_merged
        for place, gap in enumerate(again.gaps):
            flight.gaps[place] = max(flight.gaps[place], gap)
    return flight


def _is_rounding(
    kind: type[DiffusionPipeline], recipe: Recipe, in_single: Sequence[Request]
) -> bool:
    """Whether the difference is gone where numbers are rounded a billion times less."""
    pipeline = build(kind, recipe).to(torch.float64)
    try:
        requests = make_requests(pipeline, recipe)
    except Failed:
        return False  # not all pipelines run in double precision
    if [r.scheduler for r in requests] != [r.scheduler for r in in_single]:
        return False
    flight = _fly(pipeline, recipe, requests, _denoisers(pipeline))
    return max(flight.gaps) < BOUND_IN_DOUBLE


def _control(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> float:
    """How far another seed is from `request`; other inputs where there is nothing random."""
    arguments = call_arguments(type(pipeline), recipe, request.inputs)
    swapped = (
        Inputs(request.inputs.index, 9000)
        if "generator" in arguments
        else Inputs(request.inputs.index + 2, request.inputs.seed)
    )
    distance = difference(direct_call(pipeline, recipe, Request(swapped)), request.expected)
    if distance < WRONG:
        raise Failed(Outcome.NOT_BUILT, "another seed changes nothing that shows")
    return distance


def _prompt_control(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> float | None:
    """How far another prompt is from `request`; None where it has none."""
    other = replace(request.inputs, index=request.inputs.index + 1)
    prompt = call_arguments(type(pipeline), recipe, other).get("prompt")
    if not isinstance(prompt, str):
        return None
    recipe = replace(recipe, call={**recipe.call, "prompt": prompt})
    return difference(direct_call(pipeline, recipe, request), request.expected)


def _denoisers(pipeline: DiffusionPipeline) -> list[str]:
    try:
        return [slot.name for slot in find_slots(pipeline) if slot.is_denoiser]
    except ValueError as error:
        raise Failed(Outcome.REFUSED, in_one_line(error)) from error


def _in_flight(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    requests: Sequence[Request],
    modules: Sequence[str] | None,
) -> _Flight:
    """Submit two requests before the first tick and the others before the second."""
    seed_everything(77)
    engine = InFlightEngine(pipeline, modules=modules)
    tickets: list[Ticket] = []
    most_running = 0
    try:
        while len(tickets) < len(requests) or engine.has_work:
            due = requests[:2] if not tickets else requests[len(tickets) :]
            for request in due:
                arguments = call_arguments(type(pipeline), recipe, request.inputs)
                tickets.append(_submit(engine, arguments, request))
            engine.step()
            most_running = max(most_running, engine.num_running)
        gaps = [
            difference(_output(ticket), request.expected)
            for ticket, request in zip(tickets, requests, strict=True)
        ]
        return _Flight(gaps, engine.counters.merged_forwards, most_running)
    finally:
        engine.close()


def _submit(engine: InFlightEngine, arguments: dict[str, Any], request: Request) -> Ticket:
    try:
        return engine.submit(arguments, scheduler=request.scheduler)
    except (RequestError, ValueError) as error:
        raise Failed(Outcome.REFUSED, f"at submission: {in_one_line(error)}") from error


def _output(ticket: Ticket) -> Arrays:
    if ticket.error is not None:
        raise Failed(Outcome.REFUSED, f"in flight: {in_one_line(ticket.error)}") from ticket.error
    return arrays_of(ticket.result())


def _why_different(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> str:
    scheduler = f" with {request.scheduler}" if request.scheduler else ""
    again = direct_call(pipeline, recipe, request, global_seed=78)
    if difference(again, request.expected) > BOUND:
        return f"its calls{scheduler} draw from torch's global generator"
    return f"from the same call alone{scheduler}"


def _is_still_itself(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> bool:
    """Whether a direct call gives, after the engine, what it gave before."""
    return difference(direct_call(pipeline, recipe, request), request.expected) <= BOUND


def _why_alone(
    pipeline: DiffusionPipeline, recipe: Recipe, denoisers: Sequence[str], flight: _Flight
) -> str:
    if flight.most_running < 2:
        return "its requests run one after another: they change modules that all share"
    if not denoisers:
        modules = [
            n for n, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
        ]
        return f"none of its modules is known as a denoiser: {', '.join(modules)}"
    return recipe.alone or "no two calls of its denoiser fit together"


@contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    def end(signal_number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
