"""Writes an archive: which members it has, and in which order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from handler.config import HandlerConfig
from handler.errors import ArchiveError
from handler.loading.contents import (
    CONTROLNET_FOLDER,
    EMBEDDING_FOLDER,
    LORA_FOLDER,
    MODEL_ZIP,
    WEIGHTS_SUFFIX,
    controlnet_names,
)
from handler.loading.embeddings import embedding_names
from handler.loading.model_index import ModelIndex
from scripts.archive.beside import beside
from scripts.archive.checkpoint import Kind, kind_of, read_checkpoint
from scripts.archive.controlnets import controlnet_files
from scripts.archive.copying import Copier
from scripts.archive.embeddings import embedding_files
from scripts.archive.fitted_settings import describe_defaults
from scripts.archive.folder_writer import FolderWriter
from scripts.archive.leading_members import leading_members
from scripts.archive.licence import find_licence
from scripts.archive.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    build_manifest,
    dump,
)
from scripts.archive.members import Member, make_member, most_zip_bytes, write_member
from scripts.archive.opening import Given, Opened, open_pipeline
from scripts.archive.packed_config import pack_config
from scripts.archive.packing_checks import check_written, examine
from scripts.archive.pipeline_files import select_files
from scripts.archive.pipeline_source import PipelineFile, file_at
from scripts.archive.precision import is_quantized
from scripts.archive.repacking import Kept
from scripts.archive.signing import sign, signature_path
from scripts.archive.source import find_source
from scripts.archive.zip_writer import Container, WrittenMember, ZipWriter
from scripts.console import Progress, atomic_output, progress
from scripts.disk import check_space
from scripts.errors import UsageError

__all__ = ["ArchivePlan", "write_archive"]


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What to pack, and under which name.

    `pipeline` is one in any form that scripts.archive.opening reads, with `revision` and
    `config_from`; where `is_repacked`, an archive whose configuration, LoRAs and options are kept.
    `settings` override keys of the configuration's ``handler:`` section; `dtype` None leaves the
    weights as they are; a component, LoRA, ControlNet or embedding that is None is left out;
    `smoke_prompt` is what scripts.verify_archive --smoke draws. Where it `is_checked`, what cannot
    be served is refused, and the model's own defaults are configured; with `is_smoke` a picture is
    drawn before the archive takes its name.
    """

    pipeline: Path
    name: str
    version: str = "1.0"
    config: Path | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    dtype: str | None = None
    components: Mapping[str, Path | None] = field(default_factory=dict)
    loras: Mapping[str, Path | None] = field(default_factory=dict)
    lora_scales: Mapping[str, float] = field(default_factory=dict)
    """At which those are on that are not on at 1."""
    controlnets: Mapping[str, Path | None] = field(default_factory=dict)
    embeddings: Mapping[str, Path | None] = field(default_factory=dict)
    smoke_prompt: str | None = None
    sign_key: Path | None = None
    is_folder: bool = False
    revision: str = "main"
    config_from: str | None = None
    is_repacked: bool = False
    is_checked: bool = True
    is_smoke: bool = False


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that goes in, in the order in which it is written, and the manifest's facts.

    `config` waits for the checks of the model, and raises what they find; its file comes last.
    """

    leading: Mapping[str, bytes]
    loras: Sequence[Member]
    model: Sequence[Member]
    index: ModelIndex
    config: Callable[[], tuple[bytes, HandlerConfig]]
    origin: Mapping[str, str]
    licence: Mapping[str, str]
    extras: Mapping[str, object]
    unconverted: Sequence[str]

    @property
    def size_bytes(self) -> int:
        """The bytes of the pipeline's files and of the LoRAs."""
        return sum(each.size_bytes for each in (*self.loras, *self.model))


def write_archive(plan: ArchivePlan, out: Path, *, force: bool = False) -> int:
    """Write the archive `out`; return the bytes of its weights and other model files.

    Says on stderr what was left out, what was not converted, and by which defaults it draws.
    Raises: ArchiveError, ConfigError, UsageError.
    """
    given = Given(
        plan.pipeline,
        plan.revision,
        plan.config_from,
        plan.dtype,
        plan.components,
        plan.is_repacked,
    )
    with open_pipeline(given, out) as opened, _contents(plan, opened) as contents:
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
        _, config = contents.config()
        print(describe_defaults(config), file=sys.stderr)


@contextmanager
def _contents(plan: ArchivePlan, opened: Opened) -> Iterator[_Contents]:
    pipeline = select_files(
        opened.source, replaced=opened.components, dtype_name=opened.dtype or "float16"
    )
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    loras = _loras(plan, opened.kept)
    if plan.lora_scales:
        scales = {name: plan.lora_scales.get(name, 1.0) for name in sorted(loras)}
        plan = replace(plan, settings={"default_loras": scales, **plan.settings})
    packed_loras = [make_member(file) for _, file in sorted(loras.items())]
    controlnets = controlnet_files(
        plan.controlnets, _kept_files(opened, CONTROLNET_FOLDER), opened.dtype or "float16"
    )
    embeddings = embedding_files(plan.embeddings, _kept_files(opened, EMBEDDING_FOLDER))
    added = controlnets | embeddings
    files = [*pipeline.files, *(added[name] for name in sorted(added))]
    model = [make_member(file, opened.dtype) for file in files]
    unconverted = () if opened.dtype is None else _unconverted(model)

    def config() -> tuple[bytes, HandlerConfig]:
        examined = None
        if plan.is_checked:
            examined = examine(pipeline.index, files, model, loras)
        return pack_config(plan.config, _kept_config(plan, opened), plan.settings, examined)

    # A picture is drawn in this process, with what the checks imported.
    with beside(config, is_slow=plan.is_checked and not plan.is_smoke) as packed_config:
        yield _Contents(
            leading=leading_members(plan.name, plan.version),
            loras=packed_loras,
            model=model,
            index=pipeline.index,
            config=packed_config,
            origin=opened.source.origin,
            licence=find_licence(opened.source.files),
            extras=_extras(
                plan,
                opened.kept,
                sorted(loras),
                controlnet_names(controlnets),
                list(embedding_names(embeddings)),
                is_converted=not unconverted,
            ),
            unconverted=unconverted,
        )


def _kept_config(plan: ArchivePlan, opened: Opened) -> tuple[Path, bytes] | None:
    """Return the configuration of the archive that is packed again, and where it is."""
    if opened.kept is None or opened.kept.config is None:
        return None
    return plan.pipeline / CONFIG_NAME, opened.kept.config


def _kept_files(opened: Opened, folder: str) -> dict[str, PipelineFile]:
    """Return the files in a folder of the archive that is packed again."""
    files = opened.source.files if opened.kept is not None else {}
    return {name: each for name, each in files.items() if name.startswith(f"{folder}/")}


def _loras(plan: ArchivePlan, kept: Kept | None) -> dict[str, PipelineFile]:
    """Return the LoRAs that are kept, and the plan's instead of those or beside them."""
    loras = dict(kept.loras) if kept is not None else {}
    for name, path in plan.loras.items():
        if path is not None:
            loras[name] = _lora(name, path)
        elif loras.pop(name, None) is None:
            raise UsageError(f"--lora {name}=none: {plan.pipeline} has no LoRA of that name")
    return loras


def _unconverted(model: Sequence[Member]) -> list[str]:
    """Name the components whose weights are quantized, which no conversion of precision changes."""
    return sorted(
        {
            each.name.partition("/")[0]
            for each in model
            if each.header is not None and is_quantized(each.header)
        }
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
        # Where they are copied while others are added, a refusal ends that at once.
        config, _ = contents.config()
    target.add(CONFIG_NAME, [config], len(config))
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


def _extras(
    plan: ArchivePlan,
    kept: Kept | None,
    loras: Sequence[str],
    controlnets: Sequence[str],
    embeddings: Sequence[str],
    *,
    is_converted: bool,
) -> dict[str, object]:
    """Return the manifest's entries about options: the plan's, else those that are kept."""
    extras = dict(kept.extras) if kept is not None else {}
    if plan.config is not None:
        extras.pop("settings", None)  # they were settings of another configuration
    if not is_converted:
        extras.pop("converted_to", None)
    replaced = {name: _origin(path) for name, path in plan.components.items()}
    for key, found in (
        ("converted_to", plan.dtype if is_converted else None),
        ("replaced_components", _merged(extras.get("replaced_components"), replaced)),
        ("loras", list(loras)),
        ("controlnets", list(controlnets)),
        ("embeddings", list(embeddings)),
        ("settings", _merged(extras.get("settings"), plan.settings)),
        ("smoke_prompt", plan.smoke_prompt),
    ):
        before = extras.pop(key, None)  # each keeps its place
        if key in ("loras", "controlnets", "embeddings") or found:
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
