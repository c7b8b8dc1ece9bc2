"""Checks what is submitted before it is queued, and makes its ticket."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from handler.engine.policy import Limits
from handler.engine.shortcuts import NONE, Shortcuts
from handler.engine.tick_times import Pace
from handler.engine.ticket import StepEnd, Ticket
from handler.errors import DeadlineExceeded, TooLarge
from handler.pipelines.adapters import AdapterSets
from handler.pipelines.cost import Cost, estimate_cost, least_forwards
from handler.pipelines.prompt_embeddings import PromptReading
from handler.pipelines.schedulers import check_num_steps, make_scheduler
from handler.pipelines.signature import unknown_arguments
from handler.pipelines.steps import shortcuts_of

__all__ = ["Intake", "Served", "Submission"]


@dataclass(frozen=True, slots=True)
class Served:
    """One pipeline of the engine."""

    task: str
    pipeline: Any
    is_exclusive: bool
    """Whether its calls change the modules that all requests share."""
    denoisers: frozenset[int]
    """The identities of its modules that are parked as denoisers."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One call of a pipeline, as `InFlightEngine.submit` explains it."""

    kwargs: Mapping[str, Any]
    scheduler: str | Any | None
    deadline_s: float | None
    exact: bool
    adapters: Mapping[str, float] | None
    on_step: Callable[[StepEnd], None] | None
    prompts: PromptReading | None = None
    shortcuts: Shortcuts = NONE


@dataclass(eq=False, slots=True)
class Intake:
    """Makes tickets of what is submitted, or says why there will be none."""

    adapter_sets: AdapterSets
    pace: Pace
    clock: Callable[[], float]

    def ticket(self, served: Served, asked: Submission, limits: Limits) -> Ticket:
        """The ticket of one call of the pipeline in `served`.

        Raises:
            ValueError: an argument, the scheduler or an adapter that the pipeline does not have.
            InvalidRequest: more steps than the scheduler has.
            TooLarge: it would never fit.
            DeadlineExceeded: it would surely be late.
        """
        pipeline, kwargs, now_s = served.pipeline, asked.kwargs, self.clock()
        if unknown := unknown_arguments(pipeline, kwargs):
            raise ValueError(f"{type(pipeline).__name__} takes no argument {unknown}")
        scheduler = (
            make_scheduler(pipeline, asked.scheduler)
            if isinstance(asked.scheduler, str)
            else copy.deepcopy(asked.scheduler)
        )
        own = getattr(pipeline, "scheduler", None) if scheduler is None else scheduler
        check_num_steps(own, kwargs.get("num_inference_steps"))
        cost = estimate_cost(pipeline, kwargs)
        if not limits.hold(cost):
            raise TooLarge(limits.refusal(cost))
        self._check_deadline(served, asked, cost)
        _check_shortcuts(pipeline, asked.shortcuts)
        return Ticket(
            kwargs=dict(kwargs),
            cost=cost,
            task=served.task,
            pipeline=pipeline,
            is_exclusive=served.is_exclusive,
            seed=_seed_in(kwargs),
            scheduler=scheduler,
            deadline=None if asked.deadline_s is None else now_s + asked.deadline_s,
            exact=asked.exact,
            adapter_set=self.adapter_sets.checked(pipeline, asked.adapters, kwargs),
            on_step=asked.on_step,
            prompts=asked.prompts,
            shortcuts=asked.shortcuts,
            submitted_s=now_s,
        )

    def _check_deadline(self, served: Served, asked: Submission, cost: Cost) -> None:
        num_steps = asked.shortcuts.least_forwards(least_forwards(served.pipeline, asked.kwargs))
        if asked.shortcuts.has_interval:
            cost = replace(cost, rows=cost.rows // 2)
        needed_s = self.pace.least_s(num_steps, cost, served.denoisers)
        if asked.deadline_s is not None and asked.deadline_s < needed_s:
            raise DeadlineExceeded(
                f"the deadline of {asked.deadline_s:g} s cannot be met: at the present pace "
                f"{num_steps} steps need at least {needed_s:.3g} s; "
                "ask for fewer, or for a later one"
            )


def _check_shortcuts(pipeline: Any, shortcuts: Shortcuts) -> None:
    if not (shortcuts.step_cache or shortcuts.has_interval):
        return
    name, has = type(pipeline).__name__, shortcuts_of(pipeline)
    if shortcuts.step_cache and "step_cache" not in has:
        raise ValueError(f"{name} does not tell which step it is at, which a step cache needs")
    if shortcuts.has_interval and "guidance_start" not in has:
        raise ValueError(
            f"{name} has no guided rows that stand together, which a guidance interval needs"
        )


def _seed_in(kwargs: Mapping[str, Any]) -> int | None:
    """The seed of the call's generator, of the first where it has one a picture."""
    generator = kwargs.get("generator")
    if isinstance(generator, (list, tuple)) and generator:
        generator = generator[0]
    return generator.initial_seed() if isinstance(generator, torch.Generator) else None
