"""What each cycle of TorchServe brings, received without the bodies that are known already.

With ``continuousBatching: true`` every cycle carries the whole body of every live request, which
TorchServe's worker code (torchserve 0.12.0, ``ts/protocol/otf_message_handler.py``) copies, decodes
and parses anew. `handle` looks at a body once, when the request is new. So the values of those that
it knows are received into one buffer and forgotten; ids and headers are read as ever.

The frontend puts such a message together before it sends the first byte. That time can be used::

    reply ─▶ while_waiting ─▶ on_message ─▶ known: skipped, new: read ─▶ handle ─▶ reply
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from ts.protocol import otf_message_handler

__all__ = ["CycleMessages"]

_END_OF_LIST = -1
# Fits into a core's own cache, which a body of megabytes does not.
_BUFFER_BYTES = 256 * 1024
_receive_buffer = otf_message_handler._retrieve_buffer


class CycleMessages:
    """Receives messages in TorchServe's place, all but the bodies that are known.

    Args:
        is_known: whether a request's body was read before, by the request's id.
        while_waiting: called with the connection before a message is received, whether it is there
            yet or not.
        on_message: called when a message is there, before its first request is read.
    """

    def __init__(
        self,
        is_known: Callable[[str], bool],
        while_waiting: Callable[[socket.socket], None],
        on_message: Callable[[], None],
    ) -> None:
        self._is_known = is_known
        self._while_waiting = while_waiting
        self._on_message = on_message
        self._is_between_messages = True
        self._num_bytes = 0
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    @property
    def num_bytes(self) -> int:
        """How many bytes the last message had, or has so far."""
        return self._num_bytes

    def install(self) -> None:
        """Let TorchServe's worker code call these methods, in this process and for good."""
        otf_message_handler._retrieve_buffer = self.receive_buffer
        otf_message_handler._retrieve_request = self.receive_request

    def receive_buffer(self, connection: socket.socket, length: int) -> bytearray:
        """Receive `length` bytes; the first of a message is its command."""
        if self._is_between_messages:
            self._while_waiting(connection)
        received: bytearray = _receive_buffer(connection, length)
        if self._is_between_messages and received == otf_message_handler.PREDICT_MSG:
            self._is_between_messages = False
            self._num_bytes = 0
            self._on_message()
        self._num_bytes += length
        return received

    def receive_request(self, connection: socket.socket) -> dict[str, Any] | None:
        """Receive one request, without parameters if it is known; None at the message's end.

        The form is that of TorchServe's ``_retrieve_request``: lists that end with -1, of an id,
        headers (name, value) and parameters (name, content type, value), each after its length.
        """
        codec = otf_message_handler
        length = codec._retrieve_int(connection)
        if length == _END_OF_LIST:
            self._is_between_messages = True
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
