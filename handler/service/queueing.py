"""Queue requests with the engine: all of a body's or none, and none where too many wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from handler.api.decoding import Pictures
from handler.api.request import GenerationRequest
from handler.api.shortcuts import SHORTCUTS
from handler.engine import InFlightEngine
from handler.engine.shortcuts import Shortcuts
from handler.engine.ticket import StepEnd, Ticket
from handler.errors import InvalidRequest, QueueFull, RequestError
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.cost import least_forwards
from handler.pipelines.prompt_embeddings import PromptReading
from handler.pipelines.signature import call_defaults
from handler.pipelines.tasks import pipeline_name
from handler.service.results import as_request_error

__all__ = ["EngineQueue"]


class EngineQueue:
    """Submits requests to `engine`; `tasks` has the arguments of each task's ``__call__``."""

    def __init__(
        self, engine: InFlightEngine, tasks: Mapping[str, frozenset[str]], max_waiting: int
    ) -> None:
        self._engine = engine
        self._tasks = tasks
        self._max_waiting = max_waiting

    def check_room(self) -> None:
        """Refuse a request whose pictures are still to be decoded, where it would be in vain.

        Raises:
            QueueFull: others wait, and no more may.
        """
        num_waiting = self._engine.num_held_up
        if num_waiting and num_waiting >= self._max_waiting:
            raise self._full(num_waiting)

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        pictures: Sequence[Pictures],
        *,
        deadline_s: float | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
        is_limited: bool = False,
    ) -> list[Ticket]:
        """Return a ticket for each of `requests`; when one is refused, none is queued.

        `pictures` are those of each request, decoded.

        Raises:
            QueueFull: with `is_limited`, they would have to wait and `max_waiting` wait already.
            RequestError: the engine refuses one of them.
        """
        num_waiting = self._engine.num_held_up
        tickets: list[Ticket] = []
        try:
            for request, decoded in zip(requests, pictures, strict=True):
                tickets.append(
                    self._submit_one(request, decoded, deadline_s=deadline_s, on_step=on_step)
                )
            must_wait = self._engine.num_held_up > num_waiting
            if is_limited and must_wait and num_waiting >= self._max_waiting:
                raise self._full(num_waiting)
        except Exception:
            for ticket in tickets:
                self._engine.cancel(ticket)
            raise
        return tickets

    def _full(self, num_waiting: int) -> QueueFull:
        return QueueFull(
            f"{num_waiting} requests are waiting already, {self._max_waiting} may; "
            "try again a little later"
        )

    def _pipeline_of(self, request: GenerationRequest) -> str | None:
        """The engine's name of the pipeline that draws `request`; None: it has only one."""
        if len(self._engine.pipelines) == 1:
            return None
        return pipeline_name(request.engine_task, request.extra.get("control"))

    def _check_steps(self, name: str | None, arguments: Mapping[str, Any]) -> None:
        """Refuse a request that the pipeline's own strength leaves no step of."""
        engine = self._engine
        pipeline = engine.pipeline if name is None else engine.pipelines[name]
        strength = call_defaults(pipeline).get("strength")
        if isinstance(strength, float) and not least_forwards(pipeline, arguments):
            num_steps = arguments.get("num_inference_steps")
            strength = arguments.get("strength", strength)
            problem = f"{strength:g} of {num_steps} steps is less than one step; ask for more"
            raise InvalidRequest(f"strength: {problem}", {"strength": problem})

    def _submit_one(
        self,
        request: GenerationRequest,
        pictures: Pictures,
        *,
        deadline_s: float | None,
        on_step: Callable[[StepEnd], None] | None,
    ) -> Ticket:
        name = self._pipeline_of(request)
        arguments = pipeline_arguments(request, self._tasks[request.engine_task], pictures)
        try:
            self._check_steps(name, arguments)
            return self._engine.submit(
                arguments,
                task=name,
                scheduler=request.sampler,
                prompts=PromptReading(request.is_weighted),
                deadline_s=deadline_s,
                adapters=request.loras,
                on_step=on_step,
                shortcuts=_shortcuts_of(request),
            )
        except RequestError:
            raise
        except Exception as error:  # among others a scheduler's own code, made from its name
            raise as_request_error(error, 0) from error


def _shortcuts_of(request: GenerationRequest) -> Shortcuts:
    asked = {name: request.extra[name] for name in SHORTCUTS if name in request.extra}
    return Shortcuts(**asked)  # type: ignore[arg-type]  # numbers, by the table
