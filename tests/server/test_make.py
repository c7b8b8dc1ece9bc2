"""The Makefile, as a person uses it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from scripts.repository import REPOSITORY
from scripts.torchserve.options import Ports
from scripts.torchserve.process import TorchServer
from scripts.torchserve.state import StateDir
from tests.support.makes import linked_clone, linked_environment, make
from tests.support.toy_archive import write_toy_archive


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[str]]:
    """Arguments that keep a make within `tmp_path`: paths with spaces, and ports of its own."""
    virtual = linked_environment(tmp_path)
    (tmp_path / "a store").mkdir()
    ports = Ports.free()
    while Ports.starting_at(ports.inference, ports.grpc_inference).taken():
        ports = Ports.free()
    yield [
        *(f"VENV={virtual}", f"STORE={tmp_path / 'a store'}", f"RUN_DIR={tmp_path / 'a run'}"),
        *(f"PORT={ports.inference}", f"GRPC_PORT={ports.grpc_inference}"),
        f"DEMO_PICTURE={tmp_path / 'a demo.png'}",
    ]
    if (server := TorchServer.find(tmp_path / "a run")) is not None:
        server.stop()


def test_make_alone_lists_every_target() -> None:
    listed = re.findall(r"^  make ([a-z-]+) ", make().stdout, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert sorted(listed) == sorted(phony[1].split())


def test_without_a_python_that_is_new_enough(tmp_path: Path) -> None:
    answer = make("setup", f"VENV={tmp_path / 'venv'}", "PYTHON=")
    assert answer.returncode != 0
    assert "Python 3.11, 3.12 or 3.13 is needed" in answer.stderr
    assert not (tmp_path / "venv").exists()


def test_looking_installs_nothing(tmp_path: Path) -> None:
    for target in ("status", "logs"):
        answer = make(target, f"VENV={tmp_path / 'venv'}")
        assert answer.returncode != 0
        assert "Nothing is installed yet: make demo" in answer.stderr
    assert make("stop", f"VENV={tmp_path / 'venv'}").returncode == 0
    assert not (tmp_path / "venv").exists()


def test_several_archives_ask_for_a_name(tmp_path: Path, places: list[str]) -> None:
    write_toy_archive(tmp_path / "a store", "first")
    write_toy_archive(tmp_path / "a store", "second")
    answer = make("serve", *places)
    assert answer.returncode != 0
    assert "choose one with NAME=: first, second" in answer.stderr


def test_an_archive_of_the_users_own_is_not_replaced(tmp_path: Path, places: list[str]) -> None:
    own = write_toy_archive(tmp_path / "a store", "stable_diffusion")
    os.utime(own, ns=(0, 0))
    before = own.read_bytes()
    answer = make("archive", *places)
    assert answer.returncode != 0
    assert "archive of your own" in answer.stderr
    assert own.read_bytes() == before


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make clean` needs of the repository, whose caches are to stay."""
    return linked_clone(tmp_path)


def test_a_run_dir_of_somebody_else_is_left_as_it_is(
    tmp_path: Path, places: list[str], clone: Path
) -> None:
    theirs = tmp_path / "a run"
    kept = [theirs / name / "file" for name in ("tmp", "temp", "logs", "mine")]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.touch()
    (theirs / "config.properties").write_text("mine=1\n")
    theirs.chmod(0o755)
    write_toy_archive(tmp_path / "a store")
    answer = make("serve", *places)
    assert answer.returncode != 0
    assert "is not empty, and no server made it" in answer.stderr
    assert theirs.stat().st_mode & 0o777 == 0o755
    assert make("clean", *places, folder=clone).returncode == 0
    assert all(file.exists() for file in [*kept, theirs / "config.properties"])


def test_clean_leaves_nothing_of_ours(tmp_path: Path, places: list[str], clone: Path) -> None:
    StateDir(tmp_path / "a run").prepare()
    (tmp_path / "a store" / ".embedded").touch()
    (tmp_path / "a demo.png").touch()
    own = write_toy_archive(tmp_path / "a store", "own")
    write_toy_archive(tmp_path / "a store", "stable_diffusion")
    assert make("clean", *places, folder=clone).returncode == 0
    assert not (tmp_path / "a run").exists()
    assert not (tmp_path / "a demo.png").exists()
    assert list((tmp_path / "a store").iterdir()) == [own]


@pytest.mark.slow
def test_demo_twice(tmp_path: Path, places: list[str]) -> None:
    first = make("demo", *places)
    assert first.returncode == 0, first.stderr
    assert "Packing the embedded pipeline" in first.stdout
    assert str(tmp_path / "a demo.png") in first.stdout
    with Image.open(tmp_path / "a demo.png") as picture:
        assert picture.size == (768, 768)
    server = TorchServer.find(tmp_path / "a run")
    assert server is not None

    second = make("demo", *places)
    assert second.returncode == 0, second.stderr
    assert "Packing" not in second.stdout
    assert "is already serving" in second.stdout
    again = TorchServer.find(tmp_path / "a run")
    assert again is not None
    assert again.pid == server.pid

    next_line = second.stdout.split("Your turn:")[1].split("The server")[0]
    curl = subprocess.run(
        ["bash", "-euc", next_line], cwd=tmp_path, capture_output=True, check=True
    )
    assert curl.stdout == b"200 image/png\n"
    with Image.open(tmp_path / "mine.png") as picture:
        assert picture.size == (768, 768)

    assert make("stop", *places).returncode == 0
    assert server.pid is None
