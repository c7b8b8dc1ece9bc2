"""What a second instance costs in memory and on the disk: archives as a file and as a folder.

    python -m benchmarks.fleet_memory              # about five minutes on two cores

The embedded pipeline with a denoiser of random weights as large as is asked for, in two supervised
instances on the CPU. Each draws a picture, so that all weights have been read; then the memory of
their workers is read: what is shared counts by its share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel

from benchmarks.fleet import NAME, PIPELINE, fleet
from benchmarks.report import Figure, Spread, write_report
from scripts import build_archive
from scripts.torchserve.process import TorchServer

__all__ = ["main", "write_large_pipeline"]


def write_large_pipeline(folder: Path, megabytes: int) -> float:
    """Copy the embedded pipeline, with a wider denoiser; return the megabytes of its weights."""
    shutil.copytree(PIPELINE, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    shutil.rmtree(folder / "unet")
    first = config["block_out_channels"]
    unet, scale = UNet2DConditionModel(**config), 1
    while _megabytes(unet) < megabytes:
        scale += 1
        unet = UNet2DConditionModel(
            **{**config, "block_out_channels": [scale * each for each in first]}
        )
    unet.save_pretrained(folder / "unet")
    return _megabytes(unet)


def _megabytes(module: torch.nn.Module) -> float:
    return sum(each.numel() * each.element_size() for each in module.parameters()) / 1e6


def _draw(server: TorchServer) -> None:
    fields = {"prompt": "a ring", "num_inference_steps": 1, "width": 64, "height": 64}
    request = urllib.request.Request(server.predictions_url, json.dumps(fields).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=600) as reply:
        reply.read()


def _worker(server: TorchServer) -> psutil.Process:
    model = server.model()
    assert model is not None
    return psutil.Process(model.ready_pids[0])


def _disk_mb(folder: Path) -> float:
    return sum(each.lstat().st_blocks * 512 for each in folder.rglob("*")) / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both formats; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the denoiser's weights")
    options = parser.parse_args(argv)
    figures: list[Figure] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        size = write_large_pipeline(folder / "pipeline", options.megabytes)
        figures.append(Figure("weights of the denoiser", Spread((size,)), "MB"))
        for kind in ("mar", "dir"):
            figures += _measure(folder, kind)
    write_report("fleet_memory", figures, {"load_average": os.getloadavg()})
    return 0


def _measure(folder: Path, kind: str) -> list[Figure]:
    store, run_dir = folder / f"store-{kind}", folder / f"run-{kind}"
    store.mkdir()
    arguments = ["--pipeline", str(folder / "pipeline"), "--name", NAME, "--out", str(store)]
    if build_archive.main([*arguments, "--format", kind]):
        raise RuntimeError("cannot pack the pipeline")
    with fleet(store, run_dir) as servers:
        for each in servers:
            _draw(each)
        memory = [_worker(each).memory_full_info() for each in servers]
        disk_mb = _disk_mb(run_dir)
    shutil.rmtree(store)
    return [
        Figure(f"{kind}: workers together", Spread((sum(m.pss for m in memory) / 1e6,)), "MB"),
        Figure(f"{kind}: one worker, alone its own", *_own(memory)),
        Figure(f"{kind}: unpacked on the disk", Spread((disk_mb,)), "MB"),
    ]


def _own(memory: Sequence[Any]) -> tuple[Spread, str]:
    return Spread(tuple(each.uss / 1e6 for each in memory)), "MB"


if __name__ == "__main__":
    raise SystemExit(main())
