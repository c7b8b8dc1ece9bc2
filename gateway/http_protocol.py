"""HTTP as uvicorn speaks it, with bounds, and with what real clients do: half-closed connections.

A client that shuts its side after it has sent its request still waits for the reply; one that has
left altogether looks the same, until something is written to it. So an interim response is: who
is still there reads over it (RFC 9110, 15.2), and the kernel of who has left resets the connection.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

__all__ = ["HttpProtocol"]

_INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_LOOK_S, _LAST_LOOK_S = 0.05, 5.0
_MAX_HEAD_BYTES = 64 * 1024
# From the first byte of a request's head, or from the connection, to the head's end.
_HEAD_S = 30.0
_TLS_RECORD = b"\x16\x03"
# Of a reply that is being sent: in that time some of it must be read.
_UNREAD_S = 60.0
# Longer than that nobody's rest of a refused body is read and thrown away.
_DISCARD_S = 5.0

_REFUSALS = {
    400: ("invalid_http", "Invalid HTTP request received: "),
    408: ("head_timeout", f"the request's headers did not arrive within {_HEAD_S:g} s"),
    431: (
        "headers_too_large",
        f"the request's line and headers have more than {_MAX_HEAD_BYTES} bytes, which are allowed",
    ),
}


def _fault(error: BaseException | None, piece: bytes) -> str:
    """Say what the parser did not understand in a piece of a connection."""
    if piece.startswith(_TLS_RECORD):
        return (
            "it begins as TLS does, and this port speaks plain HTTP; write http://, not https://."
        )
    if piece.startswith(b"PRI * HTTP/2"):
        return "HTTP/2 is not spoken here, but HTTP/1.1."
    if isinstance(error, httptools.HttpParserInvalidMethodError):
        return "it begins with no method. Methods are written in capitals: POST, GET, DELETE."
    if isinstance(error, httptools.HttpParserCallbackError):
        return "the address in its first line cannot be read."
    return f"{error}."


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    _discarding: asyncio.TimerHandle | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _num_unread_bytes = 0
    """Of replies, at the last look."""
    _awaits_head = True
    _has_begun = False
    """Whether a byte of the head that is awaited has come."""
    _may_leave_out_body = False
    """Whether the client waits for leave to send its body (RFC 9110, 10.1.1)."""
    _num_idle_bytes = 0
    """How many came since there was a piece of a body, or a request that was whole."""
    _refused_with = 400
    _piece = b""
    """Where the last one of what came begins."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request's head, for a while."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of what waits for the connection."""
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Watch whether the client reads, now that replies to it heap up here."""
        super().pause_writing()
        self._num_unread_bytes = self.transport.get_write_buffer_size()
        self._read_timer = self.loop.call_later(_UNREAD_S, self._must_have_read)

    def resume_writing(self) -> None:
        """Watch no more: it reads."""
        self._stop_read_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Read on, unless a head or a trailer does not end.

        What came of it in the piece in which it begins is bounded by that piece.
        """
        self._num_idle_bytes += len(data)
        self._piece = data[:16]
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_idle_bytes > _MAX_HEAD_BYTES:
            self._refused_with = 431
            self.send_400_response("")
        elif self._awaits_head and self._head_timer is None and (self._has_begun or self._is_idle):
            self._head_timer = self.loop.call_later(_HEAD_S, self._head_is_late)

    def on_message_begin(self) -> None:
        """Note that a head has begun."""
        self._num_idle_bytes, self._has_begun, self._may_leave_out_body = 0, True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Serve a request whose head is small enough. Raises: ValueError, which refuses it."""
        self._awaits_head = self._has_begun = False
        self._stop_head_timer()
        if len(self.url) + sum(len(k) + len(v) + 4 for k, v in self.headers) > _MAX_HEAD_BYTES:
            self._refused_with = 431
            raise ValueError
        super().on_headers_complete()
        if self.expect_100_continue and self.cycle.keep_alive:
            # Who is refused before the body may leave it out: what follows cannot be told apart.
            self.cycle.keep_alive, self._may_leave_out_body = False, True

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._num_idle_bytes = 0
        self._body_comes()
        super().on_body(body)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for a reply that its client may still be waiting for."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or self.transport.is_closing():
            return False
        if cycle.more_body:
            return False  # it left in the middle of its body
        if self.scope.get("http_version") != "1.1":
            # It could not read an interim response. Most of these are proxies, which leave with
            # their clients: to draw on for all would cost more than the few that wait still lose.
            return False
        cycle.keep_alive = False
        if not cycle.response_started:
            self.transport.write(_INTERIM)
        self.loop.call_later(_FIRST_LOOK_S, self._look, _FIRST_LOOK_S)
        return True

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that is not HTTP, as every other error is said."""
        code, message = _REFUSALS[self._refused_with]
        if self._refused_with == 400:
            message += _fault(sys.exception(), self._piece)
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": code,
        }
        body = json.dumps({"error": error}).encode("ascii")
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[self._refused_with] + head.encode("ascii") + body)
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
        self._body_comes()
        if self._discarding is not None:
            self._discarding.cancel()
            self._discarding = None
        self._num_idle_bytes, self._awaits_head = 0, True
        super().on_message_complete()

    def _body_comes(self) -> None:
        """Keep the connection of who has not left the body out, unless the reply says otherwise."""
        if self._may_leave_out_body:
            self._may_leave_out_body = False
            self.cycle.keep_alive = not self.cycle.response_started

    @property
    def _is_idle(self) -> bool:
        """Whether nobody waits for a reply."""
        return self.cycle is None or self.cycle.response_complete

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if not self._is_idle:
            # It is the next one's, and the reply to this one comes first.
            self._head_timer = self.loop.call_later(_HEAD_S, self._head_is_late)
        elif self._has_begun:
            self._refused_with = 408
            self.send_400_response("")
        else:
            self.transport.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _must_have_read(self) -> None:
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes >= self._num_unread_bytes:
            self._read_timer = None
            self.transport.abort()
        else:
            self._num_unread_bytes = num_bytes
            self._read_timer = self.loop.call_later(_UNREAD_S, self._must_have_read)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _look(self, waited_s: float) -> None:
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        connection: Any = self.transport.get_extra_info("socket")
        if connection is None or connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            waited_s = min(2 * waited_s, _LAST_LOOK_S)
            self.loop.call_later(waited_s, self._look, waited_s)
