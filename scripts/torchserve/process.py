"""One running TorchServe: start it, wait until a worker is READY, ask it, stop it.

Everything that an instance writes is in its own state directory, so several live side by side.
Tests and benchmarks use this class too.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import psutil

from handler.service.draining import Drain
from scripts.background import end_session, read_saved, running_process, save, started_s
from scripts.errors import ServerError
from scripts.hints import to_run
from scripts.interrupts import signals_as_interrupts, signals_held
from scripts.torchserve import health
from scripts.torchserve.failures import has_failed_to_load, load_failure, refusal
from scripts.torchserve.grpc_methods import withdraw_bidirectional_streaming
from scripts.torchserve.launch import clear_away, end_orphans, launch
from scripts.torchserve.management import ModelState, describe
from scripts.torchserve.options import (
    LOOPBACK,
    Options,
    Ports,
    archive_identity,
    has_own_handler,
    is_loopback,
)
from scripts.torchserve.state import StateDir

__all__ = ["READY_TIMEOUT_S", "TorchServer"]

_RESTART = f"{to_run('stop')}, then {to_run('serve')}"
_IS_RESTARTED = "its supervisor starts it again where that lasts, within a minute or two"

POLL_S = 0.1
# The frontend's threads log what a worker said each when they get the processor.
QUIET_S = 1.0
# Unpacks the archive before it answers; a busy machine takes its time.
FRONTEND_START_S = 60.0
# As startupTimeout of config/model-config.yaml: a first start with `speed: max` takes minutes.
READY_TIMEOUT_S = 1800.0
PATH_OPTIONS = ("archive", "config", "log_config", "metrics_config")


class TorchServer:
    """One instance; `pid` is that of its frontend, None when it does not run."""

    def __init__(self, options: Options, identity: tuple[str, str] | None = None) -> None:
        """Mutates nothing outside. `identity`: model name and version, if known already."""
        self.options = options
        self.model_name, self.model_version = identity or archive_identity(options.archive)
        self.state = StateDir(options.state_dir)
        # What the options were when it started; the archive may have been rebuilt since.
        self.started_as = ""
        self._process: psutil.Process | None = None
        self._log_offset = 0

    @classmethod
    def find(cls, state_dir: Path) -> TorchServer | None:
        """Return the instance that runs with this state directory, if any."""
        try:
            saved = read_saved(state_dir / "server.json")
            process = running_process(saved)
            if process is None:
                return None
            options = Options(
                state_dir=state_dir,
                # One that an earlier version of this started had more of them.
                ports=Ports(**{each.name: saved["ports"][each.name] for each in fields(Ports)}),
                address=saved["address"],
                auth=saved["auth"],
                properties=saved["properties"],
                environment=saved.get("environment", {}),
                **{name: Path(saved[name]) for name in PATH_OPTIONS},
            )
            server = cls(options, (saved["model_name"], saved["model_version"]))
            server.started_as, server._log_offset = saved["started_as"], saved["log_offset"]
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None
        server._process = process
        return server if server.pid is not None else None

    @property
    def pid(self) -> int | None:
        """The frontend's process id, None when it does not run."""
        process = self._process
        with suppress(psutil.NoSuchProcess):
            # Where nothing reaps orphans (a container without an init) a dead one stays a zombie.
            if (
                process is not None
                and process.is_running()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                return int(process.pid)
        return None

    @property
    def state_dir(self) -> Path:
        """The state directory, absolute."""
        return self.state.path

    @property
    def log_file(self) -> Path:
        """Where the frontend and the worker log."""
        return self.state.log_file

    @property
    def url(self) -> str:
        """Where prompts go: ``http://host:port``."""
        host = LOOPBACK if self.options.address == "0.0.0.0" else self.options.address
        return f"http://{host}:{self.options.ports.inference}"

    @property
    def predictions_url(self) -> str:
        """Where requests for the model are posted."""
        return f"{self.url}/predictions/{self.model_name}"

    @property
    def management_address(self) -> str:
        """Where the management API listens: ``unix:/path`` or ``http://host:port``."""
        return self.options.management_address(self.state.management_socket)

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads."""
        return f"http://{LOOPBACK}:{self.options.ports.metrics}/metrics"

    @property
    def drain_file(self) -> Path:
        """Where the worker looks for a `Drain`."""
        return self.state.drain_file

    def token(self, kind: str = "inference") -> str | None:
        """Return the key for "inference" or "management"; None without authorization."""
        if not self.options.auth:
            return None
        return str(json.loads(self.state.keys.read_text())[kind]["key"])

    def check(self, replaced: TorchServer | None = None) -> None:
        """Raise ServerError where this could not start, even when `replaced` has stopped."""
        if not is_loopback(self.options.address) and not self.options.auth:
            raise ServerError(
                f"address {self.options.address} can be reached from other machines, and nothing "
                "would protect the server: add AUTH=on (and a reverse proxy with TLS in front)"
            )
        self.state.check_ownership()
        freed = set() if replaced is None else set(replaced.options.ports.numbers)
        if taken := sorted(set(self.options.ports.taken()) - freed):
            raise ServerError(
                f"taken by another process: port {', '.join(map(str, taken))}; stop that one, or "
                "choose others: PORT=9080 GRPC_PORT=9070"
            )

    def start(self) -> None:
        """Start the frontend; return at once. Whatever ends this leaves none behind.

        Raises: ServerError.
        """
        if TorchServer.find(self.state_dir) is not None:
            raise ServerError(f"a server already runs in {self.state_dir}: {to_run('stop')}")
        end_orphans(self.state)
        self.check()
        self.state.prepare()
        self.state.write_config(self.options.properties_text(self.state.management_socket))
        withdraw_bidirectional_streaming(self.state.path)
        self._log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
        launcher: subprocess.Popen[bytes] | None = None
        try:
            with signals_held():
                launcher = launch(self.options, self.state, self.model_name)
            launcher.wait()
            self._process = psutil.Process(int(self.state.pid_file.read_text()))
            self._save()
        except BaseException as problem:
            if launcher is not None:
                end_session(launcher)
            self._process = None
            self.state.clean()
            if isinstance(problem, OSError | ValueError | psutil.Error):
                raise ServerError("torchserve did not start", self.frontend_tail()) from None
            raise

    def wait_until_ready(
        self,
        timeout_s: float = READY_TIMEOUT_S,
        tell: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        """Return when a worker is READY; `tell` hears the seconds waited, ten times a second.

        Raises: ServerError when the server ends, the model cannot be loaded, or time is up.
        """
        started_s = time.monotonic()
        while not self.is_ready():
            waited_s = time.monotonic() - started_s
            has_ended = self.pid is None
            # Asked for after the end: a frontend that has ended because of it has logged it.
            if has_failed_to_load(self._log()):
                self._wait_until_logged()
                raise ServerError("the model cannot be loaded", self.load_failure())
            if has_ended:
                raise ServerError("the server ended while starting", self.frontend_tail())
            if waited_s > timeout_s:
                raise ServerError(
                    f"no worker was READY within {timeout_s:.0f} s; "
                    f"{self.log_file} says how far it came"
                )
            tell(waited_s)
            time.sleep(POLL_S)

    def is_ready(self) -> bool:
        """Tell whether a worker can take requests (/ping is healthy long before)."""
        model = self.model()
        return model is not None and model.is_ready

    def model(self) -> ModelState | None:
        """Return what the management API says of the model; None when nothing answers."""
        try:
            token = self.token("management")
        except (OSError, ValueError):
            return None  # It writes its keys while it starts.
        return describe(self.management_address, self.model_name, token)

    def workers(self) -> list[dict[str, object]]:
        """Return the management API's account of the workers; [] when nothing answers."""
        model = self.model()
        return [] if model is None else model.workers

    def problem(self, *, is_supervised: bool = False) -> str | None:
        """Say what keeps a running server from drawing, and how to mend it; None if nothing does.

        Nobody has to mend what a supervisor does.
        Takes milliseconds with a server that draws, and seconds with one that stands still.
        """
        model, remedy = self.model(), _IS_RESTARTED if is_supervised else _RESTART
        if model is None and not self._is_new:
            return f"the frontend does not answer: {remedy}; {to_run('logs')} says more"
        if model is None or not model.is_ready:
            reason = refusal(self._log())
            starting = f"it is starting; {to_run('logs')} says how far it is"
            return f"no worker is READY: {reason or starting}"
        if self.pid is not None and has_own_handler(self.options.archive):
            urls = (self.predictions_url, self.metrics_url)
            if health.stands_still(*urls, self.token(), self.pid, model.ready_pids):
                return (
                    "TorchServe stands still: it takes requests and hands none of them to the "
                    f"worker. Only a restart heals it: {remedy}"
                )
        drain = Drain.read(self.drain_file, time.monotonic())
        if drain is not None and is_supervised:
            return "it is draining, and refuses new requests: a restart or a stop is going on"
        if drain is not None:
            return (
                f"it is draining for {to_run('stop')}, and refuses new requests; should that have "
                f"been killed, {to_run('stop', drain_s='0')} and {to_run('serve')}"
            )
        if len(model.workers) > 1:
            return refusal(self._log())
        return None

    def stop(self, timeout_s: float = 30.0) -> bool:
        """End the frontend and its workers, by force after `timeout_s`; False if none ran."""
        if self.pid is None or self._process is None:
            return False
        family = [self._process, *self._process.children(recursive=True)]
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=timeout_s)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=timeout_s)
        self._process = None
        self.state.clean()
        return True

    def end_by_force(self) -> None:
        """End the frontend and all that it has started, whatever state they are in."""
        self._process = None
        clear_away(self.state)

    @contextmanager
    def running(self, timeout_s: float = READY_TIMEOUT_S) -> Iterator[TorchServer]:
        """Serve inside the block: READY when it begins, stopped when it ends, by a signal too."""
        with signals_as_interrupts():
            try:
                self.start()
                self.wait_until_ready(timeout_s)
                yield self
            finally:
                self.stop()

    def load_failure(self) -> str:
        """Return why the model cannot be loaded, as indented lines, and where the log is."""
        lines = [*load_failure(self._log()).splitlines(), f"({self.log_file})"]
        return "\n".join(f"    {line}" for line in lines)

    def frontend_tail(self, num_lines: int = 15) -> str:
        """Return the last lines of the frontend's console, and the log's last errors."""
        errors = [line for line in self._log().splitlines() if " ERROR " in line]
        console = self.state.console
        said = console.read_text("utf-8", "replace") if console.exists() else ""
        lines = [*said.splitlines(), *errors]
        return "\n".join(f"    {line}" for line in lines[-num_lines:])

    @property
    def _is_new(self) -> bool:
        """Whether the frontend may still be starting."""
        assert self._process is not None
        return time.time() - float(self._process.create_time()) < FRONTEND_START_S

    def _log(self) -> str:
        """What has been logged since this start."""
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as log:
            # A log that is shorter than it was has been rolled over since.
            if self.log_file.stat().st_size >= self._log_offset:
                log.seek(self._log_offset)
            return log.read().decode("utf-8", "replace")

    def _wait_until_logged(self, at_most_s: float = 10.0) -> None:
        """Return when the log has ended to grow: what a failure says comes line by line."""
        until_s = time.monotonic() + at_most_s
        while time.monotonic() < until_s:
            before = self._log()
            time.sleep(QUIET_S)
            if self._log() == before:
                return

    def _save(self) -> None:
        assert self._process is not None
        self.started_as = self.options.fingerprint()
        saved = {
            "pid": self._process.pid,
            "created_s": started_s(self._process.pid),
            "model_name": self.model_name,
            "model_version": self.model_version,
            "ports": asdict(self.options.ports),
            "address": self.options.address,
            "auth": self.options.auth,
            "properties": dict(self.options.properties),
            "environment": dict(self.options.environment),
            "management": self.management_address,
            "started_as": self.started_as,
            "log_offset": self._log_offset,
            **{name: str(Path(getattr(self.options, name)).resolve()) for name in PATH_OPTIONS},
        }
        save(self.state.saved, saved)
