"""Requests whose pictures are decoded in threads before the engine gets them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from handler.api.decoding import Pictures, decode_all, forget_contents
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.errors import DeadlineExceeded, EngineFault, RequestError
from handler.service.live_requests import LiveRequest
from handler.service.side_work import SideWork

__all__ = ["Decoded", "Decoding"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a live request: its pictures, and its requests without the files of them."""

    requests: tuple[GenerationRequest, ...]
    pictures: list[Pictures]


class Decoding:
    """Decodes the pictures of live requests; a deadline that passes meanwhile ends its request."""

    def __init__(
        self,
        config: HandlerConfig,
        clock: Callable[[], float],
        decode: Callable[..., list[Pictures]] = decode_all,
    ) -> None:
        self._config = config
        self._clock = clock
        self._decode = decode
        self.work = SideWork[Decoded]("decode", config.encode_threads)

    def start(self, live: LiveRequest) -> None:
        """Begin to decode the pictures of `live`."""
        self.work.start(live, self._decoded)

    def take_ended(self) -> list[tuple[LiveRequest, Decoded | RequestError]]:
        """Return what is decoded, has failed or is late, each once."""
        now_s = self._clock()
        ended = [(live, _outcome(future)) for live, future in self.work.take_finished()]
        for live in self.work.requests:
            if live.deadline is not None and now_s >= live.deadline:
                self.work.discard(live)
                late = DeadlineExceeded("the deadline passed while its pictures were decoded")
                ended.append((live, late))
        return ended

    def _decoded(self, live: LiveRequest) -> Decoded:
        """Run in a thread."""
        pictures = self._decode(live.sent.requests, self._config, live.sent.paths)
        return Decoded(tuple(map(forget_contents, live.sent.requests)), pictures)


def _outcome(future: Future[Decoded]) -> Decoded | RequestError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, RequestError):
        return error
    fault = EngineFault("the pictures could not be decoded; the server's log says why")
    fault.__cause__ = error
    return fault
