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
from scripts.archive.hub_cache import cache_root
from scripts.archive.precision import PRECISIONS
from scripts.archive.repacking import read_identity
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
from scripts.hints import to_run

__all__ = ["PACK", "main", "pack_embedded"]

_EXAMPLES = """\
examples:
  %(prog)s                                the embedded toy pipeline, unless it is there
  %(prog)s --pipeline my-pipeline --name stable_diffusion
  %(prog)s --model-id org/name --revision main --name sd --version 2.0
  %(prog)s --pipeline my-pipeline --name sd --dtype float16
  %(prog)s --pipeline my-pipeline --name sd \\
      --component vae=my-vae --lora style=style.safetensors --set height=512 --set width=512
  %(prog)s --pipeline my-pipeline --name sd --controlnet canny=my-controlnet
  %(prog)s --pipeline checkpoint.safetensors --config-from my-pipeline
  %(prog)s --from model-store/sd.mar --config other.yaml --name sd-other
  %(prog)s --pipeline my-pipeline --name sd --sign private.pem
  %(prog)s --pipeline my-pipeline --name sd --format dir

The archive is OUT/NAME.mar, or with --format dir the folder OUT/NAME, which TorchServe links
instead of copying: one copy of the weights on disk instead of two. The same pipeline,
configuration and versions give the same bytes. What is in it: the command inspect;
whether it is whole: verify. LoRAs are on, all of them, unless a request names others or the
configuration does (default_loras).

The model's own size, steps and guidance become the defaults of requests, unless --config or --set
say otherwise; --from keeps the archive's. What could not be served is refused before it is packed:
pipelines that give no pictures or want what no request has, models whose weights do not fit, LoRAs
and ControlNets of other models.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NONE = "none"
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCALE = re.compile(r"-?[0-9]{1,3}(\.[0-9]{1,9})?")
_UNUSUAL = re.compile(r"[^A-Za-z0-9_-]")


def pack_embedded(store: Path, *, force: bool = False, is_smoke: bool = False) -> Path:
    """Pack the embedded pipeline into `store`, unless it is there as it is now; return the archive.

    With `is_smoke` it is packed anyway, and draws a picture before it is done.
    Raises: UsageError, where an archive of the user's own has its name and `force` is not given.
    """
    out = embedded_archive(store)
    if not is_current(store, force=force) or is_smoke:
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
                    # Ours, and held by tests: its check would only import torch for seconds.
                    "--smoke" if is_smoke else "--no-check",
                ]
            )
        )
        mark_embedded(store)
    return out


def _pack_command(arguments: argparse.Namespace) -> int:
    """Run the command: without arguments that say what, it packs the embedded pipeline."""
    defaults = vars(PACK.parse([]))
    given = {name for name, value in defaults.items() if getattr(arguments, name) != value}
    if given <= {"out", "force", "smoke"}:
        pack_embedded(arguments.out, force=arguments.force, is_smoke=arguments.smoke)
        return DONE
    if not (arguments.pipeline or arguments.model_id or arguments.packed):
        arguments.pipeline = EMBEDDED_PIPELINE
        arguments.name = arguments.name or EMBEDDED_NAME
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    name, version = _identity(arguments)
    _check_names(name, version, arguments.smoke_prompt or "")
    if arguments.smoke and arguments.no_check:
        raise UsageError("--smoke and --no-check: give one of them")
    packed: Path | None = arguments.packed
    is_folder = arguments.format == "dir"
    if arguments.format is None and packed is not None:
        is_folder = packed.is_dir()
    out: Path = arguments.out / (name if is_folder else f"{name}.mar")
    if os.path.lexists(out) and not arguments.force:
        raise UsageError(f"{out} exists; --force replaces it ({to_run('pack', force='1')})")
    loras, lora_scales = _loras(arguments.lora)
    plan = ArchivePlan(
        pipeline=packed or arguments.pipeline or _download_folder(arguments),
        name=name,
        version=version,
        config=arguments.config,
        settings=_settings(arguments.set),
        dtype=arguments.dtype,
        components=_paths(_pairs("--component", arguments.component)),
        loras=_paths(loras),
        lora_scales=lora_scales,
        controlnets=_paths(_pairs("--controlnet", arguments.controlnet)),
        embeddings=_paths(_pairs("--embedding", arguments.embedding)),
        smoke_prompt=arguments.smoke_prompt,
        sign_key=arguments.sign,
        is_folder=is_folder,
        revision="main" if arguments.model_id else arguments.revision,
        config_from=arguments.config_from,
        is_repacked=packed is not None,
        is_checked=not arguments.no_check,
        is_smoke=arguments.smoke,
    )
    if arguments.model_id is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        download(
            arguments.model_id,
            revision=arguments.revision,
            out=plan.pipeline,
            is_full=_wants_full(arguments),
        )
    _pack(plan, out, force=arguments.force)
    if arguments.model_id is not None:
        shutil.rmtree(plan.pipeline)
    forget_embedded(out)
    return DONE


def _identity(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the name and the version to pack under: those given, else those of the source."""
    name, version = "", "1.0"
    if arguments.packed is not None:
        name, version = read_identity(arguments.packed)
    elif arguments.model_id is not None:
        name = arguments.model_id.rpartition("/")[2]
    else:
        name = _name_of(arguments.pipeline)
    return arguments.name or name, version if arguments.version is None else arguments.version


def _name_of(path: Path) -> str:
    """Return what a pipeline is called that has no name: as its folder, file or model."""
    root = cache_root(path.absolute())
    if root is not None:
        return root.name.rpartition("--")[2]
    is_file = path.suffix in (".safetensors", ".mar", ".zip")
    return path.stem if is_file else path.absolute().name


def _check_names(name: str, version: str, smoke_prompt: str) -> None:
    for flag, value in (("name", name), ("version", version)):
        if not _NAME.fullmatch(value):
            raise UsageError(
                f"--{flag} {value!r}: wanted letters, digits and _ . -, "
                f"a letter or digit first, at most 100; give one with --{flag} ({flag.upper()}=)"
            )
    if ".." in f"{name}.":
        raise UsageError(
            f"--name {name!r}: TorchServe refuses two dots in a row and a dot at the end"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in smoke_prompt):
        raise UsageError(f"--smoke-prompt {smoke_prompt!a}: wanted text in UTF-8")


def _wants_full(arguments: argparse.Namespace) -> bool:
    return arguments.dtype not in (None, "float16")


def _download_folder(arguments: argparse.Namespace) -> Path:
    """Return where a model is fetched: the same for every attempt, so that the next goes on."""
    kind = "full" if _wants_full(arguments) else "half"
    folder: Path = arguments.out / f".{arguments.model_id.replace('/', '--')}.{kind}.download"
    return folder


def _pack(plan: ArchivePlan, out: Path, *, force: bool) -> None:
    begun_s = time.monotonic()
    size_bytes = write_archive(plan, out, force=force)
    took_s = time.monotonic() - begun_s
    signed = f", signed: {signature_path(out)}" if plan.sign_key else ""
    rate = f"{size_bytes / 1e6 / max(took_s, 1e-3):,.0f} MB/s"
    print(f"{out}: {size_bytes / 1e6:,.1f} MB in {took_s:.1f} s ({rate}){signed}", file=sys.stderr)


def _paths(pairs: Sequence[tuple[str, str]]) -> dict[str, Path | None]:
    """Return the paths that `pairs` give to names; None where it is the word none."""
    return {name: None if text == _NONE else Path(text) for name, text in pairs}


def _pairs(flag: str, values: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(name, text) for name, _, text in (value.partition("=") for value in values)]
    for name, text in pairs:
        if not _WORD.fullmatch(name) or not text:
            raise UsageError(f"{flag} {name}={text}: wanted NAME=VALUE")
    if len({name.casefold() for name, _ in pairs}) < len(pairs):
        raise UsageError(f"{flag}: a name is given twice (upper and lower case are not told apart)")
    return pairs


def _loras(values: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """Read ``NAME=FILE:SCALE``: without NAME it is the file's, and without SCALE 1.

    Returns names with files, and the scales that were given.
    """
    named, scales = [], {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(_unscaled(value)[0]).is_file():
            name, path = "", value
        path, scale = _unscaled(path)
        name = name or _UNUSUAL.sub("_", Path(path).stem)[:64]
        named.append(f"{name}={path}")
        if scale is not None:
            scales[name] = scale
    if wrong := [name for name, scale in scales.items() if not -10 <= scale <= 10]:
        raise UsageError(f"--lora {wrong[0]}: the scale may be from -10 to 10")
    return _pairs("--lora", named), scales


def _unscaled(value: str) -> tuple[str, float | None]:
    """A path without the scale behind it, and that scale."""
    path, colon, scale = value.rpartition(":")
    if colon and not Path(value).is_file() and _SCALE.fullmatch(scale):
        return path, float(scale)
    return value, None


def _settings(values: Sequence[str]) -> dict[str, object]:
    """Read ``KEY=VALUE``, the value as YAML would."""
    return {
        name: parse_yaml(text, f"--set {name}: {text!r}") for name, text in _pairs("--set", values)
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--pipeline",
        type=Path,
        metavar="PATH",
        help="a pipeline: its folder, a hub cache, a zip, another tool's .mar, or one file of "
        "weights with --config-from",
    )
    source.add_argument("--model-id", metavar="ORG/NAME", help="a model on the hub")
    source.add_argument(
        "--from",
        dest="packed",
        type=Path,
        metavar="ARCHIVE",
        help="an archive to pack again with other options; what is not given stays as it is",
    )
    parser.add_argument(
        "--revision", default="main", help="of --model-id or of a hub cache (default: main)"
    )
    parser.add_argument(
        "--config-from",
        metavar="FOLDER|ORG/NAME[@REVISION]",
        help="a pipeline that has what a single-file checkpoint lacks: configuration, tokenizers",
    )
    parser.add_argument("--name", help="the model's name in TorchServe (default: the source's)")
    parser.add_argument("--version", help="the model's version (default: 1.0, or the archive's)")
    out = Path("model-store")
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help=f"default: {out}")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="default: config/model-config.yaml"
    )
    parser.add_argument("--force", action="store_true", help="replace the archive if it is there")
    parser.add_argument("--format", choices=("mar", "dir"), help="default: mar, or the archive's")
    parser.add_argument("--dtype", choices=PRECISIONS, help="convert the weights on the way")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="private key (PEM) to sign with")
    parser.add_argument("--smoke", action="store_true", help="draw a picture before it is done")
    parser.add_argument(
        "--no-check", action="store_true", help="pack what is found not to be servable, too"
    )
    parser.add_argument("--smoke-prompt", metavar="TEXT", help="what it can draw, for examples")
    for flag, metavar, text in (
        ("--set", "KEY=VALUE", "a setting of the handler: section; may be repeated"),
        ("--component", "NAME=PATH", "another folder or .safetensors; none leaves it out"),
        ("--lora", "[NAME=]FILE[:SCALE]", "a LoRA to pack, on at SCALE; NAME=none leaves one out"),
        ("--embedding", "NAME=FILE", "a textual inversion, a word of prompts; NAME=none: without"),
        ("--controlnet", "NAME=FOLDER", "a ControlNet to choose by name; NAME=none leaves it out"),
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
