"""The checks of an archive: structure, hashes, components, versions, configuration.

Every check yields its problems as text instead of raising, so that a report names them all.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError, ServingError
from handler.loading.contents import MODEL_INDEX, MODEL_ZIP, check_names
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header
from handler.messages import first_lines
from handler.zips.reader import ZipReader
from scripts.archive.manifest import (
    CONFIG_NAME,
    FORMAT,
    MANIFEST_NAME,
    TORCHSERVE_MANIFEST_NAME,
    installed_versions,
)
from scripts.archive.reader import ArchiveView, Reader
from scripts.console import Progress
from scripts.documents import parse_json, parse_yaml

if TYPE_CHECKING:
    import torch

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


def check_archive(view: ArchiveView, report: Progress) -> Iterator[str]:
    """Yield every problem of an archive that shows without loading its models."""
    manifest = read_manifest(view)
    if view.outer is not None:
        yield from _check_unzipping(view.outer)
        yield from _check_torchserve(view.outer)
        yield from _check_manifest(view, manifest, report)
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


def _check_manifest(
    view: ArchiveView, manifest: dict[str, Any] | None, report: Progress
) -> Iterator[str]:
    if manifest is None:
        yield f"{MANIFEST_NAME} is missing: not packed by scripts.build_archive, nothing to compare"
        yield from _read_through(view.model, report)
        return
    if manifest.get("format") != FORMAT:
        yield f"{MANIFEST_NAME} has the format {manifest.get('format')!r}; known is {FORMAT}"
        return
    assert view.outer is not None
    unlisted = {MANIFEST_NAME, MODEL_ZIP}
    yield from _compare(view.outer, manifest.get("members"), unlisted, "", report)
    yield from _compare(view.model, manifest.get("model_members"), set(), "model.zip/", report)


def _read_through(reader: Reader, report: Progress) -> Iterator[str]:
    for name in reader.sizes:
        try:
            for chunk in reader.stream(name):
                report(len(chunk))
        except ServingError as error:
            yield str(error)


def _compare(
    reader: Reader, listed: object, unlisted: set[str], prefix: str, report: Progress
) -> Iterator[str]:
    """Compare names, sizes and SHA-256 of all files with what the manifest lists."""
    if not isinstance(listed, dict):
        yield f"{MANIFEST_NAME} lists no members"
        return
    present = reader.sizes.keys() - unlisted
    for name in sorted(listed.keys() - present):
        yield f"{prefix}{name} is missing"
    for name in sorted(present - listed.keys()):
        yield f"{prefix}{name} is not in the manifest"
    for name in sorted(present & listed.keys()):
        expected = listed[name]
        if not isinstance(expected, dict) or reader.sizes[name] != expected.get("size_bytes"):
            yield f"{prefix}{name} has {reader.sizes[name]} bytes, unlike in the manifest"
            continue
        digest = hashlib.sha256()
        try:
            for chunk in reader.stream(name):
                digest.update(chunk)
                report(len(chunk))
        except ServingError as error:
            yield str(error)
            continue
        if digest.hexdigest() != expected.get("sha256"):
            yield f"{prefix}{name} does not match its SHA-256 in the manifest"


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
    """Yield the components whose weights do not fit their configurations, by names and shapes.

    The models are built around tensors that have a shape and no memory: nothing is loaded.
    """
    from handler.library_logs import quiet_libraries
    from handler.loading.pipeline_class import pipeline_class

    try:
        index, headers = view.index, view.headers
    except ServingError:
        return  # reported by check_archive
    yield from _problems(lambda: pipeline_class(index))
    with tempfile.TemporaryDirectory(prefix="verify-") as folder, quiet_libraries():
        for name in index.components:
            inside = {path: head for path, head in headers.items() if path.startswith(f"{name}/")}
            try:
                _build(view.model, index, Path(folder), name, inside)
            except ServingError as error:
                yield str(error)
            except Exception as error:
                # What a library raises about a wrong configuration is of any kind.
                yield f"{name}: its weights do not fit its configuration: {first_lines(error)}"


def _build(
    model: Reader,
    index: ModelIndex,
    folder: Path,
    name: str,
    headers: Mapping[str, Header],
) -> None:
    import torch

    from handler.loading.components import (
        NotMappableError,
        build_model,
        check_vocabulary,
    )
    from handler.loading.pipeline_class import component_class
    from handler.loading.variants import select_weights

    cls = component_class(name, index)
    prefix = f"{name}/"
    inside = (path.removeprefix(prefix) for path in model.sizes if path.startswith(prefix))
    check_vocabulary(name, cls, inside)
    if not issubclass(cls, torch.nn.Module):
        return
    for path in model.sizes:
        if path.startswith(prefix) and path.endswith(".json"):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(model.read(path))
    paths, _ = select_weights(name, headers, "float16")
    try:
        build_model(cls, folder / name, _shapes(headers, paths), torch.float32)
    except NotMappableError:
        return  # the worker then loads it by diffusers' own way, which this cannot foresee


def _shapes(headers: Mapping[str, Header], paths: list[str]) -> dict[str, torch.Tensor]:
    import torch

    return {
        name: torch.empty(1, dtype=torch.float32).expand(info.shape)
        for path in paths
        for name, info in headers[path].tensors.items()
    }
