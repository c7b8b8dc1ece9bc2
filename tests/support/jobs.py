"""A client of the gateway's jobs, and a receiver of webhooks."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gateway.jobs.database import JobDatabase
from gateway.jobs.store import JobStore
from tests.support.traffic import until

__all__ = [
    "ENDED",
    "JobClient",
    "OpenStore",
    "Reply",
    "Webhooks",
    "picture_of",
    "receiving_webhooks",
]

OpenStore = Callable[..., AbstractAsyncContextManager[tuple[JobStore, JobDatabase]]]
"""Takes settings; a store that is open inside a block, and the database behind it."""

ENDED = ("succeeded", "failed", "cancelled")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _lower(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class JobClient:
    """Raises OSError while the gateway is away."""

    url: str
    key: str | None = None
    posted: list[str] = field(default_factory=list)
    """The ids of jobs that were accepted."""

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        url = path if path.startswith("http") else self.url + path
        request = urllib.request.Request(url, content, dict(headers), method=method)
        if content is not None and "Content-Type" not in headers:
            request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with _OPENER.open(request, timeout=30) as reply:
                return Reply(reply.status, _lower(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, _lower(error.headers), error.read())
        except http.client.HTTPException as error:
            # It was killed between the head of a reply and its body.
            raise ConnectionError(repr(error)) from error

    def post(self, fields: Mapping[str, object], **headers: str) -> Reply:
        return self.ask("POST", "/v1/jobs", {"prompt": "a ring", **fields}, **headers)

    def accepted(self, fields: Mapping[str, object], **headers: str) -> str:
        """The id of a job that was accepted."""
        reply = self.post(fields, **headers)
        assert reply.status == 202, reply.body
        self.posted.append(reply.json()["id"])
        return self.posted[-1]

    def get(self, job_id: str) -> dict[str, Any]:
        reply = self.ask("GET", f"/v1/jobs/{job_id}")
        assert reply.status == 200, reply.body
        return dict(reply.json())

    def cancel_all(self) -> None:
        """Leave none that is still drawn."""
        for job_id in self.posted:
            self.ask("DELETE", f"/v1/jobs/{job_id}")

    def ended(self, job_id: str, timeout_s: float = 60) -> dict[str, Any]:
        """The job when it has ended."""
        job = until(lambda: self.get(job_id), lambda job: job["state"] in ENDED, timeout_s)
        assert job["state"] in ENDED, job
        return job


def picture_of(job: Mapping[str, Any], index: int = 0) -> bytes:
    assert job["state"] == "succeeded", job["error"]
    return base64.b64decode(job["result"]["data"][index]["b64_json"])


@dataclass(slots=True)
class Webhooks:
    """What came, and the statuses that are replied, one after the other; then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextmanager
def receiving_webhooks() -> Iterator[Webhooks]:
    """Listen on a port of loopback inside the block."""
    webhooks = Webhooks()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            webhooks.received.append((headers, body))
            webhooks.paths.append(self.path)
            self.send_response(webhooks.statuses.pop(0) if webhooks.statuses else 204)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    webhooks.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield webhooks
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
