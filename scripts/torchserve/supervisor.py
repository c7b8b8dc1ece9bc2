"""Keeps all instances of a fleet serving, until a signal: one small process.

    SIGTERM, SIGINT   drain all instances, stop them, end; SIGINT once more: at once
    SIGHUP            restart the instances one after another, with what is in the store now
    SIGKILL           the instances serve on; the next supervisor takes them over

Its parent hears nothing; `fleet.json` says at any time how the instances are, and systemd is told
when they are READY.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from scripts.background import started_s
from scripts.errors import ServerError
from scripts.torchserve.draining import DRAIN_S, GRACE_S
from scripts.torchserve.fleet import FleetRecord, fingerprint
from scripts.torchserve.haproxy_socket import num_calls, set_state
from scripts.torchserve.keeper import Keeper
from scripts.torchserve.options import Options
from scripts.torchserve.process import READY_TIMEOUT_S
from scripts.torchserve.state import FLEET_RECORD, FLEET_RESTART, FLEET_STOP

__all__ = ["Supervision", "Supervisor", "request_restart", "request_stop"]

logger = logging.getLogger(__name__)

_TICK_S = 0.2
# Gateways and HAProxy see within this that an instance is back, before the next one leaves.
_SETTLE_S = 5.0
# What HAProxy has accepted before it was told is on its way.
_LEAVE_S = 1.0
# To end a frontend by force where it does not end by itself.
_STOP_S = 60.0
# A stop that was asked for longer ago has been forgotten.
_FRESH_S = 30.0


@dataclass(frozen=True, slots=True)
class Supervision:
    """How a fleet is supervised."""

    run_dir: Path
    plan: Callable[[], Sequence[Options]]
    """The instances that there should be, with the archive that the store has now."""
    drain_s: float = DRAIN_S
    timeout_s: float = READY_TIMEOUT_S


class Supervisor:
    """Runs in the main thread; each instance has a `Keeper` of its own."""

    def __init__(self, supervision: Supervision) -> None:
        """Raises: ServerError, UsageError, where the instances cannot be planned."""
        self._supervision = supervision
        self._options = list(supervision.plan())
        self._started_as = fingerprint(self._options)
        self._process = psutil.Process()
        self._keepers = [
            Keeper(each, self._record, timeout_s=supervision.timeout_s) for each in self._options
        ]
        self._recording = threading.Lock()
        self._signals: list[signal.Signals] = []
        self._num_rolls = 0
        self._roll_problem: str | None = None

    def run(self) -> None:
        """Serve until a signal.

        Raises: ServerError, where no instance can be started at all.
        """
        supervision = self._supervision
        supervision.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (supervision.run_dir / FLEET_STOP).unlink(missing_ok=True)
        self._record()
        with self._listening():
            for keeper in self._keepers:
                keeper.start()
            try:
                if self._wait_for_first():
                    _tell_systemd("READY=1")
                    for index in range(len(self._keepers)):
                        set_state(supervision.run_dir, index, "ready")
                    self._serve()
            finally:
                self._end()

    def _wait_for_first(self) -> bool:
        """Wait until every instance was READY or has failed once; False where a signal came.

        Raises: ServerError, where all have failed.
        """
        # The first of each: what a second try says may be about the first one's remains.
        errors: dict[str, ServerError] = {}
        while not self._has_to_end:
            outcomes = {keeper.name: keeper.outcome() for keeper in self._keepers}
            for keeper in self._keepers:
                if keeper.error is not None:
                    errors.setdefault(keeper.name, keeper.error)
            if None not in outcomes.values():
                if not any(outcomes.values()) and errors:
                    raise next(iter(errors.values()))
                return True
            self._tick()
        return False

    def _serve(self) -> None:
        while not self._has_to_end:
            if signal.SIGHUP in self._signals:
                self._signals.remove(signal.SIGHUP)
                self._roll()
            self._tick()

    def _roll(self) -> None:
        """Restart one after another, first what does not serve; nobody leaves as the last."""
        drain_s = self._asked_drain_s(FLEET_RESTART)
        logger.info("rolling restart: begins")
        _tell_systemd("RELOADING=1")
        try:
            (self._supervision.run_dir / FLEET_RESTART).unlink(missing_ok=True)
            options = list(self._supervision.plan())
            if [each.state_dir for each in options] != [each.state_dir for each in self._options]:
                raise ServerError("another number of instances needs a stop and a start")
            left = list(range(len(options)))
            while left:
                index = min(left, key=lambda each: (self._keepers[each].is_serving(), each))
                self._wait_for_another(index)
                self._restart(index, options[index], drain_s)
                if self._has_to_end:
                    return
                left.remove(index)
                if left:
                    time.sleep(_SETTLE_S)
            self._options, self._started_as = options, fingerprint(options)
            self._roll_problem = None
            logger.info("rolling restart: done")
        except Exception as error:
            # The instances that are left serve on as they were.
            self._roll_problem = str(error)
            logger.error("rolling restart: given up: %s", error)
        finally:
            self._num_rolls += 1
            self._record()
            _tell_systemd("READY=1")

    def _wait_for_another(self, index: int) -> None:
        """Return when another instance than this one serves, or this one does not, or is alone.

        Raises: ServerError, where none does in time.
        """
        own = self._keepers[index]
        others = [each for each in self._keepers if each is not own]
        until_s = time.monotonic() + self._supervision.timeout_s
        has_told = False
        while others and not self._has_to_end and own.is_serving():
            if any(each.is_serving() for each in others):
                return
            if time.monotonic() > until_s:
                raise ServerError(f"instance {own.name} is the only one that serves: it stays")
            if not has_told:
                logger.info("rolling restart: instance %s waits until another serves", own.name)
                has_told = True
            self._tick()

    def _restart(self, index: int, options: Options, drain_s: float) -> None:
        """Return when an instance is READY again, or a signal came. Raises: ServerError."""
        self._leave_haproxy(index, drain_s)
        keeper = self._keepers[index]
        number = keeper.restart(options, drain_s)
        while (outcome := keeper.outcome(number)) is None:
            if self._has_to_end:
                return
            self._tick()
        set_state(self._supervision.run_dir, index, "ready")
        if not outcome:
            raise ServerError(f"instance {keeper.name} did not come back: {keeper.error}")

    def _leave_haproxy(self, index: int, drain_s: float) -> None:
        """Return when an instance has no more gRPC calls of HAProxy, or they last too long.

        What the gateway is refused it sends elsewhere; clients of gRPC would see it.
        """
        run_dir, until_s = self._supervision.run_dir, time.monotonic() + drain_s
        if not set_state(run_dir, index, "drain"):
            return
        time.sleep(_LEAVE_S)
        while num_calls(run_dir, index) and time.monotonic() < until_s and not self._has_to_end:
            self._tick()

    def _end(self) -> None:
        """Drain and stop all instances at once."""
        drain_s = self._asked_drain_s(FLEET_STOP)
        _tell_systemd("STOPPING=1")
        for keeper in self._keepers:
            keeper.end(drain_s)
        until_s = time.monotonic() + drain_s + GRACE_S + _STOP_S
        for keeper in self._keepers:
            while not keeper.join(_TICK_S) and time.monotonic() < until_s:
                self._reap()
                if self._signals.count(signal.SIGINT) > 1:
                    until_s = 0.0
        for keeper in self._keepers:
            keeper.end_by_force()
        logger.info("stopped")
        for name in (FLEET_STOP, FLEET_RESTART, FLEET_RECORD):
            (self._supervision.run_dir / name).unlink(missing_ok=True)

    def _asked_drain_s(self, name: str) -> float:
        """How long whoever has asked for the end, or a restart, wants to wait."""
        file = self._supervision.run_dir / name
        try:
            if time.time() - file.stat().st_mtime < _FRESH_S:
                return float(json.loads(file.read_text())["drain_s"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return self._supervision.drain_s

    @property
    def _has_to_end(self) -> bool:
        return any(each != signal.SIGHUP for each in self._signals)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Collect signals inside the block."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(signal.Signals(number))

        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {each: signal.signal(each, note) for each in handled}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _tick(self) -> None:
        self._reap()
        time.sleep(_TICK_S)

    def _reap(self) -> None:
        """Take notice of orphans that have ended, where nobody else does: as process 1."""
        if self._process.pid == 1:
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass

    def _record(self) -> None:
        with self._recording:
            record = FleetRecord(
                self._process.pid,
                started_s(self._process.pid),
                self._started_as,
                tuple(keeper.state for keeper in self._keepers),
                self._num_rolls,
                self._roll_problem,
            )
            try:
                record.write(self._supervision.run_dir)
            except OSError as error:  # a full disk ends nothing
                logger.warning("%s cannot be written: %s", self._supervision.run_dir, error)


def request_stop(record: FleetRecord, run_dir: Path, drain_s: float) -> None:
    """Ask the supervisor of `record` to end its instances after `drain_s`; return at once."""
    _request(record, signal.SIGTERM, run_dir / FLEET_STOP, drain_s)


def request_restart(record: FleetRecord, run_dir: Path, drain_s: float) -> None:
    """Ask it to restart its instances, each after `drain_s`; return at once."""
    _request(record, signal.SIGHUP, run_dir / FLEET_RESTART, drain_s)


def _request(record: FleetRecord, number: signal.Signals, file: Path, drain_s: float) -> None:
    with suppress(OSError):  # on a full disk it takes its own time
        file.write_text(json.dumps({"drain_s": drain_s}))
    if (supervisor := record.supervisor) is not None:
        supervisor.send_signal(number)


def _tell_systemd(state: str) -> None:
    """Send a line to the service manager, where there is one. Source: systemd, sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
