"""The command that checks an archive whole and reports every problem."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from handler.config import HandlerConfig
from handler.errors import ArchiveError, EngineFault, RequestError, ServingError
from handler.loading.contents import LORA_FOLDER
from handler.loading.model_dir import OpenedPipeline, open_pipeline, open_zip
from scripts.archive.checks import check_archive, check_models, read_config, read_manifest
from scripts.archive.reader import ArchiveView, open_archive
from scripts.archive.signing import check_signature, signature_path
from scripts.archive.store import add_archive, chosen_archive
from scripts.command import Command
from scripts.console import DONE, FAILED, printable, progress

if TYPE_CHECKING:
    from PIL import Image

    from handler.api.traits import PipelineTraits

__all__ = ["VERIFY", "draw_smoke_picture", "main", "verify"]

_EXAMPLES = """\
examples:
  %(prog)s model-store/sd.mar
  %(prog)s model-store/sd.mar --key public.pem      the signature too
  %(prog)s model-store/sd.mar --smoke               draws a small picture
  %(prog)s model-store/sd.mar --json

Checked: the zip's structure, every SHA-256, no pickles, code, links or paths that climb out; the
components of model_index.json with weights whose names and shapes fit their configurations; the
versions of diffusers, transformers and torch; the configuration. --smoke draws what the worker
would draw for a small request, but with speed: safe where the archive says max. Exit code 0: all of
it holds; 1: it does not, and every problem is named; 2: called wrongly.
"""
_SMOKE_PROMPT = "a photograph of a cat"
_SMOKE_SIDE_PX = 64


def verify(path: Path, *, key: Path | None = None, is_smoke: bool = False) -> list[str]:
    """Return every problem of the archive `path`; none means that it is whole."""
    problems: list[str] = []
    if key is not None:
        try:
            check_signature(path, key, signature_path(path))
        except ServingError as error:
            problems.append(str(error))
    try:
        with open_archive(path) as view:
            total = sum(view.model.sizes.values())
            with progress("checking", total) as report:
                problems += check_archive(view, report)
            problems += check_models(view)
            if is_smoke and not problems:
                problems += _smoke(view)
    except ServingError as error:
        problems.append(str(error))
    return problems


def draw_smoke_picture(view: ArchiveView) -> Image.Image:
    """Load the pipeline as a worker does and draw one small picture, as a request for it would be.

    On this machine's device and in its precision, with no warm-up, and with ``speed: safe`` where
    the archive says ``max``, which would compile for minutes.

    Raises:
        ServingError: the archive cannot be served, or such a request fails.
    """
    from handler.assembly import assemble, short_request
    from handler.library_logs import quiet_libraries
    from handler.loading.pipeline import load_opened

    configured = read_config(view)
    config = replace(configured, device=None, dtype=None, speed=_smoke_speed(configured))
    prompt = str((read_manifest(view) or {}).get("smoke_prompt") or _SMOKE_PROMPT)
    prompt = prompt[: config.max_prompt_chars]
    with quiet_libraries():
        with _open_model(view) as opened, TemporaryDirectory(prefix="verify-") as folder:
            loaded = load_opened(opened, _copy_loras(view, Path(folder)), config, None)
        with closing(assemble(loaded, config, model_name="smoke", warm_up=False)) as service:
            size = _smoke_size(config, service.traits)
            fields = short_request(config, service.traits, prompt=prompt, size=size)
            (result,) = service.draw(service.read([{"body": fields}]))
    return result.images[0]


def _smoke_speed(config: HandlerConfig) -> str:
    return "safe" if config.speed == "max" else config.speed


def _smoke_size(config: HandlerConfig, traits: PipelineTraits) -> tuple[int, int]:
    """Return the smallest height and width that a request may have, from 64 pixels on."""
    multiple = traits.size_multiple_px
    side_px = math.ceil(max(_SMOKE_SIDE_PX, config.min_size_px) / multiple) * multiple
    # The configured size is one that a request may have.
    return min(side_px, config.height), min(side_px, config.width)


def _open_model(view: ArchiveView) -> AbstractContextManager[OpenedPipeline]:
    if view.place is None:
        return open_pipeline(view.path)
    archive, start, size_bytes = view.place
    return open_zip(archive, start=start, size_bytes=size_bytes)


def _smoke(view: ArchiveView) -> list[str]:
    """Return what is wrong with the smoke picture, or why there is none."""
    try:
        configured = read_config(view)
        if _smoke_speed(configured) != configured.speed:
            print("drawing with speed: safe, not max, which would compile first", file=sys.stderr)
        image = draw_smoke_picture(view)
    except EngineFault as error:
        # A worker's log would hold the cause; here there is none.
        cause = error.__cause__ or error
        return [f"the pipeline loads, but draws nothing: {str(cause).strip() or repr(cause)}"]
    except RequestError as error:
        return [f"the pipeline loads, but draws nothing: {error}"]
    except ServingError as error:
        return [str(error)]
    except Exception as error:
        # A pipeline that fails here would fail any request; what it raises is of any kind.
        return [f"the pipeline loads, but draws nothing: {str(error).strip() or repr(error)}"]
    low, high = image.convert("L").getextrema()
    return ["the picture has one colour only"] if low == high else []


def _copy_loras(view: ArchiveView, folder: Path) -> list[Path]:
    """Copy the packed LoRAs into `folder`, where the loader can map them."""
    paths = []
    outer = view.outer
    for name in sorted(outer.sizes) if outer is not None else ():
        if outer is not None and name.startswith(f"{LORA_FOLDER}/") and name.count("/") == 1:
            path = folder / name.partition("/")[2]
            with path.open("xb") as file:
                file.writelines(outer.stream(name))
            paths.append(path)
    return paths


def _run(arguments: argparse.Namespace) -> int:
    path = chosen_archive(arguments)
    problems = verify(path, key=arguments.key, is_smoke=arguments.smoke)
    if arguments.json:
        print(json.dumps({"archive": str(path), "is_whole": not problems, "problems": problems}))
    elif problems:
        for problem in problems:
            print(printable(problem), file=sys.stderr)
        raise ArchiveError(f"{path}: {len(problems)} problems")
    else:
        print(f"{path}: whole")
    return FAILED if problems else DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_archive(parser)
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="public key (PEM) of its signature"
    )
    parser.add_argument("--smoke", action="store_true", help="load it and draw one small picture")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


VERIFY = Command(
    "verify",
    "check an archive without serving it; name every problem",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return VERIFY.main(argv, "verify_archive")


if __name__ == "__main__":
    sys.exit(main())
