"""Why a server did not start, read from its log."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

__all__ = ["has_failed_to_load", "load_failure", "refusal"]

# Messages that mean "the model will not load": the frontend's retries would not help.
LOAD_FAILURES = (
    "Load model failed:",
    "Failed to load model:",
    "Backend worker process died.",
    "Backend worker error",
    "Backend worker startup time out",
)
WORKER_LINE = re.compile(r"^\S+ \S+ [A-Z]+ +MODEL_LOG (?P<text>.*)$")
FRONTEND_FAILURE = re.compile(
    r"^\S+ \S+ [A-Z]+ +ModelServer Failed to load model: (?P<archive>.*)$"
)
# The handler's own word for it, above whatever TorchServe makes of the exception.
REFUSAL = "cannot serve this model: "
# And for a worker that can draw.
LOADED = re.compile(r"^\w+ is ready on \S+ after \S+ s$")
NEXT_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:")
NUM_LINES = 20


def has_failed_to_load(log: str) -> bool:
    """Whether the log says that the model will not load."""
    return any(failure in log for failure in LOAD_FAILURES)


def load_failure(log: str) -> str:
    """Return what ended the start: our own words for it, the frontend's, or the worker's last.

    One or more lines, at most 20.
    """
    if reason := refusal(log):
        return reason
    if lines := _of_the_frontend(log.splitlines()):
        return "\n".join(lines[:NUM_LINES])
    lines = [match["text"] for line in log.splitlines() if (match := WORKER_LINE.match(line))]
    tracebacks = [at for at, line in enumerate(lines) if line.startswith("Traceback")]
    if tracebacks:
        frames_and_message = lines[tracebacks[-1] + 1 :]
        lines = list(itertools.dropwhile(lambda line: line[:1] == " ", frames_and_message))
        return "\n".join(lines[:NUM_LINES])
    return "\n".join(lines[-NUM_LINES:])


def refusal(log: str) -> str | None:
    """Return the last reason for which the handler refused the model or to start beside another.

    One from before the last worker that could be loaded is no reason any more.
    """
    reason = None
    for line in log.splitlines():
        if match := WORKER_LINE.match(line):
            _, is_refusal, why = match["text"].partition(REFUSAL)
            if is_refusal:
                reason = why
            elif LOADED.match(match["text"]):
                reason = None
    return reason


def _of_the_frontend(lines: Sequence[str]) -> list[str]:
    """What the frontend says of an archive that it could not unpack: each exception's message."""
    for at, line in enumerate(lines):
        if failed := FRONTEND_FAILURE.match(line):
            stack = itertools.takewhile(lambda each: not NEXT_LINE.match(each), lines[at + 1 :])
            messages = [each for each in stack if not each.startswith(("\t", " "))]
            return [f"{failed['archive']} could not be unpacked", *messages]
    return []
