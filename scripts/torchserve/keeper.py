"""Keeps one instance serving: starts it, watches it, starts it again; drains it when it shall end.

start ──▶ starting ──▶ ready ──▶ draining ──▶ stopped
             ▲  │        │           │
             │  ▼        ▼           │ restart()
             └─ down ◀── fault       ▼
             └──────────────────── starting
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from scripts.errors import ServerError
from scripts.torchserve.draining import DRAIN_S, drain
from scripts.torchserve.fleet import InstanceState
from scripts.torchserve.launch import clear_away
from scripts.torchserve.options import Options
from scripts.torchserve.process import READY_TIMEOUT_S, TorchServer
from scripts.torchserve.pulse import Pulse
from scripts.torchserve.state import StateDir

__all__ = ["Keeper"]

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
"""Between two looks at the process."""
_BEAT_S = 10.0
"""Between two questions to the server; they cost it a cycle."""
_MAX_BACK_OFF_S = 60.0
# One that was READY for so long has not failed to start.
_STABLE_S = 30.0


class _Ended(Exception):
    """The instance shall end, while it was being started."""


class _Superseded(Exception):
    """It shall be started with other options, while it was being started."""


class Keeper:
    """One instance, kept by a thread of its own."""

    def __init__(
        self,
        options: Options,
        on_change: Callable[[], None],
        *,
        timeout_s: float = READY_TIMEOUT_S,
        beat_s: float = _BEAT_S,
    ) -> None:
        """Mutates nothing outside.

        Args:
            options: of the instance.
            on_change: is called, in the keeper's thread, when `state` has changed.
            timeout_s: how long a worker may take to be READY.
            beat_s: between two heartbeats.
        """
        self.name = options.state_dir.name
        self.error: ServerError | None = None
        """Why it could not be started the last time."""
        self.has_been_ready = False
        self._options = options
        self._on_change, self._timeout_s, self._beat_s = on_change, timeout_s, beat_s
        device = options.environment.get("CUDA_VISIBLE_DEVICES")
        self._state = InstanceState(str(options.state_dir.resolve()), device=device)
        self._wake = threading.Event()
        self._is_ending = False
        # Every restart that is asked for is a generation: what was started before it is to end.
        self._wanted = self._current = self._ready = self._failed = 0
        self._drain_s = DRAIN_S
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name=f"keeper-{self.name}", daemon=True)

    @property
    def state(self) -> InstanceState:
        """How the instance is."""
        return self._state

    def is_serving(self) -> bool:
        """Ask the instance itself whether a worker is READY: `state` is as old as the last look."""
        server = TorchServer.find(self._options.state_dir)
        return self._state.state == "ready" and server is not None and server.is_ready()

    def start(self) -> None:
        """Begin; return at once."""
        self._thread.start()

    def restart(self, options: Options, drain_s: float) -> int:
        """Drain it, stop it and start it with `options`; return at once, with the restart's number.

        `outcome` says what became of it.
        """
        self._options, self._drain_s = options, drain_s
        self._wanted += 1
        self._wake.set()
        return self._wanted

    def outcome(self, restart: int = 0) -> bool | None:
        """Tell whether it was READY since a restart, False where it failed; None: not yet known."""
        if self._ready >= restart and self.has_been_ready:
            return True
        return False if self._failed >= restart and self.error is not None else None

    def end(self, drain_s: float) -> None:
        """Drain it and stop it for good; return at once. A second call may shorten the drain."""
        self._drain_s, self._is_ending = drain_s, True
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Wait until it has ended; tell whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end_by_force(self) -> None:
        """End what is left of the instance. Raises nothing."""
        clear_away(StateDir(self._options.state_dir))

    def _run(self) -> None:
        while not self._is_ending:
            try:
                self._live()
            except _Ended:
                break
            except _Superseded:
                continue
            except ServerError as error:
                logger.error("instance %s: %s", self.name, error)
                self._fail(error)
            except Exception as error:  # a full disk, a process that may not be asked …
                logger.exception("instance %s", self.name)
                self._fail(ServerError(f"{type(error).__name__}: {error}"))
        self._note("stopped")

    def _live(self) -> None:
        """One server from its start, or from where it is found, to its end.

        Raises: ServerError, _Ended, _Superseded.
        """
        self._current = self._wanted
        server = self._adopted() or TorchServer(self._options)
        try:
            if server.pid is None:
                self._note("starting")
                server.start()
            server.wait_until_ready(self._timeout_s, lambda waited_s: self._go_on())
        except BaseException:
            if server.state.is_ours:
                server.end_by_force()
            raise
        self.error, self.has_been_ready, self._ready = None, True, self._current
        self._note("ready")
        logger.info("instance %s is READY at %s", self.name, server.url)
        ready_since_s = time.monotonic()
        fault = self._watch(server)
        if time.monotonic() - ready_since_s > _STABLE_S:
            self._num_failures = 0
        if fault is None:
            self._drain(server)
            return
        logger.error("instance %s: %s; it is started again", self.name, fault)
        server.end_by_force()
        self._fail(ServerError(fault))

    def _adopted(self) -> TorchServer | None:
        """What a supervisor that was killed has left running, if it is what it should be."""
        running = TorchServer.find(self._options.state_dir)
        if running is None:
            return None
        if running.started_as == self._options.fingerprint():
            logger.info("instance %s runs already (process %s)", self.name, running.pid)
            return running
        logger.info("instance %s runs with other settings: it is restarted", self.name)
        self._drain(running)
        return None

    def _go_on(self) -> None:
        """Raise _Ended where the instance shall end, _Superseded where it shall be another."""
        if self._is_ending:
            raise _Ended
        if self._wanted != self._current:
            raise _Superseded

    def _watch(self, server: TorchServer) -> str | None:
        """Return when the server is to end: why, or None where somebody has asked for it."""
        pulse = Pulse.of(server, self._timeout_s)
        next_beat_s = 0.0
        while not self._is_ending and self._wanted == self._current:
            if server.pid is None or time.monotonic() >= next_beat_s:
                if (fault := pulse.fault()) is not None:
                    return fault
                next_beat_s = time.monotonic() + self._beat_s
                self._note(pulse.state)
            self._wake.wait(_LOOK_S)
            self._wake.clear()
        return None

    def _drain(self, server: TorchServer) -> None:
        self._note("draining")
        logger.info("instance %s is drained for up to %g s", self.name, self._drain_s)
        drain(server, self._drain_s)
        if not server.stop():
            server.end_by_force()  # It has died meanwhile; a worker that hangs outlives it.

    def _fail(self, error: ServerError) -> None:
        """Wait before the next try: at once after a first failure, then longer and longer."""
        self.error, self._failed = error, self._current
        pause_s = min(_MAX_BACK_OFF_S, 2.0 ** (self._num_failures - 1)) * bool(self._num_failures)
        self._num_failures += 1
        self._state = replace(self._state, num_restarts=self._state.num_restarts + 1)
        self._note("down", error.message)
        until_s = time.monotonic() + pause_s
        while not self._is_ending and self._wanted == self._current:
            if (left_s := until_s - time.monotonic()) <= 0:
                return
            self._wake.wait(left_s)
            self._wake.clear()

    def _note(self, state: str, problem: str | None = None) -> None:
        if (state, problem) != (self._state.state, self._state.problem):
            self._state = replace(self._state, state=state, problem=problem, since_s=time.time())
            self._on_change()
