"""scripts.build_archive: what the archive holds, byte for byte, and what stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load, load_file, save, save_file

import scripts
from handler.config import HandlerConfig
from handler.loading.pipeline import load_pipeline
from scripts.archive.hub import download
from scripts.archive.manifest import dump, torchserve_manifest
from scripts.archive.zip_writer import ZipWriter
from scripts.build_archive import main
from scripts.console import DONE, FAILED, MISUSED
from scripts.repository import REPOSITORY
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.archives import save_pipeline
from tests.support.hub import REVISION, serve_hub
from tests.support.hub import Model as HubModel

UNET = "unet/diffusion_pytorch_model.safetensors"


def pipeline_files(tmp_path: Path) -> dict[str, bytes]:
    """A tiny Stable Diffusion as a hub has it."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    return {
        path.relative_to(pipeline).as_posix(): path.read_bytes()
        for path in pipeline.rglob("*")
        if path.is_file()
    }


def build(tmp_path: Path, *arguments: str, pipeline: Path | None = None) -> Path:
    """Pack a tiny Stable Diffusion as tmp_path/out/tiny.mar."""
    if pipeline is None:
        pipeline = tmp_path / "pipeline"
        if not pipeline.exists():
            save_pipeline(pipeline)
    out = tmp_path / "out"
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(out)]
    assert main([*common, *arguments]) == DONE
    return out / "tiny.mar"


def unpack(mar: Path, folder: Path) -> Path:
    """Unpack an archive as TorchServe does."""
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(folder)
    return folder


def manifest(mar: Path) -> dict[str, Any]:
    """Our manifest of an archive."""
    with zipfile.ZipFile(mar) as archive:
        found: dict[str, Any] = json.loads(archive.read("MAR-INF/PIPELINE.json"))
        return found


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
        assert archive.read("model-config.yaml") == shipped
        assert b"diffusers==" in archive.read("requirements.txt")
        assert b"+" not in archive.read("requirements.txt")


def test_torchserves_manifest_has_the_form_that_its_archiver_writes() -> None:
    code = (
        "from model_archiver.manifest_components.manifest import Manifest\n"
        "from model_archiver.manifest_components.model import Model\n"
        "model = Model('tiny', 'model.zip', 'torchserve_entry.py', model_version='2.0',\n"
        "    requirements_file='requirements.txt', config_file='model-config.yaml')\n"
        "print(Manifest('python', model))"
    )  # in a process of its own, for it leaves a file open
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout)
    ours = json.loads(torchserve_manifest("tiny", "2.0"))
    assert len(theirs.pop("createdOn")) == len(ours.pop("createdOn"))
    theirs["archiverVersion"] = theirs["archiverVersion"].strip()
    assert ours == theirs


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


def test_the_manifest_tells_what_it_is(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Model\n## License\nBe kind.\n# M\n"
    )
    found = manifest(build(tmp_path, "--smoke-prompt", "a tree"))
    assert found["pipeline"]["class"] == "StableDiffusionPipeline"
    unet = load_file(pipeline / UNET)
    numbers = sum(tensor.numel() for tensor in unet.values())
    assert found["pipeline"]["components"]["unet"] == {
        "class": "diffusers.UNet2DConditionModel",
        "parameters": numbers,
        "size_bytes": numbers * 4,
        "dtypes": {"F32": numbers},
    }
    assert found["licence"] == {"license": "creativeml-openrail-m", "text": "Be kind."}
    assert found["source"] == {"kind": "folder"}
    assert found["made_with"]["diffusers"] == diffusers.__version__
    assert found["smoke_prompt"] == "a tree"
    assert found["model_members"][UNET]["size_bytes"] == (pipeline / UNET).stat().st_size
    assert str(tmp_path) not in json.dumps(found)


def test_the_tools_version_is_the_projects() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert scripts.__version__ == project["version"]


def test_the_hubs_cache_is_a_source_with_a_name(tmp_path: Path) -> None:
    """Its files are links to blobs."""
    blobs = save_pipeline(tmp_path / "blobs")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc123"
    for path in blobs.rglob("*"):
        if path.is_file():
            target = snapshot / path.relative_to(blobs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    found = manifest(build(tmp_path, pipeline=snapshot))
    assert found["source"] == {"model_id": "org/name", "revision": "abc123"}


def test_downloads_a_model_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pipeline_files(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub({"org/name": HubModel(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(tmp_path / "out")]
        assert main(arguments) == DONE
        download("org/name", revision="main", out=tmp_path / "kept")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.mar"]
    mar = tmp_path / "out" / "tiny.mar"
    assert manifest(mar)["source"] == {"model_id": "org/name", "revision": REVISION}
    kept = build(tmp_path, "--force", pipeline=tmp_path / "kept")
    assert manifest(kept) == manifest(mar)


def test_a_model_whose_download_was_cut_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pipeline_files(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    out = tmp_path / "out"
    arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(out)]
    with serve_hub({"org/name": HubModel(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.cut_at_byte = 5_000
        assert main(arguments) == FAILED
        assert "run the same command to go on" in capsys.readouterr().err
        hub.cut_at_byte = None
        hub.requests.clear()
        assert main(arguments) == DONE
    assert any(wanted for _, _, wanted in hub.requests), "it goes on in the middle of a file"
    assert [path.name for path in out.iterdir()] == ["tiny.mar"]


@pytest.mark.parametrize(
    ("dtype", "is_full"),
    [(None, False), ("float16", False), ("bfloat16", True), ("float32", True)],
)
def test_a_model_is_fetched_in_the_precision_that_it_is_packed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, is_full: bool
) -> None:
    """Weights that were halved once stay coarse, whatever they are converted to."""
    files = pipeline_files(tmp_path)
    halved = {
        name.replace(".safetensors", ".fp16.safetensors"): save(
            {key: tensor.half() for key, tensor in load(data).items()}
        )
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = [] if dtype is None else ["--dtype", dtype]
    with serve_hub({"org/name": HubModel({**files, **halved})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(tmp_path), *asked]
        assert main(arguments) == DONE
    assert (UNET in hub.fetched()) == is_full
    assert (UNET.replace(".safe", ".fp16.safe") in hub.fetched()) != is_full


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
    assert _content(folder) == _content(unpacked)
    (folder / "left-over").write_bytes(b"")
    build(tmp_path, "--format", "dir", "--force")
    assert _content(folder) == _content(unpacked)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiny", "tiny.mar"]


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "heigth=512"], FAILED, "height"),
        (["--lora", "/no/run=3.x/a.safetensors"], MISUSED, "--lora /no/run="),
        (["--set", "height=7.5"], FAILED, "height"),
        (["--set", "height"], MISUSED, "--set height=: wanted NAME=VALUE"),
        (["--set", "height=8", "--set", "height=16"], MISUSED, "given twice"),
        (["--set", "height=["], FAILED, "--set height: '[' is not YAML"),
        (["--set", "height=2001-99-99"], FAILED, "--set height: '2001-99-99' is not YAML: month"),
        (["--smoke-prompt", "a\udcff"], MISUSED, "wanted text in UTF-8"),
        (["--component", "nothing=."], FAILED, "no component nothing"),
        (["--component", "vae=/nowhere"], FAILED, "the component vae has no files in /nowhere"),
        (["--lora", "/nowhere.safetensors"], FAILED, "/nowhere.safetensors: a LoRA is wanted"),
        (["--lora", "../a=b.safetensors"], MISUSED, "wanted NAME=VALUE"),
        (["--sign", "/nowhere.pem"], FAILED, "/nowhere.pem: no such key"),
        (["--config", "/nowhere.yaml"], MISUSED, "/nowhere.yaml is missing"),
        (["--name", "../a"], MISUSED, "--name '../a'"),
        (["--version", ""], MISUSED, "--version ''"),
        (["--dtype", "int8"], MISUSED, "invalid choice"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    assert main([*common, *arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.rstrip().count("\n") == 0 or "usage:" in error
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_lora_is_called_like_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run=3" / "style.v2.safetensors"
    path.parent.mkdir()
    save_file({"unet.lora.weight": torch.ones(2)}, path)
    with zipfile.ZipFile(build(tmp_path, "--lora", str(path))) as mar:
        assert "lora/style_v2.safetensors" in mar.namelist()


def test_a_name_that_is_no_text_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "unet" / "a\udcff.json").write_text("{}")
    assert main(["--pipeline", str(pipeline), "--name", "t", "--out", str(tmp_path)]) == FAILED
    error = capsys.readouterr().err
    assert "the member name" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", [b"handler: {height: 2001-99-99}", b"[" * 20_000, b"!!int x", b"!!timestamp x", b"\xff"]
)
def test_a_configuration_that_is_no_yaml_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    config = tmp_path / "own.yaml"
    config.write_bytes(text)
    pipeline = save_pipeline(tmp_path / "pipeline")
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    assert main([*common, "--config", str(config)]) == FAILED
    error = capsys.readouterr().err
    assert f"{config} is not YAML" in error
    assert error.count("\n") == 1


def test_halves_of_surrogate_pairs_stay_as_json_has_them() -> None:
    data = dump({"model_id": "a\udcff"})
    assert b"\\udcff" in data
    assert json.loads(data) == {"model_id": "a\udcff"}


def test_overwrites_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mar = build(tmp_path)
    before = mar.read_bytes()
    arguments = ["--pipeline", str(tmp_path / "pipeline"), "--name", "tiny"]
    assert main([*arguments, "--out", str(mar.parent), "--set", "height=64"]) == MISUSED
    assert "pass --force" in capsys.readouterr().err
    assert mar.read_bytes() == before
    build(tmp_path, "--set", "height=64", "--force")
    assert mar.read_bytes() != before


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
    """Weights of 400 MB, converted too; nothing of torch is imported."""
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
    for extra in ([], ["--dtype", "float16", "--force"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *common, *extra],
            check=True,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert int(done.stdout) * 1024 < 200_000_000


@pytest.mark.server
def test_torchserve_links_a_folder_serves_it_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    settings = ("num_inference_steps=2", "height=64", "width=64", "num_threads=1")
    flags = [part for setting in settings for part in ("--set", setting)]
    build(tmp_path, "--format", "dir", *flags)
    folder = tmp_path / "out" / "tiny"
    before = _content(folder)
    server = TorchServer(Options(folder, tmp_path / "run", Ports.free()), ("tiny", "1.0"))
    with server.running(timeout_s=120):
        curl = ["curl", "-sf", "-H", "Content-Type: application/json", server.predictions_url]
        done = subprocess.run([*curl, "-d", '"a tree"'], capture_output=True, check=True)
        copies = [path for path in (tmp_path / "run").rglob("model.zip") if not path.is_symlink()]
    assert done.stdout.startswith(b"\x89PNG")
    assert copies == []
    assert _content(folder) == before


@pytest.mark.slow
@pytest.mark.server
def test_torchserve_takes_members_past_four_gigabytes(tmp_path: Path) -> None:
    entry = b"""
import os
class Sizes:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.size = os.path.getsize(os.path.join(folder, "model.zip"))
    def handle(self, data, context):
        return [str(self.size)] * len(data)
"""
    zeros = bytes(4 << 20)
    num_chunks = 1025
    (tmp_path / "store").mkdir()
    archive = tmp_path / "store" / "big.mar"
    with archive.open("x+b") as file:
        writer = ZipWriter(file)
        writer.add_bytes("MAR-INF/MANIFEST.json", torchserve_manifest("big", "1.0"))
        writer.add_bytes("torchserve_entry.py", entry)
        writer.add_bytes("model-config.yaml", b"minWorkers: 1\nmaxWorkers: 1\n")
        writer.add_bytes("requirements.txt", b"")
        with writer.nested("model.zip", 5 << 30) as inner:
            inner.add("big", (zeros for _ in range(num_chunks)), num_chunks * len(zeros))
        size_bytes = writer._records[-1].size_bytes
        writer.close()
    assert size_bytes > 4 << 30
    server = TorchServer(Options(archive, tmp_path / "run", Ports.free()))
    with server.running(timeout_s=240):
        done = subprocess.run(
            ["curl", "-s", "-d", "a=b", server.predictions_url],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == str(size_bytes)
