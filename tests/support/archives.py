"""Pipelines on disk and zips of every kind, good and bad, for the tests of the archive toolkit."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

from tests.support.pipelines import build

_TEMPORARY = tempfile.gettempdir()  # now: tests redirect it
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


@functools.cache
def _saved(family: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="family-", dir=_TEMPORARY)
    build(family).save_pretrained(folder.name)
    return folder


def save_pipeline(folder: Path, family: str = "stable_diffusion") -> Path:
    """Save the tiny pipeline of `family` into the new folder `folder`."""
    shutil.copytree(_saved(family).name, folder)
    return folder


def save_in_hub_cache(cache: Path, revision: str = "abc123") -> Path:
    """Save a tiny pipeline as the hub's client caches org/name; return the snapshot."""
    root = cache / "models--org--name"
    blobs, snapshot = root / "blobs", root / "snapshots" / revision
    blobs.mkdir(parents=True)
    pipeline = Path(_saved("stable_diffusion").name)
    for number, path in enumerate(sorted(pipeline.rglob("*"))):
        if path.is_file():
            link = snapshot / path.relative_to(pipeline)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blobs / str(number))
            link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    return snapshot


def safetensors(size: int = 64) -> bytes:
    """A safetensors file with one tensor of `size` bytes."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + bytes(index % 251 for index in range(size))


def members(**changes: bytes) -> dict[str, bytes]:
    """The members of a small pipeline zip that opens."""
    return {
        "model_index.json": json.dumps(INDEX).encode(),
        "scheduler/scheduler_config.json": b"{}",
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": safetensors(),
        **changes,
    }


def write_model_zip(folder: Path, data: bytes) -> Path:
    """Put `data` where TorchServe's model_dir has model.zip; return the model_dir."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.zip").write_bytes(data)
    return folder
