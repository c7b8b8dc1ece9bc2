"""scripts.archive.pipeline_files: which files of a folder are the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from scripts.archive.pipeline_files import choose_names, list_pipeline
from tests.support.archives import save_in_hub_cache, save_pipeline


def test_only_the_pipelines_own_files_are_chosen() -> None:
    kept = [
        *("LICENSE.md", "README.md", "model_index.json", "tokenizer/merges.txt"),
        *("tokenizer/spiece.model", "unet/config.json"),
        *("unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",),
        *("unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors",),
        *("unet/diffusion_pytorch_model.safetensors.index.fp16.json",),
    ]
    others = [
        *("model.safetensors", "picture.png", "unet/model.onnx", "unet/flax_model.msgpack"),
        *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.bin"),
        *("unet/diffusion_pytorch_model.safetensors.index.json", "other/config.json"),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/code.py"),
        *("unet/old/diffusion_pytorch_model.fp16.safetensors",),
    ]
    assert choose_names([*others, *kept], ["unet", "tokenizer"]) == kept


def test_weights_by_unusual_names_are_taken_where_there_are_no_others() -> None:
    names = ["unet/special.safetensors", "vae/special.safetensors", "vae/model.safetensors"]
    expected = ["unet/special.safetensors", "vae/model.safetensors"]
    assert choose_names(names, ["unet", "vae"]) == expected


def _refusal(folder: Path, **replaced: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        list_pipeline(folder, replaced=replaced)
    return str(caught.value)


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    assert "is not a diffusers pipeline: it has no model_index.json" in _refusal(tmp_path)
    for text in ("{", "[" * 100_000):
        (tmp_path / "model_index.json").write_text(text)
        assert "is not JSON" in _refusal(tmp_path)


def test_pickled_weights_are_all_named(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (pipeline / "sd.ckpt").write_bytes(b"")
    (pipeline / ".cache").mkdir()
    (pipeline / ".cache" / "hidden.bin").write_bytes(b"")
    message = _refusal(pipeline)
    assert str(pipeline / "sd.ckpt") in message
    assert str(pipeline / "unet/diffusion_pytorch_model.bin") in message
    assert "hidden" not in message


def test_missing_components_are_refused(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "scheduler" / "scheduler_config.json").unlink()
    assert "the component scheduler has no files" in _refusal(pipeline)
    assert "no component nothing" in _refusal(pipeline, nothing=tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "does not hold a JSON object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_replacing_components_with_a_broken_configuration_are_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(text)
    assert f"{tmp_path}/vae/config.json {words}" in _refusal(pipeline, vae=tmp_path / "vae")


def test_replaced_components_bring_their_class(tmp_path: Path) -> None:
    import diffusers

    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "vae" / "old.bin").write_bytes(b"")  # no part of it any more
    diffusers.AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "vae")
    files = {
        each.name: each
        for each in list_pipeline(pipeline, replaced={"vae": tmp_path / "vae"}).files
    }
    assert files["vae/config.json"].path == tmp_path / "vae" / "config.json"
    index = json.loads(files["model_index.json"].data or b"")
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "vae" / "evil.ckpt").write_bytes(b"")
    assert "evil.ckpt" in _refusal(pipeline, vae=tmp_path / "vae")


@pytest.mark.parametrize("is_inside", [False, True])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, is_inside: bool) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    config = pipeline / "unet" / "config.json"
    elsewhere = (pipeline if is_inside else tmp_path) / "elsewhere.json"
    config.rename(elsewhere)
    config.symlink_to(elsewhere)
    if is_inside:
        assert "unet/config.json" in {each.name for each in list_pipeline(pipeline).files}
    else:
        message = _refusal(pipeline)
        assert f"{config} is a link to {elsewhere}, outside of the pipeline" in message


def test_links_of_the_hubs_cache_lead_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    snapshot = save_in_hub_cache(tmp_path)
    assert len(list_pipeline(snapshot).files) > 5
    other = save_pipeline(tmp_path / "p")
    assert list_pipeline(other, replaced={"vae": snapshot / "vae"})
    (tmp_path / "secret").write_text("{}")
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").symlink_to(tmp_path / "secret")
    assert "outside of the pipeline" in _refusal(snapshot)


def test_a_component_that_is_a_link_to_a_folder_is_told(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "vae").rename(tmp_path / "vae")
    (pipeline / "vae").symlink_to(tmp_path / "vae")
    assert "links to folders are not followed" in _refusal(pipeline)
    assert list_pipeline(pipeline, replaced={"vae": pipeline / "vae"})


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "unet" / "A.json").write_text("{}")
    assert list_pipeline(pipeline)
    (pipeline / "unet" / "a.json").write_text("{}")
    assert "unet/A.json and unet/a.json differ only in upper and lower case" in _refusal(pipeline)
