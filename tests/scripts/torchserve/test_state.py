from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.errors import ServerError
from scripts.torchserve.grpc_methods import withdraw_bidirectional_streaming
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from scripts.torchserve.state import MAX_SOCKETS_PATH_BYTES, StateDir
from tests.support.toy_archive import write_toy_archive

UNPACKED = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[StateDir]:
    """A state directory whose path is too long for a socket."""
    state = StateDir(tmp_path / ("d" * MAX_SOCKETS_PATH_BYTES))
    yield state
    state.clean()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_is_private(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "run")
    state.prepare()
    assert mode(state.path) == mode(state.temp) == 0o700
    assert state.management_socket.parent == state.temp


def test_what_somebody_else_put_there_is_refused_and_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "logs").mkdir(parents=True)
    (theirs / "config.properties").write_text("mine=1\n")
    theirs.chmod(0o755)
    server = TorchServer(Options(write_toy_archive(tmp_path), theirs, Ports.free()))
    with pytest.raises(ServerError, match=r"is not empty, and no server made it.*RUN_DIR="):
        server.start()
    assert mode(theirs) == 0o755
    assert sorted(path.name for path in theirs.iterdir()) == ["config.properties", "logs"]
    assert (theirs / "config.properties").read_text() == "mine=1\n"


@pytest.mark.parametrize("made", ["nothing", "empty", "ours", "others of ours"])
def test_what_is_empty_or_ours_is_taken(tmp_path: Path, made: str) -> None:
    state = StateDir(tmp_path / "run")
    if made == "empty":
        state.path.mkdir()
    elif made == "ours":
        state.prepare()
        (state.path / "note").write_text("of the user's")
    elif made == "others of ours":
        StateDir(state.path / "second").prepare()
    state.check_ownership()


@pytest.mark.parametrize("other", ["file", "empty directory", "link"])
def test_beside_others_of_ours_there_is_nothing_else(tmp_path: Path, other: str) -> None:
    state = StateDir(tmp_path / "run")
    StateDir(state.path / "second").prepare()
    if other == "file":
        (state.path / "other").touch()
    elif other == "empty directory":
        (state.path / "other").mkdir()
    else:
        (state.path / "other").symlink_to(state.path / "second")
    with pytest.raises(ServerError, match="not empty"):
        state.check_ownership()


def test_a_file_is_not_a_state_directory(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ServerError, match="is not a directory"):
        StateDir(tmp_path / "run").check_ownership()


def test_unpacked_archives_go_and_nothing_else_does(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "run")
    state.prepare()
    served = tmp_path / "store" / "folder"
    served.mkdir(parents=True)
    (served / "weights").touch()
    models = state.temp / "models"
    (models / UNPACKED / "handler").mkdir(parents=True)
    (models / UNPACKED / "folder").symlink_to(served)
    (models / "mine").mkdir()
    (models / UNPACKED[::-1]).symlink_to(served)
    for name in ("management.sock", ".ts.sock.9000", "kept"):
        (state.temp / name).touch()
    (state.logs / "server.log").touch()
    state.prepare()
    assert sorted(path.name for path in models.iterdir()) == sorted(["mine", UNPACKED[::-1]])
    assert sorted(path.name for path in state.temp.iterdir()) == ["kept", "models"]
    assert (served / "weights").exists()
    assert (state.logs / "server.log").exists()


def test_a_long_path_has_short_names_for_its_sockets(deep: StateDir) -> None:
    deep.prepare()
    assert len(os.fsencode(deep.sockets)) <= MAX_SOCKETS_PATH_BYTES
    assert deep.sockets.resolve() == deep.temp
    assert mode(deep.sockets.parent) == 0o700
    # Whoever finds the instance later finds its sockets.
    assert StateDir(deep.path).management_socket == deep.management_socket
    first = deep.sockets.parent
    deep.prepare()
    assert not first.exists()
    last = deep.sockets.parent
    deep.clean()
    assert not last.exists()
    assert deep.sockets == deep.temp


def test_what_somebody_else_put_under_the_short_name_stays(deep: StateDir, tmp_path: Path) -> None:
    deep.prepare()
    link = deep.sockets
    link.unlink()
    link.symlink_to(tmp_path)
    deep.clean()
    assert link.is_symlink()
    link.unlink()
    link.parent.rmdir()


def test_a_disk_without_room_leaves_a_directory_that_can_be_used_again(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path;"
        "from scripts.torchserve.state import StateDir;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
        "StateDir(Path(sys.argv[1])).prepare()"
    )
    for is_first in (True, False):
        answer = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "File too large" in answer.stderr
        StateDir(tmp_path / "run").check_ownership()
        if is_first:
            StateDir(tmp_path / "run").prepare()
    assert StateDir(tmp_path / "run").is_ours


def test_nothing_of_a_run_is_left_but_its_log_and_what_was_compiled(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "run")
    state.prepare()
    withdraw_bidirectional_streaming(state.path)
    (state.temp / "models" / UNPACKED).mkdir(parents=True)
    (state.tmp / "torchinductor_me").mkdir()
    state.log_file.touch()
    state.clean()
    left = {str(each.relative_to(state.path)) for each in state.path.rglob("*")}
    assert left == {
        *("config.properties", "logs", "logs/server.log", "temp"),
        *("tmp", "tmp/torchinductor_me"),
    }
