"""What became of a ticket, as the client is told: its pictures and times, or its error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from handler.api.request import GenerationRequest
from handler.api.result import Result, Timings
from handler.engine.device_faults import is_device_lost
from handler.engine.forward import is_out_of_memory
from handler.engine.ticket import Ticket
from handler.errors import (
    ContentFlagged,
    DeviceLost,
    EngineFault,
    InvalidRequest,
    OutOfMemory,
    RequestError,
)
from handler.pipelines.prompts import prompt_warnings
from handler.pipelines.safety import SafetyChecker, verdicts_of

__all__ = [
    "as_request_error",
    "checked_result",
    "device_lost",
    "fault_of",
    "pipeline_fault",
    "result_of",
]


def result_of(ticket: Ticket, request: GenerationRequest, pipeline: Any) -> Result:
    """Return what `pipeline` drew for `request`; its ticket is done."""
    assert ticket.admitted_s is not None
    assert ticket.ended_s is not None
    denoised_s = ticket.denoised_s or ticket.ended_s
    return Result(
        request=request,
        images=_pictures(ticket.result()),
        flagged=verdicts_of(ticket.result()),
        timings=Timings(
            queue_s=ticket.admitted_s - ticket.submitted_s,
            denoise_s=denoised_s - ticket.admitted_s,
            decode_s=ticket.ended_s - denoised_s,
        ),
        warnings=prompt_warnings(pipeline, request),
    )


def checked_result(result: Result, checker: SafetyChecker | None, *, refuses: bool) -> Result:
    """Return `result` as the safety checker leaves it; without one the pipeline's word counts.

    Slow, and touches nothing shared: made for a thread pool.

    Raises:
        ContentFlagged: a picture is flagged and `refuses`.
    """
    if checker is not None and not any(result.flagged):
        images, flagged = checker.check(result.images)
        result = replace(result, images=tuple(images), flagged=flagged)
    if refuses and any(result.flagged):
        seeds = [s for s, f in zip(result.request.seeds, result.flagged, strict=True) if f]
        raise ContentFlagged(
            "the safety checker flags what was drawn with seed"
            f" {', '.join(map(str, seeds))}; send another prompt, or another seed"
        )
    return result


def _pictures(output: Any) -> tuple[Any, ...]:
    """Return the pictures of a call's output, which a few pipelines have under `image`."""
    return tuple(output.images if hasattr(output, "images") else output.image)


def as_request_error(error: BaseException, num_steps_done: int) -> RequestError:
    """Return what a client is told of `error`, which ended its request after so many steps.

    Where that is another error than `error`, `error` is its ``__cause__``.
    """
    if isinstance(error, ValueError) and not num_steps_done:
        told = InvalidRequest(f"the pipeline refuses the request: {error}")
        told.__cause__ = error
        return told
    return pipeline_fault(error)


def fault_of(error: BaseException, message: str) -> RequestError:
    """Return what a client is told of an error that no request's value explains by itself.

    That is `message`, unless `error` says what it is told: a lost device, or memory that ran out.
    Where it is another error than `error`, `error` is its ``__cause__``.
    """
    if isinstance(error, RequestError):
        return error
    told: RequestError
    if is_device_lost(error):
        told = device_lost()
    elif is_out_of_memory(error):
        told = OutOfMemory(
            "the request does not fit into the memory, even alone; ask for a smaller picture"
        )
    else:
        told = EngineFault(message)
    told.__cause__ = error
    return told


def pipeline_fault(error: BaseException) -> RequestError:
    """Return what a client is told of an error in the pipeline's own code, as `fault_of` does."""
    name = type(error).__name__
    return fault_of(error, f"the pipeline failed: {name}; the server's log says why")


def device_lost() -> DeviceLost:
    """Return what every client is told once the device has failed, whichever request caused it."""
    return DeviceLost(
        "the device failed and the worker starts again; this request may not be the cause of it: "
        "send it again later, once"
    )
