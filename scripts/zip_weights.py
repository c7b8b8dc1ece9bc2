"""The command that packs a pipeline folder as a model.zip, alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.archive.copying import Copier
from scripts.archive.members import make_member, write_member
from scripts.archive.pipeline_files import list_pipeline
from scripts.archive.zip_writer import ZipWriter
from scripts.command import Command
from scripts.console import DONE, atomic_output, progress

__all__ = ["ZIP", "main", "zip_pipeline"]

_EXAMPLES = """\
examples:
  %(prog)s my-pipeline                  writes my-pipeline.zip
  %(prog)s my-pipeline --out model.zip
  %(prog)s my-pipeline --out model.zip --force

FOLDER is what DiffusionPipeline.save_pretrained or the command download wrote. Weights do not
compress, so they are stored; only the pipeline's own files go in, and pickled weights never do.
The same folder gives the same bytes. To go all the way to a .mar use the command pack, which
needs no zip of yours.
"""


def zip_pipeline(folder: Path, out: Path, *, force: bool = False) -> int:
    """Pack `folder` into the zip `out`; return its size in bytes. Raises: ArchiveError."""
    pipeline = list_pipeline(folder)
    files = pipeline.files
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    total = sum(file.size_bytes for file in files)
    with atomic_output(out, force=force) as part, progress("zipping", total) as report:
        with part.open("x+b") as file, Copier() as copier:
            writer = ZipWriter(file, copier)
            for each in files:
                write_member(writer, make_member(each), report)
            writer.close()
        return part.stat().st_size


def _run(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    out: Path = arguments.out or Path(f"{folder.resolve()}.zip")
    size = zip_pipeline(folder, out, force=arguments.force)
    print(f"{out}: {size / 1e6:,.1f} MB", file=sys.stderr)
    return DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the pipeline's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: FOLDER.zip")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")


ZIP = Command(
    "zip",
    "zip a pipeline folder alone: stored, aligned, reproducible",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return ZIP.main(argv, "zip_weights")


if __name__ == "__main__":
    sys.exit(main())
