"""What a model_index.json says: the pipeline's class, and the class of each component."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX
from handler.loading.documents import parse_json
from handler.messages import show, shown_name

__all__ = ["MAX_MODEL_INDEX_BYTES", "ModelIndex"]

MAX_MODEL_INDEX_BYTES = 1 << 20
LIBRARIES = ("diffusers", "transformers")
_CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """A checked model_index.json, which names nothing but known libraries' classes.

    `components` maps the components that are there to library and class; `entries` is all that
    the file says, components that are left out and options too.
    """

    class_name: str
    components: Mapping[str, tuple[str, str]]
    entries: Mapping[str, object]

    @classmethod
    def read(cls, path: Path, label: str) -> ModelIndex:
        """Read the file `path`. Raises: ArchiveError, which begins with `label`."""
        _check_size(path.stat().st_size, label)
        return cls.parse(path.read_bytes(), label)

    @classmethod
    def parse(cls, data: bytes, label: str) -> ModelIndex:
        """Parse and check the bytes of a model_index.json.

        Raises: ArchiveError, which begins with `label` and names every entry that is refused.
        """
        _check_size(len(data), label)
        entries = parse_json(data, f"{label}: {MODEL_INDEX}")
        if not isinstance(entries, dict):
            raise ArchiveError(f"{label}: {MODEL_INDEX} does not hold a JSON object")
        return cls._checked(entries, label)

    @classmethod
    def _checked(cls, entries: Mapping[str, object], label: str) -> ModelIndex:
        class_name = entries.get("_class_name")
        components: dict[str, tuple[str, str]] = {}
        problems = []
        if not isinstance(class_name, str) or not _CLASS_NAME.fullmatch(class_name):
            problems.append(
                f"_class_name is {show(class_name)}: the name of a diffusers pipeline is wanted"
            )
        for name, value in entries.items():
            if name.startswith("_") or not isinstance(value, list) or _is_option(value):
                continue
            if not _is_known_class(value) or not _CLASS_NAME.fullmatch(name):
                problems.append(
                    f"{shown_name(name)} is {show(value)}: "
                    "only classes of diffusers and transformers load"
                )
            elif value[0] is not None:
                components[name] = (value[0], value[1])
        if problems:
            raise ArchiveError(f"{label}: {MODEL_INDEX} is refused: {'; '.join(problems)}")
        return cls(str(class_name), components, entries)

    def replace(self, components: Mapping[str, tuple[str, str]], label: str) -> ModelIndex:
        """Return this index with other classes for `components`. Raises: ArchiveError."""
        changed = {name: [*library_and_class] for name, library_and_class in components.items()}
        return self._checked({**self.entries, **changed}, label)

    def dump(self) -> bytes:
        """Return the bytes of a model_index.json that says the same."""
        return (json.dumps(self.entries, indent=2, sort_keys=True) + "\n").encode()


def _check_size(size_bytes: int, label: str) -> None:
    if size_bytes > MAX_MODEL_INDEX_BYTES:
        raise ArchiveError(
            f"{label}: {MODEL_INDEX} has {size_bytes} bytes; it may have {MAX_MODEL_INDEX_BYTES}"
        )


def _is_option(value: list[object]) -> bool:
    """Say whether `value` is an option of the pipeline: several numbers, which name no class."""
    return len(value) > 2 and all(isinstance(part, int | float) for part in value)


def _is_known_class(value: list[object]) -> bool:
    """Say whether `value` is ``[library, class]`` of a library that we load from.

    Pipelines' own modules are diffusers' too: the safety checker is of ``stable_diffusion``.
    """
    if value in ([None, None], [None, None, None]):
        return True
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        return False
    library, class_name = str(value[0]), str(value[1])
    is_library = library in LIBRARIES or library in _pipeline_modules()
    return is_library and _CLASS_NAME.fullmatch(class_name) is not None


@cache
def _pipeline_modules() -> frozenset[str]:
    """Name the packages in ``diffusers.pipelines`` without paying for the import of diffusers."""
    spec = importlib.util.find_spec("diffusers")
    roots = spec.submodule_search_locations if spec else None
    folders = [Path(root, "pipelines") for root in roots or ()]
    return frozenset(
        child.parent.name for folder in folders for child in folder.glob("*/__init__.py")
    )
