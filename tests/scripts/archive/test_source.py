"""scripts.archive.source: where a pipeline came from."""

from __future__ import annotations

from pathlib import Path

from tests.support.archives import save_pipeline
from tests.support.packing import manifest, pack


def test_the_hubs_cache_is_a_source_with_a_name(tmp_path: Path) -> None:
    """Its files are links to blobs."""
    blobs = save_pipeline(tmp_path / "blobs")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc123"
    for path in blobs.rglob("*"):
        if path.is_file():
            target = snapshot / path.relative_to(blobs)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    found = manifest(pack(tmp_path, snapshot))
    assert found["source"] == {"model_id": "org/name", "revision": "abc123"}
