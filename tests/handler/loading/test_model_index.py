"""handler.loading.model_index: what a model_index.json may name, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from handler.loading.model_index import MAX_MODEL_INDEX_BYTES, ModelIndex
from tests.support.archives import INDEX


def parse(**changes: object) -> ModelIndex:
    return ModelIndex.parse(json.dumps({**INDEX, **changes}).encode(), "test")


def test_names_the_pipelines_class_and_those_of_its_components() -> None:
    index = parse(safety_checker=[None, None], requires_safety_checker=True)
    assert index.class_name == "StableDiffusionPipeline"
    assert index.components == {
        "scheduler": ("diffusers", "DDIMScheduler"),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    assert index.entries["requires_safety_checker"] is True
    assert index.entries.keys() == {*INDEX, "safety_checker", "requires_safety_checker"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "test: model_index.json is not JSON"),
        (b"[" * 100_000, "test: model_index.json is not JSON"),
        (b'{"_class_name": NaN}', "NaN is not a number there"),
        (b"[]", "test: model_index.json does not hold a JSON object"),
        (b"{}", "_class_name is null: the name of a diffusers pipeline is wanted"),
        (b" " * (MAX_MODEL_INDEX_BYTES + 1), "it may have 1048576"),
    ],
)
def test_refuses_what_is_no_index(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "model_index.json").write_bytes(data)
    for read in (
        lambda: ModelIndex.parse(data, "test"),
        lambda: ModelIndex.read(tmp_path / "model_index.json", "test"),
    ):
        with pytest.raises(ArchiveError) as caught:
            read()
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        *(["os", "system"], ["subprocess", "Popen"], ["diffusers.utils", "x"], ["diffusers"]),
        *(["torch.nn", "Linear"], ["diffusers", "a.b"], ["transformers", "__import__"], [1, 2]),
        *(["..", "x"], ["pipeline", "Custom"], ["auto_pipeline", "x"], ["diffusers", None], []),
    ],
)
def test_refuses_classes_of_other_libraries(value: list[object]) -> None:
    with pytest.raises(ArchiveError, match="only classes of diffusers and transformers load"):
        parse(vae=value)


@pytest.mark.parametrize("name", ["../unet", "a/b", "", "vae.x"])
def test_refuses_components_whose_names_are_paths(name: str) -> None:
    with pytest.raises(ArchiveError, match="only classes of diffusers and transformers load"):
        parse(**{name: ["diffusers", "AutoencoderKL"]})


@pytest.mark.parametrize(
    "value",
    [
        ["diffusers", "AutoencoderKL"],
        ["transformers", "CLIPTextModel"],
        ["stable_diffusion", "StableDiffusionSafetyChecker"],
    ],
)
def test_accepts_classes_of_known_libraries(value: list[str]) -> None:
    assert parse(vae=value).components["vae"] == tuple(value)


def test_a_list_of_numbers_is_an_option() -> None:
    """Krea 2 says which layers of its text encoder it reads."""
    index = parse(text_encoder_select_layers=[2, 5, 8])
    assert "text_encoder_select_layers" not in index.components
    assert index.entries["text_encoder_select_layers"] == [2, 5, 8]


def test_names_every_wrong_class() -> None:
    with pytest.raises(ArchiveError) as caught:
        parse(vae=["os", "a"], other=["sys", "b"], _class_name=["p", "C"])
    assert all(word in str(caught.value) for word in ("vae", "other", "_class_name"))


def test_replaced_components_are_checked_and_written_down() -> None:
    index = parse()
    changed = index.replace({"unet": ("diffusers", "Transformer2DModel")}, "test")
    assert changed.components["unet"] == ("diffusers", "Transformer2DModel")
    assert index.components["unet"] == ("diffusers", "UNet2DConditionModel")
    assert ModelIndex.parse(changed.dump(), "test") == changed
    with pytest.raises(ArchiveError, match=r"test: model_index\.json is refused: unet"):
        index.replace({"unet": ("os", "system")}, "test")
