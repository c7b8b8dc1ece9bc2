"""The JSON documents of an archive's OCI image: configuration, manifests, index.

Layers are the same for all processors, so the index lists one manifest for each of `PLATFORMS`,
which differ by their configuration only: a runtime takes an image for its own processor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import ArchiveError
from scripts.archive.tar_layer import TarLayer
from scripts.documents import parse_json
from scripts.errors import RegistryError
from scripts.registry.client import INDEX_TYPE, MANIFEST_TYPE, Manifest, digest_of

__all__ = ["Descriptor", "ImageDocuments", "build_documents", "layers_of", "manifest_of"]

PLATFORMS = ("amd64", "arm64")
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
RECIPE_MARK = "diffusers-torchserve.recipe"
_TITLE = "org.opencontainers.image.title"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob that a manifest lists."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImageDocuments:
    """What is stored beside the layers; the index is what has the tag."""

    configs: Sequence[bytes]
    manifests: Sequence[Manifest]
    index: Manifest


def build_documents(layers: Sequence[TarLayer], annotations: Mapping[str, str]) -> ImageDocuments:
    """Return the documents of an image of `layers`, the last one with the recipe."""
    descriptors = [_layer(layer, is_last=layer is layers[-1]) for layer in layers]
    configs, manifests, listed = [], [], []
    for architecture in PLATFORMS:
        config = _dump(
            {
                "architecture": architecture,
                "os": "linux",
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            }
        )
        manifest = Manifest(
            _dump(
                {
                    "schemaVersion": 2,
                    "mediaType": MANIFEST_TYPE,
                    "config": _descriptor(CONFIG_TYPE, digest_of(config), len(config)),
                    "layers": descriptors,
                    "annotations": dict(annotations),
                }
            ),
            MANIFEST_TYPE,
        )
        entry = _descriptor(MANIFEST_TYPE, manifest.digest, len(manifest.data))
        listed.append({**entry, "platform": {"architecture": architecture, "os": "linux"}})
        configs.append(config)
        manifests.append(manifest)
    index = _dump(
        {
            "schemaVersion": 2,
            "mediaType": INDEX_TYPE,
            "manifests": listed,
            "annotations": dict(annotations),
        }
    )
    return ImageDocuments(configs, manifests, Manifest(index, INDEX_TYPE))


def _layer(layer: TarLayer, *, is_last: bool) -> dict[str, Any]:
    names = list(layer.files)
    title = RECIPE_MARK if is_last else names[0] if len(names) == 1 else f"{len(names)} files"
    notes = {_TITLE: title} | ({RECIPE_MARK: "1"} if is_last else {})
    return {**_descriptor(LAYER_TYPE, layer.digest, layer.size_bytes), "annotations": notes}


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size_bytes}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_of(index: Manifest, label: str) -> str | None:
    """Return the digest of a manifest that `index` lists, None where it is a manifest itself.

    Raises: RegistryError, where it is neither.
    """
    document = _parse(index, label)
    if isinstance(document.get("layers"), list):
        return None
    for entry in document.get("manifests") or ():
        if isinstance(entry, dict) and entry.get("mediaType") == MANIFEST_TYPE:
            return _checked(entry, label).digest
    raise RegistryError(f"{label}: it is {index.media_type or 'something'}, not an image")


def layers_of(manifest: Manifest, label: str) -> list[Descriptor]:
    """Return the layers of an archive's image, the one with the recipe last.

    Raises: RegistryError, where it is another image.
    """
    layers = _parse(manifest, label).get("layers")
    entries = [each for each in layers if isinstance(each, dict)] if layers else []
    notes = entries[-1].get("annotations") if entries else None
    if not isinstance(notes, dict) or RECIPE_MARK not in notes:
        raise RegistryError(f"{label}: it is an image, but not of an archive that was pushed here")
    return [_checked(entry, label) for entry in entries]


def _parse(manifest: Manifest, label: str) -> dict[str, Any]:
    try:
        document = parse_json(manifest.data, label, is_strict=True)
    except ArchiveError as error:
        raise RegistryError(f"its manifest: {error}") from error
    if not isinstance(document, dict):
        raise RegistryError(f"{label}: its manifest does not hold keys and values")
    return document


def _checked(entry: Mapping[str, Any], label: str) -> Descriptor:
    digest, size_bytes = entry.get("digest"), entry.get("size")
    is_size = isinstance(size_bytes, int) and not isinstance(size_bytes, bool) and size_bytes >= 0
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not is_size:
        raise RegistryError(f"{label}: its manifest lists {digest!r} of {size_bytes!r} bytes")
    assert isinstance(size_bytes, int)
    return Descriptor(digest, size_bytes)
