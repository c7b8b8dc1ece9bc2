"""A real TorchServe with the embedded pipeline, at a size that is quick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from scripts.build_archive import main as build_archive
from scripts.repository import REPOSITORY
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer

MODEL = "stable_diffusion"
# Small and few, so that a request takes milliseconds; one thread, so that tests share the machine.
# A request may have many steps, so that one can be made to last longer than any test.
QUICK = {
    "num_inference_steps": 4,
    "max_num_inference_steps": 1000,
    "height": 256,
    "width": 256,
    "num_threads": 1,
}


def build_quick_archive(folder: Path, overrides: Mapping[str, object], archive_format: str) -> Path:
    """Pack the embedded pipeline with the shipped configuration, less what `overrides` changes."""
    config = yaml.safe_load((REPOSITORY / "config" / "model-config.yaml").read_text())
    config["handler"] = {**config["handler"], **QUICK, **overrides}
    (folder / "model-config.yaml").write_text(yaml.safe_dump(config))
    arguments = [
        *("--pipeline", str(REPOSITORY / "demo" / "pipeline"), "--name", MODEL),
        *("--version", "1.0", "--out", str(folder)),
        *("--config", str(folder / "model-config.yaml"), "--format", archive_format),
    ]
    assert build_archive(arguments) == 0
    return folder / (f"{MODEL}.mar" if archive_format == "mar" else MODEL)


def serve(folder: Path, archive_format: str = "mar", **overrides: object) -> Iterator[TorchServer]:
    """Serve the embedded pipeline inside `folder`; the handler's settings are `overrides`."""
    archive = build_quick_archive(folder, overrides, archive_format)
    server = TorchServer(Options(archive, folder / "run", Ports.free()))
    with server.running(timeout_s=120):
        yield server
