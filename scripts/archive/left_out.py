"""Says which files of a pipeline's source are not packed, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from handler.errors import ArchiveError
from handler.loading.contents import CODE_SUFFIXES, WEIGHTS_SUFFIX, pickled
from handler.loading.variants import select_weights, variant_of
from scripts.archive.checkpoint import Kind, kind_of_file
from scripts.archive.pipeline_source import PipelineFile
from scripts.console import printable

__all__ = ["describe_left_out", "describe_variants"]

_PICKLED = "pickled"
_CODE = "code, which is never packed"
_EMBEDDING = "embeddings (textual inversions), which are not served yet"
_VARIANT = "other variants of the weights"
_OTHER = "not read by diffusers"
_ORDER = (_PICKLED, _CODE, _EMBEDDING, _VARIANT, _OTHER)
_FULL = "full precision"


def describe_left_out(
    files: Mapping[str, PipelineFile], chosen: Collection[str], components: Iterable[str]
) -> Iterator[str]:
    """Yield one line that names all of `files` that are not `chosen`, by reason; none if none."""
    components = set(components)
    reasons: dict[str, list[str]] = {}
    for name in sorted(files.keys() - set(chosen)):
        reasons.setdefault(_reason(files[name], components), []).append(printable(name))
    if reasons:
        parts = (f"{why}: {', '.join(reasons[why])}" for why in _ORDER if why in reasons)
        yield f"left out: {'; '.join(parts)}"


def describe_variants(
    names: Iterable[str], components: Iterable[str], dtype_name: str
) -> Iterator[str]:
    """Yield a line for each choice between variants of the weights among `names`.

    It says which of the `components` the choice was made for; `dtype_name` is what was wanted.
    """
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
    choices: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for component in components:
        inside = [name for name in weights if name.startswith(f"{component}/")]
        paths, variant = select_weights(component, inside, dtype_name)
        taken = variant or ""
        found = {each for name in inside if (each := variant_of(name)) is not None}
        others = tuple(sorted(found - {taken}))
        if paths and others:
            choices.setdefault((taken, others), []).append(component)
    for (taken, others), chosen in sorted(choices.items()):
        has_full = taken and "" in others
        hint = "; --dtype float32 (DTYPE=float32) takes full precision" if has_full else ""
        left = " and ".join(each or _FULL for each in others)
        yield f"weights of {', '.join(chosen)}: {taken or _FULL} taken, {left} left out{hint}"


def _reason(file: PipelineFile, components: Collection[str]) -> str:
    if pickled([file.name]):
        return _PICKLED
    if file.name.lower().endswith(CODE_SUFFIXES):
        return _CODE
    if file.name.endswith(WEIGHTS_SUFFIX):
        if file.name.partition("/")[0] in components and variant_of(file.name) is not None:
            return _VARIANT
        if _is_embedding(file):
            return _EMBEDDING
    return _OTHER


def _is_embedding(file: PipelineFile) -> bool:
    try:
        return kind_of_file(file) is Kind.EMBEDDING
    except ArchiveError:
        return False
