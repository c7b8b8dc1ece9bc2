"""The checks of an archive: structure, hashes, components, versions, configuration.

Every check yields its problems as text instead of raising, so that a report names them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError, ServingError
from handler.loading.contents import (
    LORA_FOLDER,
    MODEL_INDEX,
    WEIGHTS_SUFFIX,
    check_names,
)
from handler.loading.safetensors_map import Header, parse_header
from handler.zips.reader import ZipReader
from scripts.archive.comparison import compare_with_manifest
from scripts.archive.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    installed_versions,
)
from scripts.archive.reader import ArchiveView, Reader
from scripts.console import Progress
from scripts.documents import parse_json, parse_yaml

__all__ = ["check_archive", "check_models", "read_config", "read_manifest"]


def read_manifest(view: ArchiveView) -> dict[str, Any] | None:
    """Return our manifest of an archive, None where it has none. Raises: ArchiveError."""
    if view.outer is None or MANIFEST_NAME not in view.outer.sizes:
        return None
    text = view.outer.read(MANIFEST_NAME)
    try:
        manifest = parse_json(text, MANIFEST_NAME)
    except ArchiveError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def check_archive(view: ArchiveView, report: Progress, *, is_hashed: bool = True) -> Iterator[str]:
    """Yield every problem of an archive that shows without loading its models.

    Without `is_hashed` the bytes of its members are not read.
    """
    manifest = read_manifest(view)
    if view.outer is not None:
        yield from _check_unzipping(view.outer)
        yield from _check_torchserve(view.outer)
        yield from compare_with_manifest(view, manifest, report if is_hashed else None)
    yield from _problems(lambda: read_config(view))
    yield from _problems(lambda: check_names(view.model.sizes, "the pipeline"))
    yield from _check_components(view)
    if manifest:
        yield from _check_versions(manifest)


def _problems(check: Any) -> Iterator[str]:
    try:
        check()
    except ServingError as error:
        yield str(error)


def _check_unzipping(outer: Reader) -> Iterator[str]:
    """Java reads a member as it comes, and cannot know where a stored one ends without its size."""
    if isinstance(outer, ZipReader):
        for member in outer.members.values():
            if member.is_stored and member.has_descriptor:
                yield (
                    f"{member.name} is stored with its size behind it, which TorchServe cannot "
                    "unzip; pack it again, into a file and not into a pipe"
                )


def _check_torchserve(outer: Reader) -> Iterator[str]:
    """TorchServe's own manifest must name an entry module, and only files that are there."""
    try:
        text = outer.read(TORCHSERVE_MANIFEST_NAME)
        model = parse_json(text, TORCHSERVE_MANIFEST_NAME)["model"]
        named = {key: model.get(key) for key in ("handler", "configFile", "requirementsFile")}
    except ServingError as error:
        yield str(error)
        return
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{TORCHSERVE_MANIFEST_NAME} is not a manifest of TorchServe's: {error!r}"
        return
    for key, name in named.items():
        if name is None and key == "handler":
            yield f"{TORCHSERVE_MANIFEST_NAME} names no handler"
        elif isinstance(name, str) and name.partition(":")[0] not in outer.sizes:
            yield f"{TORCHSERVE_MANIFEST_NAME} names {name} as {key}, which is missing"


def read_config(view: ArchiveView) -> HandlerConfig:
    """Return an archive's configuration, as its worker will read it. Raises: ConfigError."""
    if view.outer is None or CONFIG_NAME not in view.outer.sizes:
        return HandlerConfig()
    try:
        config = parse_yaml(view.outer.read(CONFIG_NAME), "it") or {}
        return HandlerConfig.from_mapping(config.get("handler"))
    except (ServingError, AttributeError) as error:
        raise ConfigError(f"{CONFIG_NAME}: {error}") from error


def _check_components(view: ArchiveView) -> Iterator[str]:
    """Every component must have files, and every safetensors file a header that is true."""
    try:
        components = view.index.components
    except ServingError as error:
        yield str(error)
        return
    for name in components:
        if not any(path.startswith(f"{name}/") for path in view.model.sizes):
            yield f"the component {name} of {MODEL_INDEX} has no files"
    yield from _problems(lambda: view.headers)


def _check_versions(manifest: Mapping[str, Any]) -> Iterator[str]:
    """An older library than the one it was packed with may not know its classes."""
    made_with = manifest.get("made_with")
    for name, installed in installed_versions().items():
        made = made_with.get(name) if isinstance(made_with, dict) else None
        if not isinstance(made, str) or not made:
            yield f"{MANIFEST_NAME} does not say which {name} it was made with"
            continue
        if made.split(".")[0] != installed.split(".")[0]:
            yield f"made with {name} {made}, another major version than the installed {installed}"
        elif _minor(made) > _minor(installed):
            yield f"made with {name} {made}, newer than the installed {installed}"


def _minor(version: str) -> int:
    parts = version.split(".")
    return int(parts[1]) if len(parts) > 1 and re.fullmatch("[0-9]{1,9}", parts[1]) else 0


def check_models(view: ArchiveView) -> Iterator[str]:
    """Yield what is wrong with the pipeline's models, by configurations, names and shapes.

    The models are built around tensors that have a shape and no memory: nothing is loaded.
    """
    from scripts.archive.controlnets import check_controlnets
    from scripts.archive.embeddings import check_embeddings
    from scripts.archive.model_checks import check_pipeline, check_settings
    from scripts.archive.skeleton import build_skeleton

    try:
        index, headers = view.index, view.headers
    except ServingError:
        return  # reported by check_archive
    skeleton = build_skeleton(index, view.model, headers)
    loras: dict[str, Header] = {}
    yield from _problems(lambda: loras.update(_lora_headers(view)))
    yield from check_pipeline(index, view.model.sizes, skeleton, loras)
    if skeleton.pipeline is not None:
        yield from check_controlnets(skeleton.pipeline, view.model, headers)
        yield from check_embeddings(skeleton.pipeline, headers)
    try:
        config = read_config(view)
    except ConfigError:
        return  # reported by check_archive
    if not skeleton.problems:
        yield from check_settings(skeleton, config, loras)


def _lora_headers(view: ArchiveView) -> dict[str, Header]:
    """Return the headers of the LoRAs beside the pipeline, by name. Raises: ArchiveError."""
    outer = view.outer
    if outer is None:
        return {}
    return {
        PurePosixPath(name).stem: parse_header(partial(outer.head, name), size_bytes, name)
        for name, size_bytes in outer.sizes.items()
        if name.startswith(f"{LORA_FOLDER}/") and name.endswith(WEIGHTS_SUFFIX)
    }
