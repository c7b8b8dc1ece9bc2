"""Writes an archive: which members it has, and in which order."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError
from handler.loading.contents import LORA_FOLDER, MODEL_ZIP
from handler.loading.model_index import ModelIndex
from scripts.archive.copying import Copier
from scripts.archive.fitted_settings import describe_defaults, fit_settings, with_settings
from scripts.archive.folder_writer import FolderWriter
from scripts.archive.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    build_manifest,
    dump,
    torchserve_manifest,
)
from scripts.archive.members import Member, make_member, most_zip_bytes, write_member
from scripts.archive.packing_checks import Examined, check_written, examine
from scripts.archive.pipeline_files import PipelineFile, list_pipeline
from scripts.archive.precision import is_quantized
from scripts.archive.signing import sign, signature_path
from scripts.archive.source import find_licence, find_source
from scripts.archive.zip_writer import Container, ZipWriter
from scripts.console import Progress, atomic_output, progress
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

    `settings` override keys of the configuration's ``handler:`` section; `dtype` None leaves the
    weights as they are; `smoke_prompt` is what scripts.verify_archive --smoke draws. Where it
    `is_checked`, what cannot be served is refused, and the model's own defaults are configured;
    with `is_smoke` a picture is drawn before the archive takes its name.
    """

    pipeline: Path
    name: str
    version: str = "1.0"
    config: Path | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dtype: str | None = None
    components: Mapping[str, Path] = field(default_factory=dict)
    loras: Mapping[str, Path] = field(default_factory=dict)
    smoke_prompt: str | None = None
    sign_key: Path | None = None
    is_folder: bool = False
    is_checked: bool = True
    is_smoke: bool = False


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that goes in, in the order in which it is written."""

    leading: Mapping[str, bytes]
    loras: Sequence[Member]
    model: Sequence[Member]
    index: ModelIndex
    config: HandlerConfig
    unconverted: Sequence[str]


def write_archive(plan: ArchivePlan, out: Path, *, force: bool = False) -> int:
    """Write the archive `out`; return the bytes of its weights and other model files.

    Says on stderr by which defaults it draws. Raises: ArchiveError, ConfigError, UsageError.
    """
    contents = _contents(plan)
    total = sum(each.size_bytes for each in (*contents.loras, *contents.model))
    marker = TORCHSERVE_MANIFEST_NAME if plan.is_folder else None
    with (
        atomic_output(out, force=force, marker=marker) as part,
        progress("packing", total) as report,
    ):
        if plan.is_folder:
            with Copier() as copier:
                _write(FolderWriter(part, copier), plan, contents, report)
        else:
            with part.open("x+b") as file, Copier() as copier:
                writer = ZipWriter(file, copier)
                _write(writer, plan, contents, report)
                writer.close()
        if plan.is_checked:
            check_written(part, is_smoke=plan.is_smoke)
        if plan.sign_key is None:
            signature_path(out).unlink(missing_ok=True)
        else:
            sign(part, plan.sign_key, signature_path(part))
            os.replace(signature_path(part), signature_path(out))
    if contents.unconverted:
        names = ", ".join(contents.unconverted)
        print(f"not converted, for it is quantized: {names}", file=sys.stderr)
    if plan.is_checked:
        print(describe_defaults(contents.config), file=sys.stderr)
    return total


def _contents(plan: ArchivePlan) -> _Contents:
    pipeline = list_pipeline(
        plan.pipeline, replaced=plan.components, dtype_name=plan.dtype or "float16"
    )
    loras = [
        PipelineFile(f"{LORA_FOLDER}/{name}.safetensors", path, _size(path))
        for name, path in sorted(plan.loras.items())
    ]
    packed_loras = [make_member(file) for file in loras]
    model = [make_member(file, plan.dtype) for file in pipeline.files]
    examined = None
    if plan.is_checked:
        examined = examine(pipeline.index, pipeline.files, model, packed_loras)
    data, config = _config(plan, examined)
    return _Contents(
        leading=_leading_members(plan, data),
        loras=packed_loras,
        model=model,
        index=pipeline.index,
        config=config,
        unconverted=() if plan.dtype is None else _unconverted(model),
    )


def _unconverted(model: Sequence[Member]) -> list[str]:
    """Name the components whose weights are quantized, which no conversion of precision changes."""
    return sorted(
        {
            each.name.partition("/")[0]
            for each in model
            if each.header is not None and is_quantized(each.header)
        }
    )


def _size(path: Path) -> int:
    if path.suffix != ".safetensors" or not path.is_file():
        raise ArchiveError(f"{path}: a LoRA is wanted as one .safetensors file")
    return path.stat().st_size


def _write(target: Container, plan: ArchivePlan, contents: _Contents, report: Progress) -> None:
    for name, data in contents.leading.items():
        target.add(name, [data], len(data))
    for each in contents.loras:
        write_member(target, each, report)
    with target.nested(MODEL_ZIP, most_zip_bytes(contents.model)) as inner:
        for each in contents.model:
            write_member(inner, each, report)
    manifest = build_manifest(
        index=contents.index,
        headers={each.name: each.header for each in contents.model if each.header is not None},
        source=find_source(plan.pipeline),
        licence=find_licence(plan.pipeline),
        extras=_extras(plan, contents.unconverted),
        members=target.finish(),
        model_members=inner.finish(),
    )
    data = dump(manifest)
    target.add(MANIFEST_NAME, [data], len(data))


def _extras(plan: ArchivePlan, unconverted: Collection[str]) -> dict[str, object]:
    extras: dict[str, object] = {}
    if plan.dtype is not None and not unconverted:
        extras["converted_to"] = plan.dtype
    if plan.components:
        extras["replaced_components"] = {
            name: find_source(folder) for name, folder in sorted(plan.components.items())
        }
    if plan.loras:
        extras["loras"] = sorted(plan.loras)
    if plan.settings:
        extras["settings"] = dict(sorted(plan.settings.items()))
    if plan.smoke_prompt is not None:
        extras["smoke_prompt"] = plan.smoke_prompt
    return extras


def _leading_members(plan: ArchivePlan, config: bytes) -> dict[str, bytes]:
    """Return the small members that stand before the weights, by name."""
    package = REPOSITORY / "handler"
    entry = package / ENTRY_NAME
    if not entry.is_file():
        raise ArchiveError(f"{entry} is missing: the archive's entry module")
    members = {
        TORCHSERVE_MANIFEST_NAME: torchserve_manifest(plan.name, plan.version),
        ENTRY_NAME: entry.read_bytes(),
        CONFIG_NAME: config,
        "requirements.txt": _requirements(),
    }
    for path in sorted(package.rglob("*.py")):
        members[path.relative_to(REPOSITORY).as_posix()] = path.read_bytes()
    return members


def _config(plan: ArchivePlan, examined: Examined | None) -> tuple[bytes, HandlerConfig]:
    """Return the configuration file, and what it says, checked as the worker will check it.

    Its own bytes, comments and all, but for what `plan.settings` and the model's defaults change.
    """
    path = plan.config or REPOSITORY / "config" / CONFIG_NAME
    if not path.is_file():
        raise UsageError(f"{path} is missing: the model's configuration")
    data = path.read_bytes()
    config = parse_yaml(data, str(path)) or {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold keys and values")
    section = config.get("handler") or {}
    if isinstance(section, dict):
        defaults = {} if examined is None else examined.defaults
        is_chosen = plan.config is not None
        changes = fit_settings(section, plan.settings, defaults, is_chosen=is_chosen)
        data, section = with_settings(data, changes), {**section, **changes}
    try:
        handler = HandlerConfig.from_mapping(section)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if examined is not None:
        examined.check_settings(handler)
    return data, handler


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
