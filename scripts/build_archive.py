"""Packs a pipeline and the handler as one .mar; changes with that command line.

One pass: weights are read once, hashed, and written once, straight into their final place.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from handler.errors import ArchiveError
from scripts.archive_writer import ArchivePlan, write_archive
from scripts.console import DONE, UsageError, command

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m scripts.build_archive --pipeline my-pipeline --name stable_diffusion
  python -m scripts.build_archive --model-id org/name --revision main --name sd --version 2.0

The archive is OUT/NAME.mar. The same pipeline, configuration and versions give the same bytes.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def _plan(arguments: argparse.Namespace, pipeline: Path) -> ArchivePlan:
    return ArchivePlan(
        pipeline=pipeline,
        name=arguments.name,
        version=arguments.version,
        config=arguments.config,
    )


def _run(arguments: argparse.Namespace) -> int:
    if not _NAME.fullmatch(arguments.name):
        raise UsageError(f"--name {arguments.name!r}: letters, digits, and _ . - after the first")
    if not _NAME.fullmatch(arguments.version):
        raise UsageError(f"--version {arguments.version!r}: letters, digits, and _ . -")
    out: Path = arguments.out / f"{arguments.name}.mar"
    if out.exists() and not arguments.force:
        raise UsageError(f"{out} exists; pass --force to replace it")
    if arguments.model_id is None:
        size = write_archive(_plan(arguments, arguments.pipeline), out, force=arguments.force)
    else:
        with tempfile.TemporaryDirectory(prefix="download-") as folder:
            _download(arguments, Path(folder))
            size = write_archive(_plan(arguments, Path(folder)), out, force=arguments.force)
    print(f"{out}: {size / 1e6:,.1f} MB", file=sys.stderr)
    return DONE


def _download(arguments: argparse.Namespace, folder: Path) -> None:
    try:
        from scripts.download_weights import download
    except ImportError as error:
        raise ArchiveError(f"cannot download: {error}") from error
    download(arguments.model_id, revision=arguments.revision, out=folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_archive",
        description="Pack a diffusers pipeline with its handler as a TorchServe archive.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", type=Path, metavar="FOLDER", help="a pipeline's folder")
    source.add_argument("--model-id", metavar="ORG/NAME", help="a model on the hub")
    parser.add_argument("--revision", default="main", help="of --model-id (default: main)")
    parser.add_argument("--name", required=True, help="the model's name in TorchServe")
    parser.add_argument("--version", default="1.0", help="the model's version (default: 1.0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("model-store"),
        metavar="FOLDER",
        help="default: model-store",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="default: config/model-config.yaml"
    )
    parser.add_argument("--force", action="store_true", help="replace the archive if it is there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return command(_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
