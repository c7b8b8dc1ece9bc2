"""Queue requests with the engine: all of a body's or none, and none where too many wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from handler.api.request import GenerationRequest
from handler.engine import InFlightEngine
from handler.engine.ticket import StepEnd, Ticket
from handler.errors import QueueFull, RequestError
from handler.pipelines.arguments import pipeline_arguments
from handler.service.results import as_request_error

__all__ = ["EngineQueue"]


class EngineQueue:
    """Submits requests to `engine`, whose pipeline's ``__call__`` has `parameters`."""

    def __init__(
        self, engine: InFlightEngine, parameters: frozenset[str], max_waiting: int
    ) -> None:
        self._engine = engine
        self._parameters = parameters
        self._max_waiting = max_waiting

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        *,
        deadline_s: float | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
        is_limited: bool = False,
    ) -> list[Ticket]:
        """Return a ticket for each of `requests`; when one is refused, none is queued.

        Raises:
            QueueFull: with `is_limited`, they would have to wait and `max_waiting` wait already.
            RequestError: the engine refuses one of them.
        """
        num_waiting = self._engine.num_held_up
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._submit_one(request, deadline_s=deadline_s, on_step=on_step))
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
        *,
        deadline_s: float | None,
        on_step: Callable[[StepEnd], None] | None,
    ) -> Ticket:
        try:
            return self._engine.submit(
                pipeline_arguments(request, self._parameters),
                scheduler=request.sampler,
                deadline_s=deadline_s,
                on_step=on_step,
            )
        except RequestError:
            raise
        except Exception as error:  # among others a scheduler's own code, made from its name
            raise as_request_error(error, 0) from error
