"""Archives of a tiny Stable Diffusion: packed, unpacked, changed and signed for."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from scripts.archive.manifest import MANIFEST_NAME
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.archive.zip_writer import ZipWriter
from scripts.build_archive import main as build_archive
from scripts.console import DONE
from tests.support.archives import save_pipeline

UNET = "unet/diffusion_pytorch_model.safetensors"


def pack(tmp_path: Path, pipeline: Path | None = None, **options: Any) -> Path:
    """Pack `pipeline`, else a tiny Stable Diffusion, as tiny.mar or as a folder of that name.

    Unchecked, with the project's own defaults, unless `options` say otherwise.
    """
    pipeline = pipeline or save_pipeline(tmp_path / "pipeline")
    out = tmp_path / "tiny.mar"
    options = {"is_checked": False, **options}
    write_archive(ArchivePlan(pipeline, "tiny", **options), out, force=True)
    return out


def build(tmp_path: Path, *arguments: str, pipeline: Path | None = None) -> Path:
    """Pack a tiny Stable Diffusion as tmp_path/out/tiny.mar, by the command."""
    if pipeline is None:
        pipeline = tmp_path / "pipeline"
        if not pipeline.exists():
            save_pipeline(pipeline)
    out = tmp_path / "out"
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(out)]
    assert build_archive([*common, *arguments]) == DONE
    return out / "tiny.mar"


def zip_folder(folder: Path, out: Path) -> Path:
    """Zip `folder` as Python does."""
    shutil.make_archive(str(out.with_suffix("")), "zip", folder)
    return out


def unpack(mar: Path, folder: Path) -> Path:
    """Unpack an archive as TorchServe does."""
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(folder)
    return folder


def manifest(mar: Path) -> dict[str, Any]:
    """Our manifest of an archive."""
    with zipfile.ZipFile(mar) as archive:
        found: dict[str, Any] = json.loads(archive.read(MANIFEST_NAME))
        return found


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files below `folder`, by their paths in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def edit_json(name: str, edit: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    """A change for `rewrite`: `edit` the value in the member `name`."""

    def change(files: dict[str, bytes]) -> None:
        value = json.loads(files[name])
        edit(value)
        files[name] = json.dumps(value).encode()

    return change


def in_old_form(mar: Path) -> Path:
    """Give an archive the manifest that it would have had in the first form: with SHA-256."""

    def change(files: dict[str, bytes]) -> None:
        found = json.loads(files[MANIFEST_NAME])
        with zipfile.ZipFile(io.BytesIO(files["model.zip"])) as model:
            bytes_of = {"members": files.__getitem__, "model_members": model.read}
            for key, read in bytes_of.items():
                for name, entry in found[key].items():
                    del entry["blake3"]
                    entry["sha256"] = hashlib.sha256(read(name)).hexdigest()
        found["format"] = 1
        files[MANIFEST_NAME] = json.dumps(found).encode()

    return rewrite(mar, change)


def move_and_link(folder: Path, name: str) -> None:
    """Move a file or folder of `folder` out of it, and link it there."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def make_keys(folder: Path) -> tuple[Path, Path]:
    """Make a pair of keys; return the private one and the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "private.pem", folder / "public.pem"
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, info))
    return private, public
