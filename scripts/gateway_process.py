"""A gateway that runs in the background: start it, wait until it answers, find it, stop it."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from scripts.background import BackgroundProcess, last_lines
from scripts.errors import ServerError
from scripts.hints import to_run
from scripts.repository import REPOSITORY

__all__ = [
    "DEFAULT_CONFIG",
    "GatewayOptions",
    "GatewayProcess",
    "answers",
    "command_line",
    "environment",
]

DEFAULT_CONFIG = REPOSITORY / "config" / "gateway.yaml"
_START_TIMEOUT_S = 60.0
_POLL_S = 0.05
# In a line of text or of JSON.
_LISTENS = re.compile(r"listens at (https?://[^\s\"]+)")


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What one gateway runs with; None is what its configuration says."""

    state_dir: Path
    config: Path = DEFAULT_CONFIG
    address: str | None = None
    port: int | None = None
    run_dirs: tuple[Path, ...] = ()
    """Of its instances; none: those that its configuration names."""

    def fingerprint(self) -> str:
        """Return a digest of all that a running gateway depends on."""
        settings = {name: str(value) for name, value in asdict(self).items()}
        text = json.dumps([settings, self.config.read_text()])
        return hashlib.sha256(text.encode()).hexdigest()


def command_line(options: GatewayOptions) -> list[str]:
    """Return the command that runs a gateway. Raises: ServerError, where it is not installed."""
    missing = [
        name
        for name in ("aiohttp", "httptools", "python_multipart", "starlette", "uvicorn")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ServerError(
            f"the gateway needs {', '.join(missing)}: pip install 'diffusers-torchserve[gateway]'"
        )
    given = {
        "--config": options.config,
        "--state-dir": options.state_dir,
        "--address": options.address,
        "--port": options.port,
    }
    arguments = [
        word for name, value in given.items() if value is not None for word in (name, str(value))
    ]
    for run_dir in options.run_dirs:
        arguments += ["--run-dir", str(run_dir)]
    return [sys.executable, "-m", "gateway", *arguments]


def environment() -> dict[str, str]:
    """Return the environment in which that command finds its package, from any folder."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class GatewayProcess(BackgroundProcess):
    """One gateway in the background, by its state folder."""

    name = "gateway"

    @classmethod
    def start(cls, options: GatewayOptions) -> GatewayProcess:
        """Start one and return when it answers. Raises: ServerError; nothing is left then."""
        command = command_line(options)
        options.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls.launch(
            command,
            environment(),
            options.state_dir,
            _wait_until_it_answers,
            started_as=options.fingerprint(),
        )


def _wait_until_it_answers(
    launched: subprocess.Popen[bytes], log_file: Path, log_begins_at: int
) -> str:
    """Return its URL, which it logs; whether anything can be drawn is not asked."""
    until_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until_s:
        with log_file.open("rb") as log:
            log.seek(log_begins_at)
            said = log.read().decode("utf-8", "replace")
        if launched.poll() is not None:
            raise ServerError("the gateway did not start", last_lines(log_file, log_begins_at))
        listens = _LISTENS.search(said)
        if listens is not None and answers(listens[1]):
            return listens[1]
        time.sleep(_POLL_S)
    raise ServerError(f"the gateway did not answer; {log_file} says more, then `{to_run('up')}`")


def answers(url: str) -> bool:
    """Whether a gateway answers at `url`."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
