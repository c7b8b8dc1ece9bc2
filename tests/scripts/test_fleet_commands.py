"""What the commands say of a fleet whose supervisor is a process that only sleeps."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scripts.serve import main
from scripts.torchserve.fleet import FleetRecord, InstanceState


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that ends with the test."""
    started = subprocess.Popen(["sleep", "600"])
    try:
        yield psutil.Process(started.pid)
    finally:
        started.kill()
        started.wait()


@pytest.fixture
def run_dir(tmp_path: Path, sleeper: psutil.Process) -> Path:
    """The folder of a fleet of two, which are said to be READY and do not run."""
    folder = tmp_path / "run"
    folder.mkdir()
    instances = tuple(InstanceState(str(folder / name), "ready") for name in "01")
    FleetRecord(sleeper.pid, sleeper.create_time(), "", instances).write(folder)
    return folder


@pytest.mark.parametrize("command", ["start", "stop", "restart"])
def test_one_of_a_fleet_is_not_started_or_stopped_alone(
    command: str, run_dir: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--run-dir", str(run_dir / "1")]) == 2
    error = capsys.readouterr().err
    assert f"one of 2 instances, which process {sleeper.pid} supervises" in error
    assert f"RUN_DIR={run_dir}" in error
    # A folder beside them is nobody's.
    assert main(["stop", "--run-dir", str(run_dir / "2")]) == 0


def test_one_of_a_fleet_that_nobody_supervises_can_be_stopped(
    run_dir: Path, sleeper: psutil.Process
) -> None:
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait(10)
    assert main(["stop", "--run-dir", str(run_dir / "1")]) == 0
