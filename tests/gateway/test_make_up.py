"""`make up`, `make down` and `make key`, as a person uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from scripts.gateway_process import GatewayProcess
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.gateways import free_port
from tests.support.ports import free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[str]]:
    """Arguments that keep a make within `tmp_path`, and ports of its own."""
    virtual = tmp_path / "venv"
    virtual.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (virtual / name).symlink_to(Path(sys.prefix) / name)
    (virtual / ".installed").touch()
    http, grpc = free_ports()
    yield [
        *(f"VENV={virtual}", f"STORE={tmp_path / 'a store'}", f"RUN_DIR={tmp_path / 'a run'}"),
        *(f"PORT={http}", f"GRPC_PORT={grpc}", f"GATEWAY_PORT={free_port()}"),
    ]
    if (gateway := GatewayProcess.find(tmp_path / "a run-gateway")) is not None:
        gateway.stop(10)
    if (server := TorchServer.find(tmp_path / "a run")) is not None:
        server.stop()


def test_up_and_down(tmp_path: Path, places: list[str]) -> None:
    first = make("up", *places)
    assert first.returncode == 0, first.stderr
    gateway = GatewayProcess.find(tmp_path / "a run-gateway")
    server = TorchServer.find(tmp_path / "a run")
    assert gateway is not None
    assert server is not None
    assert f"The gateway answers at {gateway.url}" in first.stdout
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        fields = {"num_inference_steps": 2}
        reply = client.images.generate(prompt="a red ring", size="64x64", extra_body=fields)
    assert reply.data is not None

    second = make("up", *places)
    assert second.returncode == 0, second.stderr
    assert "is already there" in second.stdout
    again = GatewayProcess.find(tmp_path / "a run-gateway")
    assert again is not None
    assert again.pid == gateway.pid

    command = second.stdout.split("\n\n")[1]
    drawn = subprocess.run(["bash", "-euc", f"{command} -sS"], capture_output=True, check=True)
    url = json.loads(drawn.stdout)["data"][0]["url"]
    with urllib.request.urlopen(url) as picture:
        assert picture.read().startswith(b"\x89PNG")

    down = make("down", *places)
    assert down.returncode == 0, down.stderr
    assert GatewayProcess.find(tmp_path / "a run-gateway") is None
    assert server.pid is None


def test_a_key_is_shown_once(tmp_path: Path, places: list[str]) -> None:
    file = tmp_path / "keys"
    limits = f"ARGS=--file {file} --max-steps 50 --models toy"
    made = make("key", "NAME=somebody", limits, *places)
    assert made.returncode == 0, made.stderr
    secret = made.stdout.strip()
    assert secret.startswith("dts-")
    kept = file.read_text()
    assert secret not in kept
    assert yaml.safe_load(kept)["somebody"]["max_steps"] == 50
    assert file.stat().st_mode & 0o777 == 0o600
    again = make("key", "NAME=somebody", limits, *places)
    assert again.returncode != 0
    assert "has a key somebody already" in again.stderr
    assert file.read_text() == kept


def test_another_address_needs_a_key(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(f"keys_file: {tmp_path / 'keys'}\n")
    arguments = ["--config", str(tmp_path / "gateway.yaml"), "--address", "0.0.0.0"]
    run = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments, "--state-dir", str(tmp_path / "state")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert "make key NAME=" in run.stderr
