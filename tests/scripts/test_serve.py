"""The life of a real TorchServe instance, on an archive with a handler of a few lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scripts import demo, serve
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.archive.store import choose_archive
from scripts.background import started_s
from scripts.serve import main
from scripts.torchserve.launch import OPENMP_SPINS, environment
from scripts.torchserve.options import Options, Ports, archive_identity
from scripts.torchserve.process import TorchServer
from scripts.torchserve.state import StateDir
from tests.support.instances import consecutive_free_ports, start_arguments, stopped_afterwards
from tests.support.toy_archive import write_toy_archive


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


@pytest.mark.server
@pytest.mark.skipif(sys.platform != "linux", reason="others have no address that nobody reaches")
def test_without_grpc_nobody_can_connect_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_toy_archive(tmp_path / "store")
    http, _ = consecutive_free_ports()
    with stopped_afterwards(tmp_path / "run"):
        assert main([*start_arguments(tmp_path, (http, 1))[:-1], "off"]) == 0
        server = TorchServer.find(tmp_path / "run")
        assert server is not None
        listening = [
            each.laddr
            for each in psutil.Process(server.pid).net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        ]
        reached = {each.port for each in listening if not each.ip.endswith("255.255.255.255")}
        assert reached == {http, http + 2}
        assert len(listening) == 4
        capsys.readouterr()
        main(["status", "--run-dir", str(tmp_path / "run"), "--json"])
        assert json.loads(capsys.readouterr().out)["grpc"] is None


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
    assert given_s == [60, 2.5]
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


def test_a_server_that_an_earlier_version_started_is_found(tmp_path: Path) -> None:
    """It had five ports; not finding it would be to clean up under its feet."""
    process = psutil.Process()
    ports = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
    saved = {
        "pid": process.pid,
        "created_s": started_s(process.pid),
        "auth": False,
        **dict.fromkeys(("model_name", "model_version", "address", "started_as"), "x"),
        **dict.fromkeys(("archive", "config", "log_config", "metrics_config"), "x"),
        "ports": dict.fromkeys(ports, 8080),
        "properties": {},
        "log_offset": 0,
    }
    (tmp_path / "server.json").write_text(json.dumps(saved))
    server = TorchServer.find(tmp_path)
    assert server is not None
    assert server.pid == process.pid


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
