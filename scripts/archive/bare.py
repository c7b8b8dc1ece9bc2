"""Looks at a pipeline's bare folder as packing does: without what it would leave out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from handler.errors import ServingError
from scripts.archive.pipeline_files import select_files
from scripts.archive.pipeline_source import read_folder
from scripts.archive.reader import ArchiveView, open_archive

__all__ = ["as_packed"]


@contextmanager
def as_packed(view: ArchiveView) -> Iterator[tuple[ArchiveView, Sequence[str], Sequence[str]]]:
    """Give the `view` of what packing would take, its notes, and the problems that it would name.

    That is links in a folder of its own; the view itself of what is no bare folder, or of one that
    packing refuses.
    """
    if view.outer is not None or not view.path.is_dir():
        yield view, (), ()
        return
    try:
        chosen = select_files(read_folder(view.path))
    except ServingError as error:
        yield view, (), (str(error),)
        return
    with TemporaryDirectory(prefix="verify-") as place:
        for file in chosen.files:
            link = Path(place, file.name)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(file.path.absolute(), link)
        with open_archive(Path(place)) as packed:
            yield packed, chosen.notes, ()
