"""Queue requests with the engine: all of a body's or none, and none where too many wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType
from typing import Any

from PIL import Image

from handler.api.request import GenerationRequest
from handler.engine import InFlightEngine
from handler.engine.ticket import StepEnd, Ticket
from handler.errors import InvalidRequest, QueueFull, RequestError
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.cost import least_forwards
from handler.pipelines.signature import call_defaults
from handler.pipelines.tasks import pipeline_name
from handler.service.results import as_request_error

__all__ = ["EngineQueue"]


_NO_PICTURES: Mapping[str, Image.Image] = MappingProxyType({})


class EngineQueue:
    """Submits requests to `engine`; `tasks` are the parameters of each of its tasks' pipelines."""

    def __init__(
        self, engine: InFlightEngine, tasks: Mapping[str, frozenset[str]], max_waiting: int
    ) -> None:
        self._engine = engine
        self._tasks = tasks
        self._max_waiting = max_waiting

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        pictures: Sequence[Mapping[str, Image.Image]] = (),
        *,
        deadline_s: float | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
        is_limited: bool = False,
    ) -> list[Ticket]:
        """Return a ticket for each of `requests`; when one is refused, none is queued.

        `pictures` are those of each request, decoded, by field; none where no request has any.

        Raises:
            QueueFull: with `is_limited`, they would have to wait and `max_waiting` wait already.
            RequestError: the engine refuses one of them.
        """
        num_waiting = self._engine.num_held_up
        tickets: list[Ticket] = []
        try:
            for request, theirs in zip(requests, pictures or repeat(_NO_PICTURES), strict=False):
                tickets.append(
                    self._submit_one(request, theirs, deadline_s=deadline_s, on_step=on_step)
                )
            must_wait = self._engine.num_held_up > num_waiting
            if is_limited and must_wait and num_waiting >= self._max_waiting:
                raise QueueFull(
                    f"{num_waiting} requests are waiting already, {self._max_waiting} may; "
                    "try again a little later"
                )
        except Exception:
            for ticket in tickets:
                self._engine.cancel(ticket)
            raise
        return tickets

    def _submit_one(
        self,
        request: GenerationRequest,
        pictures: Mapping[str, Image.Image],
        *,
        deadline_s: float | None,
        on_step: Callable[[StepEnd], None] | None,
    ) -> Ticket:
        task = request.engine_task
        arguments = pipeline_arguments(request, self._tasks[task], pictures)
        name = pipeline_name(task, request.extra.get("control"))
        try:
            self._check_steps(name, arguments)
            return self._engine.submit(
                arguments,
                task=name,
                scheduler=request.scheduler,
                deadline_s=deadline_s,
                on_step=on_step,
            )
        except RequestError:
            raise
        except Exception as error:  # among others a scheduler's own code, made from its name
            raise as_request_error(error, 0) from error

    def _check_steps(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse a request that the pipeline's own strength leaves no step of."""
        pipeline = self._engine.pipelines.get(name)
        strength = call_defaults(pipeline).get("strength") if pipeline is not None else None
        if isinstance(strength, float) and not least_forwards(pipeline, arguments):
            num_steps = arguments.get("num_inference_steps")
            strength = arguments.get("strength", strength)
            problem = f"{strength:g} of {num_steps} steps is less than one step; ask for more"
            raise InvalidRequest(f"strength: {problem}", {"strength": problem})
