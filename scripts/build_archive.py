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
from scripts.command import Command
from scripts.console import DONE
from scripts.documents import parse_yaml
from scripts.embedded import (
    EMBEDDED_NAME,
    EMBEDDED_PIPELINE,
    EMBEDDED_PROMPT,
    embedded_archive,
    forget_embedded,
    is_current,
    mark_embedded,
)
from scripts.errors import UsageError

__all__ = ["PACK", "main", "pack_embedded"]

_EXAMPLES = """\
examples:
  %(prog)s                                the embedded toy pipeline, unless it is there
  %(prog)s --pipeline my-pipeline --name stable_diffusion
  %(prog)s --model-id org/name --revision main --name sd --version 2.0
  %(prog)s --pipeline my-pipeline --name sd --dtype float16
  %(prog)s --pipeline my-pipeline --name sd \\
      --component vae=my-vae --lora style=style.safetensors --set height=512 --set width=512
  %(prog)s --pipeline my-pipeline --name sd --sign private.pem
  %(prog)s --pipeline my-pipeline --name sd --format dir

The archive is OUT/NAME.mar, or with --format dir the folder OUT/NAME, which TorchServe links
instead of copying: one copy of the weights on disk instead of two. The same pipeline,
configuration and versions give the same bytes. What is in it: the command inspect;
whether it is whole: verify. LoRAs are active from the start, all of them, at weight 1.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNUSUAL = re.compile(r"[^A-Za-z0-9_-]")


def pack_embedded(store: Path, *, force: bool = False) -> Path:
    """Pack the embedded pipeline into `store`, unless it is there as it is now; return the archive.

    Raises: UsageError, where an archive of the user's own has its name and `force` is not given.
    """
    out = embedded_archive(store)
    if not is_current(store, force=force):
        print(f"Packing the embedded pipeline into {out} ...", flush=True)
        _run(
            PACK.parse(
                [
                    "--pipeline",
                    str(EMBEDDED_PIPELINE),
                    "--name",
                    EMBEDDED_NAME,
                    "--smoke-prompt",
                    EMBEDDED_PROMPT,
                    "--out",
                    str(store),
                    "--force",
                ]
            )
        )
        mark_embedded(store)
    return out


def _pack_command(arguments: argparse.Namespace) -> int:
    """Run the command: without arguments that say what, it packs the embedded pipeline."""
    defaults = vars(PACK.parse([]))
    given = {name for name, value in defaults.items() if getattr(arguments, name) != value}
    if given <= {"out", "force"}:
        pack_embedded(arguments.out, force=arguments.force)
        return DONE
    if arguments.pipeline is None and arguments.model_id is None:
        arguments.pipeline = EMBEDDED_PIPELINE
        arguments.name = arguments.name or EMBEDDED_NAME
    if arguments.name is None:
        source = arguments.model_id or os.path.abspath(arguments.pipeline)
        arguments.name = source.rpartition("/")[2]
    return _run(arguments)


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
    forget_embedded(out)
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


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pipeline", type=Path, metavar="FOLDER", help="a pipeline's folder")
    source.add_argument("--model-id", metavar="ORG/NAME", help="a model on the hub")
    parser.add_argument("--revision", default="main", help="of --model-id (default: main)")
    parser.add_argument("--name", help="the model's name in TorchServe (default: the pipeline's)")
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
    parser.add_argument("--smoke-prompt", metavar="TEXT", help="what it can draw, for examples")
    for flag, metavar, text in (
        ("--set", "KEY=VALUE", "a setting of the handler: section; may be repeated"),
        ("--component", "NAME=FOLDER", "a component from another folder; may be repeated"),
        ("--lora", "[NAME=]FILE", "a LoRA to pack and switch on; may be repeated"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)


PACK = Command(
    "pack",
    "pack a diffusers pipeline with its handler as a TorchServe archive",
    _pack_command,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return PACK.main(argv, "build_archive")


if __name__ == "__main__":
    sys.exit(main())
