"""Lays out an archive: which members, in which order; changes with what a .mar of ours holds."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from handler.errors import ArchiveError
from handler.safetensors_map import Header, read_header
from scripts.console import beside, progress
from scripts.manifest import (
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    build_manifest,
    dump,
    find_licence,
    find_source,
    torchserve_manifest,
)
from scripts.packing import most_zip_bytes, write_pipeline
from scripts.pipeline_files import PipelineFile, list_pipeline, read_model_index
from scripts.zipwriter import Written, ZipWriter

__all__ = ["ArchivePlan", "write_archive"]

_ROOT = Path(__file__).resolve().parent.parent
ENTRY_NAME = "torchserve_entry.py"
_REQUIRED = (
    "accelerate",
    "diffusers",
    "greenlet",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "torch",
    "transformers",
)


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What to pack, and under which name."""

    pipeline: Path
    name: str
    version: str = "1.0"
    config: Path | None = None


def write_archive(plan: ArchivePlan, out: Path, *, force: bool = False) -> int:
    """Write the .mar `out`; return its size in bytes. Raises: ArchiveError, UsageError."""
    files = list_pipeline(plan.pipeline)
    leading = _leading_members(plan)
    total = sum(file.size_bytes for file in files)
    with beside(out, force=force) as part, progress("packing", total) as report:
        with part.open("x+b") as file:
            writer = ZipWriter(file)
            members = [writer.add_bytes(name, data) for name, data in leading.items()]
            with writer.nested("model.zip", most_zip_bytes(files)) as inner:
                model_members = write_pipeline(inner, files, report)
            writer.add_bytes(MANIFEST_NAME, dump(_manifest(plan, files, members, model_members)))
            writer.close()
        return part.stat().st_size


def _manifest(
    plan: ArchivePlan,
    files: list[PipelineFile],
    members: list[Written],
    model_members: list[Written],
) -> dict[str, object]:
    return build_manifest(
        index=read_model_index(plan.pipeline),
        headers=_headers(files),
        source=find_source(plan.pipeline),
        licence=find_licence(plan.pipeline),
        extras={},
        members=members,
        model_members=model_members,
    )


def _headers(files: list[PipelineFile]) -> dict[str, Header]:
    headers = {}
    for each in files:
        if each.is_weights:
            with each.path.open("rb") as file:
                headers[each.name] = read_header(file, each.size_bytes, str(each.path))
    return headers


def _leading_members(plan: ArchivePlan) -> dict[str, bytes]:
    """Return the small members that stand before the weights, by name."""
    package = _ROOT / "handler"
    entry = package / ENTRY_NAME
    if not entry.is_file():
        raise ArchiveError(f"{entry} is missing: the archive's entry module")
    members = {
        TORCHSERVE_MANIFEST_NAME: torchserve_manifest(plan.name, plan.version),
        ENTRY_NAME: entry.read_bytes(),
        "model-config.yaml": _config(plan),
        "requirements.txt": _requirements(),
    }
    for path in sorted(package.rglob("*.py")):
        members[path.relative_to(_ROOT).as_posix()] = path.read_bytes()
    return members


def _config(plan: ArchivePlan) -> bytes:
    path = plan.config or _ROOT / "config" / "model-config.yaml"
    if not path.is_file():
        raise ArchiveError(f"{path} is missing: the model's configuration")
    return path.read_bytes()


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
