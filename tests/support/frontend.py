"""TorchServe as the handler meets it: its own worker code around `handle`, and its cycles.

`Frontend` does what the Java side does with ``continuousBatching`` (torchserve 0.12.0): each cycle
it sends every live request, with only its id once it streams; a request whose reply is left out
stays live. What it must never see is an assertion here, so every test of the handler checks it.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.service import Service

from scripts.repository import REPOSITORY

METRICS = REPOSITORY / "config" / "metrics.yaml"
MODEL_NAME = "tiny"
# Far more than the slowest test needs on the slowest machine.
PATIENCE_S = 300
CONTINUOUS = {"continuousBatching": True, "minWorkers": 1, "maxWorkers": 1}
# Small enough to draw in milliseconds with the pipelines of tests/support/pipelines.py.
QUICK = {
    "height": 32,
    "width": 32,
    "min_size_px": 8,
    "num_inference_steps": 3,
    "max_num_inference_steps": 1000,
    "num_threads": 1,
}


@dataclass(eq=False)
class Posted:
    """What became of one request; `chunks` are the bodies of its replies so far."""

    request_id: str
    parameters: list[dict[str, Any]]
    headers: list[dict[str, bytes]]
    is_grpc: bool = False
    status: int | None = None
    reply_headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    is_streaming: bool = False
    is_answered: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[tuple[str, Any]]:
        """The server-sent events of the body, their data parsed."""
        blocks = [b.splitlines() for b in self.body.decode("ascii").split("\n\n")]
        return [
            (block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: ")))
            for block in blocks
            if block and block[0].startswith("event: ")
        ]


class Frontend:
    """One model with one worker: `post` requests, then let `cycle`s run."""

    def __init__(self, handler: Any, model_dir: Path, config: Mapping[str, Any]) -> None:
        # Whole at any time: a second process may be reading it, and empty means the defaults.
        part = model_dir / f"model-config.{os.getpid()}.yaml"
        part.write_text(yaml.safe_dump(dict(config)))
        part.replace(model_dir / "model-config.yaml")
        self.metrics = MetricsCacheYamlImpl(str(METRICS))
        self.metrics.initialize_cache()
        self._service = Service(
            MODEL_NAME,
            str(model_dir),
            {"model": {"configFile": "model-config.yaml"}},
            handler.handle,
            None,
            128,
            metrics_cache=self.metrics,
        )
        self.context = self._service.context
        self._service.set_cl_socket(None)
        self._live: dict[str, Posted] = {}
        self._ids = (f"ts-{number}" for number in itertools.count())

    @property
    def live(self) -> list[Posted]:
        return list(self._live.values())

    def post(
        self,
        body: object,
        headers: Mapping[str, str] | None = None,
        *,
        form: bool = False,
        grpc: bool = False,
        request_id: str | None = None,
    ) -> Posted:
        """Queue a request: JSON, text, or with `form` or `grpc` fields of their own."""
        fields = body if (form or grpc) and isinstance(body, Mapping) else {"body": body}
        parameters = [
            {"name": name, "contentType": b"application/json", "value": value}
            for name, value in fields.items()
        ]
        sent = {} if grpc else {"Host": "localhost", **(headers or {})}
        encoded = [{"name": k.encode(), "value": v.encode()} for k, v in sent.items()]
        posted = Posted(request_id or next(self._ids), parameters, encoded, is_grpc=grpc)
        assert posted.request_id not in self._live
        self._live[posted.request_id] = posted
        return posted

    def disconnect(self, posted: Posted) -> None:
        """The client goes away, which TorchServe notices on streams only."""
        if posted.is_streaming:
            self._live.pop(posted.request_id, None)

    def cycle(self) -> list[Posted]:
        """Send every live request to the worker once; those that were answered for good."""
        batch = [
            {
                "requestId": posted.request_id.encode(),
                "parameters": [] if posted.is_streaming else posted.parameters,
                "headers": [] if posted.is_streaming else posted.headers,
            }
            for posted in self._live.values()
        ]
        answered = []
        for request_id, status, headers, body in _decode(self.predict(batch)):
            assert request_id in self._live, f"{request_id} was answered, and is not there"
            posted = self._live[request_id]
            stream_next = headers.pop("ts_stream_next", None)
            if not posted.is_streaming:
                # A stream's status and headers are those of its first chunk.
                posted.status, posted.reply_headers = status, headers
                if posted.is_grpc:
                    assert stream_next == "false", "StreamPredictions with it kills the worker"
                else:
                    assert stream_next != "false", "TorchServe's client hangs on this first reply"
            else:
                assert stream_next is not None, "an unmarked reply after a stream has begun"
            posted.chunks.append(body)
            posted.is_streaming = stream_next == "true"
            if not posted.is_streaming:
                posted.is_answered = True
                del self._live[request_id]
                answered.append(posted)
        return answered

    def predict(self, batch: list[dict[str, Any]]) -> bytes:
        """Let the worker's code handle one message as its codec gives it; its reply."""
        return bytes(self._service.predict(batch))

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Cycle until `until` says so, by default until nothing is live.

        Bounded by time: with `cycle_ms=0` thousands of cycles pass while a picture is encoded.
        """
        begun_s = time.monotonic()
        while not (until() if until is not None else not self._live):
            assert time.monotonic() < begun_s + PATIENCE_S, f"not over after {PATIENCE_S} s"
            self.cycle()


def _decode(message: bytes) -> list[tuple[str, int, dict[str, str], bytes]]:
    """The predictions in a worker's reply: id, status, headers, body."""
    at = 0

    def integer() -> int:
        nonlocal at
        at += 4
        value: int = struct.unpack("!i", message[at - 4 : at])[0]
        return value

    def data() -> bytes:
        nonlocal at
        size = integer()
        at += size
        return message[at - size : at]

    code, text = integer(), data()
    assert code == 200, f"handle() raised, which fails the whole batch: {text!r}"
    predictions = []
    while (size := integer()) != -1:
        at += size
        request_id = message[at - size : at].decode()
        data()  # the content type, which is among the headers too
        status = integer()
        data()  # the reason phrase
        headers = {data().decode(): data().decode() for _ in range(integer())}
        predictions.append((request_id, status, headers, data()))
    assert at == len(message)
    return predictions
