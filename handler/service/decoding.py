"""Requests whose pictures and LoRAs are read in threads before the engine gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from handler.api.decoding import Pictures, decode_all, forget_contents
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.errors import DeadlineExceeded, RequestError
from handler.pipelines.adapters import PreparedLora
from handler.service.live_requests import LiveRequest
from handler.service.lora_shelf import LoraShelf
from handler.service.results import fault_of
from handler.service.side_work import SideWork

__all__ = ["Decoded", "Decoding"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of a live request.

    Its pictures, its requests without the files of them, and the LoRAs that were read for it.
    """

    requests: tuple[GenerationRequest, ...]
    pictures: list[Pictures]
    loras: Mapping[str, PreparedLora]


class Decoding:
    """Reads what live requests need; a deadline that passes meanwhile ends its request."""

    def __init__(
        self,
        config: HandlerConfig,
        clock: Callable[[], float],
        decode: Callable[..., list[Pictures]] = decode_all,
        shelf: LoraShelf | None = None,
    ) -> None:
        self._config = config
        self._shelf = shelf
        self._clock = clock
        self._decode = decode
        self.work = SideWork[Decoded]("decode", config.encode_threads)

    def start(self, live: LiveRequest, missing: Sequence[str] = ()) -> None:
        """Begin to decode the pictures of `live`, and to read the `missing` LoRAs."""
        self.work.start(live, self._decoded, missing)

    def take_ended(self) -> list[tuple[LiveRequest, Decoded | RequestError]]:
        """Return what is decoded, has failed or is late, each once."""
        now_s = self._clock()
        ended = [(live, _outcome(future)) for live, future in self.work.take_finished()]
        for live in self.work.requests:
            if live.deadline is not None and now_s >= live.deadline:
                self.work.discard(live)
                late = DeadlineExceeded("the deadline passed while its pictures or LoRAs were read")
                ended.append((live, late))
        return ended

    def _decoded(self, live: LiveRequest, missing: Sequence[str]) -> Decoded:
        """Run in a thread."""
        loras = {} if self._shelf is None else self._shelf.read(missing)
        pictures = self._decode(live.sent.requests, self._config, live.sent.paths)
        return Decoded(tuple(map(forget_contents, live.sent.requests)), pictures, loras)


def _outcome(future: Future[Decoded]) -> Decoded | RequestError:
    error = future.exception()
    if error is None:
        return future.result()
    return fault_of(error, "the request could not be read; the server's log says why")
