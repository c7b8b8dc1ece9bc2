"""Check a call of the pipeline before it is queued, and make its ticket."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from handler.engine.policy import Limits
from handler.engine.tick_times import Pace
from handler.engine.ticket import StepEnd, Ticket
from handler.errors import DeadlineExceeded, TooLarge
from handler.pipelines.adapters import AdapterSets
from handler.pipelines.cost import estimate_cost, least_forwards
from handler.pipelines.schedulers import make_scheduler
from handler.pipelines.signature import unknown_arguments

__all__ = ["make_ticket"]


def make_ticket(
    pipeline: Any,
    kwargs: Mapping[str, Any],
    *,
    scheduler: str | Any | None,
    deadline_s: float | None,
    exact: bool,
    adapters: Mapping[str, float] | None,
    on_step: Callable[[StepEnd], None] | None,
    limits: Limits,
    adapter_sets: AdapterSets,
    pace: Pace,
    now_s: float,
) -> Ticket:
    """The ticket of one call of `pipeline` with `kwargs`, as `InFlightEngine.submit` explains.

    Raises:
        ValueError: an argument, the scheduler or an adapter that the pipeline does not have.
        TooLarge: it would never fit.
        DeadlineExceeded: it would surely be late.
    """
    if unknown := unknown_arguments(pipeline, kwargs):
        raise ValueError(f"{type(pipeline).__name__} takes no argument {unknown}")
    scheduler = (
        make_scheduler(pipeline, scheduler)
        if isinstance(scheduler, str)
        else copy.deepcopy(scheduler)
    )
    cost = estimate_cost(pipeline, kwargs)
    if not limits.hold(cost):
        raise TooLarge(limits.refusal(cost))
    num_steps = least_forwards(pipeline, kwargs)
    needed_s = pace.least_s(num_steps, cost)
    if deadline_s is not None and deadline_s < needed_s:
        raise DeadlineExceeded(
            f"the deadline of {deadline_s:g} s cannot be met: at the present pace "
            f"{num_steps} steps need at least {needed_s:.3g} s; ask for fewer, or for a later one"
        )
    return Ticket(
        kwargs=dict(kwargs),
        cost=cost,
        scheduler=scheduler,
        deadline=None if deadline_s is None else now_s + deadline_s,
        exact=exact,
        adapters=adapter_sets.checked(adapters, kwargs),
        on_step=on_step,
        submitted_s=now_s,
    )
