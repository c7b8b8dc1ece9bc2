"""Server-sent events that tell a client of each denoising step while its request runs.

event: step      {"step": 3, "num_steps": 50, "elapsed_s": 0.41}
event: preview   {"step": 10, "content_type": "image/jpeg", "image": "<base64>"}
event: image     the reply's JSON, or {"content_type", "seeds", "image": "<base64>",
                  "warning"?, "content_flagged"?}
event: error     the error's JSON, with its status
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from handler.api.accept import EVENT_STREAM
from handler.api.replies import FLAGGED, Reply
from handler.engine.ticket import StepEnd
from handler.pipelines.preview import Previewer

__all__ = ["INTERRUPTED", "EventStream"]

INTERRUPTED = (
    b'event: error\ndata: {"status":503,"error":{"code":"interrupted","message":'
    b'"the server was paused for too long; send the request again","fields":{}}}\n\n'
)
"""The last event of a stream that the handler gave up although its client was still there."""


class EventStream:
    """The events of one request: `on_step` adds to them, `take` returns what is new."""

    def __init__(
        self, previewer: Previewer, preview_every: int, clock: Callable[[], float]
    ) -> None:
        self._preview_every = preview_every
        self._previewer = previewer
        self._clock = clock
        self._started_s = clock()
        self._pending: list[bytes] = []
        self._has_begun = False

    def on_step(self, end: StepEnd) -> None:
        """Add the end of a denoising step; called by the engine."""
        elapsed_s = round(self._clock() - self._started_s, 3)
        self._add("step", {"step": end.step, "num_steps": end.num_steps, "elapsed_s": elapsed_s})
        if self._preview_every and end.step % self._preview_every == 0:
            jpeg = self._previewer.jpeg(end.latents)
            if jpeg is not None:
                image = base64.b64encode(jpeg).decode("ascii")
                preview = {"step": end.step, "content_type": "image/jpeg", "image": image}
                self._add("preview", preview)

    def take(self) -> bytes:
        """Return the events since the last time; empty if there were none."""
        taken = b"".join(self._pending)
        self._pending.clear()
        return taken

    def opening(self) -> Reply:
        """Return the first chunk, which fixes the reply's status and type for good."""
        self._has_begun = True
        return Reply(200, "OK", EVENT_STREAM, b": accepted\n\n" + self.take())

    def close(self, reply: Reply) -> Reply:
        """Return the last chunk: all that is pending and then `reply` as an event.

        An error of a stream that has not begun stays the reply that it is.
        """
        if reply.status != 200 and not self._has_begun:
            return reply
        if reply.status != 200:
            self._add("error", {"status": reply.status, **json.loads(reply.body)})
        elif reply.content_type == "application/json":
            # One line of ASCII already; the engine would wait while megabytes were parsed again.
            self._pending.append(b"event: image\ndata: " + reply.body + b"\n\n")
        else:
            image = base64.b64encode(reply.body).decode("ascii")
            seeds = [int(seed) for seed in reply.headers["X-Seed"].split(",")]
            event = {"content_type": reply.content_type, "seeds": seeds, "image": image}
            # Its headers went out with the first chunk.
            if warning := reply.headers.get("Warning"):
                event["warning"] = warning
            if flagged := reply.headers.get(FLAGGED):
                event["content_flagged"] = json.loads(f"[{flagged}]")
            self._add("image", event)
        return Reply(reply.status, reply.phrase, EVENT_STREAM, self.take(), reply.headers)

    def _add(self, event: str, data: dict[str, Any]) -> None:
        text = json.dumps(data, separators=(",", ":"))
        self._pending.append(f"event: {event}\ndata: {text}\n\n".encode("ascii"))
