"""scripts.verify_archive: a whole archive passes, and every kind of damage is named."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from safetensors.torch import load_file, save_file

from handler.errors import ArchiveError
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.archive.zip_writer import ZipWriter
from scripts.console import DONE, FAILED, MISUSED
from scripts.verify_archive import main, verify
from tests.support.archives import save_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


def pack(tmp_path: Path, pipeline: Path | None = None, **options: Any) -> Path:
    """Pack a tiny Stable Diffusion."""
    pipeline = pipeline or save_pipeline(tmp_path / "pipeline")
    out = tmp_path / "tiny.mar"
    write_archive(ArchivePlan(pipeline, "tiny", **options), out, force=True)
    return out


def keys(folder: Path) -> tuple[Path, Path]:
    """Make a pair of keys; return the private one and the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "private.pem", folder / "public.pem"
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public


def rewrite(mar: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Write an archive again with changed members."""
    with zipfile.ZipFile(mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with mar.open("w+b") as file:
        writer = ZipWriter(file)
        for name, data in files.items():
            writer.add_bytes(name, data)
        writer.close()
    return mar


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


@pytest.mark.parametrize("family", ["flux", "stable_diffusion_3", "sana", "kandinsky_2_2"])
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
    data[data.index(b"minWorkers")] ^= 1
    mar.write_bytes(data)
    assert main([str(mar), "--json"]) == FAILED
    assert json.loads(capsys.readouterr().out)["is_whole"] is False
    assert main([str(mar)]) == FAILED
    error = capsys.readouterr().err
    assert "model-config.yaml is damaged" in error
    assert error.endswith("problems\n")


def _edit_json(name: str, edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        value = json.loads(files[name])
        edit(value)
        files[name] = json.dumps(value).encode()

    return change


PIPELINE, TORCHSERVE = "MAR-INF/PIPELINE.json", "MAR-INF/MANIFEST.json"


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
        (_edit_json(PIPELINE, lambda value: value.update(format=9)), "has the format 9"),
        (_edit_json(PIPELINE, lambda value: value.pop("members")), "lists no members"),
        (
            _edit_json(PIPELINE, lambda value: value["made_with"].update(torch="99.0")),
            "made with torch 99.0, another major version",
        ),
        (
            _edit_json(PIPELINE, lambda value: value["made_with"].update(diffusers="0.99.0")),
            "made with diffusers 0.99.0, newer than the installed",
        ),
        (
            _edit_json(PIPELINE, lambda value: value["made_with"].pop("transformers")),
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
            "requirements.txt does not match its SHA-256",
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
    change = _edit_json(PIPELINE, lambda value: value["made_with"].update(torch=f"{major}.\u00b2"))
    assert verify(rewrite(pack(tmp_path), change)) == []


def test_what_a_terminal_would_obey_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = _edit_json(TORCHSERVE, lambda value: value["model"].update(handler="\x1b[2J"))
    assert main([str(rewrite(pack(tmp_path), change))]) == FAILED
    error = capsys.readouterr().err
    assert "names \ufffd[2J as handler" in error
    assert "\x1b" not in error


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    def change(files: dict[str, bytes]) -> None:
        files["extra"] = b""
        files["requirements.txt"] = b"evil"
        files.pop("torchserve_entry.py")
        _edit_json(PIPELINE, lambda value: value["made_with"].update(torch="99.0"))(files)

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
    expected = f"model.zip/{UNET} does not match its SHA-256 in the manifest"
    assert verify(mar) == [expected]


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


def test_members_that_only_torchserve_would_see_are_named(tmp_path: Path) -> None:
    """It reads local headers one after the other, and the last of two of a name stays."""
    mar = pack(tmp_path)
    data = mar.read_bytes()
    with zipfile.ZipFile(mar) as archive:
        directory = archive.start_dir
        offset = archive.getinfo("torchserve_entry.py").header_offset
        end = min(i.header_offset for i in archive.infolist() if i.header_offset > offset)
    forged = bytearray(data[:directory] + data[offset:end] + data[directory:])
    struct.pack_into("<L", forged, forged.rindex(b"PK\5\6") + 16, directory + end - offset)
    mar.write_bytes(forged)
    assert "not belong to a member" in "".join(verify(mar))


def _move_and_link(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def _hide(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: _move_and_link(f, "model-config.yaml"), "refused in an archive: model-config"),
        (lambda f: _move_and_link(f, "handler"), "refused in an archive: handler"),
        (lambda f: (f / "greenlet").symlink_to(f.parent / "pipeline"), "in an archive: greenlet"),
        (lambda f: (f / "x").symlink_to("nowhere"), "refused in an archive: x"),
        (lambda f: os.mkfifo(f / "pipe"), "refused in an archive: pipe"),
        (lambda f: _hide(f / "handler/.x.bin"), "handler/.x.bin is not in the manifest"),
        (lambda f: _hide(f / ".hidden/x.pkl"), ".hidden/x.pkl is not in the manifest"),
        (lambda f: _hide(f / "model_index.json"), "model_index.json is not in the manifest"),
        (lambda f: _move_and_link(f, "MAR-INF/MANIFEST.json"), "in an archive: MAR-INF/MANIFEST"),
    ],
)
def test_links_and_hidden_files_of_a_folder_are_named(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = pack(tmp_path, is_folder=True)
    damage(folder)
    problems = verify(folder)
    assert any(words in problem for problem in problems), problems


def test_a_pipeline_of_the_hubs_cache_is_links(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    _move_and_link(pipeline, UNET)
    assert verify(pipeline) == []
    assert verify(pack(tmp_path, pipeline, is_folder=True)) == []


def test_truncation_is_named(tmp_path: Path) -> None:
    mar = pack(tmp_path)
    mar.write_bytes(mar.read_bytes()[:-100])
    assert "cut off" in verify(mar)[0]


def edit_index(pipeline: Path, **changes: object) -> None:
    """Change entries of model_index.json; None removes one."""
    path = pipeline / "model_index.json"
    index = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def _zip_folder(folder: Path, out: Path) -> Path:
    shutil.make_archive(str(out.with_suffix("")), "zip", folder)
    return out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "unet" / "x.bin").write_bytes(b""), "pickled weights are refused"),
        (lambda p: (p / "unet" / "x.py").write_bytes(b""), "code in a pipeline is refused"),
        (lambda p: shutil.rmtree(p / "scheduler"), "the component scheduler of model_index.json"),
        (lambda p: (p / "unet/config.json").write_text("{}"), "unet: "),
        (lambda p: (p / "unet/config.json").write_text('{"layers_per_block": "x"}'), "unet: "),
        (lambda p: (p / "vae/config.json").write_text("{"), "vae: "),
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
    problems = verify(_zip_folder(pipeline, tmp_path / "bad.zip"))
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


def test_a_pipeline_that_draws_nothing_fails_the_smoke_test(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    mar = pack(tmp_path, pipeline)
    assert verify(mar) == []
    assert verify(mar, is_smoke=True) == ["the picture has one colour only"]


def test_a_bare_zip_draws(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    assert verify(_zip_folder(pipeline, tmp_path / "pipeline.zip"), is_smoke=True) == []


@pytest.mark.parametrize(
    ("folder", "words"), [("model", "PIPELINE.json is missing"), ("pipe", "no worker looks")]
)
def test_a_pipeline_must_lie_where_the_worker_looks(
    tmp_path: Path, folder: str, words: str
) -> None:
    def unzip_inside(files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(io.BytesIO(files.pop("model.zip"))) as inner:
            files.update({f"{folder}/{name}": inner.read(name) for name in inner.namelist()})
        del files["MAR-INF/PIPELINE.json"]

    (problem,) = verify(rewrite(pack(tmp_path), unzip_inside))
    assert words in problem


def test_the_packed_configuration_is_tried(tmp_path: Path) -> None:
    mar = pack(tmp_path, settings={"scheduler": "nonsense", "device": "cuda"})
    (problem,) = verify(mar, is_smoke=True)
    assert "scheduler: 'nonsense' is not one of" in problem


@pytest.mark.parametrize("settings", [{"scheduler": "euler"}, {"scheduler": "pndm"}, {}])
def test_the_smoke_picture_has_the_steps_that_its_scheduler_needs(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """PNDM's Runge-Kutta start takes more steps than two."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "skip_prk_steps": False}))
    assert verify(pack(tmp_path, pipeline, settings=settings), is_smoke=True) == []


def test_a_key_of_another_kind_signs_nothing(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private = tmp_path / "private.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(ArchiveError, match=r"does not sign: .* make a key with"):
        pack(tmp_path, sign_key=private)
    assert not (tmp_path / "tiny.mar").exists()


def test_signatures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = keys(tmp_path / "other")
    mar = pack(tmp_path, sign_key=private)
    assert main([str(mar), "--key", str(public)]) == DONE
    assert "Key mismatch" in verify(mar, key=other)[0]

    data = bytearray(mar.read_bytes())
    struct.pack_into("<H", data, data.rindex(b"PK\1\2") + 12, 1)  # a time, which no hash covers
    mar.write_bytes(data)
    assert verify(mar) == []
    assert "does not match" in verify(mar, key=public)[0]

    signature = tmp_path / "tiny.mar.sig"
    signature.write_text("{")
    assert "does not match" in verify(mar, key=public)[0]
    signature.unlink()
    assert "is missing: the archive is not signed" in verify(mar, key=public)[0]
    assert "no such key" in verify(mar, key=tmp_path / "none.pem")[0]


def test_a_new_unsigned_archive_has_no_old_signature(tmp_path: Path) -> None:
    private, _ = keys(tmp_path)
    pack(tmp_path, sign_key=private)
    assert (tmp_path / "tiny.mar.sig").exists()
    pack(tmp_path, tmp_path / "pipeline")
    assert not (tmp_path / "tiny.mar.sig").exists()


def test_a_folder_is_signed_too(tmp_path: Path) -> None:
    private, public = keys(tmp_path)
    folder = pack(tmp_path, sign_key=private, is_folder=True)
    assert verify(folder, key=public) == []
    (folder / "requirements.txt").write_text("evil")
    assert "does not match" in verify(folder, key=public)[0]
