"""scripts.archive.repacking: an archive made of another one is as one made of the folder."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import save_file

from scripts.build_archive import main
from scripts.console import DONE, FAILED, MISUSED
from tests.support.archives import save_pipeline
from tests.support.layouts import lora_of_unet, plain_fp8
from tests.support.packing import UNET, content, manifest, unpack, zip_folder


def lora(path: Path) -> Path:
    """Save a LoRA of the pipeline's UNet."""
    save_file(lora_of_unet(), path)
    return path


def options(tmp_path: Path) -> list[str]:
    """Options of every kind that an archive keeps."""
    config = tmp_path / "own.yaml"
    config.write_text("# mine\nhandler:\n  height: 64\n")
    style = lora(tmp_path / "style.safetensors")
    vae = save_pipeline(tmp_path / "other") / "vae"
    return [
        *("--config", str(config), "--lora", str(style), "--component", f"vae={vae}"),
        *("--set", "width=64", "--smoke-prompt", "a star", "--dtype", "bfloat16"),
    ]


def pack(tmp_path: Path, source: list[str], *arguments: str, out: str = "out") -> Path:
    """Pack as tmp_path/OUT/tiny.mar."""
    if "--name" not in arguments and "--from" not in source:
        arguments = (*arguments, "--name", "tiny")
    assert main([*source, "--out", str(tmp_path / out), *arguments]) == DONE
    (path,) = (tmp_path / out).iterdir()
    return path


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["--version", "2.0"],
        ["--name", "other"],
        ["--set", "num_inference_steps=5"],
        ["--dtype", "float32"],
        ["--smoke-prompt", "a moon"],
    ],
    ids=lambda changes: "-".join(changes) or "nothing",
)
def test_an_archive_keeps_what_is_not_changed(tmp_path: Path, changes: list[str]) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    first = pack(tmp_path, folder, *options(tmp_path) if changes[:1] != ["--dtype"] else ())
    expected = pack(
        tmp_path,
        folder,
        *(options_again(tmp_path) if changes[:1] != ["--dtype"] else ()),
        *changes,
        out="expected",
    )
    found = pack(tmp_path, ["--from", str(first)], *changes, out="found")
    assert found.name == expected.name
    assert found.read_bytes() == expected.read_bytes()


def options_again(tmp_path: Path) -> list[str]:
    """The options that `options` gave, whose files are there already."""
    vae = tmp_path / "other" / "vae"
    return [
        *("--config", str(tmp_path / "own.yaml"), "--lora", str(tmp_path / "style.safetensors")),
        *("--component", f"vae={vae}", "--set", "width=64", "--smoke-prompt", "a star"),
        *("--dtype", "bfloat16"),
    ]


def test_configuration_loras_and_components_change_without_the_folder(tmp_path: Path) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    first = pack(tmp_path, folder, *options(tmp_path))
    new_config = tmp_path / "new.yaml"
    new_config.write_text("handler:\n  height: 128\n")
    ink = lora(tmp_path / "ink.safetensors")
    te = save_pipeline(tmp_path / "third") / "text_encoder"
    changes = [
        *("--config", str(new_config), "--lora", str(ink), "--lora", "style=none"),
        *("--component", f"text_encoder={te}"),
    ]
    found = pack(tmp_path, ["--from", str(first)], *changes, out="found")
    vae = tmp_path / "other" / "vae"
    expected = pack(
        tmp_path,
        folder,
        *("--config", str(new_config), "--lora", str(ink), "--smoke-prompt", "a star"),
        *("--component", f"vae={vae}", "--component", f"text_encoder={te}", "--dtype", "bfloat16"),
        out="expected",
    )
    assert found.read_bytes() == expected.read_bytes()


def test_a_folder_stays_a_folder(tmp_path: Path) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    first = pack(tmp_path, folder, "--format", "dir")
    found = pack(tmp_path, ["--from", str(first)], "--version", "2", out="found")
    expected = pack(tmp_path, folder, "--format", "dir", "--version", "2", out="expected")
    assert content(found) == content(expected)
    as_file = pack(tmp_path, ["--from", str(first)], "--format", "mar", out="file")
    assert as_file.read_bytes() == pack(tmp_path, folder, out="expected-file").read_bytes()


def test_an_archive_may_be_replaced_by_itself(tmp_path: Path) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    first = pack(tmp_path, folder)
    arguments = ["--from", str(first), "--out", str(first.parent), "--version", "2"]
    assert main(arguments) == MISUSED
    assert main([*arguments, "--force"]) == DONE
    assert first.read_bytes() == pack(tmp_path, folder, "--version", "2", out="two").read_bytes()


def test_damaged_weights_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    mar = pack(tmp_path, ["--pipeline", str(pipeline)])
    data = bytearray(mar.read_bytes())
    at = data.index((pipeline / UNET).read_bytes()[-64:])
    data[at] ^= 1
    mar.write_bytes(data)
    out = tmp_path / "found"
    assert main(["--from", str(mar), "--out", str(out)]) == FAILED
    assert f"{UNET} is damaged: its bytes do not match its checksum" in capsys.readouterr().err
    assert not list(out.iterdir())


def make_foreign(tmp_path: Path, model_zip: bytes) -> Path:
    """An archive with `model_zip`, as torch-model-archiver makes it."""
    (tmp_path / "model.zip").write_bytes(model_zip)
    (tmp_path / "handler.py").write_text("")
    command = [sys.executable, "-m", "model_archiver.model_packaging"]
    command += ["--model-name", "foreign", "--version", "3", "--export-path", str(tmp_path)]
    command += ["--handler", str(tmp_path / "handler.py")]
    command += ["--serialized-file", str(tmp_path / "model.zip")]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "foreign.mar"


def zipped(folder: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Zip `folder` as people do, each name after `prefix`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content(folder).items():
            archive.writestr(prefix + name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("prefix", ["", "pipeline/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_the_pipeline_in_an_archive_of_another_tool(
    tmp_path: Path, prefix: str, compression: int
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    foreign = make_foreign(tmp_path, zipped(pipeline, prefix, compression))
    expected = pack(tmp_path, ["--pipeline", str(pipeline)])
    found = pack(tmp_path, ["--pipeline", str(foreign)], out="found")
    assert manifest(found) == manifest(expected) | {"source": {"kind": "archive"}}
    model_zips = [unpack(mar, tmp_path / mar.parent.name / "m") for mar in (found, expected)]
    first, second = ((folder / "model.zip").read_bytes() for folder in model_zips)
    assert first == second
    named = pack(tmp_path, ["--from", str(foreign)], out="named")
    assert named.name == "foreign.mar"
    with zipfile.ZipFile(named) as archive:
        assert b'"modelVersion": "3"' in archive.read("MAR-INF/MANIFEST.json")


def test_a_zipped_pipeline(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    (pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    path = zip_folder(pipeline, tmp_path / "tiny.zip")
    assert main(["--pipeline", str(path), "--out", str(tmp_path / "out")]) == DONE
    found = tmp_path / "out" / "tiny.mar"
    expected = pack(tmp_path, ["--pipeline", str(pipeline)], out="expected")
    assert manifest(found)["model_members"] == manifest(expected)["model_members"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--from", "is not an archive: make archive PIPELINE="),
        ("--pipeline", "it is a finished archive"),
    ],
)
def test_the_wrong_flag_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, words: str
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    mar = pack(tmp_path, ["--pipeline", str(pipeline)])
    given = pipeline if flag == "--from" else mar
    assert main([flag, str(given), "--out", str(tmp_path / "found")]) == FAILED
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    if flag == "--pipeline":
        assert f"make archive FROM={mar} packs it again" in error


def test_a_lora_that_is_not_there_cannot_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mar = pack(tmp_path, ["--pipeline", str(save_pipeline(tmp_path / "p"))])
    arguments = ["--from", str(mar), "--out", str(tmp_path / "found")]
    assert main([*arguments, "--lora", "ink=none"]) == MISUSED
    assert "has no LoRA of that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        ["--set", "height=64"],
        ["--set", "guidance_scale=31", "--set", "max_guidance_scale=40"],
        ["--set", "warm_up_sizes=[64x64]"],
    ],
)
def test_the_models_own_defaults_stay_in_the_configuration(
    tmp_path: Path, changes: list[str]
) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p", "latent_consistency"))]
    first = pack(tmp_path, folder)
    expected = pack(tmp_path, folder, *changes, out="expected")
    found = pack(tmp_path, ["--from", str(first)], *changes, out="found")
    assert found.read_bytes() == expected.read_bytes()
    with zipfile.ZipFile(found) as archive:
        assert b"  num_inference_steps: 4" in archive.read("model-config.yaml")


def test_a_limit_below_the_archives_own_defaults_is_told_with_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    size = ("--set", "height=512", "--set", "width=512")
    first = pack(tmp_path, folder, *size)
    limit = ["--set", "max_size_px=256"]
    out = ["--out", str(tmp_path / "found")]
    assert main(["--from", str(first), *out, *limit]) == FAILED
    needed = ("--set", "height=256", "--set", "width=256")
    assert f"add {' '.join(needed)}" in capsys.readouterr().err
    assert main(["--from", str(first), *out, *limit, *needed]) == DONE


def test_a_quantized_component_ends_the_claim_that_all_is_converted(tmp_path: Path) -> None:
    folder = ["--pipeline", str(save_pipeline(tmp_path / "p"))]
    first = pack(tmp_path, folder, "--dtype", "float16")
    assert manifest(first)["converted_to"] == "float16"
    changes = ["--component", f"unet={plain_fp8(tmp_path / 'fp8') / 'unet'}"]
    found = pack(tmp_path, ["--from", str(first)], *changes, out="found")
    assert "converted_to" not in manifest(found)
    expected = pack(tmp_path, folder, *changes, "--dtype", "float16", out="expected")
    assert found.read_bytes() == expected.read_bytes()


def test_an_archive_is_checked_when_it_is_packed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "p", "kandinsky_2_2")
    first = pack(tmp_path, ["--pipeline", str(pipeline)], "--no-check")
    out = tmp_path / "found"
    assert main(["--from", str(first), "--out", str(out)]) == FAILED
    assert "needs image_embeds" in capsys.readouterr().err
    assert not out.exists() or not [*out.iterdir()]
