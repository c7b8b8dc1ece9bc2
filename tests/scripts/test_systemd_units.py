"""deploy/systemd: units that systemd takes, with commands that we take."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.cli import make_parser
from scripts.repository import REPOSITORY
from scripts.torchserve.draining import DRAIN_S, GRACE_S

UNITS = sorted((REPOSITORY / "deploy" / "systemd").glob("*.service"))


def value_of(unit: Path, key: str) -> str:
    (line,) = [line for line in unit.read_text().splitlines() if line.startswith(f"{key}=")]
    return line.partition("=")[2]


def test_there_are_units() -> None:
    assert [unit.stem for unit in UNITS] == ["diffusers-gateway", "diffusers-torchserve"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_their_commands_are_ours(unit: Path) -> None:
    program, *words = shlex.split(value_of(unit, "ExecStart"))
    assert Path(program).name == "diffusers-torchserve"
    assert callable(make_parser().parse_args(words).run)


def test_systemd_waits_longer_than_a_drain() -> None:
    unit = REPOSITORY / "deploy" / "systemd" / "diffusers-torchserve.service"
    assert float(value_of(unit, "TimeoutStopSec")) > DRAIN_S + GRACE_S + 60


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="a machine without systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_knows_every_word(unit: Path, tmp_path: Path) -> None:
    def complaints(text: str) -> list[str]:
        # It looks whether the program is there.
        file = tmp_path / unit.name
        file.write_text(
            text.replace("/opt/diffusers-torchserve/bin/diffusers-torchserve", "/bin/true")
        )
        run = subprocess.run(
            ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False
        )
        return [line for line in run.stderr.splitlines() if unit.name in line]

    assert complaints(unit.read_text()) == []
    assert complaints(unit.read_text().replace("KillMode=", "KilMode="))
