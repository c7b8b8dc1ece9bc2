"""handler.loading.pipeline_class: components that may be left out, and classes by old names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from handler.config import HandlerConfig
from handler.errors import ArchiveError
from handler.loading.model_index import ModelIndex
from handler.loading.pipeline import load_pipeline
from handler.loading.pipeline_class import pipeline_class
from scripts.zip_weights import zip_pipeline
from tests.support.archives import INDEX, save_pipeline
from tests.support.layouts import (
    after_ip_adapter,
    edit_index,
    with_old_feature_extractor,
    without_third_encoder,
)
from tests.support.model_dirs import refusal, with_index
from tests.support.pipelines import example_kwargs


def load(folder: Path) -> Any:
    """Load the pipeline in `folder` as a worker does, from a zip."""
    model_dir = folder.parent / "m"
    zip_pipeline(folder, model_dir / "model.zip")
    return load_pipeline(model_dir, HandlerConfig(), None).pipeline


def without_safety_checker(folder: Path) -> Path:
    save_pipeline(folder)
    nothing = [None, None]
    return edit_index(folder, safety_checker=nothing, feature_extractor=nothing)


def without_what_is_optional(folder: Path) -> Path:
    return edit_index(
        save_pipeline(folder), safety_checker=None, feature_extractor=None, image_encoder=None
    )


@pytest.mark.parametrize(
    ("layout", "family", "present", "absent"),
    [
        (after_ip_adapter, "stable_diffusion", ["image_encoder"], ["safety_checker"]),
        (without_safety_checker, "stable_diffusion", ["unet"], ["safety_checker"]),
        (without_what_is_optional, "stable_diffusion", ["unet"], ["feature_extractor"]),
        (with_old_feature_extractor, "stable_diffusion", ["feature_extractor"], ["image_encoder"]),
        (without_third_encoder, "stable_diffusion_3", ["text_encoder_2"], ["text_encoder_3"]),
    ],
)
def test_what_is_optional_loads_and_draws(
    tmp_path: Path,
    layout: Callable[[Path], Path],
    family: str,
    present: list[str],
    absent: list[str],
) -> None:
    pipeline = load(layout(tmp_path / "pipeline"))
    components = pipeline.components
    assert all(components[name] is not None for name in present)
    assert all(components[name] is None for name in absent)
    images = pipeline(**{**example_kwargs(family, 0), "num_inference_steps": 2}).images
    assert np.isfinite(images).all()


def test_a_renamed_class_is_what_it_is_called_now(tmp_path: Path) -> None:
    pipeline = load(with_old_feature_extractor(tmp_path / "pipeline"))
    assert isinstance(pipeline.feature_extractor, transformers.CLIPImageProcessorPil)
    assert pipeline.feature_extractor.crop_size["height"] == 32


def test_a_class_that_is_gone_names_who_saved_it_and_the_way_out(tmp_path: Path) -> None:
    model_dir = with_index(
        tmp_path, unet=["transformers", "ViTFeatureExtractor"], _diffusers_version="0.19.0"
    )
    assert refusal(model_dir) == (
        f"unet: transformers {transformers.__version__} has no ViTFeatureExtractor in transformers"
        "; the pipeline was saved by diffusers 0.19.0: save it again with the installed one"
    )


@pytest.mark.parametrize("name", ["vae", "unet", "scheduler"])
def test_what_no_pipeline_draws_without_may_not_be_null(tmp_path: Path, name: str) -> None:
    message = refusal(with_index(tmp_path, **{name: [None, None]}))
    assert message.endswith(f"needs components that the pipeline lacks: {name}")


def test_what_needs_a_package_that_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else name)
    data = {**INDEX, "_class_name": "OnnxStableDiffusionPipeline"}
    index = ModelIndex("OnnxStableDiffusionPipeline", {}, data)
    with pytest.raises(ArchiveError, match="needs onnx, which is not installed"):
        pipeline_class(index)
