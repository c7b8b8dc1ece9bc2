"""Several supervised instances: started, killed, restarted one after another, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scripts.repository import REPOSITORY
from scripts.serve import main
from scripts.torchserve.fleet import FleetRecord
from scripts.torchserve.process import TorchServer
from tests.support.client import curl
from tests.support.fleets import fleet_arguments, stopped_fleet
from tests.support.instances import processes_of, stopped_afterwards
from tests.support.toy_archive import write_toy_archive
from tests.support.traffic import until

TIMEOUT_S = 90.0
NEW_HANDLER = """
class Toy:
    def initialize(self, context):
        {initialize}

    def handle(self, data, context):
        return ["new"] * len(data)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the archive `toy` lies in a store; no process of it outlives the test."""
    write_toy_archive(tmp_path / "store")
    with stopped_fleet(tmp_path / "run"):
        yield tmp_path


def start(folder: Path, *arguments: str) -> int:
    return main(["start", *fleet_arguments(folder), *arguments])


def record(folder: Path) -> FleetRecord:
    found = FleetRecord.read(folder / "run")
    assert found is not None
    return found


def states(folder: Path) -> list[str]:
    return [each.state for each in record(folder).instances]


def server(folder: Path, index: int) -> TorchServer:
    found = TorchServer.find(folder / "run" / str(index))
    assert found is not None
    assert found.pid is not None
    return found


def is_answering(each: TorchServer) -> bool:
    return curl(f"{each.url}/predictions/toy", "-d", "x=y").status == 200


def test_two_start_are_seen_and_stop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(folder, "--instances", "2") == 0
    out = capsys.readouterr().out
    first, second = server(folder, 0), server(folder, 1)
    assert first.url in out
    assert second.url in out
    assert is_answering(first)
    assert is_answering(second)

    assert start(folder, "--instances", "2") == 0
    assert "is already serving" in capsys.readouterr().out
    assert server(folder, 0).pid == first.pid
    # One of them is not started alone beside it.
    assert main(["start", *fleet_arguments(folder)]) == 2
    assert "holds a fleet of 2" in capsys.readouterr().err

    assert main(["status", "--run-dir", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\nready ") == 2
    assert main(["status", "--run-dir", str(folder / "run"), "--json"]) == 0
    status: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status["supervisor"] == record(folder).pid
    assert [each["url"] for each in status["instances"]] == [first.url, second.url]
    assert main(["logs", "--run-dir", str(folder / "run"), "--lines", "3"]) == 0
    # A gateway that has ended is wrong too, though all of them are READY.
    gateway = folder / "run-gateway" / "gateway.json"
    gateway.parent.mkdir()
    gateway.write_text(json.dumps({"pid": os.getpid(), "created_s": 0.0, "url": "http://there"}))
    assert main(["status", "--run-dir", str(folder / "run")]) == 1
    assert "it has ended" in capsys.readouterr().out

    assert main(["stop", "--run-dir", str(folder / "run")]) == 0
    assert processes_of(folder / "run") == []
    assert list((folder / "run").glob("*/temp/models/*")) == []
    assert main(["status", "--run-dir", str(folder / "run")]) == 1


def test_what_dies_comes_back_and_leaves_nothing(folder: Path) -> None:
    assert start(folder, "--instances", "2") == 0
    killed, other = server(folder, 0), server(folder, 1)
    assert killed.pid is not None
    (worker,) = psutil.Process(killed.pid).children()
    # It hangs, so that it does not notice the end of its frontend.
    worker.suspend()
    os.kill(killed.pid, signal.SIGKILL)
    assert until(lambda: states(folder), lambda now: now[0] != "ready")[1] == "ready"
    assert until(lambda: states(folder), lambda now: now[0] == "ready", TIMEOUT_S)[0] == "ready"
    assert not worker.is_running()
    assert record(folder).instances[0].num_restarts == 1
    assert is_answering(server(folder, 0))
    assert server(folder, 1).pid == other.pid
    # The killed one had unpacked the archive too.
    assert len(list((folder / "run" / "0" / "temp" / "models").iterdir())) == 1


def test_a_restart_takes_the_new_archive_one_after_another(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "--instances", "2") == 0
    before = [server(folder, index).pid for index in (0, 1)]
    write_toy_archive(folder / "store", handler=NEW_HANDLER)
    capsys.readouterr()
    assert main(["restart", "--run-dir", str(folder / "run")]) == 0
    steps = [line.split(": ")[-1] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert steps == ["draining", "starting", "ready"] * 2
    for index in (0, 1):
        assert server(folder, index).pid != before[index]
        answer = curl(f"{server(folder, index).url}/predictions/toy", "-d", "x=y")
        assert answer.body == b"new"

    # One that cannot be loaded ends the restart at the first: the second serves on.
    before = [server(folder, index).pid for index in (0, 1)]
    write_toy_archive(folder / "store", initialize="raise ValueError('broken')")
    assert main(["restart", "--run-dir", str(folder / "run")]) == 1
    error = capsys.readouterr().err
    assert "instance 0 did not come back" in error
    assert server(folder, 1).pid == before[1]
    assert is_answering(server(folder, 1))


def test_a_restart_takes_what_is_dead_first(folder: Path) -> None:
    """While it is down the other one is the only one that serves: it is not drained before."""
    assert start(folder, "--instances", "2") == 0
    os.kill(server(folder, 1).pid or 0, signal.SIGKILL)
    assert main(["restart", "--run-dir", str(folder / "run"), "--drain-s", "7"]) == 0
    _, _, after = (folder / "run" / "fleet.log").read_text().partition("rolling restart: begins")
    assert 0 < after.index("instance 1 is READY") < after.index("instance 0 is drained")
    assert after.count("is READY") == 2
    assert after.count("is drained for up to 7 s") == after.count("is drained") > 0
    assert states(folder) == ["ready", "ready"]


def test_one_server_is_restarted_with_the_new_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store")
    run_dir = ["--run-dir", str(tmp_path / "run")]
    with stopped_afterwards(tmp_path / "run"):
        assert main(["restart", *run_dir]) == 1
        assert "no server is running" in capsys.readouterr().err
        assert start(tmp_path) == 0
        before = TorchServer.find(tmp_path / "run")
        assert before is not None
        pid = before.pid
        write_toy_archive(tmp_path / "store", handler=NEW_HANDLER)
        assert main(["restart", *run_dir]) == 0
        after = TorchServer.find(tmp_path / "run")
        assert after is not None
        assert after.pid != pid
        assert after.options.ports == before.options.ports
        assert curl(f"{after.url}/predictions/toy", "-d", "x=y").body == b"new"


def test_an_archive_that_cannot_be_loaded_starts_no_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store", initialize="raise ValueError('broken')")
    with stopped_fleet(tmp_path / "run"):
        assert start(tmp_path, "--instances", "2") == 1
    assert "ValueError: broken" in capsys.readouterr().err
    assert processes_of(tmp_path / "run") == []


def test_the_instances_of_a_killed_supervisor_serve_on_and_are_taken_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(folder, "--instances", "2") == 0
    before = [server(folder, index).pid for index in (0, 1)]
    supervisor = record(folder).supervisor
    assert supervisor is not None
    supervisor.kill()
    psutil.wait_procs([supervisor], timeout=10)
    assert main(["status", "--run-dir", str(folder / "run")]) == 1
    assert "nobody supervises them" in capsys.readouterr().out
    assert is_answering(server(folder, 0))
    assert start(folder, "--instances", "2") == 0
    assert [server(folder, index).pid for index in (0, 1)] == before
    supervisor = record(folder).supervisor
    assert supervisor is not None
    supervisor.kill()
    psutil.wait_procs([supervisor], timeout=10)
    assert main(["stop", "--run-dir", str(folder / "run")]) == 0
    assert processes_of(folder / "run") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_a_signal_ends_it(folder: Path, number: signal.Signals) -> None:
    """As containers and systemd run it; one instance has its state in RUN_DIR itself."""
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "scripts.serve", "start", "--foreground"),
            *fleet_arguments(folder),
        ],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until(lambda: TorchServer.find(folder / "run"), lambda each: each is not None, TIMEOUT_S)
        found = TorchServer.find(folder / "run")
        assert found is not None
        assert until(lambda: states(folder), lambda now: now == ["ready"], TIMEOUT_S) == ["ready"]
        assert is_answering(found)
        running.send_signal(number)
        said = running.communicate(timeout=60)[1]
    finally:
        running.kill()
    assert running.returncode == 0, said
    assert processes_of(folder / "run") == []
    assert FleetRecord.read(folder / "run") is None
