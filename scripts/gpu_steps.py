"""The steps of `scripts.gpu_check` that are no program of their own: the machine, and a server."""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from scripts.console import DONE, FAILED, run_command
from scripts.errors import ServerError
from scripts.repository import REPOSITORY

__all__ = ["main", "readme_script"]

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "greenlet", "torchserve")
# Small and quick, for the dry run.
_QUICK = {"height": 256, "width": 256, "num_inference_steps": 4, "num_threads": 1}
_NUM_CLIENTS = 8


def readme_script(document: str, url: str) -> str:
    """Return all requests that `document` shows, as one script for the server at `url`."""
    blocks = re.findall(r"```bash\n(.*?)```", document, re.DOTALL)
    script = "\n".join(block for block in blocks if "curl " in block)
    return script.replace("http://127.0.0.1:8080", url)


def _machine(arguments: argparse.Namespace) -> int:
    """Write which chip, driver and versions there are; fail where the device does not compute."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "nvidia_smi": _nvidia_smi(),
        "chips": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    _write(arguments.folder / "machine.json", found)
    print(json.dumps(found, indent=2))
    if arguments.device == "cuda" and not found["chips"]:
        raise ServerError("torch finds no CUDA device here; --device cpu is a dry run")
    device = torch.device(arguments.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["memory_bytes"] = {"free": free, "total": total}
        found["capability"] = torch.cuda.get_device_capability(device)
    ones = torch.ones(256, 256, device=device, dtype=torch.float16)
    is_right = bool(((ones @ ones) == 256).all())
    _write(arguments.folder / "machine.json", {**found, "computes": is_right})
    print(*(found["chips"] or ["CPU"]), f"torch {torch.__version__}", sep=", ")
    return DONE if is_right else FAILED


def _server(arguments: argparse.Namespace) -> int:
    """Serve the demo on the device, send all requests of the README by curl, then eight at once."""
    from scripts.build_archive import main as build_archive
    from scripts.torchserve.options import Options, Ports
    from scripts.torchserve.process import TorchServer

    told: dict[str, Any] = {"device": arguments.device}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        config = yaml.safe_load((REPOSITORY / "config" / "model-config.yaml").read_text())
        quick = _QUICK if arguments.device == "cpu" else {}
        config["handler"] = {**config["handler"], "device": arguments.device, **quick}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        packing = [
            *("--pipeline", str(REPOSITORY / "demo" / "pipeline"), "--name", "stable_diffusion"),
            *("--out", str(folder), "--config", str(folder / "config.yaml"), "--no-check"),
        ]
        if build_archive(packing) != DONE:
            raise ServerError("the demo could not be packed")
        archive = folder / "stable_diffusion.mar"
        server = TorchServer(Options(archive, folder / "run", Ports.free()))
        started_s = time.monotonic()
        try:
            # How long that may take says the step's own limit.
            with server.running():
                told["ready_s"] = time.monotonic() - started_s
                told["readme"] = _ask_as_readme(server.url, folder, arguments.folder)
                told["images_per_s"] = _ask_at_once(server.predictions_url, folder)
        finally:
            log = server.log_file.read_text(errors="replace") if server.log_file.exists() else ""
            told["log"] = [line for line in log.splitlines() if " is ready on " in line]
            _write(arguments.folder / "server.json", told)
            print(log[-8000:])
    is_there = any(f"ready on {arguments.device}" in line for line in told["log"])
    if not is_there:
        raise ServerError(f"no worker was ready on {arguments.device}: {told['log']}")
    print(f"ready in {told['ready_s']:.1f} s, {told['images_per_s']:.2f} images/s")
    return DONE


def _ask_as_readme(url: str, folder: Path, results: Path) -> dict[str, int]:
    """Run the README's requests; return the bytes of what each wrote. Raises: ServerError."""
    script = readme_script((REPOSITORY / "README.md").read_text(), url)
    (folder / "demo").symlink_to(REPOSITORY / "demo")  # It sends pictures from there.
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise ServerError(f"the README's requests failed: {run.stderr.strip()[-400:]}")
    written = {}
    for output in re.findall(r"-o (\S+)", script):
        content = (folder / output).read_bytes()
        if output.endswith(".png"):
            if not content.startswith(b"\x89PNG"):
                raise ServerError(f"{output} is not a picture: {content[:200]!r}")
            (results / "picture.png").write_bytes(content)
        elif b"event: image" not in content and output.endswith("events.txt"):
            raise ServerError(f"{output} has no picture: {content[-200:]!r}")
        written[output] = len(content)
    if not written or '"invalid_request"' not in run.stdout:
        raise ServerError(f"the README's wrong request was not refused: {run.stdout[-400:]}")
    return written


def _ask_at_once(url: str, folder: Path) -> float:
    """Draw one picture for each of eight clients at once; return pictures a second."""

    def ask(seed: int) -> int:
        output = folder / f"at-once-{seed}.png"
        fields = json.dumps({"prompt": "a large red heart on a cyan background", "seed": seed})
        command = [
            *("curl", "-sS", "--noproxy", "*", "-o", str(output), "-w", "%{http_code}"),
            *("-H", "Content-Type: application/json", "-d", fields, url),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(run.stdout)

    started_s = time.monotonic()
    with ThreadPoolExecutor(_NUM_CLIENTS) as pool:
        statuses = list(pool.map(ask, range(_NUM_CLIENTS)))
    if set(statuses) != {200}:
        raise ServerError(f"eight at once were answered {statuses}")
    return _NUM_CLIENTS / (time.monotonic() - started_s)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> list[str]:
    fields = "name,driver_version,memory.total,memory.used"
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return asked.stdout.strip().splitlines()


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; return 0 done, 1 failed, 2 misused."""
    parser = argparse.ArgumentParser(prog="gpu_steps", description=__doc__)
    parser.add_argument("step", choices=("machine", "server"))
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--folder", type=Path, required=True, help="of results")
    steps = {"machine": _machine, "server": _server}
    return run_command(parser, lambda arguments: steps[arguments.step](arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
