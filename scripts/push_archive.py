"""The command that stores an archive in an OCI registry."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from scripts.archive.checks import read_manifest
from scripts.archive.image import read_archive
from scripts.archive.image_manifest import build_documents
from scripts.archive.reader import open_archive
from scripts.archive.store import add_archive, chosen_archive
from scripts.archive.tar_layer import TarLayer
from scripts.command import Command
from scripts.console import DONE, progress
from scripts.errors import UsageError
from scripts.registry.client import RegistryClient, digest_of
from scripts.registry.parallel import run_all
from scripts.registry.reference import Reference
from scripts.registry.transfer import Blob, push_blob
from scripts.torchserve.options import archive_identity

__all__ = ["PUSH", "main", "push"]

_EXAMPLES = """\
examples:
  %(prog)s --to ghcr.io/me/sd:1.0                    the only archive in the store
  %(prog)s --name sd --to ghcr.io/me/sd:1.0
  %(prog)s --to localhost:5000/sd:1.0                a registry on this machine: plain HTTP

The archive becomes an OCI image: each weights file is a layer, everything small is another, so an
archive with another configuration sends kilobytes. What the registry has is not sent again, so
a push that stopped goes on with the file that it was at. It prints the digest that the command
pull takes, with which the very same bytes come back. Credentials are those of docker login.
docs/shipping.md says how Kubernetes mounts such an image.
"""


@dataclass(frozen=True)
class _Bytes:
    """A small blob."""

    data: bytes

    @cached_property
    def digest(self) -> str:
        return digest_of(self.data)

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        yield self.data[start:]


def push(archive: Path, reference: Reference, *, is_insecure: bool = False) -> str:
    """Store `archive` as `reference`, which has a tag or gets ``latest``; return its digest.

    Raises: ArchiveError, RegistryError, UsageError.
    """
    if reference.digest is not None:
        raise UsageError(f"{reference}: push to a tag; the digest follows from what is pushed")
    layers = read_archive(archive).layers()
    run_all([partial(_hash, layer) for layer in layers])
    documents = build_documents(layers, _annotations(archive))
    small: list[Blob] = [_Bytes(config) for config in documents.configs]
    with RegistryClient(reference, is_insecure=is_insecure) as client:
        missing = [blob for blob in (*layers, *small) if not client.has_blob(blob.digest)]
        with progress("pushing", sum(blob.size_bytes for blob in missing)) as report:
            run_all([partial(push_blob, client, blob, report) for blob in missing])
        for manifest in documents.manifests:
            client.put_manifest(manifest)
        client.put_manifest(documents.index, reference.tag or "latest")
    sent, total = (sum(each.size_bytes for each in blobs) for blobs in (missing, layers))
    print(f"{reference}: sent {sent / 1e6:,.3f} of {total / 1e6:,.1f} MB", file=sys.stderr)
    return documents.index.digest


def _hash(layer: TarLayer, stopped: threading.Event) -> str:
    """Have the layer know its digest."""
    return layer.digest


def _annotations(archive: Path) -> dict[str, str]:
    """Return what a registry shows of the archive."""
    name, version = archive_identity(archive)
    with open_archive(archive) as view:
        manifest = read_manifest(view) or {}
        found = {"title": name, "version": version, "description": view.index.class_name}
    licence, source = (manifest.get(key) for key in ("licence", "source"))
    if isinstance(licence, dict) and licence.get("license"):
        found["licenses"] = str(licence["license"])
    if isinstance(source, dict) and source.get("model_id"):
        found["source"] = str(source["model_id"])
        found["revision"] = str(source.get("revision"))
    return {f"org.opencontainers.image.{key}": value for key, value in found.items()}


def _run(arguments: argparse.Namespace) -> int:
    reference = Reference.parse(arguments.to)
    digest = push(chosen_archive(arguments), reference, is_insecure=arguments.insecure)
    print(f"{reference.host}/{reference.name}@{digest}")
    return DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_archive(parser)
    parser.add_argument("--to", required=True, metavar="REGISTRY/NAME:TAG", help="where to")
    parser.add_argument(
        "--insecure", action="store_true", help="plain HTTP, also to another machine"
    )


PUSH = Command(
    "push",
    "store an archive in an OCI registry, weights in layers of their own",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return PUSH.main(argv, "push_archive")


if __name__ == "__main__":
    sys.exit(main())
