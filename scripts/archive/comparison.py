"""Compares an archive's files with what its manifest says of them: names, sizes, hashes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from handler.errors import ServingError
from handler.loading.contents import MODEL_ZIP
from handler.loading.digests import listed_digest
from scripts.archive.manifest import KNOWN_FORMATS, MANIFEST_NAME
from scripts.archive.reader import ArchiveView, Reader
from scripts.console import Progress

__all__ = ["compare_with_manifest"]

_CHUNK_BYTES = 256 << 10  # stays in a core's own cache
_MOST_AT_ONCE = 4


def compare_with_manifest(
    view: ArchiveView, manifest: Mapping[str, Any] | None, report: Progress | None
) -> Iterator[str]:
    """Yield where an archive is not as its `manifest` says.

    Bytes are read, several files at once, where there is somebody to `report` to. Without a
    manifest that is for the checksums of the zip.
    """
    if manifest is None:
        yield f"{MANIFEST_NAME} is missing: not packed by scripts.build_archive, nothing to compare"
        if report is not None:
            yield from _read_all(view.model, dict.fromkeys(view.model.sizes), "", report)
        return
    if manifest.get("format") not in KNOWN_FORMATS:
        known = ", ".join(map(str, KNOWN_FORMATS))
        yield f"{MANIFEST_NAME} has the format {manifest.get('format')!r}; known are {known}"
        return
    assert view.outer is not None
    unlisted = {MANIFEST_NAME, MODEL_ZIP}
    if MODEL_ZIP not in view.outer.sizes:  # unpacked in model/, as in an image
        unlisted |= {f"model/{name}" for name in view.model.sizes}
    yield from _compare(view.outer, manifest.get("members"), unlisted, "", report)
    yield from _compare(view.model, manifest.get("model_members"), set(), "model.zip/", report)


def _compare(
    reader: Reader, listed: object, unlisted: set[str], prefix: str, report: Progress | None
) -> Iterator[str]:
    if not isinstance(listed, dict):
        yield f"{MANIFEST_NAME} lists no members"
        return
    present = reader.sizes.keys() - unlisted
    for name in sorted(listed.keys() - present):
        yield f"{prefix}{name} is missing"
    for name in sorted(present - listed.keys()):
        yield f"{prefix}{name} is not in the manifest"
    alike: dict[str, Mapping[str, object] | None] = {}
    for name in sorted(present & listed.keys()):
        expected = listed[name]
        if not isinstance(expected, dict) or reader.sizes[name] != expected.get("size_bytes"):
            yield f"{prefix}{name} has {reader.sizes[name]} bytes, unlike in the manifest"
        else:
            alike[name] = expected
    if report is not None:
        yield from _read_all(reader, alike, prefix, report)


def _read_all(
    reader: Reader,
    wanted: Mapping[str, Mapping[str, object] | None],
    prefix: str,
    report: Progress,
) -> Iterator[str]:
    """Read all files that are `wanted`, and yield what is wrong with them, in their order."""
    sizes = reader.sizes
    with ThreadPoolExecutor(max_workers=min(_MOST_AT_ONCE, os.cpu_count() or 1)) as pool:
        # The largest first, so that none is left alone at the end.
        begun = {
            name: pool.submit(_problem, reader, name, wanted[name], prefix, report)
            for name in sorted(wanted, key=lambda name: -sizes[name])
        }
        try:
            for name in wanted:
                if problem := begun[name].result():
                    yield problem
        finally:
            pool.shutdown(cancel_futures=True)


def _problem(
    reader: Reader,
    name: str,
    entry: Mapping[str, object] | None,
    prefix: str,
    report: Progress,
) -> str | None:
    """Say what is wrong with a file, by its zip's checksum and by its manifest's `entry`."""
    try:
        digest = None if entry is None else listed_digest(prefix + name, entry)
        hasher = None if digest is None else digest.start()
        for chunk in reader.stream(name, _CHUNK_BYTES):
            if hasher is not None:
                hasher.update(chunk)
            report(len(chunk))
    except ServingError as error:
        return str(error)
    if digest is not None and hasher is not None and hasher.hexdigest() != digest.value:
        return f"{prefix}{name} does not match its {digest.name} in the manifest"
    return None
