"""scripts.verify_archive: a whole archive passes, and the smoke test draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.console import DONE, FAILED, MISUSED
from scripts.verify_archive import main, verify
from tests.support.archives import save_pipeline
from tests.support.packing import UNET, edit_json, pack, rewrite, zip_folder


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_we_pack_is_whole_and_draws(tmp_path: Path, is_folder: bool) -> None:
    lora = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}
    lora["unet.conv_in.lora_B.weight"] = torch.ones(
        load_file(save_pipeline(tmp_path / "pipeline") / UNET)["conv_in.weight"].shape[0], 2, 1, 1
    )
    save_file(lora, tmp_path / "style.safetensors")
    options: dict[str, Any] = {"loras": {"style": tmp_path / "style.safetensors"}}
    mar = pack(tmp_path, tmp_path / "pipeline", is_folder=is_folder, **options)
    assert verify(mar, is_smoke=True) == []


@pytest.mark.parametrize("family", ["flux", "stable_diffusion_3", "sana", "kandinsky_2_2_combined"])
def test_other_families_are_whole(tmp_path: Path, family: str) -> None:
    assert verify(pack(tmp_path, save_pipeline(tmp_path / "pipeline", family))) == []


def test_half_precision_is_whole(tmp_path: Path) -> None:
    assert verify(pack(tmp_path, dtype="float16"), is_smoke=True) == []


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mar = pack(tmp_path)
    assert main([str(mar)]) == DONE
    assert capsys.readouterr().out == f"{mar}: whole\n"
    assert main([str(mar), "--json"]) == DONE
    report = json.loads(capsys.readouterr().out)
    assert report == {"archive": str(mar), "is_whole": True, "problems": []}
    assert main([str(tmp_path / "none.mar")]) == MISUSED
    data = bytearray(mar.read_bytes())
    data[data.rindex(b"minWorkers")] ^= 1  # the handler has the word too
    mar.write_bytes(data)
    assert main([str(mar), "--json"]) == FAILED
    assert json.loads(capsys.readouterr().out)["is_whole"] is False
    assert main([str(mar)]) == FAILED
    error = capsys.readouterr().err
    assert "model-config.yaml is damaged" in error
    assert error.endswith("problems\n")


def test_what_a_terminal_would_obey_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = edit_json(
        TORCHSERVE_MANIFEST_NAME, lambda value: value["model"].update(handler="\x1b[2J")
    )
    assert main([str(rewrite(pack(tmp_path), change))]) == FAILED
    error = capsys.readouterr().err
    assert "names \ufffd[2J as handler" in error
    assert "\x1b" not in error


def test_of_a_bare_folder_what_would_not_be_packed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commonest layout on the hub: pickles beside safetensors, and other frameworks' files."""
    folder = save_pipeline(tmp_path / "pipeline")
    for name in ("unet/diffusion_pytorch_model.bin", "unet/model.onnx", "pipeline.py"):
        (folder / name).write_bytes(b"any")
    before = sorted(folder.rglob("*"))
    assert main([str(folder), "--smoke"]) == DONE
    told = capsys.readouterr()
    assert "left out: pickled: unet/diffusion_pytorch_model.bin; code" in told.err
    assert told.out == f"{folder}: whole\n"
    assert sorted(folder.rglob("*")) == before


def test_of_a_bare_folder_what_would_be_refused_is_a_problem(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipeline")
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "vae" / "config.json").unlink()
    problems = verify(folder)
    assert any(each.startswith("pickled weights are refused") for each in problems), problems
    assert any("vae" in each for each in problems), problems


def test_a_bare_zip_draws(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    assert verify(zip_folder(pipeline, tmp_path / "pipeline.zip"), is_smoke=True) == []
