"""deploy/Dockerfile and deploy/compose.yaml: what can be told of them without building."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.requirements import main as print_requirements
from gateway.settings import Settings
from scripts.cli import make_parser
from scripts.repository import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FINAL = DOCKERFILE.rpartition("\nFROM ")[2]


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([str(program), str(path)], capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    answer = hadolint(DEPLOY / "Dockerfile")
    assert answer.returncode == 0, answer.stdout


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    wrong = DOCKERFILE.replace("COPY README.md LICENSE ./", "ADD README.md LICENSE ./")
    (tmp_path / "Dockerfile").write_text(wrong)
    assert hadolint(tmp_path / "Dockerfile").returncode != 0


def instructions() -> list[list[str]]:
    joined = re.sub(r"#.*\n", "\n", DOCKERFILE.replace("\\\n", " "))
    return [shlex.split(line) for line in joined.splitlines() if line.strip()]


def copied() -> list[str]:
    """What is copied from the context."""
    found = []
    for name, *words in instructions():
        if name == "COPY" and not words[0].startswith("--from"):
            found += words[:-1]
    return found


def test_what_is_copied_is_there_and_is_sent() -> None:
    allowed = {
        line[1:]
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied()
    for path in copied():
        assert (REPOSITORY / path).exists(), path
        assert path in allowed, path
    assert allowed == set(copied())


def test_the_wheel_has_all_its_sources_in_the_image() -> None:
    """What hatch includes, less what is left out of a wheel."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["only-include"]) <= set(copied())


@pytest.mark.parametrize("path", ["config/keys", "model-store/a.mar", ".run/key_file.json", ".git"])
def test_keys_archives_and_state_are_not_sent(path: str) -> None:
    """As Docker reads the file: the last line that matches counts."""
    is_sent = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not pattern or line.startswith("#"):
            continue
        parts = [path[: i or None] for i in (0, *(m.start() for m in re.finditer("/", path)))]
        if any(fnmatch.fnmatch(part, pattern) for part in parts):
            is_sent = line.startswith("!")
    assert not is_sent


def test_it_runs_as_nobody_in_particular() -> None:
    assert re.search(r"^USER 10001:10001$", FINAL, re.MULTILINE)
    assert "USER 0" not in DOCKERFILE
    assert re.search(r"^ENTRYPOINT \[\"/usr/bin/tini\"", FINAL, re.MULTILINE)


def test_requirements_of_the_extras(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"requirements\.py (pyproject\.toml .*) >", DOCKERFILE)
    _, *extras = line.split()
    assert print_requirements([str(REPOSITORY / "pyproject.toml"), *extras]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"torch", "diffusers", "starlette", "prometheus-client"} <= set(printed)
    assert "pytest" not in printed
    assert len(printed) == len(set(printed))


def test_the_command_line_takes_what_is_run() -> None:
    commands = [
        shlex.split(" ".join(re.findall(r'"([^"]+)"', line)))
        for line in DOCKERFILE.splitlines()
        if line.startswith("CMD")
    ]
    commands += [service["command"] for service in SERVICES.values()]
    assert len(commands) == 5
    for program, *arguments in commands:
        assert program == "diffusers-torchserve"
        make_parser().parse_args(arguments)


def test_services_may_do_little() -> None:
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "10001:10001"


def test_only_loopback_reaches_them() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports == ["127.0.0.1:${PORT:-8000}:8000"]


def test_volumes_of_services_are_declared() -> None:
    named = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            named.add("store" if isinstance(volume, dict) else volume.partition(":")[0])
    assert named == set(COMPOSE["volumes"])


def test_the_gateway_takes_its_settings() -> None:
    content = yaml.safe_load(COMPOSE["configs"]["gateway"]["content"])
    settings = Settings.from_mapping(content)
    assert settings.keys_required
    file = next(each for each in SERVICES["key"]["command"] if each.startswith("--file="))
    name = next(each for each in SERVICES["key"]["command"] if each.startswith("--name="))
    assert file == f"--file={settings.keys_file}"
    assert name == f"--name={settings.metrics_for}"


def test_both_in_one_container(tmp_path: Path) -> None:
    """The gateway is told to end first, and its end is waited for; then TorchServe."""
    _stand_in(tmp_path)
    process = _start_both(tmp_path)
    _until(lambda: _said(tmp_path) == ["gateway begins", "serve begins"])
    process.terminate()
    assert process.wait(20) == 0
    assert _told(tmp_path)[2:] == ["gateway ends", "serve ends"]


@pytest.mark.parametrize("dies", ["serve", "gateway"])
def test_one_that_dies_takes_the_other_with_it(tmp_path: Path, dies: str) -> None:
    _stand_in(tmp_path)
    process = _start_both(tmp_path)
    _until(lambda: _said(tmp_path) == ["gateway begins", "serve begins"])
    os.kill(int((tmp_path / f"{dies}.pid").read_text()), 9)
    assert process.wait(20) == 1
    (other,) = {"serve", "gateway"} - {dies}
    assert _told(tmp_path)[2:] == [f"{other} ends"]


def _stand_in(folder: Path) -> None:
    """A command of our command's name, which says what it is told."""
    program = folder / "diffusers-torchserve"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import os, signal, sys, time\n"
        f"folder, name = {str(folder)!r}, sys.argv[1]\n"
        "def say(what):\n"
        "    with open(f'{folder}/said', 'a') as file: file.write(f'{name} {what}\\n')\n"
        "def end(*_):\n"
        "    time.sleep(0.5); say('ends'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open(f'{folder}/{name}.pid', 'w').write(str(os.getpid()))\n"
        "say('begins')\n"
        "while True: time.sleep(0.05)\n"
    )
    program.chmod(0o755)


def _start_both(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen([str(DEPLOY / "serve-both"), "/store", "name"], env=environment)


def _until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def _said(folder: Path) -> list[str]:
    return sorted(_told(folder))


def _told(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().splitlines() if path.exists() else []
