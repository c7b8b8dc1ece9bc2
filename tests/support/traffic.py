"""Requests that last, are watched, cancelled and left, and what the metrics say of them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TypeVar

from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, curl, post_json

# Minutes of work on one thread: whatever is over before this has overtaken it.
ENDLESS: dict[str, object] = {
    "prompt": "a ring",
    "seed": 1,
    "num_inference_steps": 1000,
    "num_images": 4,
    "height": 768,
    "width": 768,
    "output_format": "json",
}
_OWN_LABELS = ("outcome", "stage", "le", "task", "lora", "kind")
T = TypeVar("T")
SSE = ("-H", "Accept: text/event-stream")


class Watched:
    """A stream that is being read: its lines as they come."""

    def __init__(self, process: subprocess.Popen[str], lines: IO[str]) -> None:
        self._process = process
        self.lines = lines

    def read_until(self, beginning: str) -> str:
        """The first line that begins so; empty when the stream ends before."""
        return next((line for line in self.lines if line.startswith(beginning)), "")

    def events(self) -> list[tuple[str, dict[str, object]]]:
        """Read to the end: what is still to come."""
        return parse_events(self.lines.read())

    def leave(self) -> None:
        """Close the connection, as a client that has lost interest."""
        self._process.kill()
        self._process.wait()


def parse_events(text: str) -> list[tuple[str, dict[str, object]]]:
    """The server-sent events in `text`, by name."""
    found = re.findall(r"^event: (\w+)\ndata: (.*)$", text, re.MULTILINE)
    return [(name, json.loads(data)) for name, data in found]


@contextmanager
def watching(url: str, fields: Mapping[str, object], *arguments: str) -> Iterator[Watched]:
    """Post `fields` and give the stream of events, with the first step behind it."""
    process = subprocess.Popen(
        [
            *("curl", "-sSN", "--noproxy", "*", "--max-time", "120", url),
            *("-H", "Content-Type: application/json", *SSE, *arguments),
            *("-d", json.dumps(dict(fields))),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        watched = Watched(process, process.stdout)
        watched.read_until("event: step")
        watched.read_until("data: ")
        yield watched
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def cancel(url: str, request_id: str) -> Answer:
    """Cancel a request that is on its way: it may not have arrived yet."""
    return until(
        lambda: post_json(url, {"cancel": request_id}), lambda answer: answer.status != 404
    )


def until(ask: Callable[[], T], is_enough: Callable[[T], bool], timeout_s: float = 30) -> T:
    """Ask until the answer is enough or time is up; the last answer."""
    ends_s = time.monotonic() + timeout_s
    while True:
        answer = ask()
        if is_enough(answer) or time.monotonic() > ends_s:
            return answer


def metrics(server: TorchServer) -> dict[str, float]:
    """Our metrics by name and labels, less those that are the same for all: `x{outcome=ok}`."""
    values = {}
    for line in curl(server.metrics_url).body.decode().splitlines():
        match = re.fullmatch(r"(diffusers_\w+)\{(.*)\} (\S+)", line)
        if match is not None:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            assert labels.pop("ModelName") == server.model_name
            own = ",".join(f"{k}={labels[k]}" for k in _OWN_LABELS if k in labels)
            values[match[1] + (f"{{{own}}}" if own else "")] = float(match[3])
    return values
