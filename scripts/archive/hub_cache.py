"""Finds a model's snapshot in the hub's cache, where ``models--org--name`` holds all of them."""

from __future__ import annotations

from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX
from scripts.hints import option, to_run

__all__ = ["cache_root", "find_snapshot"]

_CACHE_PREFIX = "models--"
_SHORTEST_COMMIT = 7


def cache_root(path: Path) -> Path | None:
    """Return the root of one model's cache, where `path` is it or its folder of snapshots."""
    root = path.parent if path.name == "snapshots" else path
    is_root = root.name.startswith(_CACHE_PREFIX) and (root / "snapshots").is_dir()
    return root if is_root else None


def find_snapshot(path: Path, revision: str = "main") -> Path:
    """Return the snapshot of `revision` where `path` is the cache of a model, else `path`.

    A revision is a branch or tag that the cache knows, or a commit, of which the first letters do.
    Raises: ArchiveError, which says what the cache has.
    """
    root = cache_root(path.absolute())
    if root is None:
        return path
    model_id = root.name.removeprefix(_CACHE_PREFIX).replace("--", "/")
    whole = {each.parent.name: each.parent for each in root.glob(f"snapshots/*/{MODEL_INDEX}")}
    if not whole:
        raise ArchiveError(
            f"{path} is the hub's cache of {model_id}, which holds no whole snapshot; "
            f"{to_run('pack', model_id=model_id)} fetches it"
        )
    reference = root / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    found = [name for name in whole if name == commit]
    if not found and len(commit) >= _SHORTEST_COMMIT:
        found = [name for name in whole if name.startswith(commit)]
    if not found and revision == "main" and not reference.exists():
        found = list(whole)  # fetched by commit: there is no branch to know
    if len(found) != 1:
        raise ArchiveError(
            f"{path} is the hub's cache of {model_id}, which holds no whole snapshot of "
            f"{revision}; {option('revision')} takes one of: {', '.join(sorted(whole))}"
        )
    return whole[found[0]]
