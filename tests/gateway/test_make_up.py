"""`make up`, `make down` and `make key`, as a person uses them."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI

from scripts.gateway_process import GatewayOptions, GatewayProcess
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from scripts.up import UP
from tests.support.gateways import free_port
from tests.support.makes import linked_clone, linked_environment, make
from tests.support.ports import free_ports

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[str]]:
    """Arguments that keep a make within `tmp_path`, and ports of its own."""
    virtual = linked_environment(tmp_path)
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


def test_the_port_is_that_of_its_settings_unless_it_is_given(places: list[str]) -> None:
    others = [each for each in places if not each.startswith("GATEWAY_PORT=")]
    assert "--gateway-port" not in make("-n", "up", *others).stdout
    assert "--gateway-port 8001" in make("-n", "up", *others, "GATEWAY_PORT=8001").stdout
    assert UP.parse([]).gateway_port is None


def test_clean_takes_nothing_of_others(tmp_path: Path, places: list[str]) -> None:
    clone = linked_clone(tmp_path)
    for name, line in (("ours", "INFO gateway listens at http://127.0.0.1:8000"), ("home", "mine")):
        folder = tmp_path / name
        (folder / "pictures").mkdir(parents=True)
        (folder / "gateway.log").write_text(f"2026-01-01 00:00:00 {line}\n")
        (folder / "jobs.sqlite").touch()
        cleaned = make("clean", *places, f"GATEWAY_DIR={folder}", folder=clone)
        assert cleaned.returncode == 0, cleaned.stderr
    left = {
        name: sorted(each.name for each in (tmp_path / name).iterdir()) for name in ("ours", "home")
    }
    assert left == {"ours": ["jobs.sqlite"], "home": ["gateway.log", "jobs.sqlite", "pictures"]}


# As a command does, the test lets go of what it has started.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_large_log_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(f"port: {free_port()}\nrun_dirs: [none]\n")
    options = GatewayOptions(tmp_path / "state", tmp_path / "gateway.yaml")
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "gateway.log").open("wb") as log:
        log.truncate(65 * 1024**2)
    started = GatewayProcess.start(options)
    found = GatewayProcess.find(options.state_dir)
    assert found is not None
    assert found.url == started.url
    found.stop(10)
    started.stop(10)  # it has gone already
    assert GatewayProcess.find(options.state_dir) is None
    assert (tmp_path / "state" / "gateway.log.1").stat().st_size == 65 * 1024**2
    assert (tmp_path / "state" / "gateway.log").stat().st_size < 10_000


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
