"""The ends of a server's life: signals, archives that cannot be unpacked, crashes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scripts.repository import REPOSITORY
from scripts.serve import main
from scripts.torchserve.process import TorchServer
from tests.support.instances import processes_of, start_arguments, stopped_afterwards
from tests.support.signals import default_signals
from tests.support.toy_archive import write_toy_archive


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["logs/console.log", "server.json"])
def test_a_signal_while_starting_leaves_no_server(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    write_toy_archive(tmp_path / "store", initialize="import time; time.sleep(300)")
    arguments = [sys.executable, "-m", "scripts.serve", *start_arguments(tmp_path)]
    starting = subprocess.Popen(
        arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, preexec_fn=default_signals
    )
    with stopped_afterwards(tmp_path / "run"):
        until_s = time.monotonic() + 60
        while not (tmp_path / "run" / moment).exists() and time.monotonic() < until_s:
            time.sleep(0.01)
        starting.send_signal(number)
        starting.communicate(timeout=90)
        assert starting.returncode != 0
        assert processes_of(tmp_path / "run") == []


IN_A_BLOCK = """
import pathlib, sys, time
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
archive, state = map(pathlib.Path, sys.argv[1:])
with TorchServer(Options(archive, state, Ports.free())).running():
    print('ready', flush=True)
    time.sleep(300)
"""
IN_A_LOOP = """
import asyncio, pathlib, sys
from contextlib import AsyncExitStack
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
archive, state = map(pathlib.Path, sys.argv[1:])
async def run():
    async with AsyncExitStack() as stack:
        stack.enter_context(TorchServer(Options(archive, state, Ports.free())).running())
        print('ready', flush=True)
        await asyncio.sleep(300)
asyncio.run(run())
"""


@pytest.mark.server
@pytest.mark.parametrize("program", [IN_A_BLOCK, IN_A_LOOP], ids=["block", "event loop"])
def test_a_server_inside_a_block_ends_when_its_program_is_ended(
    tmp_path: Path, program: str
) -> None:
    """As `timeout … python -m benchmarks.engine --served` does it: with two signals at once."""
    archive = write_toy_archive(tmp_path / "store")
    ending = subprocess.run(
        ["timeout", "30", sys.executable, "-c", program, str(archive), str(tmp_path / "run")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=default_signals,
        check=False,
    )
    timed_out = 124
    assert (ending.returncode, ending.stdout) == (timed_out, "ready\n"), ending.stderr
    assert processes_of(tmp_path / "run") == []
    assert not (tmp_path / "run" / "temp" / "models").exists()


@pytest.mark.server
def test_an_archive_that_the_frontend_cannot_unpack_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = write_toy_archive(tmp_path / "store")
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"class Toy", b"class Tay", 1))
    with stopped_afterwards(tmp_path / "run"):
        assert main(start_arguments(tmp_path)) == 1
    message = capsys.readouterr().err
    assert "toy.mar could not be unpacked" in message
    assert "invalid entry CRC" in message


@pytest.mark.server
@pytest.mark.parametrize("next_command", ["start", "stop"])
def test_what_a_killed_server_unpacked_goes_with_the_next_command(
    tmp_path: Path, next_command: str
) -> None:
    write_toy_archive(tmp_path / "store")
    models = tmp_path / "run" / "temp" / "models"
    with stopped_afterwards(tmp_path / "run"):
        assert main(start_arguments(tmp_path)) == 0
        (first,) = models.iterdir()
        killed = TorchServer.find(tmp_path / "run")
        assert killed is not None
        family = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        assert list(models.iterdir()) == [first]
        if next_command == "start":
            assert main(start_arguments(tmp_path)) == 0
            (second,) = models.iterdir()
            assert second != first
        assert main(["stop", "--run-dir", str(tmp_path / "run")]) == 0
        assert not models.exists()


@pytest.mark.server
@pytest.mark.parametrize("next_command", ["start", "stop"])
def test_the_server_of_a_killed_start_ends_with_the_next_command(
    tmp_path: Path, next_command: str
) -> None:
    write_toy_archive(tmp_path / "store")
    arguments = start_arguments(tmp_path)
    with stopped_afterwards(tmp_path / "run"):
        assert main(arguments) == 0
        unrecorded = TorchServer.find(tmp_path / "run")
        assert unrecorded is not None
        family = [p.pid for p in processes_of(tmp_path / "run")]
        # As if the start had been killed before it could record the server.
        (tmp_path / "run" / "server.json").unlink()
        if next_command == "start":
            assert main(arguments) == 0
        assert main(["stop", "--run-dir", str(tmp_path / "run")]) == 0
        assert unrecorded.pid is None
        assert not [pid for pid in family if psutil.pid_exists(pid)]
