"""What can go wrong, as one hierarchy; for requests the class is the HTTP status.

ServingError
├── RequestError            ends one request, never its neighbours
│   ├── InvalidRequest      400  every problem of the request at once, by field
│   ├── NotFound            404  no live request has this id
│   ├── Conflict            409  the id is taken by a live request
│   ├── TooLarge            413  larger than the server is configured to take
│   ├── ContentFlagged      422  the safety checker flags what was drawn
│   ├── Cancelled           499  somebody cancelled it
│   ├── EngineFault         500  the pipeline raised
│   │   └── PipelineFailed  500  what it drew is not finite
│   ├── QueueFull           503  try again after ``retry_after_s``
│   ├── Draining            503  the server is about to stop; try again after ``retry_after_s``
│   ├── DeviceLost          503  the device failed, the worker starts again; try again later
│   ├── DeadlineExceeded    504  past its deadline
│   └── OutOfMemory         507  does not fit on the device, even alone
├── ConfigError             start-up stops: the configuration is wrong
└── ArchiveError            start-up stops, or a script ends: the archive is wrong
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ArchiveError",
    "Cancelled",
    "ConfigError",
    "Conflict",
    "ContentFlagged",
    "DeadlineExceeded",
    "DeviceLost",
    "Draining",
    "EngineFault",
    "InvalidRequest",
    "NotFound",
    "OutOfMemory",
    "PipelineFailed",
    "QueueFull",
    "RequestError",
    "ServingError",
    "TooLarge",
]


class ServingError(Exception):
    """Any error that this package raises on purpose."""


class ConfigError(ServingError):
    """The worker's configuration is wrong; the message says which key and what it may be."""


class ArchiveError(ServingError):
    """An archive or a pipeline folder cannot be used; the message says why and what to do."""


class RequestError(ServingError):
    """One request ends with `status`.

    `fields` maps a request field to what is wrong with it (its value and its allowed range);
    `retry_after_s` goes into the Retry-After header.
    """

    status: int = 500
    phrase: str = "Internal Server Error"
    code: str = "error"

    def __init__(
        self,
        message: str,
        fields: Mapping[str, str] | None = None,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.fields: dict[str, str] = dict(fields or {})
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to this error."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def body(self) -> dict[str, object]:
        """The JSON body of the reply: ``{"error": {"code", "message", "fields"}}``."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "fields": self.fields,
            }
        }


class InvalidRequest(RequestError):
    """Something in the request is wrong; every problem is named at once, by field."""

    status, phrase, code = 400, "Bad Request", "invalid_request"


class NotFound(RequestError):
    """No running request has this id."""

    status, phrase, code = 404, "Not Found", "not_found"


class Conflict(RequestError):
    """The id belongs to a request that is still running."""

    status, phrase, code = 409, "Conflict", "conflict"


class TooLarge(RequestError):
    """The body is larger than the server is configured to take."""

    status, phrase, code = 413, "Content Too Large", "too_large"


class ContentFlagged(RequestError):
    """The safety checker flags what was drawn, and the operator refuses such pictures."""

    status, phrase, code = 422, "Unprocessable Content", "content_flagged"


class Cancelled(RequestError):
    """Somebody cancelled the request."""

    status, phrase, code = 499, "Client Closed Request", "cancelled"


class EngineFault(RequestError):
    """The pipeline failed, or the server; its log says why."""

    status, phrase, code = 500, "Internal Server Error", "engine_fault"


class PipelineFailed(EngineFault):
    """The picture is not finite: the pipeline's numbers overflowed; the message names remedies."""

    code = "pipeline_failed"


class _Unavailable(RequestError):
    """What is asked for may be had later: the header Retry-After says in how many seconds."""

    status, phrase = 503, "Service Unavailable"
    default_retry_after_s: int

    def __init__(self, message: str, retry_after_s: int | None = None) -> None:
        seconds = self.default_retry_after_s if retry_after_s is None else retry_after_s
        super().__init__(message, retry_after_s=seconds)


class QueueFull(_Unavailable):
    """Too many requests are waiting; the header Retry-After says in how many seconds to retry."""

    code, default_retry_after_s = "queue_full", 1


class Draining(_Unavailable):
    """The server is about to stop, and takes nothing new or had no time to finish the request."""

    code, default_retry_after_s = "draining", 10


class DeviceLost(_Unavailable):
    """The device failed under some request; the worker ends and starts again."""

    code, default_retry_after_s = "device_lost", 60


class DeadlineExceeded(RequestError):
    """The deadline passed, or the steps cannot end before it at the present pace."""

    status, phrase, code = 504, "Gateway Timeout", "deadline_exceeded"


class OutOfMemory(RequestError):
    """The request does not fit into the memory, even alone."""

    status, phrase, code = 507, "Insufficient Storage", "out_of_memory"
