"""TorchServe's management API, asked over the address that it listens on.

By default that is a Unix socket in a private directory: whoever reaches this API can end the
service for good (``GET /models/NAME?customized=true``) or scale it to two workers, which hang.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["ModelState", "describe"]


@dataclass(frozen=True, slots=True)
class ModelState:
    """What the frontend says about its model."""

    workers: list[dict[str, object]]
    # Requests that no worker has taken yet.
    num_pending: int

    @property
    def is_ready(self) -> bool:
        """Whether a worker can take requests (/ping is healthy long before)."""
        return bool(self._ready)

    @property
    def ready_pids(self) -> list[int]:
        """The processes of the workers that can take requests."""
        return [int(str(worker["pid"])) for worker in self._ready]

    @property
    def _ready(self) -> list[dict[str, object]]:
        return [worker for worker in self.workers if worker.get("status") == "READY"]


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def describe(
    address: str, model_name: str, token: str | None = None, timeout_s: float = 10.0
) -> ModelState | None:
    """Return the state of a model; None when nothing answers, or not about this model.

    Args:
        address: of the management API, as in config.properties: ``unix:/path`` or ``http://…``.
        model_name: which model.
        token: the management key, where authorization is on.
        timeout_s: how long the frontend may take.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        body = _get(address, f"/models/{model_name}", headers, timeout_s)
        state = json.loads(body)[0]
        queue = state.get("jobQueueStatus", {})
        return ModelState(list(state["workers"]), int(queue.get("pendingRequests", 0)))
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None


def _get(address: str, path: str, headers: Mapping[str, str], timeout_s: float) -> bytes:
    kind, _, rest = address.partition(":")
    connection: http.client.HTTPConnection
    if kind == "unix":
        connection = _UnixConnection(rest, timeout_s)
    else:
        # Loopback never goes through a proxy, whatever http_proxy says; http.client knows of none.
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout_s)
    try:
        connection.request("GET", path, headers=dict(headers))
        return connection.getresponse().read()
    finally:
        connection.close()
