"""scripts.console: finished files and nothing else, and exit codes that mean what they say."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from scripts.console import FAILED, MISUSED, atomic_output, run_command
from scripts.errors import ServerError, UsageError
from tests.support.signals import default_signals

MARKER = "MAR-INF/MANIFEST.json"


def make_archive(folder: Path, text: str) -> None:
    (folder / MARKER).parent.mkdir(parents=True)
    (folder / MARKER).write_text(text)


def test_a_folder_replaces_a_folder_of_its_kind(tmp_path: Path) -> None:
    target = tmp_path / "sd"
    make_archive(target, "old")
    with atomic_output(target, force=True, marker=MARKER) as part:
        make_archive(part, "new")
    assert (target / MARKER).read_text() == "new"
    assert os.listdir(tmp_path) == ["sd"]


@pytest.mark.parametrize("marker", [MARKER, None])
def test_force_removes_nobodys_folder(tmp_path: Path, marker: str | None) -> None:
    target = tmp_path / "projects"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with (
        pytest.raises(UsageError, match=r"is not a f.*remove it first"),
        atomic_output(target, force=True, marker=marker),
    ):
        pytest.fail("it must not begin to pack")
    assert (target / "thesis.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["projects"]


def test_what_appeared_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "sd.mar"
    packing = atomic_output(target, force=False)
    packing.__enter__().write_text("slow")
    target.write_text("quick")
    with pytest.raises(UsageError, match="exists"):
        packing.__exit__(None, None, None)
    assert target.read_text() == "quick"
    assert os.listdir(tmp_path) == ["sd.mar"]


def test_an_interrupt_between_the_moves_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace = tmp_path / "sd", os.replace
    make_archive(target, "old")

    def interrupted(source: Path, to: Path) -> None:
        if to == target and (source / MARKER).read_text() == "new":
            raise KeyboardInterrupt
        replace(source, to)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_output(target, force=True, marker=MARKER) as part:
        make_archive(part, "new")
    assert (target / MARKER).read_text() == "old"
    assert os.listdir(tmp_path) == ["sd"]


_PACKING = """
import argparse, sys, time
from pathlib import Path
from scripts.console import atomic_output, run_command

def run(arguments):
    with atomic_output(Path(sys.argv[1]), force=False) as part:
        part.write_text("half")
        print("begun", flush=True)
        time.sleep(60)
    return 0

sys.exit(run_command(argparse.ArgumentParser("pack"), run, []))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_done(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", _PACKING, str(tmp_path / "sd.mar")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    assert complaint == "pack: error: interrupted\n"
    assert os.listdir(tmp_path) == []


_SPEAKING = """
import argparse, sys
from scripts.console import run_command

def run(arguments):
    print("Lizenz: \u4f60\u597d")
    return 0

sys.exit(run_command(argparse.ArgumentParser("speak"), run, []))
"""


def speak(stdout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SPEAKING],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
        check=False,
    )


def test_what_cannot_be_written_is_one_line_and_exit_code_1() -> None:
    with open("/dev/full", "wb") as full:
        done = speak(full.fileno())
    assert done.returncode == 1
    assert done.stderr == "speak: error: [Errno 28] No space left on device\n"


def test_letters_that_the_terminal_lacks_are_spelled_out() -> None:
    done = speak(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "Lizenz: \\u4f60\\u597d\n")


def test_a_reader_that_goes_away_ends_a_command_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = speak(writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("say\nwhat"), MISUSED, "speak: error: say what\n"),
        (ArchiveError("broken"), FAILED, "speak: error: broken\n"),
        (OSError(28, "No space"), FAILED, "speak: error: [Errno 28] No space\n"),
        (ServerError("no"), FAILED, "speak: error: no\n"),
        (ServerError("no", "  a\x1b[2J\n  b"), FAILED, "speak: error: no\n  a\ufffd[2J\n  b\n"),
    ],
)
def test_errors_are_one_line_and_a_servers_log(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    assert run_command(argparse.ArgumentParser("speak"), run, []) == code
    assert capsys.readouterr().err == said
