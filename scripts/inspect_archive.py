"""The command that shows what an archive holds, without unpacking it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError
from handler.loading.contents import pickled
from scripts.archive.checks import read_config, read_manifest
from scripts.archive.manifest import CONFIG_NAME, TORCHSERVE_MANIFEST_NAME, component_facts
from scripts.archive.offers import fields_of, samplers_in, tasks_of
from scripts.archive.reader import ArchiveView, open_archive
from scripts.archive.sbom import sbom
from scripts.archive.signing import signature_path
from scripts.archive.store import add_archive, chosen_archive
from scripts.command import Command
from scripts.console import DONE, printable
from scripts.documents import parse_json

__all__ = ["INSPECT", "inspect", "main"]

_EXAMPLES = """\
examples:
  %(prog)s model-store/sd.mar
  %(prog)s model-store/sd.mar --json
  %(prog)s model-store/sd.mar --sbom > sd.cdx.json
  %(prog)s upstream.mar          made by torch-model-archiver
  %(prog)s my-pipeline           a pipeline's folder

Nothing is loaded and no hash is compared: that is the command verify.
"""
_DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "scheduler")
_LIMITS = (
    *("max_prompt_chars", "max_num_inference_steps", "max_size_px", "max_pixels", "max_images"),
    *("max_rows", "max_waiting"),
)
_FORMS = {True: "archive", False: "pipeline"}


def inspect(path: Path) -> dict[str, Any]:
    """Return the facts about the archive `path`. Raises: ArchiveError."""
    with open_archive(path) as view:
        manifest = read_manifest(view) or {}
        components = component_facts(view.index, view.headers)
        num_parameters = sum(facts.get("parameters", 0) for facts in components.values())
        weights_bytes = sum(facts.get("size_bytes", 0) for facts in components.values())
        return {
            "path": str(path),
            "form": _FORMS[view.outer is not None] + (" folder" if path.is_dir() else ""),
            "size_bytes": _size(path),
            "is_signed": signature_path(path).is_file(),
            "torchserve": _torchserve(view),
            "pipeline": {
                "class": view.index.class_name,
                "parameters": num_parameters,
                "weights_bytes": weights_bytes,
                "components": components,
                "tasks": tasks_of(view),
            },
            "memory_bytes": {
                "float32": num_parameters * 4,
                "float16": num_parameters * 2,
                "as_packed": weights_bytes,
            },
            "is_mapped": _is_mapped(view),
            "pickled": pickled(view.model.sizes),
            "samplers": samplers_in(view),
            **fields_of(view, _loras(view, manifest.get("loras"))),
            **_settings(view),
            **{
                key: manifest.get(key)
                for key in (
                    *("source", "licence", "made_with", "tool", "converted_to"),
                    *("replaced_components", "loras", "controlnets", "embeddings", "settings"),
                    "smoke_prompt",
                )
            },
        }


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _is_mapped(view: ArchiveView) -> bool:
    """Say whether the worker can map the weights where TorchServe puts them."""
    from handler.zips.reader import ZipReader

    if view.place is None:
        return True
    archive, start, size_bytes = view.place
    with archive.open("rb") as file:
        members = ZipReader(file, start=start, size_bytes=size_bytes).members
    return all(each.is_stored for name, each in members.items() if name.endswith(".safetensors"))


def _torchserve(view: ArchiveView) -> dict[str, Any] | None:
    if view.outer is None or TORCHSERVE_MANIFEST_NAME not in view.outer.sizes:
        return None
    try:
        text = view.outer.read(TORCHSERVE_MANIFEST_NAME)
        model = parse_json(text, TORCHSERVE_MANIFEST_NAME)["model"]
        return {key: model.get(key) for key in ("modelName", "modelVersion", "handler")}
    except (ArchiveError, KeyError, TypeError, AttributeError):
        return None


def _loras(view: ArchiveView, packed: object) -> list[str]:
    """Return the LoRAs that a request may name; a folder on the server stands for its own."""
    names = [str(name) for name in packed] if isinstance(packed, list | dict) else []
    config = _config(view)
    folder = None if config is None else config.lora_dir
    return names if folder is None else [*names, folder]


def _config(view: ArchiveView) -> HandlerConfig | None:
    if view.outer is None or CONFIG_NAME not in view.outer.sizes:
        return None
    try:
        return read_config(view)
    except ConfigError:
        return None


def _settings(view: ArchiveView) -> dict[str, Any]:
    """Return what a request gets by default and what it may ask for at most."""
    config = _config(view)
    if config is None:
        return {"defaults": None, "limits": None, "default_loras": None}
    return {
        "defaults": {name: getattr(config, name) for name in _DEFAULTS},
        "limits": {name: getattr(config, name) for name in _LIMITS},
        "default_loras": config.default_loras,
    }


def _page(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the readable page."""
    pipeline = facts["pipeline"]
    yield f"{facts['path']}  ({facts['form']}, {_megabytes(facts['size_bytes'])})"
    if facts["torchserve"]:
        model = facts["torchserve"]
        yield _line("model", f"{model['modelName']} {model['modelVersion'] or ''}".strip())
    yield _line("pipeline", pipeline["class"])
    yield _line("parameters", f"{pipeline['parameters']:,}")
    if pipeline["tasks"]:
        yield _line("tasks", ", ".join(pipeline["tasks"]))
    yield ""
    yield "components"
    for name, each in pipeline["components"].items():
        weights = ""
        if "parameters" in each:
            dtypes = ", ".join(each["dtypes"])
            size = _megabytes(each["size_bytes"])
            weights = f"{each['parameters']:>15,}  {size:>12}  {dtypes}"
        yield f"  {name:<18} {each['class'].partition('.')[2]:<34} {weights}".rstrip()
    yield ""
    memory = facts["memory_bytes"]
    yield _line(
        "memory",
        f"weights take {_megabytes(memory['float16'])} in float16 (CUDA), "
        f"{_megabytes(memory['float32'])} in float32 (CPU)",
    )
    how = "mapped in place" if facts["is_mapped"] else "unpacked first, for they are deflated"
    yield _line("opening", f"weights are {how}")
    yield from _provenance(facts)
    for title in ("defaults", "limits"):
        if facts[title]:
            shown = [f"{key} {value}" for key, value in facts[title].items() if value is not None]
            yield _line(title, ", ".join(shown))
    for key, title in (("fields", "fields"), ("other_parameters", "not fields")):
        if facts[key]:
            yield _line(title, ", ".join(facts[key]))
    if facts["samplers"]:
        yield _line("samplers", ", ".join(facts["samplers"]))
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, sigmas in facts["samplers"].items():
            alike.setdefault(tuple(sigmas), []).append(name)
        for sigmas, names in alike.items():
            if sigmas:
                yield _line("sigmas", f"{', '.join(sigmas)} with {', '.join(names)}")
    if facts["pickled"]:
        yield _line("WARNING", f"pickled weights, which the worker refuses: {facts['pickled']}")


def _provenance(facts: Mapping[str, Any]) -> Iterator[str]:
    source = _mapping(facts["source"])
    if "model_id" in source:
        yield _line("source", f"{source['model_id']} at {source.get('revision')}")
    elif "file" in source:
        given = source.get("configuration_model_id", "a folder")
        yield _line("source", f"the single file {source['file']}, configured as {given}")
    elif source:
        yield _line("source", f"a {source.get('kind', 'folder')}")
    licence = _mapping(facts["licence"])
    if licence:
        name = licence.get("license_name") or licence.get("license")
        text = str(licence.get("text") or "").strip().split("\n")[0]
        yield _line("licence", ": ".join(str(part) for part in (name, text) if part))
    made_with = _mapping(facts["made_with"])
    if made_with:
        yield _line("made with", ", ".join(f"{name} {made_with[name]}" for name in made_with))
    for key, title in (
        ("converted_to", "converted to"),
        ("replaced_components", "replaced"),
        ("loras", "LoRAs"),
        ("controlnets", "ControlNets"),
        ("embeddings", "embeddings"),
        ("settings", "settings"),
        ("smoke_prompt", "smoke prompt"),
    ):
        value = facts[key]
        if isinstance(value, dict):
            value = [name if key != "settings" else f"{name}={value[name]}" for name in value]
        if key == "loras" and isinstance(value, list):
            value = [_lora(str(name), facts["default_loras"]) for name in value]
        if isinstance(value, list):
            value = ", ".join(str(each) for each in value)
        if value:
            yield _line(title, value)
    yield _line("signature", "beside it" if facts["is_signed"] else "none")


def _lora(name: str, defaults: Mapping[str, float] | None) -> str:
    """Say at which scale a LoRA is on without being named."""
    scale = 1.0 if defaults is None else defaults.get(name)
    return f"{name} (off)" if scale is None else name if scale == 1 else f"{name} (at {scale:g})"


def _mapping(fact: object) -> Mapping[str, Any]:
    """Return `fact`, which an archive claims, if it is one."""
    return fact if isinstance(fact, dict) else {}


def _line(title: str, text: object) -> str:
    return f"{title + ':':<14}{text}"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _run(arguments: argparse.Namespace) -> int:
    path = chosen_archive(arguments)
    if arguments.sbom:
        print(sbom(path))
        return DONE
    facts = inspect(path)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for line in _page(facts):
            print(printable(line))
    return DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_archive(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the facts as JSON")
    form.add_argument(
        "--sbom", action="store_true", help="print a bill of materials: CycloneDX, as JSON"
    )


INSPECT = Command(
    "inspect",
    "show what an archive holds, how large, from where, with which defaults",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return INSPECT.main(argv, "inspect_archive")


if __name__ == "__main__":
    sys.exit(main())
