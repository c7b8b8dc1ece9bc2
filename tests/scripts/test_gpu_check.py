"""Steps that fail, hang or have no time left are told, and none keeps the others from running."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from scripts.gpu_check import STEPS, TOTAL_S, Outcome, Step, main, run_steps
from scripts.gpu_steps import readme_script
from scripts.repository import REPOSITORY

WORDS = {"device": "cpu"}
HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def step(name: str, code: str, limit_s: float = 60) -> Step:
    return Step(name, ("-c", code), limit_s)


def results(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.result for outcome in outcomes}


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_each_step_survives_the_one_before(tmp_path: Path) -> None:
    steps = [
        step("breaks", "raise SystemExit('it broke')"),
        step("hangs", HANG, 3),
        step("device", "print('on', '{device}')"),
    ]
    outcomes = run_steps(steps, tmp_path, WORDS)
    assert results(outcomes) == {"breaks": "failed", "hangs": "ended at its limit", "device": "ok"}
    assert [outcome.told for outcome in outcomes[::2]] == ["it broke", "on cpu"]
    assert not is_running(int(outcomes[1].told)), "what a step started outlives it"
    log = (tmp_path / "log.txt").read_text()
    assert log.index("breaks") < log.index("\nit broke") < log.index("\non cpu")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [each["name"] for each in report["steps"]] == ["breaks", "hangs", "device"]


def test_the_report_is_there_after_every_step(tmp_path: Path) -> None:
    look = "import json; print(len(json.load(open('{folder}/report.json'))['steps']))"
    steps = [step("one", "pass"), step("two", look)]
    outcomes = run_steps(steps, tmp_path, {"folder": str(tmp_path)})
    assert outcomes[1].told == "1"


def test_the_whole_has_a_limit_too(tmp_path: Path) -> None:
    started_s = time.monotonic()
    steps = [step("first", "import time; time.sleep(600)"), step("second", "print('too late')")]
    outcomes = run_steps(steps, tmp_path, WORDS, total_s=15)
    assert results(outcomes) == {"first": "ended at its limit", "second": "no time left"}
    assert time.monotonic() - started_s < 30


def test_all_limits_together_are_eight_minutes_at_most() -> None:
    assert sum(step.limit_s for step in STEPS) < TOTAL_S
    assert TOTAL_S == 480


def test_all_steps_with_tiny_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--folder", str(tmp_path), "--limit-s", "1"]
    assert main(arguments) == 1
    table = capsys.readouterr().out.split("\n\n")[-2]
    assert [line.split()[0] for line in table.splitlines()] == [each.name for each in STEPS]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {each["result"] for each in report["steps"]} == {"ended at its limit"}


def test_steps_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = tmp_path / "test_nothing.py"
    tests.write_text("def test_nothing() -> None:\n    pass\n")
    chosen = ["--only", "machine,tests", "--tests", str(tests), "--limit-s", "120"]
    assert main(["--device", "cpu", "--folder", str(tmp_path / "out"), *chosen]) == 0
    assert "1 passed" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [each["name"] for each in report["steps"]] == ["machine", "tests"]
    assert report["machine"]["computes"] is True
    assert report["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_step_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "machine,dance"]) == 2
    assert "the steps are machine, tests, server" in capsys.readouterr().err


@pytest.mark.server
def test_the_server_step(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--folder", str(tmp_path), "--only", "server"]
    assert main([*arguments, "--limit-s", "240"]) == 0, (tmp_path / "log.txt").read_text()
    server = json.loads((tmp_path / "server.json").read_text())
    assert set(server["readme"]) >= {"picture.png", "events.txt"}
    assert server["images_per_s"] > 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_readmes_requests_go_to_the_server() -> None:
    script = readme_script((REPOSITORY / "README.md").read_text(), "http://127.0.0.1:9999")
    assert script.count("curl ") >= 5
    assert "8080" not in script
