"""The servers of `benchmarks.peers`: how each is installed, started, asked and stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.peer_requests import SIDES_PX
from benchmarks.systems import one_at_a_time, ours
from scripts.torchserve.options import Ports

__all__ = [
    "NUM_CLIENTS",
    "PEERS",
    "PIPELINE",
    "PRECISIONS",
    "SERVERS",
    "Asked",
    "Peer",
    "PeerError",
    "Serving",
    "install",
    "slug",
]

PIPELINE = Path("demo/pipeline").resolve()
SERVERS = Path(__file__).parent / "peer_servers"
INSTALL_S = 900.0
READY_S = 180.0
NUM_CLIENTS = 12
"""Who are always there; ours lets as many draw at once, with two rows each."""
PRECISIONS = ("float32", "bfloat16")
_STOP_S = 20.0


class PeerError(Exception):
    """A peer cannot be installed or started; the message says what it said."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a server takes it."""

    path: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that answers, and where."""

    url: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that draws pictures, as its own users run it."""

    name: str
    ask: Callable[[Mapping[str, Any]], Asked]
    """From a request's fields, by the names of diffusers' arguments, beside `seed`."""
    requirements: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    """After its own Python; words in braces stand for the pipeline, the port, the precision."""
    start: Callable[[str, Path, Path], Any] | None = None
    """In place of `command`: a context of a TorchServe, by `_ours` or `_upstream`."""
    precision: str = "float32"
    """What it computes in; ours, where this is bfloat16, has `speed: max`."""

    @property
    def title(self) -> str:
        """Its name, and what it computes in."""
        return f"{self.name} in {self.precision}"

    @contextmanager
    def serving(self, environments: Path, folder: Path) -> Iterator[Serving]:
        """It answers inside the block, and is stopped after it. Raises: PeerError."""
        if self.start is not None:
            with self.start(self.precision, folder, environments) as server:
                yield Serving(server.predictions_url)
            return
        port = Ports.free().inference
        words = {
            "pipeline": str(PIPELINE),
            "port": str(port),
            "precision": self.precision,
            "servers": str(SERVERS),
        }
        python = environment(environments, self) / "bin" / "python"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [str(python), *(word.format(**words) for word in self.command)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
            try:
                _wait(process, f"http://127.0.0.1:{port}/health", folder / "log.txt")
                yield Serving(f"http://127.0.0.1:{port}")
            finally:
                _stop(process)


def environment(environments: Path, peer: Peer) -> Path:
    """The folder of a peer's virtual environment."""
    return environments / slug(peer.name)


def slug(name: str) -> str:
    """`name` as a part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def install(peer: Peer, environments: Path) -> None:
    """Make a virtual environment for `peer`: its own packages beside the libraries of this one.

    So all servers compute with the same torch and diffusers. Does nothing where it was made before.

    Raises:
        PeerError: a package is not to be had.
    """
    if not peer.requirements:
        return
    folder = environment(environments, peer)
    is_done = folder / "installed"
    if is_done.exists() and is_done.read_text().split() == list(peer.requirements):
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (shared,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(f"{shared}\n")
    pip = [str(folder / "bin" / "pip"), "install", "-q", *peer.requirements]
    try:
        run = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"pip was not done after {INSTALL_S:g} s") from error
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerError((lines or run.stderr.strip().splitlines() or ["pip failed"])[-1])
    is_done.write_text(" ".join(peer.requirements))


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    ends_s = time.monotonic() + READY_S
    while time.monotonic() < ends_s:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise PeerError(f"it ended: {lines[-1] if lines else process.returncode}")
        with suppress(httpx2.HTTPError):
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.3)
    raise PeerError(f"it did not answer {url} in {READY_S:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """By asking first; then all that it started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _ours(precision: str, folder: Path, environments: Path) -> Iterator[Any]:
    """Our handler as it is shipped, or at its fastest: then compiled code is kept."""
    settings: dict[str, object] = {"max_rows": 2 * NUM_CLIENTS}
    if precision == "bfloat16":
        settings["speed"] = "max"
        settings["warm_up_sizes"] = [f"{side}x{side}" for side in SIDES_PX]
    system = ours("ours", PIPELINE, folder, settings)
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(environments / "compiled")}
    with system.serving(folder / "run", compiled) as server:
        yield server


@contextmanager
def _upstream(precision: str, folder: Path, _: Path) -> Iterator[Any]:
    """The way of TorchServe's example."""
    settings = {"dtype": precision}
    system = one_at_a_time("example", PIPELINE, folder, num_workers=1, settings=settings)
    with system.serving(folder / "run") as server:
        yield server


def _plain(path: str) -> Callable[[Mapping[str, Any]], Asked]:
    """The fields as they are."""
    return lambda fields: Asked(path, dict(fields), {})


def _example(fields: Mapping[str, Any]) -> Asked:
    """The example's handler has its own names and no defaults."""
    body = {
        "prompt": fields["prompt"],
        "steps": fields.get("num_inference_steps", 50),
        "guidance": fields.get("guidance_scale", 7.5),
        "height": fields.get("height", 768),
        "width": fields.get("width", 768),
        "seed": fields.get("seed", 0),
    }
    return Asked("", {**fields, **body}, {})


def _hugging_face(fields: Mapping[str, Any]) -> Asked:
    parameters = {name: value for name, value in fields.items() if name != "prompt"}
    body = {"inputs": fields["prompt"], "parameters": parameters}
    return Asked("/predict", body, {"Accept": "image/png"})


def _server(script: str) -> tuple[str, ...]:
    return (f"{{servers}}/{script}", "{pipeline}", "{port}", "{precision}")


_PEERS: Sequence[Peer] = (
    Peer("ours", _plain(""), start=_ours),
    Peer("TorchServe's example", _example, start=_upstream),
    Peer(
        "hf-serve",
        _hugging_face,
        ("hf-serve==0.2.0",),
        (
            *("-c", "from hf_serve.cli import main; main()"),
            *("--model-dir", "{pipeline}", "--task", "text-to-image"),
            *("--device", "cpu", "--dtype", "{precision}"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
    ),
    Peer(
        "LitServe",
        _plain("/predict"),
        ("litserve==0.2.19",),
        _server("litserve_batching.py"),
    ),
    Peer(
        "diffusers' server-async",
        _plain("/predict"),
        ("starlette", "uvicorn"),
        _server("request_scoped.py"),
    ),
    Peer(
        "Ray Serve",
        _plain("/predict"),
        ("ray[serve]==2.60.0",),
        _server("ray_batching.py"),
    ),
)
PEERS = tuple(replace(peer, precision=each) for each in PRECISIONS for peer in _PEERS)
"""Each server in both precisions; of each precision ours is the first."""
