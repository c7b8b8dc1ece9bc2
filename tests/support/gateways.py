"""A gateway of its own, as a process, in front of instances of a test."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from scripts.repository import REPOSITORY

__all__ = ["RunningGateway", "free_port", "running_gateway"]

_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """Where it listens, and what it was started with."""

    url: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "gateway.log").read_text("utf-8", "replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_gateway(
    folder: Path, run_dirs: Sequence[Path], *, wait: bool = True, **settings: object
) -> Iterator[RunningGateway]:
    """Run one inside the block; READY when it begins where `wait`, else alive."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "port": port,
        "run_dirs": [str(each) for each in run_dirs],
        "keys_file": str(folder / "keys"),
        "poll_s": 0.1,
        **settings,
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(content))
    arguments = ["--config", str(folder / "gateway.yaml"), "--state-dir", str(folder / "state")]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", *arguments],
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    gateway = RunningGateway(f"http://127.0.0.1:{port}", port, folder, process)
    try:
        _wait_for(f"{gateway.url}/{'readyz' if wait else 'healthz'}", process, folder)
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    until_s = time.monotonic() + _START_TIMEOUT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: object = None
    while time.monotonic() < until_s:
        assert process.poll() is None, (folder / "gateway.log").read_text()
        try:
            with opener.open(url, timeout=5) as reply:
                json.loads(reply.read())
                return
        except urllib.error.HTTPError as error:
            answer = error.code
            error.close()
        except OSError as error:
            answer = error
        time.sleep(0.05)
    raise AssertionError(f"{url}: {answer}: {(folder / 'gateway.log').read_text()}")
