"""What is known of one request, for its log line and its metrics; nothing of what was sent."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CURRENT", "Facts", "current_facts"]


@dataclass(slots=True)
class Facts:
    """One request of a client's; filled in by whoever learns something of it."""

    request_id: str
    """As the client sees it."""
    method: str
    path: str
    route: str
    """The path that was declared: ``/v1/models/{name}`` for every model."""
    is_keyless: bool = False
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    key_name: str = ""
    status: int = 0
    code: str = ""
    """The error's code, also where it was the last event of a stream; empty without an error."""
    has_left: bool = False
    """Whether the client left before its reply's end."""
    model: str = ""
    waited_s: float = 0.0
    """The longest that one of its pictures waited for an instance."""
    instances: list[str] = field(default_factory=list)
    upstream_ids: list[str] = field(default_factory=list)
    """What its pictures were called towards the instances, whose logs have these ids."""
    num_resent: int = 0
    traceparent: str = ""
    """Of its own span where there are traces, else what its client sent."""
    span: Any = None
    """OpenTelemetry's, where there are traces."""

    @property
    def trace_id(self) -> str:
        """Of the trace that it is part of; empty where there is none."""
        return self.traceparent[3:35]

    @property
    def seconds(self) -> float:
        """How long it took, or takes already."""
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.started_s


CURRENT: ContextVar[Facts | None] = ContextVar("facts of the current request", default=None)
"""Of the task that runs, and of those that it starts."""


def current_facts() -> Facts | None:
    """The request that the running task belongs to; None for jobs, and outside of requests."""
    return CURRENT.get()
