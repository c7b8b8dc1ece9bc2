"""LoRAs named by clients of a real TorchServe: two at the same time, each as if alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from scripts.repository import REPOSITORY
from tests.support.client import pixels, post_json
from tests.support.loras import kohya_lora
from tests.support.serving import serve

NAMES = ("ink", "wool")
BOUND = 1
"""Of 255: a value next to a rounding edge."""
FIELDS: dict[str, Any] = {"num_inference_steps": 6, "height": 128, "width": 128}


def load() -> Any:
    pipeline = DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora(pipeline: Any, name: str) -> dict[str, torch.Tensor]:
    seed, ends = NAMES.index(name), ("to_q", "to_v", "to_out.0", "proj_in", "conv1")
    return kohya_lora({"lora_unet": pipeline.unet}, seed=seed, alpha=2.0, std=0.2, ends=ends)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, with two LoRAs in a folder."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = load()
    for name in NAMES:
        save_file(lora(pipeline, name), folder / f"{name}.safetensors")
    for server in serve(tmp_path_factory.mktemp("server"), lora_dir=str(folder)):
        yield server.predictions_url


def alone(loras: dict[str, float]) -> Any:
    """What diffusers draws with these loaded and active, and nothing of ours."""
    pipeline = load()
    files = {name: lora(pipeline, name) for name in loras}
    for name, tensors in files.items():
        pipeline.load_lora_weights(tensors, adapter_name=name)
    if loras:
        pipeline.set_adapters(list(loras), list(loras.values()))
    generator = torch.Generator().manual_seed(3)
    image = pipeline("a red ring", guidance_scale=7.5, generator=generator, **FIELDS).images[0]
    return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_requests_of_different_loras_at_the_same_time_are_each_as_alone(url: str) -> None:
    sets: list[dict[str, float]] = [{"ink": 1.0}, {"wool": 0.7}, {}, {"ink": 0.4, "wool": -0.5}]
    bodies = [{"prompt": "a red ring", "seed": 3, "loras": each, **FIELDS} for each in sets]
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: post_json(url, body), bodies))
    assert [answer.status for answer in answers] == [200] * len(bodies)
    expected = [alone(each) for each in sets]
    for answer, picture in zip(answers, expected, strict=True):
        assert np.abs(pixels(answer.body).astype(np.int16) - picture).max() <= BOUND
    for place, picture in enumerate(expected):
        for other in expected[:place]:
            assert np.abs(picture - other).max() > 20


def test_an_unknown_name_is_told_which_there_are(url: str) -> None:
    answer = post_json(url, {"prompt": "a red ring", "lora": "silk"})
    assert answer.status == 400
    assert "there are ink, wool" in answer.error()["fields"]["loras"]
