"""scripts.archive.checks: every kind of damage is named."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.archive.manifest import MANIFEST_NAME, TORCHSERVE_MANIFEST_NAME
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.verify_archive import verify
from tests.support.archives import save_pipeline
from tests.support.layouts import lora_of_unet
from tests.support.packing import (
    UNET,
    edit_json,
    in_old_form,
    manifest,
    pack,
    rewrite,
    zip_folder,
)

PIPELINE, TORCHSERVE = MANIFEST_NAME, TORCHSERVE_MANIFEST_NAME


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop(PIPELINE), "PIPELINE.json is missing"),
        (lambda files: files.pop("requirements.txt"), "requirements.txt is missing"),
        (lambda files: files.update(extra=b""), "extra is not in the manifest"),
        (lambda files: files.pop(TORCHSERVE), "MAR-INF/MANIFEST.json is missing"),
        (lambda files: files.update({TORCHSERVE: b"{}"}), "is not a manifest of TorchServe's"),
        (lambda files: files.update({PIPELINE: b"no"}), "has the format None"),
        (lambda files: files.pop("torchserve_entry.py"), "as handler, which is missing"),
        (edit_json(PIPELINE, lambda value: value.update(format=9)), "has the format 9"),
        (edit_json(PIPELINE, lambda value: value.pop("members")), "lists no members"),
        (
            edit_json(PIPELINE, lambda value: value["made_with"].update(torch="99.0")),
            "made with torch 99.0, another major version",
        ),
        (
            edit_json(PIPELINE, lambda value: value["made_with"].update(diffusers="0.99.0")),
            "made with diffusers 0.99.0, newer than the installed",
        ),
        (
            edit_json(PIPELINE, lambda value: value["made_with"].pop("transformers")),
            "which transformers it was made with",
        ),
        (
            lambda files: files.update({"model-config.yaml": b"handler: {heigth: 3}"}),
            "model-config.yaml: ",
        ),
        *(
            (lambda files, text=text: files.update({"model-config.yaml": text}), "it is not YAML")
            for text in (b"[" * 20_000, b"x: 2001-99-99")
        ),
        *(
            (lambda files, name=name: files.update({name: b"[" * 100_000}), words)
            for name, words in (
                (TORCHSERVE, "MANIFEST.json is not JSON"),
                (PIPELINE, "has the format None"),
            )
        ),
        (lambda files: files.update({"requirements.txt": b"evil"}), "requirements.txt has 4 bytes"),
        (
            lambda files: files.update({"requirements.txt": files["requirements.txt"][::-1]}),
            "requirements.txt does not match its BLAKE3",
        ),
        (lambda files: files.pop("model.zip"), "holds 0 pipelines"),
    ],
)
def test_damage_of_the_archive_is_named(
    tmp_path: Path, change: Callable[[dict[str, bytes]], None], words: str
) -> None:
    problems = verify(rewrite(pack(tmp_path), change))
    assert any(words in problem for problem in problems), problems


def test_a_version_that_is_no_number_is_no_traceback(tmp_path: Path) -> None:
    major = torch.__version__.partition(".")[0]
    change = edit_json(PIPELINE, lambda value: value["made_with"].update(torch=f"{major}.\u00b2"))
    assert verify(rewrite(pack(tmp_path), change)) == []


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    def change(files: dict[str, bytes]) -> None:
        files["extra"] = b""
        files["requirements.txt"] = b"evil"
        files.pop("torchserve_entry.py")
        edit_json(PIPELINE, lambda value: value["made_with"].update(torch="99.0"))(files)

    assert len(verify(rewrite(pack(tmp_path), change))) == 5


@pytest.mark.parametrize("is_folder", [False, True])
def test_flipped_bits_in_weights_are_named(tmp_path: Path, is_folder: bool) -> None:
    mar = pack(tmp_path, is_folder=is_folder)
    path = mar / "model.zip" if is_folder else mar
    weights = (tmp_path / "pipeline" / UNET).read_bytes()
    data = bytearray(path.read_bytes())
    data[data.index(weights[-500:])] ^= 1
    path.write_bytes(data)
    assert any(f"{UNET} is damaged" in problem for problem in verify(mar))


def test_a_consistent_forgery_is_found_by_its_hash(tmp_path: Path) -> None:
    """The checksums of the zip are right again; those of the manifest are not."""
    mar = pack(tmp_path)
    pipeline = tmp_path / "pipeline"
    weights = load_file(pipeline / UNET)
    weights["conv_in.bias"] += 1
    save_file(weights, pipeline / UNET, metadata={"format": "pt"})
    forged = tmp_path / "forged.mar"
    write_archive(ArchivePlan(pipeline, "tiny"), forged)
    with zipfile.ZipFile(forged) as archive:
        model = archive.read("model.zip")
    rewrite(mar, lambda files: files.update({"model.zip": model}))
    expected = f"model.zip/{UNET} does not match its BLAKE3 in the manifest"
    assert verify(mar) == [expected]


def test_archives_of_the_first_form_still_verify(tmp_path: Path) -> None:
    """They list SHA-256, and what does not match it is found all the same."""
    style = tmp_path / "style.safetensors"
    save_file(lora_of_unet(), style)
    old = in_old_form(pack(tmp_path, loras={"style": style}))
    assert verify(old) == []
    again = tmp_path / "again.mar"
    write_archive(ArchivePlan(old, "tiny", is_repacked=True), again)
    assert manifest(again)["format"] == 2
    assert verify(again) == []

    def change(files: dict[str, bytes]) -> None:
        files["requirements.txt"] = files["requirements.txt"][::-1]

    expected = "requirements.txt does not match its SHA-256 in the manifest"
    assert verify(rewrite(old, change)) == [expected]


def test_a_member_without_a_known_hash_is_named(tmp_path: Path) -> None:
    def change(value: dict[str, dict[str, dict[str, object]]]) -> None:
        value["members"]["requirements.txt"].pop("blake3")

    problems = verify(rewrite(pack(tmp_path), edit_json(PIPELINE, change)))
    assert problems == ["requirements.txt: the manifest lists none of its hashes blake3, sha256"]


class Pipe(io.BytesIO):
    """Takes bytes as a pipe does: zipfile then writes every size behind its member."""

    def tell(self) -> int:
        raise OSError("a pipe has no place")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_that_torchserve_cannot_unzip_are_named(tmp_path: Path, method: int) -> None:
    mar = pack(tmp_path)
    pipe = Pipe()
    with zipfile.ZipFile(mar) as archive, zipfile.ZipFile(pipe, "w") as piped:
        for name in archive.namelist():
            how = zipfile.ZIP_STORED if name.endswith(".zip") else method
            piped.writestr(name, archive.read(name), how)
    mar.write_bytes(pipe.getvalue())
    problems = verify(mar)
    assert any("model.zip is stored with its size behind it" in each for each in problems)
    stored_only = method == zipfile.ZIP_STORED
    assert any("MANIFEST.json is stored" in each for each in problems) == stored_only


def edit_index(pipeline: Path, **changes: object) -> None:
    """Change entries of model_index.json; None removes one."""
    path = pipeline / "model_index.json"
    index = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "unet" / "x.bin").write_bytes(b""), "pickled weights are refused"),
        (lambda p: (p / "unet" / "x.py").write_bytes(b""), "code in a pipeline is refused"),
        (lambda p: shutil.rmtree(p / "scheduler"), "the component scheduler of model_index.json"),
        (lambda p: (p / "unet/config.json").write_text("{}"), "unet: "),
        (lambda p: (p / "unet/config.json").write_text('{"layers_per_block": "x"}'), "unet: "),
        (lambda p: (p / "vae/config.json").write_text("{"), "vae/config.json is not JSON"),
        (lambda p: (p / UNET).write_bytes(b"short"), f"{UNET}: too short"),
        (lambda p: (p / "tokenizer/tokenizer.json").unlink(), "tokenizer: has no vocabulary"),
        (lambda p: edit_index(p, _class_name="NoSuch"), "has no pipeline NoSuch"),
        (lambda p: edit_index(p, _class_name="DiffusionPipeline"), "has no pipeline Diffusion"),
        (lambda p: edit_index(p, vae=None), "components that the pipeline lacks: vae"),
    ],
)
def test_a_bad_pipeline_is_named(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    """In a bare zip, which our packer would not have made."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    damage(pipeline)
    problems = verify(zip_folder(pipeline, tmp_path / "bad.zip"))
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("component", "name"),
    [("unet", "conv_in.weight"), ("text_encoder", "final_layer_norm.weight")],
)
@pytest.mark.parametrize("damage", ["shape", "missing"])
def test_shapes_are_compared_with_the_configuration(
    tmp_path: Path, component: str, name: str, damage: str
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = next((pipeline / component).glob("*.safetensors"))
    weights = load_file(path)
    name = next(each for each in weights if each.endswith(name))
    if damage == "shape":
        weights[name] = torch.ones(3, 3)
    else:
        del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    problems = verify(pack(tmp_path, pipeline))
    assert [problem.partition(":")[0] for problem in problems] == [component]
