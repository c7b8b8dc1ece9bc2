"""Which pipeline classes of diffusers are served: tried tiny, from packing to a drawn picture.

    python -m tests.support.served_models                    # the table, on stdout
    python -m tests.support.served_models --only Flux
    python -m tests.support.served_models --write            # into docs/models.md

Every class is judged by what it is; those that there is a tiny pipeline of are packed, verified,
loaded and drawn with, as a plain request would be.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from handler.errors import ServingError
from handler.library_logs import quiet_for_good
from handler.loading.model_index import ModelIndex
from handler.pipelines.tasks import controlled_by, pictures_of, task_of
from scripts.archive.scope import scope_problem
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.repository import REPOSITORY
from scripts.verify_archive import verify
from tests.support.every_pipeline.families import RECIPES
from tests.support.every_pipeline.recipe import NotBuildable, Recipe
from tests.support.every_pipeline.recipe import build as build_swept
from tests.support.every_pipeline.stand_ins import stand_ins
from tests.support.layouts import pixart_of_a_known_size
from tests.support.pipelines import FAMILIES, build, shared
from tests.support.tiny_models import SIDE_PX

__all__ = [
    "DOCUMENT",
    "Outcome",
    "Row",
    "judge_all",
    "main",
    "render",
    "tiny_builders",
    "try_pipeline",
]

DOCUMENT = REPOSITORY / "docs" / "models.md"


class Outcome(Enum):
    """What becomes of a pipeline class."""

    SERVED = "served"
    UNTRIED = "should be served, not tried"
    REFUSED = "refused when packing"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Row:
    """A pipeline class, what becomes of it, and why it is no better."""

    name: str
    outcome: Outcome
    why: str = ""


def try_pipeline(name: str, make: Callable[[], Any]) -> Row:
    """Pack, verify, load and draw with the pipeline that `make` builds.

    What fails is tried by diffusers alone too: where that fails as well, it is the tiny pipeline
    that does not do, and nothing is known of its class. Nor is where packing refuses a part that
    the tests have put in another's place.
    """
    with tempfile.TemporaryDirectory(prefix="served-") as place:
        folder = Path(place)
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                make().save_pretrained(folder / "pipeline")
            except Exception as error:
                return Row(name, Outcome.UNTRIED, _in_one_line(error))
            row = _try_packing(name, folder)
            if row.outcome is not Outcome.SERVED:
                try:
                    _draw_alone(name, folder / "pipeline")
                except Exception as error:
                    why = f"tiny, it does not draw by diffusers alone: {_in_one_line(error)}"
                    return Row(name, Outcome.UNTRIED, why)
    if row.outcome is Outcome.REFUSED:
        return Row(name, Outcome.UNTRIED, f"the tests' tiny pipeline is refused: {row.why}")
    return row


def _try_packing(name: str, folder: Path) -> Row:
    try:
        plan = ArchivePlan(folder / "pipeline", "tiny", settings=_SMALL)
        write_archive(plan, folder / "tiny.mar")
        problems = verify(folder / "tiny.mar", is_smoke=True)
    except ServingError as error:
        return Row(name, Outcome.REFUSED, str(error).removeprefix("not packed: "))
    except Exception as error:
        return Row(name, Outcome.FAILS, _in_one_line(error))
    return Row(name, Outcome.FAILS, problems[0]) if problems else Row(name, Outcome.SERVED)


def _draw_alone(name: str, pipeline: Path) -> None:
    """Draw by a call that has what a plain request has, pictures where the class needs them."""
    loaded = getattr(diffusers, name).from_pretrained(pipeline, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    plain = {"prompt": "a star", "num_inference_steps": 2, "height": SIDE_PX, "width": SIDE_PX}
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    plain |= dict.fromkeys(pictures_of(task_of(type(loaded))), picture)
    plain[controlled_by(type(loaded)) or "control_image"] = picture
    plain["output_type"] = "np"
    takes = inspect.signature(type(loaded).__call__).parameters
    drawn = loaded(**{key: value for key, value in plain.items() if key in takes})
    pixels = np.asarray(drawn.images)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("the picture is not finite")
    if pixels.min() == pixels.max():
        raise ValueError("the picture has one colour only")


def _try_aside(name: str, make: Callable[[], Any], limit_s: float) -> Row:
    """Try a pipeline in a process of its own, which is ended when `limit_s` have passed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(try_pipeline(name, make)))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Row(name, Outcome.UNTRIED, f"takes longer than {limit_s:g} s, tiny as it is")
        row: Row = receiver.recv()
        return row
    except EOFError:
        return Row(name, Outcome.FAILS, "its process ended")
    finally:
        process.kill()
        process.join()


def _in_one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, NotBuildable) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


# What tiny pipelines are built for.
_SMALL = {"height": SIDE_PX, "width": SIDE_PX, "min_size_px": 8, "num_threads": 1}


def judge_class(cls: Any) -> Row:
    """Judge a class by what it is, its components all being there."""
    components = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    index = ModelIndex(cls.__name__, dict.fromkeys(components, ("diffusers", "")), {})
    problem = scope_problem(cls, index)
    if problem is None:
        return Row(cls.__name__, Outcome.UNTRIED)
    return Row(cls.__name__, Outcome.REFUSED, problem.removeprefix(f"{cls.__name__} "))


def _classes() -> Iterator[Any]:
    """Yield the pipeline classes that diffusers exports and that can be imported here."""
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline"):
            continue
        cls = getattr(diffusers, name)
        is_pipeline = isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)
        if is_pipeline and cls is not diffusers.DiffusionPipeline:
            yield cls


def tiny_builders() -> dict[str, Callable[[], Any]]:
    """Makers of tiny pipelines, by class; some raise, saying which part there is no recipe for."""
    names = (name for name in dir(diffusers) if name.endswith("Pipeline"))
    swept: dict[str, Callable[[], Any]] = {name: partial(_build_swept, name) for name in names}
    families = {type(shared(family)).__name__: partial(build, family) for family in FAMILIES}
    return {**swept, **families, "PixArtSigmaPipeline": pixart_of_a_known_size}


def _build_swept(name: str) -> Any:
    cls = getattr(diffusers, name)
    with stand_ins(cls):
        return build_swept(cls, RECIPES.get(name, Recipe()))


def judge_all(
    only: str = "",
    builders: Mapping[str, Callable[[], Any]] | None = None,
    limit_s: float = 120.0,
) -> list[Row]:
    """Judge every class whose name matches `only`; try those that are not refused."""
    makers = tiny_builders() if builders is None else builders
    rows = []
    for cls in _classes():
        if re.search(only, cls.__name__):
            row = judge_class(cls)
            if row.outcome is Outcome.UNTRIED and cls.__name__ in makers:
                row = _try_aside(cls.__name__, makers[cls.__name__], limit_s)
                print(f"{row.outcome.value}: {row.name} {row.why}", file=sys.stderr)
            rows.append(row)
    return rows


def render(rows: list[Row]) -> str:
    """The document: what is served, and why the rest is not."""
    served = [row for row in rows if row.outcome is Outcome.SERVED]
    untried = [row for row in rows if row.outcome is Outcome.UNTRIED]
    others = [row for row in rows if row not in served and row not in untried]
    lines = [
        "# Models",
        "",
        "Any diffusers pipeline that draws pictures is packed and served, whoever trained it: from",
        "text, or from a picture, a mask or a control picture that is sent with it. What a class",
        "needs or gives is found out when it is packed; a class that is not served is refused",
        "then, and the message says what it is. An archive serves every task that its weights can",
        "do: of a text-to-image class image to image and inpainting too, where diffusers has them.",
        "",
        "A request that asks for nothing else gets the model's own size, steps and guidance:",
        "packing reads them from the model, prints them and writes them into the archive's",
        "model-config.yaml. `--set` and `CONFIG` beat them; limits are moved to allow them.",
        "",
        "This page is written by `python -m tests.support.served_models --write`, for diffusers",
        f"{diffusers.__version__}. Served means: built tiny, packed, verified, loaded and drawn",
        "with by a plain request, with white pictures where the class needs them.",
        "",
        f"## Served ({len(served)})",
        "",
        ", ".join(f"`{row.name}`" for row in served) + ".",
        "",
        f"## Should be served, not tried ({len(untried)})",
        "",
        "They draw pictures; the tests have no tiny pipeline of them that does.",
        "",
        "| class | why not tried |",
        "| --- | --- |",
        *(f"| `{row.name}` | {_cell(row)} |" for row in untried),
        "",
        f"## Not served ({len(others)})",
        "",
        "| class | why |",
        "| --- | --- |",
        *(f"| `{row.name}` | {_cell(row)} |" for row in others),
        "",
    ]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    why = " ".join(row.why.split()).replace("|", "\\|")
    return f"{row.outcome.value}: {why}" if row.outcome is Outcome.FAILS else why


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1: a class that is not refused does not draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.served_models")
    parser.add_argument("--only", default="", metavar="PATTERN", help="classes whose name matches")
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="of a class")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args(argv)
    if options.write and options.only:
        parser.error("--write is for all classes, not with --only")
    warnings.simplefilter("ignore")
    quiet_for_good()
    torch.set_num_threads(1)  # several threads do not survive a fork
    rows = judge_all(options.only, limit_s=options.limit)
    if options.write:
        DOCUMENT.write_text(render(rows))
    else:
        print(render(rows))
    return 1 if any(row.outcome is Outcome.FAILS for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
