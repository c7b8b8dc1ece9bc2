"""The life of a real TorchServe instance, on an archive with a handler of a few lines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from scripts import demo, serve
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.archive.store import choose_archive
from scripts.repository import REPOSITORY
from scripts.serve import main
from scripts.torchserve.launch import OPENMP_SPINS, environment
from scripts.torchserve.options import Options, Ports, archive_identity
from scripts.torchserve.process import TorchServer
from scripts.torchserve.state import StateDir
from tests.support.signals import default_signals
from tests.support.toy_archive import write_toy_archive


@contextmanager
def stopped_afterwards(run_dir: Path) -> Iterator[None]:
    """Leave no server behind, whatever the test did."""
    try:
        yield
    finally:
        if (server := TorchServer.find(run_dir)) is not None:
            server.stop()


def start_arguments(folder: Path, ports: tuple[int, int] | None = None) -> list[str]:
    http, grpc = ports or consecutive_free_ports()
    return [
        *("start", "--run-dir", str(folder / "run"), "--store", str(folder / "store")),
        *("--port", str(http), "--grpc-port", str(grpc)),
    ]


def consecutive_free_ports() -> tuple[int, int]:
    while True:
        free = Ports.free()
        if not Ports.starting_at(free.inference, free.grpc_inference).taken():
            return free.inference, free.grpc_inference


def test_a_folder_is_an_archive_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(write_toy_archive(tmp_path, "toy")) as mar:
        mar.extractall(tmp_path / "store" / "folder")
    (tmp_path / "store" / "no-archive").mkdir()
    archive = choose_archive(tmp_path / "store", None)
    assert archive == tmp_path / "store" / "folder"
    assert archive_identity(archive) == ("toy", "1.0")
    before = Options(archive, tmp_path).fingerprint()
    os.utime(archive / TORCHSERVE_MANIFEST_NAME, ns=(0, 0))
    assert Options(archive, tmp_path).fingerprint() != before


def test_without_authorization_another_address_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store")
    assert main([*start_arguments(tmp_path), "--address", "0.0.0.0"]) == 1
    assert "add AUTH=on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_taken_port_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store")
    http, grpc = consecutive_free_ports()
    with socket.create_server(("127.0.0.1", http + 2)):
        assert main(start_arguments(tmp_path, (http, grpc))) == 1
    message = capsys.readouterr().err
    assert f"port {http + 2};" in message
    assert "PORT=9080" in message


@pytest.mark.parametrize(
    ("set_by_user", "spins"),
    [({}, OPENMP_SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_spin_briefly_unless_told_otherwise(
    set_by_user: dict[str, str],
    spins: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    assert environment(StateDir(tmp_path)).get("GOMP_SPINCOUNT") == spins


def test_workers_write_no_compiled_code_beside_an_archive(tmp_path: Path) -> None:
    assert environment(StateDir(tmp_path))["PYTHONDONTWRITEBYTECODE"] == "1"


def test_misuse_is_told_apart_from_failure() -> None:
    assert main(["start", "--auth", "perhaps"]) == 2


@pytest.mark.parametrize(
    ("place", "words"), [("file", "is not a directory"), ("file/below", "Not a directory")]
)
def test_a_state_directory_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, words: str
) -> None:
    (tmp_path / "file").write_text("")
    write_toy_archive(tmp_path / "store")
    ports = (Ports.free().inference, Ports.free().grpc_inference)
    arguments = ["start", "--store", str(tmp_path / "store"), "--run-dir", str(tmp_path / place)]
    assert main([*arguments, "--port", str(ports[0]), "--grpc-port", str(ports[1])]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path / "file") in error


@pytest.mark.parametrize("out", ["none/x.png", "."])
def test_where_no_picture_can_be_written_none_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    arguments = ["--run-dir", str(tmp_path), "--out", str(tmp_path / out)]
    assert demo.main(arguments) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_how_many_requests_are_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    server = TorchServer(Options(write_toy_archive(tmp_path), tmp_path / "run"))
    given_s: list[float] = []

    def drain(server: TorchServer, drain_s: float, tell: Callable[[int, float], None]) -> None:
        given_s.append(drain_s)
        tell(3, 1.2)
        tell(1, 2.4)

    monkeypatch.setattr(TorchServer, "find", lambda run_dir: server)
    monkeypatch.setattr(server, "stop", lambda: True)
    monkeypatch.setattr(serve, "drain", drain)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert main(["stop"]) == main(["stop", "--drain-s", "2.5"]) == 0
    assert given_s == [30, 2.5]
    shown = capsys.readouterr().err
    assert ("Finishing 3 requests ... 1 s" in shown) == is_terminal
    assert ("Finishing 1 request ... 2 s" in shown) == is_terminal


@pytest.mark.parametrize("drain_s", ["-1", "nan", "inf", "soon"])
def test_a_drain_takes_a_number_of_seconds(drain_s: str, tmp_path: Path) -> None:
    assert main(["stop", "--run-dir", str(tmp_path), f"--drain-s={drain_s}"]) == 2


def test_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = ["--run-dir", str(tmp_path)]
    assert main(["stop", *run_dir]) == 0
    assert main(["status", *run_dir]) == 1
    assert main(["logs", *run_dir]) == 1
    (tmp_path / "server.json").write_text('{"pid": 1, "created_s": 0}')
    assert TorchServer.find(tmp_path) is None


@pytest.mark.server
def test_start_is_idempotent_and_stop_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a späce"
    # What it prints would turn a terminal red, or text around.
    printing = r"print('ESC \x1b[31m \x9b31m \u202e', flush=True)"
    archive = write_toy_archive(folder / "store", initialize=printing)
    run_dir, arguments = folder / "run", start_arguments(folder)
    with stopped_afterwards(run_dir):
        assert main(arguments) == 0
        assert "curl -sS" in capsys.readouterr().out
        server = TorchServer.find(run_dir)
        assert server is not None
        assert server.is_ready()
        pids = [server.pid, *(worker["pid"] for worker in server.workers())]
        assert all(psutil.pid_exists(int(str(pid))) for pid in pids)

        assert main(arguments) == 0
        assert "is already serving" in capsys.readouterr().out
        again = TorchServer.find(run_dir)
        assert again is not None
        assert again.pid == server.pid

        # What cannot be started is refused before what runs is stopped.
        assert main([*arguments, "--address", "0.0.0.0"]) == 1
        assert "add AUTH=on" in capsys.readouterr().err
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            assert main([*arguments, "--grpc-port", str(taken)]) == 1
        assert f"port {taken}" in capsys.readouterr().err
        assert server.is_ready()

        write_toy_archive(folder / "store", "second")
        assert main([*arguments, "--name", "second"]) == 1
        assert "toy.mar is being served" in capsys.readouterr().err

        assert main(["status", "--json", "--run-dir", str(run_dir)]) == 0
        state = json.loads(capsys.readouterr().out)
        assert (state["ready"], state["model"], state["version"]) == (True, "toy", "1.0")

        archive.unlink()  # A server whose archive is gone can still be stopped.
        assert main(["stop", "--run-dir", str(run_dir)]) == 0
        assert not any(psutil.pid_exists(int(str(pid))) for pid in pids)
        assert server.options.ports.taken() == ()
        assert TorchServer.find(run_dir) is None

    log = server.log_file.read_text()
    assert "GET /models/" not in log, "asking for readiness must not fill the log"
    assert "DEBUG" not in log
    (line,) = [line for line in log.splitlines() if "MODEL_LOG ESC" in line]
    assert line.endswith("ESC ?[31m ?31m ?")


@pytest.mark.server
@pytest.mark.parametrize(
    "statement", ["raise ValueError('max_rows is wrong')", "import os; os.kill(os.getpid(), 9)"]
)
def test_a_model_that_cannot_be_loaded_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    write_toy_archive(tmp_path / "store", initialize=statement)
    with stopped_afterwards(tmp_path / "run"):
        assert main(start_arguments(tmp_path)) == 1
        assert TorchServer.find(tmp_path / "run") is None
    message = capsys.readouterr().err
    assert "the model cannot be loaded" in message
    assert ("ValueError: max_rows is wrong" in message) == statement.startswith("raise")
    assert "File " not in message


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Everything that runs with this state directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if any(str(run_dir) in word for word in words):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


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
    assert not list((tmp_path / "run" / "temp" / "models").iterdir())


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
        assert list(models.iterdir()) == []


@pytest.mark.server
def test_with_authorization_the_printed_key_opens_the_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store")
    with stopped_afterwards(tmp_path / "run"):
        assert main([*start_arguments(tmp_path), "--auth", "on"]) == 0
        server = TorchServer.find(tmp_path / "run")
        assert server is not None
        header = f"Authorization: Bearer {server.token()}"
        assert header in capsys.readouterr().out
        assert (server.state_dir / "key_file.json").stat().st_mode & 0o077 == 0
        post = ["curl", "-s", "-o", str(tmp_path / "body"), "-w", "%{http_code}", "-d", "data=x"]
        url = server.predictions_url
        with_key = subprocess.run([*post, url, "-H", header], capture_output=True, check=True)
        without = subprocess.run([*post, url], capture_output=True, check=True)
    assert (with_key.stdout, without.stdout) == (b"200", b"400")
