"""The bill of materials of an archive: CycloneDX 1.6, by its own library.

Everything comes from the archive's manifest and requirements, nothing from the hour or the machine:
equal archives have equal bills. Hashes are the manifest's; whether they are right says verify.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError
from handler.loading.contents import LORA_FOLDER, MANIFEST_NAME
from scripts.archive.checks import read_manifest
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.archive.reader import ArchiveView, open_archive
from scripts.documents import parse_json

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component

__all__ = ["sbom"]

_PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;#]+)")
_PREFIX = "diffusers-torchserve"


def sbom(path: Path) -> str:
    """Return the bill of materials of the archive `path`, as JSON.

    Raises: ArchiveError, where it has no manifest of ours or the library is not installed.
    """
    try:
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError as error:
        raise ArchiveError(
            f"a bill of materials needs the extra sbom (pip install cyclonedx-python-lib): {error}"
        ) from error
    with open_archive(path) as view:
        manifest = read_manifest(view)
        if not manifest or view.outer is None:
            raise ArchiveError(
                f"{path}: {MANIFEST_NAME} is missing, which lists what is in it: pack it again"
            )
        text = JsonV1Dot6(_bill(view, manifest)).output_as_string(indent=2)
    return str(text)


def _bill(view: ArchiveView, manifest: Mapping[str, Any]) -> Bom:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.tool import ToolRepository

    assert view.outer is not None
    tool = _mapping(manifest.get("tool"))
    program = _component("application", str(tool.get("name")), version=str(tool.get("version")))
    model = _model(view, manifest)
    digest = hashlib.sha256(view.outer.read(MANIFEST_NAME)).hexdigest()
    bill = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{_PREFIX}:{digest}"),
        metadata=BomMetaData(component=model, tools=ToolRepository(components=[program])),
    )
    # The library takes the present time for none; the format does without.
    bill.metadata.timestamp = None  # type: ignore[assignment]
    parts = [*_pipeline_components(view, manifest), *_loras(manifest), _handler(manifest)]
    for each in (*parts, *_packages(view)):
        bill.components.add(each)
    bill.register_dependency(model, bill.components)
    return bill


def _model(view: ArchiveView, manifest: Mapping[str, Any]) -> Component:
    assert view.outer is not None
    entry = parse_json(view.outer.read(TORCHSERVE_MANIFEST_NAME), TORCHSERVE_MANIFEST_NAME)
    names = _mapping(_mapping(entry).get("model"))
    facts = _mapping(manifest.get("pipeline"))
    settings = {
        "pipeline-class": facts.get("class"),
        "parameters": facts.get("parameters"),
        "converted-to": manifest.get("converted_to"),
    }
    return _component(
        "machine-learning-model",
        str(names.get("modelName")),
        version=str(names.get("modelVersion")),
        ref="model",
        description=f"{facts.get('class')} of diffusers",
        properties=settings,
        licence=_mapping(manifest.get("licence")),
        source=_mapping(manifest.get("source")),
    )


def _pipeline_components(view: ArchiveView, manifest: Mapping[str, Any]) -> Iterator[Component]:
    facts = _mapping(_mapping(manifest.get("pipeline")).get("components"))
    replaced = _mapping(manifest.get("replaced_components"))
    files = _mapping(manifest.get("model_members"))
    for name in sorted({*facts, *(path.partition("/")[0] for path in files if "/" in path)}):
        each = _mapping(facts.get(name))
        inside = {path: files[path] for path in files if path.startswith(f"{name}/")}
        yield _component(
            "machine-learning-model" if "parameters" in each else "data",
            name,
            ref=f"component/{name}",
            description=str(each["class"]) if "class" in each else None,
            properties={
                "parameters": each.get("parameters"),
                "dtypes": ", ".join(_mapping(each.get("dtypes"))) or None,
            },
            files=inside,
            source=_mapping(replaced.get(name)),
        )
    loose = {path: files[path] for path in files if "/" not in path}
    yield _component("data", "pipeline", ref="component/pipeline", files=loose)


def _loras(manifest: Mapping[str, Any]) -> Iterator[Component]:
    for path, entry in _mapping(manifest.get("members")).items():
        if path.startswith(f"{LORA_FOLDER}/"):
            name = Path(path).stem
            kind = "machine-learning-model"
            yield _component(kind, name, ref=path, description="LoRA", files={path: entry})


def _handler(manifest: Mapping[str, Any]) -> Component:
    members = _mapping(manifest.get("members"))
    files = {path: members[path] for path in members if not path.startswith(f"{LORA_FOLDER}/")}
    tool = _mapping(manifest.get("tool"))
    return _component(
        "application", "handler", version=str(tool.get("version")), ref="handler", files=files
    )


def _packages(view: ArchiveView) -> Iterator[Component]:
    """Yield the Python packages that the archive was made with."""
    from packageurl import PackageURL

    assert view.outer is not None
    text = view.outer.read("requirements.txt").decode("utf-8", "replace")
    for name, version in _PINNED.findall(text):
        purl = PackageURL("pypi", name=name, version=version)
        yield _component("library", name, version=version, ref=purl.to_string(), purl=purl)


def _component(
    kind: str,
    name: str,
    *,
    version: str | None = None,
    ref: str | None = None,
    description: str | None = None,
    properties: Mapping[str, object] | None = None,
    files: Mapping[str, Any] | None = None,
    licence: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    purl: Any = None,
) -> Component:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, Property, XsUri
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    references = []
    if source and "model_id" in source:
        model_id, revision = str(source["model_id"]), str(source.get("revision"))
        namespace, _, short = model_id.rpartition("/")
        purl = PackageURL("huggingface", namespace or None, short, revision)
        uri = XsUri(f"https://huggingface.co/{model_id}/tree/{revision}")
        references.append(ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=uri))
    return Component(
        type=ComponentType(kind),
        name=name,
        version=version,
        bom_ref=ref,
        description=description,
        purl=purl,
        properties=[
            Property(name=f"{_PREFIX}:{key}", value=str(value))
            for key, value in (properties or {}).items()
            if value is not None
        ],
        licenses=_licences(licence or {}),
        external_references=references,
        components=_files(files or {}, ref or name),
    )


def _files(files: Mapping[str, Any], prefix: str) -> Iterator[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    known = {"sha256": HashAlgorithm.SHA_256, "blake3": HashAlgorithm.BLAKE3}
    for path, entry in files.items():
        hashes = [
            HashType(alg=known[key], content=str(value))
            for key, value in _mapping(entry).items()
            if key in known
        ]
        ref = f"{prefix}#{path}"
        yield Component(type=ComponentType.FILE, name=path, bom_ref=ref, hashes=hashes)


def _licences(licence: Mapping[str, Any]) -> Iterable[Any]:
    from cyclonedx.contrib.license.exceptions import InvalidSpdxLicenseException
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import AttachedText

    name = licence.get("license_name") or licence.get("license")
    text = licence.get("text")
    if not name and not text:
        return []
    attached = AttachedText(content=str(text)) if text else None
    factory = LicenseFactory()
    try:
        found = factory.make_with_id(str(name), text=attached)
    except InvalidSpdxLicenseException:
        found = factory.make_with_name(str(name or "see the text"), text=attached)
    return [found]


def _mapping(value: object) -> Mapping[str, Any]:
    """Return `value`, which an archive claims, if it is one."""
    return value if isinstance(value, dict) else {}
