"""Drains a server before it is stopped: nothing new, and what is in flight is finished."""

from __future__ import annotations

import http.client
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from handler.service.draining import Drain, num_live_in
from scripts.torchserve.process import TorchServer

__all__ = ["DRAIN_S", "GRACE_S", "drain"]

DRAIN_S = 60.0
"""How long requests in flight may still take, unless told otherwise."""
GRACE_S = 10.0
"""The worker sees that the time is up between two steps; one of large pictures takes seconds."""
POLL_S, MAX_POLL_S = 0.1, 0.5
# Netty's threads write replies; the kernel sends them.
WRITE_S, MAX_SEND_S = 0.1, 5.0
# The frontend's own answer while its queue holds as many requests as it may.
QUEUE_FULL = b"ServiceUnavailableException"
SOCKET_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def drain(
    server: TorchServer,
    drain_s: float = DRAIN_S,
    tell: Callable[[int, float], None] = lambda num_live, waited_s: None,
) -> None:
    """Return when all requests of `server` are answered, so that it can be stopped.

    What is in flight after `drain_s` is answered with 503. This takes at most GRACE_S longer, also
    when the worker hangs; no time when there is none, and one request's when its handler is not
    ours. Interrupted, it lets the server serve on.

    Args:
        server: runs.
        drain_s: seconds; 0 does nothing.
        tell: hears how many requests are left, and the seconds waited, a few times a second.
    """
    if drain_s <= 0 or not server.is_ready():
        return
    started_s = time.monotonic()
    until_s = started_s + drain_s
    # Somebody else may be waiting for the server to be drained: both go on asking.
    earlier = Drain.read(server.drain_file, started_s)
    inquiry = f"drain-{secrets.token_hex(16)}" if earlier is None else earlier.inquiry
    pause_s = POLL_S
    try:
        Drain(until_s, inquiry).write(server.drain_file)
    except OSError as error:
        # On a full disk above all: to stop matters more than to finish.
        print(f"Requests in flight are not finished: {error}", file=sys.stderr)
        return
    try:
        while num_live := _num_live(server, inquiry, until_s + GRACE_S):
            tell(num_live, time.monotonic() - started_s)
            time.sleep(pause_s)
            pause_s = min(MAX_POLL_S, 1.5 * pause_s)
        if num_live is not None:
            _wait_until_sent(server)
    except BaseException:
        if earlier is None:
            server.drain_file.unlink(missing_ok=True)
        else:
            earlier.write(server.drain_file)
        raise


def _num_live(server: TorchServer, inquiry: str, until_s: float) -> int | None:
    """Return how many requests are live; None when the worker says nothing, or of something else.

    The question goes the way of all requests: when the answer comes, the frontend has what was
    answered before.
    """
    while (body := _ask(server, inquiry, until_s)) is not None and QUEUE_FULL in body:
        time.sleep(POLL_S)
    return None if body is None else num_live_in(body)


def _ask(server: TorchServer, inquiry: str, until_s: float) -> bytes | None:
    parts = urlsplit(server.predictions_url)
    headers = {"Content-Type": "application/json"}
    if token := server.token():
        headers["Authorization"] = f"Bearer {token}"
    timeout_s = until_s - time.monotonic()
    if timeout_s <= 0:
        return None
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        connection.request("POST", parts.path, json.dumps({"cancel": inquiry}), headers)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _wait_until_sent(server: TorchServer) -> None:
    """Wait until clients have received what was written to them.

    The frontend sets SO_LINGER to 0: what its sockets still hold when it ends is thrown away.
    """
    ends_s = time.monotonic() + MAX_SEND_S
    ports = set(server.options.ports.numbers)
    time.sleep(WRITE_S)
    while any(_unsent_bytes(ports)) and time.monotonic() < ends_s:
        time.sleep(POLL_S)


def _unsent_bytes(ports: set[int]) -> Iterator[int]:
    """The bytes that each connection to one of `ports` has still to send; nothing but on Linux.

    Source: Linux, Documentation/networking/proc_net_tcp.rst.
    """
    for table in SOCKET_TABLES:
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) in ports:
                    yield int(fields[4].partition(":")[0], 16)
