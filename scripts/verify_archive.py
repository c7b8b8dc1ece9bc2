"""The command that checks an archive whole and reports every problem."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from handler.errors import ArchiveError, ServingError
from handler.loading.contents import LORA_FOLDER
from handler.loading.model_dir import open_pipeline, open_zip
from scripts.archive.checks import check_archive, check_models, read_config, read_manifest
from scripts.archive.reader import ArchiveView, open_archive
from scripts.archive.signing import check_signature, signature_path
from scripts.archive.store import add_archive, chosen_archive
from scripts.console import DONE, FAILED, printable, progress, run_command

__all__ = ["main", "verify"]

_EXAMPLES = """\
examples:
  python -m scripts.verify_archive model-store/sd.mar
  python -m scripts.verify_archive model-store/sd.mar --key public.pem      the signature too
  python -m scripts.verify_archive model-store/sd.mar --smoke               draws a small picture
  python -m scripts.verify_archive model-store/sd.mar --json

Checked: the zip's structure, every SHA-256, no pickles, code, links or paths that climb out; the
components of model_index.json with weights whose names and shapes fit their configurations; the
versions of diffusers, transformers and torch; the configuration. Exit code 0: all of it holds;
1: it does not, and every problem is named; 2: called wrongly.
"""
_SMOKE_PROMPT = "a photograph of a cat"
_SMOKE_STEPS = 2


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


def _smoke(view: ArchiveView) -> list[str]:
    """Load the pipeline as a worker does and draw one picture of few steps."""
    import torch

    from handler.api.request import check_against_pipeline
    from handler.api.traits import scheduler_class
    from handler.loading.pipeline import load_opened
    from handler.pipelines.describe import describe
    from handler.pipelines.schedulers import make_scheduler

    manifest = read_manifest(view) or {}
    prompt = manifest.get("smoke_prompt") or _SMOKE_PROMPT
    if view.place is None:
        opening = open_pipeline(view.path)
    else:
        archive, start, size_bytes = view.place
        opening = open_zip(archive, start=start, size_bytes=size_bytes)
    try:
        with opening as opened, TemporaryDirectory(prefix="verify-") as folder:
            config = replace(read_config(view), device=None, dtype=None)  # as this machine can
            loaded = load_opened(opened, _copy_loras(view, Path(folder)), config, None)
        traits = describe(loaded.pipeline)
        check_against_pipeline(config, traits)
        multiple = traits.size_multiple_px
        side_px = max(64 // multiple, 1) * multiple
        if config.scheduler is not None:
            name = scheduler_class(config.scheduler, traits)
            assert name is not None  # checked above
            loaded.pipeline.scheduler = make_scheduler(loaded.pipeline, name)
        arguments = {
            "prompt": prompt,
            "num_inference_steps": max(_SMOKE_STEPS, traits.least_steps_with(config.scheduler)),
            "height": side_px,
            "width": side_px,
            "generator": torch.Generator("cpu").manual_seed(0),
        }
        taken = {key: value for key, value in arguments.items() if key in traits.parameters}
        image = loaded.pipeline(**taken).images[0]
    except ServingError as error:
        return [str(error)]
    except Exception as error:
        # A pipeline that fails here would fail any request; what it raises is of any kind.
        return [f"the pipeline loads, but draws nothing: {str(error).strip() or error!r}"]
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="verify_archive",
        description="Check an archive without serving it; name every problem.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_archive(parser)
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="public key (PEM) of its signature"
    )
    parser.add_argument("--smoke", action="store_true", help="load it and draw one small picture")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return run_command(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
