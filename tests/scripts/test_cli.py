"""scripts.cli: every command in one."""

from __future__ import annotations

import re

import pytest

from scripts.cli import main
from scripts.console import DONE, FAILED, MISUSED

COMMANDS = (
    *("demo", "pack", "inspect", "verify", "serve", "stop", "restart", "status", "logs"),
    *("up", "gateway", "key"),
    *("push", "pull", "download", "zip", "completion"),
)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == DONE
    shown = capsys.readouterr().out
    assert tuple(re.findall(r"^    ([a-z]+)\b", shown, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == DONE
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m diffusers_torchserve {command}")
    assert "%(prog)s" not in shown
    if "examples:" in shown:
        assert f"  python -m diffusers_torchserve {command}" in shown.split("examples:")[1]


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "nothing.mar"]) == MISUSED
    assert main(["logs", "--run-dir", "/nowhere"]) == FAILED
    assert main([]) == MISUSED
    assert main(["pusch"]) == MISUSED
    shown = capsys.readouterr().err
    assert "nothing.mar: no such archive" in shown
    assert "Traceback" not in shown
