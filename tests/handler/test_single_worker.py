from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from handler.errors import ConfigError
from handler.single_worker import hold_model
from scripts.repository import REPOSITORY

HOLD = """
import pathlib, sys, time
from handler.single_worker import hold_model
hold_model(pathlib.Path(sys.argv[1]), patience_s=0)
print("held", flush=True)
time.sleep(60)
"""


def holder(model_dir: Path) -> subprocess.Popen[str]:
    """Another process that holds a model."""
    command = [sys.executable, "-c", HOLD, str(model_dir)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_model_has_one_process(tmp_path: Path) -> None:
    other = holder(tmp_path)
    try:
        with pytest.raises(ConfigError, match="another worker serves it"):
            hold_model(tmp_path, patience_s=0.2)
    finally:
        other.kill()
        other.communicate()
    # What is killed holds nothing any more.
    hold_model(tmp_path, patience_s=0)
    hold_model(tmp_path, patience_s=0)


def test_one_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    other = holder(tmp_path)
    started_s = time.monotonic()
    kill = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    hold_model(tmp_path, patience_s=30)
    assert 0.3 < time.monotonic() - started_s < 20
    kill.wait()
    other.communicate()


def test_a_folder_that_several_servers_link_is_served_by_each(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    links = [tmp_path / name / "model" for name in ("first", "second")]
    for link in links:
        link.parent.mkdir()
        link.symlink_to(folder)
    other = holder(links[0])
    try:
        hold_model(links[1], patience_s=0)
        with pytest.raises(ConfigError):
            hold_model(links[0], patience_s=0)
    finally:
        other.kill()
        other.communicate()


def test_nothing_is_written(tmp_path: Path) -> None:
    hold_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
