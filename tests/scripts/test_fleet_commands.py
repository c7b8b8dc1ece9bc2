"""What the commands say of a fleet whose supervisor is a process that only sleeps."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from scripts.background import started_s
from scripts.serve import main
from scripts.torchserve import process
from scripts.torchserve.fleet import FleetRecord, InstanceState, fingerprint, members
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from scripts.torchserve.state import FLEET_RECORD
from tests.support.fleets import fleet_arguments
from tests.support.toy_archive import write_toy_archive
from tests.support.traffic import until


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that ends with the test."""
    started = subprocess.Popen(["sleep", "600"])
    try:
        yield psutil.Process(started.pid)
    finally:
        started.kill()
        started.wait()


def suspend(running: psutil.Process) -> None:
    """Return when it has been stopped: the signal alone takes its time on a busy machine."""
    running.suspend()
    now = until(running.status, lambda now: now == psutil.STATUS_STOPPED)
    assert now == psutil.STATUS_STOPPED


@pytest.fixture
def run_dir(tmp_path: Path, sleeper: psutil.Process) -> Path:
    """The folder of a fleet of two, which are said to be READY and do not run."""
    folder = tmp_path / "run"
    folder.mkdir()
    instances = tuple(InstanceState(str(folder / name), "ready") for name in "01")
    FleetRecord(sleeper.pid, started_s(sleeper.pid), "", instances).write(folder)
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


@pytest.mark.parametrize("front", ["gateway", "haproxy"])
def test_a_front_that_has_ended_is_told_until_it_is_stopped(
    front: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = ["status", "--run-dir", str(run_dir)]
    main(status)
    assert front not in capsys.readouterr().out
    folder = run_dir.with_name(f"run-{front}")
    folder.mkdir()
    ended = subprocess.Popen(["true"])
    created_s = started_s(ended.pid)
    ended.wait()
    record = folder / f"{front}.json"
    saved = {"pid": ended.pid, "created_s": created_s, "url": "http://there"}
    record.write_text(json.dumps(saved))
    assert main(status) == 1
    assert "it has ended: make up starts it again" in capsys.readouterr().out
    assert main([*status, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["front"][front]["pid"] is None
    main(["stop", "--drain-s", "0", "--run-dir", str(run_dir)])
    assert not record.exists()


def test_a_gateway_that_does_not_answer_is_told(
    run_dir: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_dir.with_name("elsewhere")
    folder.mkdir()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        saved = {"pid": sleeper.pid, "created_s": started_s(sleeper.pid), "url": url}
        (folder / "gateway.json").write_text(json.dumps(saved))
        main(["status", "--run-dir", str(run_dir), "--gateway-dir", str(folder)])
        assert "it does not answer" in capsys.readouterr().out
        suspend(sleeper)
        main(["status", "--run-dir", str(run_dir), "--gateway-dir", str(folder)])
    assert f"kill -CONT {sleeper.pid}" in capsys.readouterr().out


def test_a_suspended_supervisor_is_told_and_asked_for_nothing(
    run_dir: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    suspend(sleeper)
    assert main(["status", "--run-dir", str(run_dir)]) == 1
    assert f"it is suspended: kill -CONT {sleeper.pid}" in capsys.readouterr().out
    assert main(["restart", "--run-dir", str(run_dir)]) == 1
    assert f"the supervisor is suspended: kill -CONT {sleeper.pid}" in capsys.readouterr().err
    # The signal of a restart would have ended it now.
    sleeper.resume()
    time.sleep(0.2)
    assert sleeper.status() == psutil.STATUS_SLEEPING


def test_a_suspended_supervisor_is_stopped_at_once_and_leaves_nothing(
    run_dir: Path, sleeper: psutil.Process
) -> None:
    suspend(sleeper)
    started_s = time.monotonic()
    assert main(["stop", "--run-dir", str(run_dir), "--drain-s", "0"]) == 0
    assert time.monotonic() - started_s < 30
    assert [each.name for each in run_dir.iterdir()] == []


def test_nobody_is_told_to_stop_a_fleet_of_which_one_hangs(
    run_dir: Path,
    sleeper: psutil.Process,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "FRONTEND_START_S", 0.0)
    own = Options(run_dir / "toy.mar", run_dir / "0")
    saved = {
        "pid": sleeper.pid,
        "created_s": started_s(sleeper.pid),
        "model_name": "toy",
        "model_version": "1.0",
        "ports": asdict(own.ports),
        "address": own.address,
        "auth": False,
        "properties": {},
        "started_as": "",
        "log_offset": 0,
        **{name: str(getattr(own, name)) for name in process.PATH_OPTIONS},
    }
    own.state_dir.mkdir()
    (own.state_dir / "server.json").write_text(json.dumps(saved))
    hangs = "the frontend does not answer: "
    assert main(["status", "--run-dir", str(run_dir)]) == 1
    assert f"{hangs}its supervisor starts it again" in capsys.readouterr().out
    # Alone, nobody else would.
    (run_dir / FLEET_RECORD).unlink()
    assert main(["status", "--run-dir", str(own.state_dir)]) == 1
    assert f"{hangs}make stop, then make serve" in capsys.readouterr().out


def test_one_that_is_starting_has_no_problem_yet(
    run_dir: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(run_dir.parent / "store")
    arguments = ["start", *fleet_arguments(run_dir.parent), "--instances", "2"]
    http, grpc = (int(arguments[arguments.index(name) + 1]) for name in ("--port", "--grpc-port"))
    archive, ports = run_dir.parent / "store" / "toy.mar", Ports.starting_at(http, grpc)
    first, second = members(Options(archive, run_dir, ports), num_instances=2)
    states = (InstanceState(str(first.state_dir), "ready"), InstanceState(str(second.state_dir)))
    started_as = fingerprint((first, second))
    FleetRecord(sleeper.pid, started_s(sleeper.pid), started_as, states).write(run_dir)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert f"at {TorchServer(first).url}" in said.out
    assert said.err.strip() == f"{TorchServer(second).url} is starting"
