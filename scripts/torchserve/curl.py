"""Requests to a running server with curl: a line for people to paste, and one that is run."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.errors import ServerError
from scripts.torchserve.process import TorchServer

__all__ = ["Answer", "curl_line", "post"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl got."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def curl_line(server: TorchServer, fields: dict[str, object], output: str) -> str:
    """Return a command that draws a picture, ready to be pasted into a shell.

    It says whether it got one: an error's JSON would otherwise lie unseen in `output`.
    """
    token = server.token()
    key = f"-H 'Authorization: Bearer {token}' " if token else ""
    return (
        f"curl -sS -w '%{{http_code}} %{{content_type}}\\n' {server.predictions_url} {key}\\\n"
        f"    -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(json.dumps(fields))} -o {shlex.quote(output)}"
    )


def post(server: TorchServer, fields: dict[str, object]) -> Answer:
    """Post `fields` as JSON to the server's model with curl. Raises: ServerError."""
    token = server.token()
    with tempfile.TemporaryDirectory() as folder:
        headers_file, body_file = Path(folder, "headers"), Path(folder, "body")
        try:
            run = subprocess.run(
                [
                    *("curl", "-sS", "--noproxy", "*", server.predictions_url),
                    *("-H", "Content-Type: application/json", "-d", json.dumps(fields)),
                    *(("-H", f"Authorization: Bearer {token}") if token else ()),
                    *("-D", str(headers_file), "-o", str(body_file), "-w", "%{http_code}"),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise ServerError("curl is not installed; any HTTP client will do") from None
        if run.returncode != 0:
            raise ServerError(run.stderr.strip())
        lines = headers_file.read_text("latin-1").splitlines()
        pairs = [line.split(": ", 1) for line in lines if ": " in line]
        body = body_file.read_bytes() if body_file.exists() else b""
        return Answer(int(run.stdout), {name.lower(): value for name, value in pairs}, body)
