"""What a job is: its states, what is known of it, and what is handed from one part to another."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "ENDED",
    "Claim",
    "Delivery",
    "Drawn",
    "Job",
    "NewJob",
    "Progress",
    "State",
    "WebhookState",
]


class State(StrEnum):
    """QUEUED ─▶ RUNNING ─▶ SUCCEEDED, FAILED; back to QUEUED where who drew it has gone.

    Both may become CANCELLED.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class WebhookState(StrEnum):
    """Of a job's webhook; a job without one has none of these."""

    WAITING = "waiting"
    """The job has not ended."""
    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is to be accepted."""

    id: str
    key_name: str
    idempotency_key: str | None
    fingerprint: str
    """Of what the client sent."""
    model: str
    request: bytes
    """What is to be drawn, its seed included."""
    summary: str
    """JSON that a job's replies need for as long as it is known."""
    webhook_url: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is drawn."""

    picture: int = 0
    """Which of its pictures is being drawn, from 0."""
    step: int = 0
    num_steps: int = 0
    preview: bytes | None = None
    """A small JPEG."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job as its store knows it, without what is to be drawn and without pictures."""

    id: str
    key_name: str
    fingerprint: str
    state: State
    model: str
    summary: str
    created_s: float
    started_s: float | None
    finished_s: float | None
    progress: Progress
    result: str | None
    """JSON of a reply of the images API, with the names of pictures for their URLs."""
    error: str | None
    """JSON of an error's reply, with its status."""
    webhook_state: WebhookState | None
    webhook_tries: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that is this gateway's to draw, for as long as its lease is renewed."""

    id: str
    token: str
    """Differs between any two claims of a job."""
    key_name: str
    model: str
    request: bytes
    summary: str
    created_s: float
    num_deaths: int
    """How often instances have died over it."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture of a job that has ended."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook that is due; it counts as tried."""

    job: Job
    url: str
