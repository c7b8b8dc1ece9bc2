"""The command that packs a pipeline folder as a model.zip, alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.archive.copying import Copier
from scripts.archive.members import make_member, write_member
from scripts.archive.pipeline_files import list_pipeline
from scripts.archive.zip_writer import ZipWriter
from scripts.console import DONE, atomic_output, progress, run_command

__all__ = ["main", "zip_pipeline"]

_EXAMPLES = """\
examples:
  python -m scripts.zip_weights my-pipeline                  writes my-pipeline.zip
  python -m scripts.zip_weights my-pipeline --out model.zip
  python -m scripts.zip_weights my-pipeline --out model.zip --force

FOLDER is what DiffusionPipeline.save_pretrained or scripts.download_weights wrote. Weights do not
compress, so they are stored; only the pipeline's own files go in, and pickled weights never do.
The same folder gives the same bytes. To go all the way to a .mar use scripts.build_archive, which
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="zip_weights",
        description="Zip a diffusers pipeline folder: stored, aligned, reproducible.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the pipeline's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: FOLDER.zip")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return run_command(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
