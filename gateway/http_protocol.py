"""HTTP as uvicorn speaks it, with what real clients do besides: half-closed connections, bad lines.

A client that shuts its side after it has sent its request still waits for the reply; one that has
left altogether looks the same, until something is written to it. So an interim response is: who
is still there reads over it (RFC 9110, 15.2), and the kernel of who has left resets the connection.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

__all__ = ["HttpProtocol"]

_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_LOOK_S, _LAST_LOOK_S = 0.05, 5.0
# Longer than that nobody's rest of a refused body is read and thrown away.
_DISCARD_S = 5.0


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _discarding: asyncio.TimerHandle | None = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for a reply that its client may still be waiting for."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or self.transport.is_closing():
            return False
        if cycle.more_body or self.scope.get("http_version") != "1.1":
            return (
                False  # it left in the middle of its body, or could not read the interim response
            )
        cycle.keep_alive = False
        if not cycle.response_started:
            self.transport.write(_INTERIM)
        self.loop.call_later(_FIRST_LOOK_S, self._look, _FIRST_LOOK_S)
        return True

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that is not HTTP, as every other error is said."""
        message = f"{msg} Methods are written in capitals: POST, GET, DELETE."
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_http",
        }
        body = json.dumps({"error": error}).encode("ascii")
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[400] + head.encode("ascii") + body)
        self.transport.close()

    def on_response_complete(self) -> None:
        """Read no endless rest of a body that was refused."""
        # It may be the reply before that of `cycle`, which was sent without waiting for it.
        is_refused = self.cycle.response_complete and self.cycle.more_body
        if is_refused and not self.transport.is_closing():
            self._discarding = self.loop.call_later(_DISCARD_S, self.transport.close)
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """Keep the connection: all of a body that was refused has come."""
        if self._discarding is not None:
            self._discarding.cancel()
            self._discarding = None
        super().on_message_complete()

    def _look(self, waited_s: float) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        connection: Any = self.transport.get_extra_info("socket")
        if connection is None or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            waited_s = min(2 * waited_s, _LAST_LOOK_S)
            self.loop.call_later(waited_s, self._look, waited_s)
