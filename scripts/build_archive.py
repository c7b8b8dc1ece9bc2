"""The command that packs a pipeline with its handler as an archive."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.archive.hub import download
from scripts.archive.precision import PRECISIONS
from scripts.archive.signing import signature_path
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.console import DONE, run_command
from scripts.documents import parse_yaml
from scripts.errors import UsageError

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m scripts.build_archive --pipeline my-pipeline --name stable_diffusion
  python -m scripts.build_archive --model-id org/name --revision main --name sd --version 2.0
  python -m scripts.build_archive --pipeline my-pipeline --name sd --dtype float16
  python -m scripts.build_archive --pipeline my-pipeline --name sd \\
      --component vae=my-vae --lora style=style.safetensors --set height=512 --set width=512
  python -m scripts.build_archive --pipeline my-pipeline --name sd --sign private.pem
  python -m scripts.build_archive --pipeline my-pipeline --name sd --format dir

The archive is OUT/NAME.mar, or with --format dir the folder OUT/NAME, which TorchServe links
instead of copying: one copy of the weights on disk instead of two. The same pipeline,
configuration and versions give the same bytes. What is in it: scripts.inspect_archive; whether it
is whole: scripts.verify_archive. LoRAs are active from the start, all of them, at weight 1.

The model's own size, steps and guidance become the defaults of requests, unless --config or --set
say otherwise. What could not be served is refused before it is packed: pipelines that give no
pictures or want one, models whose weights do not fit, LoRAs of other models.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNUSUAL = re.compile(r"[^A-Za-z0-9_-]")


def _run(arguments: argparse.Namespace) -> int:
    for flag in ("name", "version"):
        if not _NAME.fullmatch(getattr(arguments, flag)):
            raise UsageError(
                f"--{flag} {getattr(arguments, flag)!r}: wanted letters, digits and _ . -, "
                "a letter or digit first, at most 100"
            )
    if ".." in f"{arguments.name}.":
        raise UsageError(
            f"--name {arguments.name!r}: TorchServe refuses two dots in a row and a dot at the end"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in arguments.smoke_prompt or ""):
        raise UsageError(f"--smoke-prompt {arguments.smoke_prompt!a}: wanted text in UTF-8")
    if arguments.smoke and arguments.no_check:
        raise UsageError("--smoke and --no-check: give one of them")
    is_folder = arguments.format == "dir"
    out: Path = arguments.out / (arguments.name if is_folder else f"{arguments.name}.mar")
    if os.path.lexists(out) and not arguments.force:
        raise UsageError(f"{out} exists; pass --force to replace it")
    if arguments.model_id is None:
        _pack(arguments, arguments.pipeline, out)
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        is_full = arguments.dtype not in (None, "float16")
        # Of one name for every attempt, so that the next goes on where this one stopped.
        kind = "full" if is_full else "half"
        folder = arguments.out / f".{arguments.model_id.replace('/', '--')}.{kind}.download"
        download(arguments.model_id, revision=arguments.revision, out=folder, is_full=is_full)
        _pack(arguments, folder, out)
        shutil.rmtree(folder)
    return DONE


def _pack(arguments: argparse.Namespace, pipeline: Path, out: Path) -> None:
    plan = ArchivePlan(
        pipeline=pipeline,
        name=arguments.name,
        version=arguments.version,
        config=arguments.config,
        settings=_settings(arguments.set),
        dtype=arguments.dtype,
        components={
            name: Path(value) for name, value in _pairs("--component", arguments.component)
        },
        loras={name: Path(value) for name, value in _loras(arguments.lora)},
        smoke_prompt=arguments.smoke_prompt,
        sign_key=arguments.sign,
        is_folder=arguments.format == "dir",
        is_checked=not arguments.no_check,
        is_smoke=arguments.smoke,
    )
    begun_s = time.monotonic()
    size_bytes = write_archive(plan, out, force=arguments.force)
    took_s = time.monotonic() - begun_s
    signed = f", signed: {signature_path(out)}" if arguments.sign else ""
    rate = f"{size_bytes / 1e6 / max(took_s, 1e-3):,.0f} MB/s"
    print(f"{out}: {size_bytes / 1e6:,.1f} MB in {took_s:.1f} s ({rate}){signed}", file=sys.stderr)


def _pairs(flag: str, values: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(name, text) for name, _, text in (value.partition("=") for value in values)]
    for name, text in pairs:
        if not _WORD.fullmatch(name) or not text:
            raise UsageError(f"{flag} {name}={text}: wanted NAME=VALUE")
    if len({name.casefold() for name, _ in pairs}) < len(pairs):
        raise UsageError(f"{flag}: a name is given twice (upper and lower case are not told apart)")
    return pairs


def _loras(values: Sequence[str]) -> list[tuple[str, str]]:
    """Read ``NAME=FILE`` or ``FILE``, whose name then is the file's."""
    named = []
    for value in values:
        if "=" in value and not Path(value).is_file():
            named.append(value)
        else:
            named.append(f"{_UNUSUAL.sub('_', Path(value).stem)[:64]}={value}")
    return _pairs("--lora", named)


def _settings(values: Sequence[str]) -> dict[str, object]:
    """Read ``KEY=VALUE``, the value as YAML would."""
    return {
        name: parse_yaml(text, f"--set {name}: {text!r}") for name, text in _pairs("--set", values)
    }


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
    out = Path("model-store")
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"default: {out}")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="default: config/model-config.yaml"
    )
    parser.add_argument("--force", action="store_true", help="replace the archive if it is there")
    parser.add_argument("--format", choices=("mar", "dir"), default="mar", help="default: mar")
    parser.add_argument("--dtype", choices=PRECISIONS, help="convert the weights on the way")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="private key (PEM) to sign with")
    parser.add_argument("--smoke", action="store_true", help="draw a picture before it is done")
    parser.add_argument(
        "--no-check", action="store_true", help="pack what is found not to be servable, too"
    )
    parser.add_argument("--smoke-prompt", metavar="TEXT", help="what it can draw, for examples")
    for flag, metavar, text in (
        ("--set", "KEY=VALUE", "a setting of the handler: section; may be repeated"),
        ("--component", "NAME=FOLDER", "a component from another folder; may be repeated"),
        ("--lora", "[NAME=]FILE", "a LoRA to pack and switch on; may be repeated"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_command(_parser(), _run, argv)


if __name__ == "__main__":
    sys.exit(main())
