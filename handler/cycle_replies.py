"""What one cycle of TorchServe replies: whole replies, chunks of streams, or nothing yet.

TorchServe's reply encoder reads, request by request: the body, the status and headers in the
context, and a stopping criterion, which says whether the body is a plain reply (None), a chunk of
a stream that goes on (False) or its last chunk (True). A request that is taken out of
``context.request_ids`` gets nothing yet and comes again in the next cycle.

A reply over gRPC is always a last chunk: TorchServe sends that as an ordinary reply to a unary
call, whereas a plain reply to a streaming call kills the worker (GRPCJob.response of 0.12.0). The
first reply over HTTP never is one: its client would wait for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from handler.api.replies import Reply
from handler.service.event_stream import INTERRUPTED
from handler.service.generation import GenerationService

__all__ = ["CycleReplies", "http_headers"]

logger = logging.getLogger(__name__)

_Criterion = Callable[[object], bool | None]


class CycleReplies:
    """Writes replies into TorchServe's contexts; remembers whose streams have begun."""

    def __init__(self) -> None:
        self._streaming: set[str] = set()
        self._interrupted: set[str] = set()

    def is_interrupted(self, request_id: str) -> bool:
        """Whether this is a stream that was given up, and whose client is still to be told."""
        return request_id in self._interrupted

    def interrupt_streams(self) -> None:
        """Give up all streams. Should TorchServe send their ids again, their clients are told.

        It sends no more than the id of a stream that has begun, so that it cannot begin anew.
        """
        self._interrupted = self._streaming
        self._streaming = set()

    def forget(self, request_id: str) -> None:
        """Note that the client of this request went away."""
        self._streaming.discard(request_id)

    def write(
        self, service: GenerationService, ids: Mapping[int, str], context: Any
    ) -> list[bytes]:
        """Return the body for each place of `ids`; places without one leave `context.request_ids`.

        Mutates `context`: statuses, headers, ids and stopping criteria.
        """
        replies = service.take_replies()
        bodies = [b""] * len(ids)
        criteria: list[_Criterion] = [_plain] * len(ids)
        for index, request_id in ids.items():
            reply, stream = replies.get(request_id), service.stream_of(request_id)
            if request_id in self._interrupted:
                self._interrupted.remove(request_id)
                bodies[index], criteria[index] = INTERRUPTED, _last
            elif reply is not None:
                bodies[index] = _write_reply(context, index, request_id, reply)
                if request_id in self._streaming:
                    self._streaming.remove(request_id)
                    criteria[index] = _last
                elif not http_headers(context, index):
                    criteria[index] = _last
            elif stream is not None and request_id not in self._streaming:
                self._streaming.add(request_id)
                bodies[index] = _write_reply(context, index, request_id, stream.opening())
                criteria[index] = _more
            elif stream is not None and (chunk := stream.take()):
                bodies[index], criteria[index] = chunk, _more
            else:
                del context.request_ids[index]
        # Afresh in every cycle: stale ones would be reused.
        context.stopping_criteria = criteria
        return bodies


def http_headers(context: Any, index: int) -> dict[str, str]:
    """Return the headers of a request by their lower-cased names; over gRPC there are none.

    TorchServe puts headers of form parts among them. It sends none once a stream has begun.
    """
    headers: Mapping[str, object] = context.get_all_request_header(index)
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def _plain(_: object) -> bool | None:
    return None


def _more(_: object) -> bool | None:
    return False


def _last(_: object) -> bool | None:
    return True


def _write_reply(context: Any, index: int, request_id: str, reply: Reply) -> bytes:
    context.set_response_status(reply.status, reply.phrase, index)
    context.set_response_content_type(index, reply.content_type)
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
    logger.debug("%s %d %s %d bytes", request_id, reply.status, reply.content_type, len(reply.body))
    return reply.body
