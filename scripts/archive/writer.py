"""Writes an archive: which members it has, and in which order."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError
from handler.loading.contents import LORA_FOLDER, MODEL_ZIP, WEIGHTS_SUFFIX
from handler.loading.model_index import ModelIndex
from scripts.archive.checkpoint import Kind, kind_of, read_checkpoint
from scripts.archive.copying import Copier
from scripts.archive.folder_writer import FolderWriter
from scripts.archive.licence import find_licence
from scripts.archive.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    build_manifest,
    dump,
    torchserve_manifest,
)
from scripts.archive.members import Member, make_member, most_zip_bytes, write_member
from scripts.archive.opening import Given, Opened, open_pipeline
from scripts.archive.pipeline_files import select_files
from scripts.archive.pipeline_source import PipelineFile, file_at
from scripts.archive.repacking import Kept
from scripts.archive.signing import sign, signature_path
from scripts.archive.source import find_source
from scripts.archive.zip_writer import Container, WrittenMember, ZipWriter
from scripts.console import Progress, atomic_output, progress
from scripts.disk import check_space
from scripts.documents import parse_yaml
from scripts.errors import UsageError
from scripts.repository import REPOSITORY

__all__ = ["ArchivePlan", "write_archive"]

ENTRY_NAME = "torchserve_entry.py"
_REQUIRED = (
    "accelerate",
    "diffusers",
    "greenlet",
    "isal",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "torch",
    "transformers",
)


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What to pack, and under which name.

    `pipeline` is one in any form that scripts.archive.opening reads, with `revision` and
    `config_from`; where `is_repacked`, an archive whose configuration, LoRAs and options are kept.
    `settings` override keys of the configuration's ``handler:`` section; `dtype` None leaves the
    weights as they are; a component or LoRA that is None is left out; `smoke_prompt` is what
    scripts.verify_archive --smoke draws.
    """

    pipeline: Path
    name: str
    version: str = "1.0"
    config: Path | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dtype: str | None = None
    components: Mapping[str, Path | None] = field(default_factory=dict)
    loras: Mapping[str, Path | None] = field(default_factory=dict)
    smoke_prompt: str | None = None
    sign_key: Path | None = None
    is_folder: bool = False
    revision: str = "main"
    config_from: str | None = None
    is_repacked: bool = False


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that goes in, in the order in which it is written, and the manifest's facts."""

    leading: Mapping[str, bytes]
    loras: Sequence[Member]
    model: Sequence[Member]
    index: ModelIndex
    origin: Mapping[str, str]
    licence: Mapping[str, str]
    extras: Mapping[str, object]

    @property
    def size_bytes(self) -> int:
        """The bytes of the pipeline's files and of the LoRAs."""
        return sum(each.size_bytes for each in (*self.loras, *self.model))


def write_archive(plan: ArchivePlan, out: Path, *, force: bool = False) -> int:
    """Write the archive `out`; return the bytes of its weights and other model files.

    Says on stderr what was left out. Raises: ArchiveError, ConfigError, UsageError.
    """
    given = Given(
        plan.pipeline,
        plan.revision,
        plan.config_from,
        plan.dtype,
        plan.components,
        plan.is_repacked,
    )
    with open_pipeline(given, out) as opened:
        contents = _contents(plan, opened)
        _write_contents(plan, contents, out, force)
    return contents.size_bytes


def _write_contents(plan: ArchivePlan, contents: _Contents, out: Path, force: bool) -> None:
    marker = TORCHSERVE_MANIFEST_NAME if plan.is_folder else None
    with (
        atomic_output(out, force=force, marker=marker) as part,
        progress("packing", contents.size_bytes) as report,
    ):
        check_space(out, most_zip_bytes((*contents.loras, *contents.model)), "the archive")
        if plan.is_folder:
            with Copier() as copier:
                _write(FolderWriter(part, copier), plan, contents, report)
        else:
            with part.open("x+b") as file, Copier() as copier:
                writer = ZipWriter(file, copier)
                _write(writer, plan, contents, report)
                writer.close()
        if plan.sign_key is None:
            signature_path(out).unlink(missing_ok=True)
        else:
            sign(part, plan.sign_key, signature_path(part))
            os.replace(signature_path(part), signature_path(out))


def _contents(plan: ArchivePlan, opened: Opened) -> _Contents:
    pipeline = select_files(
        opened.source, replaced=opened.components, dtype_name=opened.dtype or "float16"
    )
    loras = dict(opened.kept.loras) if opened.kept is not None else {}
    for name, path in plan.loras.items():
        if path is not None:
            loras[name] = _lora(name, path)
        elif loras.pop(name, None) is None:
            raise UsageError(f"--lora {name}=none: {plan.pipeline} has no LoRA of that name")
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    return _Contents(
        leading=_leading_members(plan, opened.kept),
        loras=[make_member(file) for _, file in sorted(loras.items())],
        model=[make_member(file, opened.dtype) for file in pipeline.files],
        index=pipeline.index,
        origin=opened.source.origin,
        licence=find_licence(opened.source.files),
        extras=_extras(plan, opened.kept, sorted(loras)),
    )


def _lora(name: str, path: Path) -> PipelineFile:
    if path.suffix != WEIGHTS_SUFFIX or not path.is_file():
        raise ArchiveError(f"{path}: a LoRA is wanted as one {WEIGHTS_SUFFIX} file")
    kind = kind_of(read_checkpoint(path).tensors)
    if kind in (Kind.CHECKPOINT, Kind.CONTROLNET, Kind.EMBEDDING, Kind.VAE):
        raise ArchiveError(f"--lora {name}={path}: it is {kind.value}, not a LoRA")
    return file_at(f"{LORA_FOLDER}/{name}{WEIGHTS_SUFFIX}", path)


def _write(target: Container, plan: ArchivePlan, contents: _Contents, report: Progress) -> None:
    for name, data in contents.leading.items():
        target.add(name, [data], len(data))
    for each in contents.loras:
        write_member(target, each, report)
    with target.nested(MODEL_ZIP, most_zip_bytes(contents.model)) as inner:
        for each in contents.model:
            write_member(inner, each, report)
    members, model_members = target.finish(), inner.finish()
    _check_copied(plan.pipeline, contents.loras, members)
    _check_copied(plan.pipeline, contents.model, model_members)
    manifest = build_manifest(
        index=contents.index,
        headers={each.name: each.header for each in contents.model if each.header is not None},
        source=contents.origin,
        licence=contents.licence,
        extras=contents.extras,
        members=members,
        model_members=model_members,
    )
    data = dump(manifest)
    target.add(MANIFEST_NAME, [data], len(data))


def _check_copied(source: Path, wanted: Sequence[Member], written: Sequence[WrittenMember]) -> None:
    """Compare what was copied out of a zip with the checksums there. Raises: ArchiveError."""
    expected = {each.name: each.crc32 for each in wanted if each.crc32 is not None}
    for each in written:
        if each.crc32 != expected.get(each.name, each.crc32):
            raise ArchiveError(
                f"{source}: {each.name} is damaged: its bytes do not match its checksum"
            )


def _extras(plan: ArchivePlan, kept: Kept | None, loras: Sequence[str]) -> dict[str, object]:
    """Return the manifest's entries about options: the plan's, else those that are kept."""
    extras = dict(kept.extras) if kept is not None else {}
    if plan.config is not None:
        extras.pop("settings", None)  # they were settings of another configuration
    replaced = {name: _origin(path) for name, path in plan.components.items()}
    for key, found in (
        ("converted_to", plan.dtype),
        ("replaced_components", _merged(extras.get("replaced_components"), replaced)),
        ("loras", list(loras)),
        ("settings", _merged(extras.get("settings"), plan.settings)),
        ("smoke_prompt", plan.smoke_prompt),
    ):
        before = extras.pop(key, None)  # each keeps its place
        if key == "loras" or found:
            before = found
        if before:
            extras[key] = before
    return extras


def _merged(before: object, changes: Mapping[str, object]) -> dict[str, object]:
    old = before if isinstance(before, dict) else {}
    return dict(sorted({**old, **changes}.items()))


def _origin(path: Path | None) -> dict[str, str]:
    if path is None:
        return {"kind": "left out"}
    return {"kind": "file", "file": path.name} if path.is_file() else find_source(path)


def _leading_members(plan: ArchivePlan, kept: Kept | None) -> dict[str, bytes]:
    """Return the small members that stand before the weights, by name."""
    package = REPOSITORY / "handler"
    entry = package / ENTRY_NAME
    if not entry.is_file():
        raise ArchiveError(f"{entry} is missing: the archive's entry module")
    members = {
        TORCHSERVE_MANIFEST_NAME: torchserve_manifest(plan.name, plan.version),
        ENTRY_NAME: entry.read_bytes(),
        CONFIG_NAME: _config(plan, kept),
        "requirements.txt": _requirements(),
    }
    for path in sorted(package.rglob("*.py")):
        members[path.relative_to(REPOSITORY).as_posix()] = path.read_bytes()
    return members


def _config(plan: ArchivePlan, kept: Kept | None) -> bytes:
    """Return the configuration, checked as the worker will check it.

    Its own bytes, comments and all, unless `plan.settings` change it.
    """
    path = plan.config or REPOSITORY / "config" / CONFIG_NAME
    if plan.config is None and kept is not None and kept.config is not None:
        path, data = plan.pipeline / CONFIG_NAME, kept.config
    elif path.is_file():
        data = path.read_bytes()
    else:
        raise UsageError(f"{path} is missing: the model's configuration")
    config = parse_yaml(data, str(path)) or {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold keys and values")
    section = config.get("handler") or {}
    if plan.settings and isinstance(section, dict):
        section = {**section, **plan.settings}
        config["handler"] = section
        data = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()
    try:
        HandlerConfig.from_mapping(section)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return data


def _requirements() -> bytes:
    """Return the versions that the archive was made with, as pip reads them."""
    lines = []
    for name in _REQUIRED:
        try:
            version = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        lines.append(f"{name}=={version}\n")
    return "".join(lines).encode()
