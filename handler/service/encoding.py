"""Requests that are drawn, while their pictures are checked and encoded in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from handler.api.replies import Reply, success_reply
from handler.api.result import Result
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.pipelines.safety import SafetyChecker
from handler.service.live_requests import LiveRequest
from handler.service.results import checked_result, fault_of
from handler.service.side_work import SideWork

__all__ = ["Encoding"]


class Encoding:
    """Makes the replies of live requests with `encode`, after `checker` looked at the pictures.

    `model_name` and `config` go into the replies.
    """

    def __init__(
        self,
        config: HandlerConfig,
        model_name: str,
        encode: Callable[..., Reply] = success_reply,
        checker: SafetyChecker | None = None,
    ) -> None:
        self._config = config
        self._model_name = model_name
        self._encode = encode
        self._checker = checker
        self.work = SideWork[Reply]("encode", config.encode_threads)

    def start(self, live: LiveRequest, results: Sequence[Result]) -> None:
        """Begin to encode what was drawn for each of the requests of `live`."""
        self.work.start(live, self._encoded, results)

    def take_ended(self) -> list[tuple[LiveRequest, Reply | RequestError]]:
        """Return what is encoded or has failed, each once.

        Replies come first: where an error is the device's, all that are left end with it.
        """
        ended = [(live, _outcome(future)) for live, future in self.work.take_finished()]
        return sorted(ended, key=lambda each: isinstance(each[1], RequestError))

    def checked(self, result: Result) -> Result:
        """Return `result` as the safety checker leaves it.

        Raises:
            ContentFlagged: a picture is flagged, and the operator refuses such.
        """
        refuses = self._config.safety_checker == "refuse"
        return checked_result(result, self._checker, refuses=refuses)

    def give_checker_back(self) -> None:
        """Leave the checker to the pipelines that it was taken from."""
        if self._checker is not None:
            self._checker.give_back()

    def _encoded(self, live: LiveRequest, results: Sequence[Result]) -> Reply:
        """Run in a thread."""
        return self._encode(
            live.sent,
            [self.checked(result) for result in results],
            request_id=live.request_id,
            model_name=self._model_name,
            config=self._config,
        )


def _outcome(future: Future[Reply]) -> Reply | RequestError:
    error = future.exception()
    if error is None:
        return future.result()
    return fault_of(error, "the picture could not be encoded; the server's log says why")
