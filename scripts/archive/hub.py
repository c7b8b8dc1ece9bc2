"""The client of the Hugging Face hub: fetches one variant of a pipeline, resumable."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from handler.errors import ArchiveError, ServingError
from handler.library_logs import hub_bars_on_terminals
from handler.loading.contents import MODEL_INDEX, WEIGHTS_SUFFIX, pickled
from handler.loading.model_index import ModelIndex
from handler.loading.variants import variant_of
from handler.messages import first_lines
from handler.zips.central_directory import check_name
from scripts.archive.mistaken import has_lora_names
from scripts.archive.pipeline_files import choose_names
from scripts.archive.source import read_source_note, write_source_note
from scripts.disk import check_space
from scripts.errors import UsageError

__all__ = ["download"]


@dataclass(frozen=True, slots=True)
class _Hub:
    """Where a model is fetched from; `revision` is a commit, `sizes` has the bytes of its files."""

    model_id: str
    revision: str
    endpoint: str | None
    token: str | None
    sizes: Mapping[str, int]


def download(
    model_id: str,
    *,
    revision: str,
    out: Path,
    is_full: bool = False,
    is_configuration: bool = False,
) -> Path:
    """Fetch the pipeline `model_id` at `revision` into the folder `out`; go on where one stopped.

    Where `is_configuration`, all but its weights.
    Raises: ArchiveError, saying what a gated, missing or unfit model needs; UsageError, where
    `out` holds something else.
    """
    from huggingface_hub.errors import HFValidationError

    token = os.environ.get("HF_TOKEN") or None
    try:
        with hub_bars_on_terminals():
            hub = _find(model_id, revision, token)
            dtype_name = "float32" if is_full else "float16"
            _download(hub, out, None if is_configuration else dtype_name)
    except HFValidationError as error:
        hint = f"; pack a folder with --pipeline {model_id}" if Path(model_id).exists() else ""
        raise UsageError(
            f"{model_id!r} is not a model id such as org/name{hint}: {error}"
        ) from error
    except ServingError:
        raise
    except Exception as error:
        # The client raises errors of several libraries; every one ends in one clear line.
        raise ArchiveError(_explain(error, model_id, revision, token)) from error
    write_source_note(out, model_id, hub.revision, is_complete=True)
    return out


def _find(model_id: str, revision: str, token: str | None) -> _Hub:
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = HfApi(endpoint=endpoint, token=token).model_info(
        model_id, revision=revision, files_metadata=True
    )
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}
    return _Hub(model_id, str(info.sha), endpoint, token, sizes)


def _download(hub: _Hub, out: Path, dtype_name: str | None) -> None:
    """Fetch a pipeline with its weights nearest to `dtype_name`; without any where it is None."""
    model_id, sizes = hub.model_id, hub.sizes
    _check_names(model_id, sizes)
    if MODEL_INDEX not in sizes:
        raise ArchiveError(f"{model_id} is not a diffusers pipeline: {_what_else(model_id, sizes)}")
    _claim(out, model_id, hub.revision)
    _fetch(hub, [MODEL_INDEX], out)
    index = ModelIndex.read(out / MODEL_INDEX, model_id)
    if dtype_name is None:
        names = [
            name
            for name in choose_names(sizes, index.components)
            if not name.endswith(WEIGHTS_SUFFIX) and variant_of(name) is None
        ]
    else:
        names = _choose(model_id, index, sizes, dtype_name)
    total = sum(sizes[name] for name in names)
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    check_space(out / MODEL_INDEX, total - there, f"the download of {model_id}")
    print(f"{model_id}: {len(names)} files, {total / 1e6:,.1f} MB → {out}", file=sys.stderr)
    _fetch(hub, names, out)


def _what_else(model_id: str, names: Collection[str]) -> str:
    if has_lora_names(names):
        return (
            f"it is a LoRA; fetch it with hf download {model_id} --local-dir lora, and pack the "
            "pipeline that it belongs to with --lora"
        )
    files = [name for name in names if name.endswith(WEIGHTS_SUFFIX) and "/" not in name]
    if not files:
        return f"it has no {MODEL_INDEX}"
    return (
        f"it has no {MODEL_INDEX}, but files of weights ({', '.join(sorted(files))}); fetch one "
        f"with hf download {model_id} {sorted(files)[0]} --local-dir . and pack it with --pipeline"
    )


def _check_names(model_id: str, names: Iterable[str]) -> None:
    """Refuse a model with a file that would be written outside of the folder it is fetched into."""
    for name in names:
        try:
            check_name(name)
        except ArchiveError as error:
            raise ArchiveError(f"{model_id}: {error}; nothing was fetched") from error


def _claim(out: Path, model_id: str, revision: str) -> None:
    """Take the folder `out` for this download, unless it holds another one."""
    note = read_source_note(out)
    if note is None and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and not a download of ours: choose another folder")
    if note is not None and (note.get("model_id"), note.get("revision")) != (model_id, revision):
        raise UsageError(
            f"{out} holds {note.get('model_id')} at {note.get('revision')}: delete it, or choose "
            "another folder"
        )
    if note is None:
        out.mkdir(parents=True, exist_ok=True)
        write_source_note(out, model_id, revision, is_complete=False)


def _choose(
    model_id: str, index: ModelIndex, sizes: Mapping[str, int], dtype_name: str
) -> list[str]:
    names = choose_names(sizes, index.components, dtype_name)
    for component in index.components:
        inside = [name for name in sizes if name.startswith(f"{component}/")]
        has_weights = any(name.endswith(".safetensors") for name in inside)
        if pickled(inside) and not has_weights:
            raise ArchiveError(
                f"{model_id}: {component} has only pickled weights ({', '.join(pickled(inside))}), "
                "which are refused: look for a revision with safetensors"
            )
    return names


def _fetch(hub: _Hub, names: list[str], out: Path) -> None:
    """Fetch `names` into `out`: small files together, weights one by one."""
    from huggingface_hub import snapshot_download

    small = [name for name in names if not name.endswith(".safetensors")]
    snapshot_download(
        hub.model_id,
        revision=hub.revision,
        local_dir=out,
        endpoint=hub.endpoint,
        token=hub.token,
        # Patterns are globs; a name is one only when its special letters are escaped.
        allow_patterns=[glob.escape(name) for name in small],
    )
    for name in names:
        if name not in small:
            _fetch_weights(hub, name, out / name)


def _fetch_weights(hub: _Hub, name: str, target: Path) -> None:
    """Fetch one file of weights; go on from what an earlier call left.

    huggingface_hub 2.4 throws a partial file away when it fails (it resumes within one call only),
    which for weights may be gigabytes.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if target.is_file():
        return
    url = hf_hub_url(hub.model_id, name, revision=hub.revision, endpoint=hub.endpoint)
    metadata = get_hf_file_metadata(url, token=hub.token, endpoint=hub.endpoint)
    etag = re.sub(r"\W", "", metadata.etag or "")
    part = target.with_name(f"{target.name}.{etag[:64]}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            expected_size=metadata.size,
            headers=build_hf_headers(token=hub.token),
            displayed_filename=name,
        )
    if len(etag) == 64:  # the hub's ETag of large files is their SHA-256
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != etag:
            part.unlink()
            raise ArchiveError(f"{name} arrived damaged; run the same command to fetch it again")
    os.replace(part, target)


def _explain(error: Exception, model_id: str, revision: str, token: str | None) -> str:
    """Say what to do about `error`; the hub's own words are long and name no remedy of ours."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        remedy = "with the account that HF_TOKEN belongs to" if token else "and set HF_TOKEN"
        return f"{model_id} is gated: accept its terms at its page on the hub {remedy}"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "or HF_TOKEN may not read it" if token else "or it is private: set HF_TOKEN"
        return f"{model_id} does not exist, {hint}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model_id} has no revision {revision!r}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "no status"
        hint = "; HF_TOKEN is not valid" if status == 401 else ""
        return f"the hub answered {status} for {model_id}{hint}"
    return (
        f"{model_id} could not be fetched: {first_lines(error, 1)}; run the same command to go on"
    )
