"""The manifests of an archive: TorchServe's, and our own beside it.

``MAR-INF/PIPELINE.json`` says what every member's bytes must be and what the pipeline is. It holds
nothing of the machine, the hour or the user that packed it: equal inputs give equal manifests.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from handler.loading.contents import MANIFEST_NAME
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header
from scripts import __version__
from scripts.archive.zip_writer import WrittenMember

__all__ = [
    "ARCHIVE_ROOT",
    "CONFIG_NAME",
    "FORMAT",
    "KNOWN_FORMATS",
    "MANIFEST_NAME",
    "TORCHSERVE_MANIFEST_NAME",
    "build_manifest",
    "component_facts",
    "dump",
    "installed_versions",
    "torchserve_manifest",
]

ARCHIVE_ROOT = "MAR-INF"
TORCHSERVE_MANIFEST_NAME = f"{ARCHIVE_ROOT}/MANIFEST.json"
CONFIG_NAME = "model-config.yaml"
FORMAT = 2
KNOWN_FORMATS = (1, FORMAT)  # the first has SHA-256 where this one has BLAKE3


def dump(value: object) -> bytes:
    """Return `value` as JSON that is the same every time."""
    # Halves of surrogate pairs, which a hub may have sent, stay escaped as JSON has them.
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"{text}\n".encode("utf-8", "backslashreplace")


def torchserve_manifest(name: str, version: str) -> bytes:
    """Return TorchServe's MANIFEST.json as torch-model-archiver 0.12 writes it, at a fixed time."""
    return dump(
        {
            "createdOn": "01/01/1980 00:00:00",
            "runtime": "python",
            "model": {
                "modelName": name,
                "serializedFile": "model.zip",
                "handler": "torchserve_entry.py",
                "modelVersion": version,
                "requirementsFile": "requirements.txt",
                "configFile": CONFIG_NAME,
            },
            "archiverVersion": "0.12.0",
        }
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that load a pipeline, without their build tags."""
    return {
        name: importlib.metadata.version(name).partition("+")[0]
        for name in ("diffusers", "torch", "transformers")
    }


def component_facts(index: ModelIndex, headers: Mapping[str, Header]) -> dict[str, dict[str, Any]]:
    """Return class, parameters, bytes and dtypes of every component.

    `headers` are those of the packed safetensors files, by their path in the pipeline.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name, (library, class_name) in index.components.items():
        facts[name] = {"class": f"{library}.{class_name}"}
        infos = [
            info
            for path, header in headers.items()
            if path.startswith(f"{name}/")
            for info in header.tensors.values()
        ]
        if infos:
            dtypes: Counter[str] = Counter()
            for info in infos:
                dtypes[info.dtype] += info.num_values
            facts[name]["parameters"] = sum(dtypes.values())
            facts[name]["size_bytes"] = sum(info.end - info.start for info in infos)
            facts[name]["dtypes"] = dict(sorted(dtypes.items()))
    return facts


def build_manifest(
    *,
    index: ModelIndex,
    headers: Mapping[str, Header],
    source: Mapping[str, str],
    licence: Mapping[str, str],
    extras: Mapping[str, object],
    members: Sequence[WrittenMember],
    model_members: Sequence[WrittenMember],
) -> dict[str, Any]:
    """Put the manifest together."""
    components = component_facts(index, headers)
    return {
        "format": FORMAT,
        "tool": {"name": "diffusers-torchserve", "version": __version__},
        "pipeline": {
            "class": index.class_name,
            "parameters": sum(facts.get("parameters", 0) for facts in components.values()),
            "components": components,
        },
        "source": dict(source),
        "licence": dict(licence),
        "made_with": installed_versions(),
        **extras,
        "members": _listed(members),
        "model_members": _listed(model_members),
    }


def _listed(members: Iterable[WrittenMember]) -> dict[str, dict[str, Any]]:
    return {
        member.name: {"size_bytes": member.size_bytes, "blake3": member.blake3}
        for member in members
    }
