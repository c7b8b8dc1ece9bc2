"""Leaves unread what TorchServe sends again and again: the bodies of requests that are live.

With ``continuousBatching: true`` every cycle carries the whole body of every live request, which
TorchServe's worker code (torchserve 0.12.0, ``ts/protocol/otf_message_handler.py``) copies, decodes
and parses anew. `handle` looks at a body once, when the request is new. So the values of those that
it knows are received into one buffer and forgotten; ids and headers are read as ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ts.protocol import otf_message_handler

__all__ = ["LiveBodies"]

_END_OF_LIST = -1
# Fits into a core's own cache, which a body of megabytes does not.
_BUFFER_BYTES = 256 * 1024


class LiveBodies:
    """Receives requests in TorchServe's place, all but the bodies that are known.

    Args:
        is_known: whether a request's body was read before, by the request's id.
        on_message: called before the first request of a message is read.
    """

    def __init__(self, is_known: Callable[[str], bool], on_message: Callable[[], None]) -> None:
        self._is_known = is_known
        self._on_message = on_message
        self._is_between_messages = True
        self._num_bytes = 0
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def install(self) -> None:
        """Let TorchServe's worker code call `receive`, in this process and for good."""
        otf_message_handler._retrieve_request = self.receive

    def take_num_bytes(self) -> int:
        """How many bytes of known bodies came since this was last called."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        return num_bytes

    def receive(self, connection: socket.socket) -> dict[str, Any] | None:
        """Read one request, without parameters if it is known; None at the message's end.

        The form is that of TorchServe's ``_retrieve_request``: lists that end with -1, of an id,
        headers (name, value) and parameters (name, content type, value), each after its length.
        """
        codec = otf_message_handler
        if self._is_between_messages:
            self._on_message()
        length = codec._retrieve_int(connection)
        self._is_between_messages = length == _END_OF_LIST
        if length == _END_OF_LIST:
            return None
        request_id = codec._retrieve_buffer(connection, length)
        headers, parameters = [], []
        while (header := codec._retrieve_reqest_header(connection)) is not None:
            headers.append(header)
        if self._is_known(request_id.decode("utf-8")):
            self._skip_parameters(connection)
        else:
            while (parameter := codec._retrieve_input_data(connection)) is not None:
                parameters.append(parameter)
        return {"requestId": request_id, "headers": headers, "parameters": parameters}

    def _skip_parameters(self, connection: socket.socket) -> None:
        codec = otf_message_handler
        while (length := codec._retrieve_int(connection)) != _END_OF_LIST:
            self._skip(connection, length)
            for _ in ("content type", "value"):
                self._skip(connection, codec._retrieve_int(connection))

    def _skip(self, connection: socket.socket, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        while num_bytes:
            received = connection.recv_into(self._buffer, min(num_bytes, _BUFFER_BYTES))
            if not received:
                # As TorchServe's own code does it: the frontend is gone, and so is this worker.
                raise SystemExit(0)
            num_bytes -= received
