"""make archive: every way to name what is packed, and names that a shell would stumble over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.repository import REPOSITORY
from tests.support.archives import save_in_hub_cache, save_pipeline
from tests.support.packing import manifest

QUOTES = ['a"b', "a`touch x`b", "a\\b", "a$(touch x)b"]


def make_archive(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``make archive`` with this test's Python."""
    virtual = tmp_path / "venv"
    if not virtual.exists():
        virtual.mkdir()
        for name in ("bin", "lib", "pyvenv.cfg"):
            (virtual / name).symlink_to(Path(sys.prefix) / name)
        (virtual / ".installed").touch()
    return make(tmp_path, "archive", *arguments)


def make(tmp_path: Path, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell, with the Python in tmp_path/venv and a store of its own."""
    virtual = tmp_path / "venv"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", target, f"VENV={virtual}", f"STORE={tmp_path / 'store'}", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_another_archive_is_made_of_an_archive(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "tiny")
    first = make_archive(tmp_path, f"PIPELINE={pipeline}", "VERSION=3.0")
    assert first.returncode == 0, first.stderr
    shutil.rmtree(pipeline)
    again = [f"FROM={tmp_path / 'store' / 'tiny.mar'}", "ARGS=--set height=64"]
    refused = make_archive(tmp_path, *again)
    assert "tiny.mar exists; --force replaces it (make archive FORCE=1)" in refused.stderr
    done = make_archive(tmp_path, *again, "NAME=small")
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / "store" / "small.mar")["settings"] == {"height": 64}
    done = make_archive(tmp_path, *again, "VERSION=1.0", "FORCE=1")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "store")) == ["small.mar", "tiny.mar"]


def test_smoke_draws_before_the_archive_is_there(tmp_path: Path) -> None:
    wanted = "drawing with speed: safe"  # which drawing alone says
    arguments = [f"PIPELINE={save_pipeline(tmp_path / 'tiny')}", "ARGS=--set speed=max", "FORCE=1"]
    for is_smoke in (False, True):
        done = make_archive(tmp_path, *arguments, *(["SMOKE=1"] if is_smoke else []))
        assert done.returncode == 0, done.stderr
        assert (wanted in done.stderr) is is_smoke


def test_a_hub_cache_is_packed_under_the_models_name(tmp_path: Path) -> None:
    snapshot = save_in_hub_cache(tmp_path)
    root = snapshot.parents[1]
    done = make_archive(tmp_path, f"PIPELINE={root}", f"REVISION={snapshot.name}")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "store") == ["name.mar"]


def test_spaces_and_quotes_in_paths(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "it's mine")
    store = tmp_path / "a 'store'"
    arguments = [f"PIPELINE={pipeline}", f"STORE={store}"]
    refused = make_archive(tmp_path, *arguments)
    assert "give one with --name (NAME=)" in refused.stderr
    done = make_archive(tmp_path, *arguments, "NAME=tiny")
    assert done.returncode == 0, done.stderr
    assert os.listdir(store) == ["tiny.mar"]


@pytest.mark.parametrize("value", QUOTES)
@pytest.mark.parametrize(
    "name", ["NAME", "STORE", "RUN_DIR", "PIPELINE", "FROM", "DTYPE", "DEMO_PICTURE"]
)
def test_letters_that_a_shell_would_read_are_refused(tmp_path: Path, name: str, value: str) -> None:
    answer = make_archive(tmp_path, f"{name}={value}")
    assert answer.returncode != 0
    assert f'{name} may not have any of " ` \\ $ in it' in answer.stderr
    assert not (REPOSITORY / "x").exists()


@pytest.mark.parametrize("value", ["--set 'a", '--smoke-prompt "a', "--set height=64 )"])
def test_arguments_that_a_shell_cannot_read_are_refused(tmp_path: Path, value: str) -> None:
    answer = make_archive(tmp_path, f"ARGS={value}")
    assert answer.returncode == 2
    first = answer.stderr.splitlines()[0]
    assert first == f"make: ARGS cannot be read, is a quotation in it not closed? ARGS={value}"


def test_a_prompt_is_any_text(tmp_path: Path) -> None:
    """Another Python in the place of ours says what it was given."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").touch()
    prompt = """a "red" star, it's 5$ `or` \\ $(so)"""
    answer = make(tmp_path, "demo", f"PROMPT={prompt}")
    assert f"<--prompt><{prompt}>" in answer.stdout, answer.stderr
