"""scripts.archive.beside: work in another process ends as if it had been done here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from handler.errors import ConfigError
from scripts.archive.beside import beside
from scripts.repository import REPOSITORY
from tests.support.archives import save_pipeline
from tests.support.layouts import scaled_fp8
from tests.support.packing import content, pack

_BEFORE = """
import os, signal, sys, threading, time
from pathlib import Path
from tempfile import TemporaryDirectory
from handler.errors import ArchiveError, ConfigError
from scripts.archive.beside import beside
assert "torch" not in sys.modules
"""


def said(code: str, *arguments: str) -> str:
    """What `code` prints in a process that has not imported torch."""
    done = subprocess.run(
        [sys.executable, "-c", _BEFORE + code, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_result_comes_from_another_process_however_often_it_is_asked_for() -> None:
    code = """
with beside(os.getpid) as result:
    print(result() == os.getpid(), result() == result())
"""
    assert said(code) == "False True\n"


@pytest.mark.parametrize("before", ["sys.modules['torch'] = None", "waiting.start()"])
def test_it_is_done_here_where_a_fork_gains_nothing_or_is_not_safe(before: str) -> None:
    code = f"""
done = threading.Event()
waiting = threading.Thread(target=done.wait)
{before}
with beside(os.getpid) as result:
    print(result() == os.getpid())
done.set()
"""
    assert said(code) == "True\n"


def test_errors_arrive() -> None:
    code = """
def fail():
    raise ConfigError("height: no")
try:
    with beside(fail) as result:
        print("begun")
        result()
except ConfigError as error:
    print(error)
"""
    assert said(code) == "begun\nheight: no\n"


def test_a_process_that_was_killed_is_an_error() -> None:
    code = """
try:
    with beside(lambda: os.kill(os.getpid(), signal.SIGKILL)) as result:
        result()
except ArchiveError as error:
    print(error)
"""
    assert said(code).startswith("the checks ended without a result: ")


def test_it_ends_with_the_context_and_removes_what_it_has_open(tmp_path: Path) -> None:
    code = """
def work():
    with TemporaryDirectory(dir=sys.argv[1]) as folder:
        Path(folder, "begun").write_text(str(os.getpid()))
        time.sleep(60)
with beside(work):
    while not (found := [*Path(sys.argv[1]).glob("*/begun")]) or not found[0].read_text():
        time.sleep(0.01)
    number = int(found[0].read_text())
print(os.listdir(sys.argv[1]), Path(f"/proc/{number}").exists())
"""
    assert said(code, str(tmp_path)) == "[] False\n"


def test_what_work_raises_here_is_raised_before_the_context() -> None:
    def fail() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError), beside(fail, is_slow=False):
        raise AssertionError("the context has begun")


@pytest.mark.slow
def test_a_fresh_process_packs_and_refuses_as_this_one_does(tmp_path: Path) -> None:
    """This one has imported torch, and checks before it writes."""
    good = save_pipeline(tmp_path / "good")
    bad = scaled_fp8(tmp_path / "bad")
    command = [sys.executable, "-m", "scripts.build_archive", "--name", "tiny"]
    for is_folder, form in ((False, "mar"), (True, "dir")):
        out = tmp_path / form
        flags = ["--out", str(out), "--format", form, "--pipeline"]
        refused = subprocess.run(
            [*command, *flags, str(bad)], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert refused.returncode == 1
        (line,) = refused.stderr.splitlines()
        assert line.startswith("build_archive: error: not packed: unet: its weights are scaled")
        assert not [*out.iterdir()]
        subprocess.run([*command, *flags, str(good)], cwd=REPOSITORY, check=True)
        here = pack(tmp_path, good, is_checked=True, is_folder=is_folder)
        if is_folder:
            assert content(out / "tiny") == content(here)
        else:
            assert (out / "tiny.mar").read_bytes() == here.read_bytes()
        here.rename(tmp_path / f"here-{form}")
