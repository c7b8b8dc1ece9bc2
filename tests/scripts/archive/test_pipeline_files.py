"""scripts.archive.pipeline_files: which files of a folder are the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


def _refusal(folder: Path, **replaced: Path | None) -> str:
    with pytest.raises(ArchiveError) as caught:
        list_pipeline(folder, replaced=replaced)
    return str(caught.value)


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    assert "is not a diffusers pipeline: it has no model_index.json" in _refusal(tmp_path)
    for text in ("{", "[" * 100_000):
        (tmp_path / "model_index.json").write_text(text)
        assert "is not JSON" in _refusal(tmp_path)


def test_components_with_pickled_weights_only_are_all_named(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    for component, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        (pipeline / component / f"{name}.safetensors").unlink()
        (pipeline / component / f"{name}.bin").write_bytes(b"")
    (pipeline / "sd.ckpt").write_bytes(b"")
    message = _refusal(pipeline)
    assert "pickled weights are refused" in message
    for component in ("unet", "vae"):
        assert str(pipeline / component / "diffusion_pytorch_model.bin") in message
    assert "sd.ckpt" not in message


def _notes(folder: Path, dtype_name: str = "float16", **replaced: Path | None) -> list[str]:
    return [*list_pipeline(folder, replaced=replaced, dtype_name=dtype_name).notes]


def test_what_is_left_out_is_said_in_one_line(tmp_path: Path) -> None:
    """The commonest layout: every other format lies beside the safetensors."""
    pipeline = save_pipeline(tmp_path / "p")
    assert _notes(pipeline) == []
    for name in (
        *("unet/diffusion_pytorch_model.bin", "sd.ckpt", "unet/flax_model.msgpack"),
        *("unet/openvino_model.bin", "vae_decoder/model.onnx", "pipeline.py", ".hidden.bin"),
    ):
        (pipeline / name).parent.mkdir(exist_ok=True)
        (pipeline / name).write_bytes(b"")
    save_file({"emb_params": torch.ones(2, 16)}, pipeline / "thing.safetensors")
    assert _notes(pipeline) == [
        "left out: pickled: sd.ckpt, unet/diffusion_pytorch_model.bin, unet/openvino_model.bin; "
        "code, which is never packed: pipeline.py; "
        "embeddings (textual inversions), which are not served yet: thing.safetensors; "
        "not read by diffusers: unet/flax_model.msgpack, vae_decoder/model.onnx"
    ]


@pytest.mark.parametrize(
    ("dtype_name", "said"),
    [
        (
            "float16",
            "weights of unet: fp16 taken, full precision left out; "
            "--dtype float32 (DTYPE=float32) takes full precision",
        ),
        ("float32", "weights of unet: full precision taken, fp16 left out"),
    ],
)
def test_which_of_two_variants_was_taken_is_said(
    tmp_path: Path, dtype_name: str, said: str
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    full = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    half = full.with_name("diffusion_pytorch_model.fp16.safetensors")
    half.write_bytes(full.read_bytes())
    left = half if dtype_name == "float32" else full
    assert _notes(pipeline, dtype_name) == [
        said,
        f"left out: other variants of the weights: unet/{left.name}",
    ]


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
    assert _notes(pipeline, vae=tmp_path / "vae") == ["left out: pickled: vae/evil.ckpt"]
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "evil.ckpt" in _refusal(pipeline, vae=tmp_path / "vae")


def test_the_component_of_a_whole_pipeline_is_taken(tmp_path: Path) -> None:
    pipeline, other = save_pipeline(tmp_path / "p"), save_in_hub_cache(tmp_path)
    found = list_pipeline(pipeline, replaced={"vae": other})
    (config,) = (each for each in found.files if each.name == "vae/config.json")
    assert config.path == other / "vae" / "config.json"
    assert found.notes == [f"vae: {other} is a whole pipeline; its vae is taken"]
    (other / "model_index.json").unlink()
    index = {"_class_name": "PNDMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (other / "model_index.json").write_text(json.dumps(index))
    assert f"{other} is a whole pipeline and has no vae; it has: unet" in _refusal(
        pipeline, vae=other
    )


def test_a_file_of_weights_keeps_the_components_own_configuration(tmp_path: Path) -> None:
    pipeline, other = save_pipeline(tmp_path / "p"), save_pipeline(tmp_path / "other")
    name = "vae/diffusion_pytorch_model.safetensors"
    for component, path in (
        ("vae", other / name),
        ("text_encoder", other / "text_encoder/model.safetensors"),
    ):
        files = {
            each.name: each for each in list_pipeline(pipeline, replaced={component: path}).files
        }
        assert files[f"{component}/{path.name}"].path == path
        assert files[f"{component}/config.json"].path == pipeline / component / "config.json"
    (tmp_path / "vae.ckpt").write_bytes(b"")
    assert "is a file of pickled weights" in _refusal(pipeline, vae=tmp_path / "vae.ckpt")
    (tmp_path / "vae.txt").write_bytes(b"")
    assert "wanted as a folder or a .safetensors" in _refusal(pipeline, vae=tmp_path / "vae.txt")


def test_what_a_pipeline_can_do_without_is_left_out(tmp_path: Path) -> None:
    """As on many hubs: model_index.json names a safety checker, and its folder is not there."""
    pipeline = save_pipeline(tmp_path / "p")
    index = json.loads((pipeline / "model_index.json").read_bytes())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (pipeline / "model_index.json").write_text(json.dumps(index))
    flags = "--component feature_extractor=none --component safety_checker=none"
    message = _refusal(pipeline)
    assert "the components feature_extractor and safety_checker have no files" in message
    assert f"the pipeline works without: {flags}" in message
    found = list_pipeline(pipeline, replaced={"safety_checker": None}).index
    assert found.components.keys() == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    assert found.entries["requires_safety_checker"] is False
    with pytest.raises(ArchiveError, match="unet cannot be left out"):
        list_pipeline(pipeline, replaced={"unet": None})


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
