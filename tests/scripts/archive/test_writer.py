"""scripts.archive.writer: what an archive holds, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load, load_file, save_file

from handler.config import HandlerConfig
from handler.loading.pipeline import load_pipeline
from scripts.archive.fitted_settings import with_settings
from scripts.archive.zip_writer import ZipWriter
from scripts.build_archive import main
from scripts.console import FAILED
from scripts.repository import REPOSITORY
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.archives import save_pipeline
from tests.support.layouts import edit_json, edit_weights
from tests.support.packing import UNET, build, content, manifest, unpack


def test_holds_handler_configuration_requirements_and_pipeline(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        sources = {
            path.relative_to(REPOSITORY).as_posix()
            for path in (REPOSITORY / "handler").rglob("*.py")
        }
        own = {"torchserve_entry.py", "model-config.yaml", "requirements.txt", "model.zip"}
        infos = {"MAR-INF/MANIFEST.json", "MAR-INF/PIPELINE.json"}
        assert set(names) == sources | own | infos
        for name in sources:
            assert archive.read(name) == (REPOSITORY / name).read_bytes()
        shipped = (REPOSITORY / "config/model-config.yaml").read_bytes()
        own_size = {"height": 32, "width": 32, "min_size_px": 32}
        assert archive.read("model-config.yaml") == with_settings(shipped, own_size)
        assert b"diffusers==" in archive.read("requirements.txt")
        assert b"+" not in archive.read("requirements.txt")


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    """In another folder, at another hour, with another umask, home and hash seed."""
    first = build(tmp_path).read_bytes()
    other = tmp_path / "other"
    pipeline = save_pipeline(other / "renamed")
    for path in pipeline.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    code = (
        "import os, sys; os.umask(0o077)\n"
        "from scripts.build_archive import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(other)]
    environment = {**os.environ, "HOME": str(other), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, env=environment, cwd=REPOSITORY
    )
    assert (other / "tiny.mar").read_bytes() == first


def test_the_worker_loads_it(tmp_path: Path) -> None:
    model_dir = unpack(build(tmp_path), tmp_path / "m")
    loaded = load_pipeline(model_dir, HandlerConfig(), None)
    expected = load_file(tmp_path / "pipeline" / UNET)["conv_in.weight"]
    assert torch.equal(loaded.pipeline.unet.conv_in.weight, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_converts_on_the_way(tmp_path: Path, dtype: str) -> None:
    mar = build(tmp_path, "--dtype", dtype)
    model_dir = unpack(mar, tmp_path / "m")
    with zipfile.ZipFile(model_dir / "model.zip") as archive:
        found = load(archive.read(UNET))
    expected = load_file(tmp_path / "pipeline" / UNET)
    assert all(
        torch.equal(found[name], tensor.to(getattr(torch, dtype)))
        for name, tensor in expected.items()
    )
    short = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert set(manifest(mar)["pipeline"]["components"]["unet"]["dtypes"]) == {short}
    assert manifest(mar)["converted_to"] == dtype
    loaded = load_pipeline(model_dir, HandlerConfig(dtype=dtype), None)
    assert torch.equal(loaded.pipeline.unet.conv_in.weight, found["conv_in.weight"])


def test_components_loras_and_settings_travel_along(tmp_path: Path) -> None:
    diffusers.AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "vae")
    prefix = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    side = load_file(save_pipeline(tmp_path / "pipeline") / UNET)[
        f"{prefix.removeprefix('unet.')}.weight"
    ].shape[0]
    lora = {
        f"{prefix}.lora_A.weight": torch.ones(2, side),
        f"{prefix}.lora_B.weight": torch.ones(side, 2),
    }
    save_file(lora, tmp_path / "style.safetensors")
    mar = build(
        tmp_path,
        *("--component", f"vae={tmp_path / 'vae'}", "--lora", str(tmp_path / "style.safetensors")),
        *("--set", "height=64", "--set", "width=64", "--set", "scheduler=euler"),
    )
    model_dir = unpack(mar, tmp_path / "m")
    config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
    assert config["handler"]["height"] == 64
    assert config["handler"]["scheduler"] == "euler"
    assert config["continuousBatching"] is True
    pipeline = load_pipeline(model_dir, HandlerConfig(), None).pipeline
    assert isinstance(pipeline.vae, diffusers.AutoencoderTiny)
    assert pipeline.get_active_adapters() == ["style"]
    found = manifest(mar)
    assert found["loras"] == ["style"]
    assert found["pipeline"]["components"]["vae"]["class"] == "diffusers.AutoencoderTiny"
    assert found["settings"] == {"height": 64, "scheduler": "euler", "width": 64}


def test_a_folder_takes_the_place_of_the_archive(tmp_path: Path) -> None:
    mar = build(tmp_path)
    build(tmp_path, "--format", "dir")
    folder = tmp_path / "out" / "tiny"
    unpacked = unpack(mar, tmp_path / "m")
    assert content(folder) == content(unpacked)
    (folder / "left-over").write_bytes(b"")
    build(tmp_path, "--format", "dir", "--force")
    assert content(folder) == content(unpacked)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny", "tiny.mar"]


def test_an_interrupted_pack_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    original = ZipWriter.add

    def interrupted(self: ZipWriter, name: str, *arguments: Any, **options: Any) -> Any:
        if name == UNET:
            raise KeyboardInterrupt
        return original(self, name, *arguments, **options)

    monkeypatch.setattr(ZipWriter, "add", interrupted)
    out = tmp_path / "out"
    assert main(["--pipeline", str(pipeline), "--name", "tiny", "--out", str(out)]) == FAILED
    assert "interrupted" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_packing_takes_little_memory(tmp_path: Path) -> None:
    """Weights of 400 MB, converted too; nothing of torch is imported, but for the checks."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    entry = {"weight": {"dtype": "F32", "shape": [100_000_000], "data_offsets": [0, 400_000_000]}}
    header = json.dumps(entry).encode()
    with (pipeline / UNET).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 400_000_000)
    code = (
        "import pathlib, sys; from scripts.build_archive import main\n"
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0]); sys.exit(code)"
    )
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    for extra in (["--no-check"], ["--no-check", "--dtype", "float16", "--force"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *common, *extra],
            check=True,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert int(done.stdout) * 1024 < 200_000_000


def test_checking_takes_no_memory_for_weights(tmp_path: Path) -> None:
    """A text encoder with a vocabulary of 200 MB, beside what the libraries take by themselves."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    edit_json(pipeline, "text_encoder/config.json", vocab_size=3_000_000)
    path = pipeline / "text_encoder/model.safetensors"
    name = next(key for key in load_file(path) if key.endswith("token_embedding.weight"))
    edit_weights(pipeline, "text_encoder/model.safetensors", **{name: torch.zeros(3_000_000, 16)})
    code = (
        "import pathlib, sys; from scripts.build_archive import main\n"
        "def peak():\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(status.split('VmHWM:')[1].split()[0])\n"
        "assert main([*sys.argv[1:3], '--name', 'small', *sys.argv[5:]]) == 0; before = peak()\n"
        "assert main([*sys.argv[3:5], '--name', 'big', *sys.argv[5:]]) == 0\n"
        "print(peak() - before)"
    )
    small = save_pipeline(tmp_path / "small")
    arguments = ["--pipeline", str(small), "--pipeline", str(pipeline), "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert path.stat().st_size > 190_000_000
    assert int(done.stdout) * 1024 < 60_000_000


@pytest.mark.server
def test_torchserve_links_a_folder_serves_it_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    settings = ("num_inference_steps=2", "height=64", "width=64", "num_threads=1")
    flags = [part for setting in settings for part in ("--set", setting)]
    build(tmp_path, "--format", "dir", *flags)
    folder = tmp_path / "out" / "tiny"
    before = content(folder)
    server = TorchServer(Options(folder, tmp_path / "run", Ports.free()), ("tiny", "1.0"))
    with server.running(timeout_s=120):
        curl = ["curl", "-sf", "-H", "Content-Type: application/json", server.predictions_url]
        done = subprocess.run([*curl, "-d", '"a tree"'], capture_output=True, check=True)
        copies = [path for path in (tmp_path / "run").rglob("model.zip") if not path.is_symlink()]
    assert done.stdout.startswith(b"\x89PNG")
    assert copies == []
    assert content(folder) == before


@pytest.mark.parametrize("name", ["unet/config.json", UNET])
def test_a_file_that_changes_while_it_is_packed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file of the same size too, as when training goes on in the folder."""
    pipeline = save_pipeline(tmp_path / "tiny")

    def touch_then_copy(self: Any, *arguments: Any, **options: Any) -> Any:
        os.utime(pipeline / name)
        return nested(self, *arguments, **options)

    nested = ZipWriter.nested
    monkeypatch.setattr(ZipWriter, "nested", touch_then_copy)
    out = tmp_path / "out"
    assert main(["--pipeline", str(pipeline), "--out", str(out)]) == FAILED
    assert os.listdir(out) == []
