"""Whether a running server is to be started again: it has ended, hangs, or has no worker.

TorchServe starts a worker that dies again by itself. What it does not notice is left to whoever
watches: that the frontend itself is gone or hangs, that its worker does not come back, and that it
takes requests and hands none of them on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import psutil

from scripts.torchserve import health
from scripts.torchserve.management import ModelState
from scripts.torchserve.options import has_own_handler
from scripts.torchserve.process import READY_TIMEOUT_S, TorchServer

__all__ = ["Patient", "Pulse"]

# Each silence lasts ten seconds: a frontend that is only busy has answered by then.
_MAX_SILENCES = 3
_MAX_STANDSTILLS = 2
# TorchServe waits longer and longer between two tries, and gives a model up after five minutes.
_NO_WORKER_S = 120.0


class Patient(Protocol):
    """What is asked of a server."""

    @property
    def pid(self) -> int | None:
        """The frontend's process id, None when it does not run."""
        ...

    def model(self) -> ModelState | None:
        """Return what the management API says; None when nothing answers."""
        ...


class Pulse:
    """Looks at one server again and again; what it remembers is of that server alone."""

    def __init__(
        self,
        server: Patient,
        stands_still: Callable[[ModelState], bool],
        has_worker: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        worker_timeout_s: float = READY_TIMEOUT_S,
    ) -> None:
        """Mutates nothing outside.

        Args:
            server: is running.
            stands_still: says whether a server with a READY worker hands it nothing.
            has_worker: says whether the frontend has a worker's process, READY or not.
            clock: seconds.
            worker_timeout_s: how long a worker may take to be READY (again).
        """
        self._server, self._stands_still, self._has_worker = server, stands_still, has_worker
        self._clock, self._worker_timeout_s = clock, worker_timeout_s
        self._num_silences = self._num_standstills = 0
        self._unready_since_s: float | None = None
        self._alone_since_s: float | None = None

    @classmethod
    def of(cls, server: TorchServer, worker_timeout_s: float = READY_TIMEOUT_S) -> Pulse:
        """Return that of a real server."""
        own = has_own_handler(server.options.archive)

        def stands_still(model: ModelState) -> bool:
            if server.pid is None or not own:
                return False
            urls = (server.predictions_url, server.metrics_url)
            return health.stands_still(*urls, server.token(), server.pid, model.ready_pids)

        def has_worker() -> bool:
            with suppress(psutil.Error):
                return server.pid is not None and bool(psutil.Process(server.pid).children())
            return False

        return cls(server, stands_still, has_worker, worker_timeout_s=worker_timeout_s)

    @property
    def state(self) -> str:
        """How it was when it was last looked at: ``ready``, ``worker down`` or ``no answer``."""
        if self._num_silences:
            return "no answer"
        return "ready" if self._unready_since_s is None else "worker down"

    def fault(self) -> str | None:
        """Look once; say why the server is to be started again, None where it is not.

        Takes milliseconds, and up to twenty seconds with one that hangs.
        """
        if self._server.pid is None:
            return "the frontend's process has ended"
        model = self._server.model()
        if model is None:
            self._num_silences += 1
            hangs = self._num_silences >= _MAX_SILENCES
            return "the frontend does not answer" if hangs else None
        self._num_silences = 0
        if not model.is_ready:
            return self._fault_without_worker()
        self._unready_since_s = self._alone_since_s = None
        if not self._stands_still(model):
            self._num_standstills = 0
            return None
        self._num_standstills += 1
        if self._num_standstills < _MAX_STANDSTILLS:
            return None
        return "it takes requests and hands none of them to the worker"

    def _fault_without_worker(self) -> str | None:
        now_s, self._num_standstills = self._clock(), 0
        if self._unready_since_s is None:
            self._unready_since_s = now_s
        if self._has_worker():
            self._alone_since_s = None
        elif self._alone_since_s is None:
            self._alone_since_s = now_s
        if self._alone_since_s is not None and now_s - self._alone_since_s > _NO_WORKER_S:
            return f"it has had no worker for {now_s - self._alone_since_s:.0f} s"
        if now_s - self._unready_since_s > self._worker_timeout_s:
            return f"no worker was READY for {now_s - self._unready_since_s:.0f} s"
        return None
