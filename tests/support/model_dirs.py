"""Folders as TorchServe leaves them to a worker, and what is loaded of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler.config import HandlerConfig
from handler.errors import ArchiveError
from handler.loading.pipeline import load_pipeline
from scripts.zip_weights import zip_pipeline
from tests.support.archives import save_pipeline


def packed(tmp_path: Path, family: str = "stable_diffusion") -> Path:
    """Pack `family` as TorchServe would have it: a model_dir with a model.zip."""
    pipeline = save_pipeline(tmp_path / "pipeline", family)
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


def with_weights(tmp_path: Path, component: str, changes: dict[str, str | None]) -> Path:
    """Pack Stable Diffusion with weights of `component` renamed, or removed."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = next((pipeline / component).glob("*.safetensors"))
    weights = load_file(path)
    for name, changed in changes.items():
        tensor = weights.pop(name)
        if changed is not None:
            weights[changed] = tensor
    save_file(weights, path, metadata={"format": "pt"})
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


def with_index(tmp_path: Path, **changes: object) -> Path:
    """Pack Stable Diffusion with other entries in its model_index.json."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    index = json.loads((pipeline / "model_index.json").read_bytes())
    (pipeline / "model_index.json").write_text(json.dumps({**index, **changes}))
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


def refusal(model_dir: Path) -> str:
    """Return what is said of a pipeline that must not load."""
    with pytest.raises(ArchiveError) as caught:
        load_pipeline(model_dir, HandlerConfig(), None)
    return str(caught.value)


def tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a pipeline, by component and name."""
    return {
        f"{component}.{name}": tensor
        for component, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for source in (module.named_parameters(), module.named_buffers())
        for name, tensor in source
    }
