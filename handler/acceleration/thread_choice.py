"""A forward wrapper that gives denoisers' forwards as many threads as the CPU has to spare.

The number holds for the forward alone: what else runs, requests that are `exact` among it, has all
threads that torch has. On other numbers sums have another order, as they have in company.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from handler.acceleration.thread_policy import ThreadPolicy
from handler.config import HandlerConfig
from handler.engine.wrappers import ForwardWrapper

__all__ = ["ThreadChoice", "thread_choices"]

logger = logging.getLogger(__name__)


def thread_choices(
    config: HandlerConfig, device: torch.device, *, is_compiled: bool
) -> tuple[ForwardWrapper, ...]:
    """The wrapper, where there are threads to choose from and the operator leaves it to us.

    Not for forwards that are compiled: for another number of threads torch compiles them anew.
    """
    is_left = config.num_threads is None and not config.exact and not is_compiled
    most = torch.get_num_threads()
    return (ThreadChoice(most),) if is_left and device.type == "cpu" and most > 1 else ()


class ThreadChoice(ForwardWrapper):
    """Runs each forward on the number of threads that a `ThreadPolicy` chooses, up to `most`.

    `set_threads` is called in the thread that computes: torch's number belongs to it.
    """

    def __init__(
        self,
        most: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.policy = ThreadPolicy(most)
        self._most = most
        self._clock = clock
        self._set_threads = set_threads

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` on the chosen number of threads."""

        @functools.wraps(forward)
        def on_chosen(*args: Any, **kwargs: Any) -> Any:
            kind = (id(forward), *_shapes((*args, *kwargs.values())))
            before = self.policy.present
            threads = self.policy.choose(kind)
            started_s = self._clock()
            if threads == self._most:
                output = forward(*args, **kwargs)
            else:
                self._set_threads(threads)
                try:
                    output = forward(*args, **kwargs)
                finally:
                    self._set_threads(self._most)
            self.policy.note(kind, threads, self._clock() - started_s)
            if self.policy.present != before:
                logger.info(
                    "forwards get %d of %d threads, which is quicker now",
                    self.policy.present,
                    self._most,
                )
            return output

        return on_chosen


def _shapes(values: tuple[Any, ...]) -> Iterator[Hashable]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield (value.shape, value.dtype)
