"""The command that fetches an archive from an OCI registry."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from handler.errors import ArchiveError
from scripts.archive.assembly import MAX_RECIPE_LAYER_BYTES, LayerSink, Recipe, read_recipe
from scripts.archive.image_manifest import Descriptor, layers_of, manifest_of
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.archive.tar_layer import TarLayer
from scripts.command import Command
from scripts.console import DONE, Progress, atomic_output, progress
from scripts.errors import RegistryError, UsageError
from scripts.hints import to_run
from scripts.registry.client import RegistryClient
from scripts.registry.parallel import run_all
from scripts.registry.reference import Reference
from scripts.registry.transfer import fetch_blob

__all__ = ["PULL", "main", "pull"]

_EXAMPLES = """\
examples:
  %(prog)s --from ghcr.io/me/sd@sha256:…         the very archive that was pushed
  %(prog)s --from ghcr.io/me/sd:1.0 --name sd2   what the tag names now, under another name

The digest of every part is checked. Interrupted? The same command goes on where it stopped.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NOTE_BYTES = 32 << 20


def pull(
    reference: Reference,
    store: Path,
    *,
    name: str | None = None,
    force: bool = False,
    is_insecure: bool = False,
) -> Path:
    """Fetch the archive `reference` into `store`, as `name` or else as it was called.

    Raises: ArchiveError, RegistryError, UsageError.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: wanted letters, digits and _ . -, at most 100")
    with RegistryClient(reference, is_insecure=is_insecure) as client:
        manifest = client.manifest(reference.digest or reference.tag or "latest")
        print(f"{reference.host}/{reference.name}@{manifest.digest}", file=sys.stderr)
        while (digest := manifest_of(manifest, str(reference))) is not None:
            manifest = client.manifest(digest)
        *descriptors, last = layers_of(manifest, str(reference))
        recipe = read_recipe(_fetch_small(client, last), str(reference))
        out = store / (name or recipe.name)
        out = out if recipe.is_folder else out.with_name(f"{out.name}.mar")
        if os.path.lexists(out) and not force:
            raise UsageError(f"{out} exists; pass --force to replace it")
        store.mkdir(parents=True, exist_ok=True)
        # Of one name for every attempt, so that the next goes on where this one stopped.
        stage = store / f".{manifest.digest.removeprefix('sha256:')[:16]}.pull"
        _assemble(client, recipe, descriptors, stage)
    marker = TORCHSERVE_MANIFEST_NAME if recipe.is_folder else None
    with atomic_output(out, force=force, marker=marker) as part:
        os.replace(stage / "archive", part)
    shutil.rmtree(stage)
    return out


def _fetch_small(client: RegistryClient, layer: Descriptor) -> bytes:
    """Return the layer with the recipe, whole."""
    if layer.size_bytes > MAX_RECIPE_LAYER_BYTES:
        raise RegistryError(f"{client.reference}: its last layer has {layer.size_bytes} bytes")
    data = bytearray()
    fetch_blob(
        client,
        layer.digest,
        layer.size_bytes,
        lambda chunk, at: data.extend(chunk),
        stopped=threading.Event(),
    )
    return bytes(data)


def _assemble(
    client: RegistryClient, recipe: Recipe, descriptors: list[Descriptor], stage: Path
) -> None:
    """Fetch all layers into the archive in `stage`."""
    layers = recipe.tar_layers(stage)
    sizes = [layer.size_bytes for layer in layers]
    if sizes != [each.size_bytes for each in descriptors]:
        raise ArchiveError(f"{client.reference}: its layers are not as its recipe says")
    _check_room(recipe, stage)
    stage.mkdir(exist_ok=True)
    recipe.make(stage)
    with progress("pulling", sum(sizes)) as report:
        run_all(
            [
                partial(_fetch_layer, client, each, layer, stage / f"layer-{number}", report)
                for number, (each, layer) in enumerate(zip(descriptors, layers, strict=True))
            ]
        )


def _check_room(recipe: Recipe, stage: Path) -> None:
    there = sum(each.stat().st_blocks * 512 for each in stage.rglob("*") if each.is_file())
    free = shutil.disk_usage(stage.parent).free + there
    if free < recipe.size_bytes:
        raise ArchiveError(
            f"{stage.parent}: the archive takes {recipe.size_bytes / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free there"
        )


@dataclass(slots=True)
class _Note:
    """How many bytes of a layer are written, kept in a file now and then."""

    path: Path
    num_bytes: int = 0
    _kept: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        with suppress(OSError, ValueError):
            self.num_bytes = self._kept = int(self.path.read_text())

    def set(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        if num_bytes - self._kept >= _NOTE_BYTES:
            self.keep()

    def keep(self) -> None:
        self._kept = self.num_bytes
        self.path.write_text(str(self.num_bytes))


def _fetch_layer(
    client: RegistryClient,
    descriptor: Descriptor,
    layer: TarLayer,
    note_path: Path,
    report: Progress,
    stopped: threading.Event,
) -> None:
    """Fetch one layer, from where an earlier attempt stopped.

    What that one wrote is hashed again: a machine may have stopped before it was on the disk.
    """
    sink, note = LayerSink(layer), _Note(note_path)
    note.num_bytes = min(max(note.num_bytes, 0), layer.size_bytes)

    def write(chunk: bytes, at: int) -> None:
        sink.write(chunk, at)
        note.set(at + len(chunk))
        report(len(chunk))

    def fetch(done: Iterator[bytes]) -> None:
        size_bytes = layer.size_bytes
        fetch_blob(client, descriptor.digest, size_bytes, write, done, stopped=stopped)

    began_at = note.num_bytes
    try:
        try:
            report(began_at)
            fetch(sink.written(began_at))
        except (RegistryError, ArchiveError):
            if not began_at or note.num_bytes < layer.size_bytes:
                raise
            report(-note.num_bytes)
            note.num_bytes = 0
            fetch(iter(()))
    finally:
        note.keep()


def _run(arguments: argparse.Namespace) -> int:
    reference = Reference.parse(arguments.source)
    out = pull(
        reference,
        arguments.store,
        name=arguments.name,
        force=arguments.force,
        is_insecure=arguments.insecure,
    )
    print(f"{out}: done; {to_run('verify', name=out.name.removesuffix('.mar'))}", file=sys.stderr)
    return DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", required=True, metavar="REGISTRY/NAME@DIGEST", help="from where"
    )
    store = Path("model-store")
    parser.add_argument(
        "--store", type=Path, default=store, metavar="FOLDER", help=f"default: {store}"
    )
    parser.add_argument("--name", help="what to call it (default: as it was)")
    parser.add_argument("--force", action="store_true", help="replace the archive if it is there")
    parser.add_argument(
        "--insecure", action="store_true", help="plain HTTP, also to another machine"
    )


PULL = Command(
    "pull",
    "fetch an archive from an OCI registry, every digest checked",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return PULL.main(argv, "pull_archive")


if __name__ == "__main__":
    sys.exit(main())
