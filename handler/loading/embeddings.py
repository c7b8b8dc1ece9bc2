"""Textual inversions that are packed with a pipeline: words of a prompt with vectors of their own.

A file is one in diffusers' form (a tensor under its token) or in A1111's (``emb_params``, or
``clip_l`` and ``clip_g`` for SDXL's two encoders).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError
from handler.loading.contents import EMBEDDING_FOLDER, WEIGHTS_SUFFIX
from handler.loading.safetensors_map import map_tensors
from handler.messages import first_lines

if TYPE_CHECKING:
    from handler.loading.model_dir import OpenedPipeline

__all__ = ["Inversion", "embedding_names", "load_embeddings", "read_inversion"]

# What A1111 calls the vectors of each encoder, instead of the word that they stand for.
_ENCODERS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True, slots=True)
class Inversion:
    """What a file adds to a pipeline."""

    tokens: tuple[str, ...]
    """The words of a prompt that stand for it."""
    keys: Mapping[str, str]
    """The text encoder that each of the file's tensors is for."""


def embedding_names(paths: Iterable[str]) -> dict[str, str]:
    """The paths, among those of a pipeline's files, of its textual inversions by their names."""
    return {
        PurePosixPath(path).stem: path
        for path in sorted(paths)
        if path.startswith(f"{EMBEDDING_FOLDER}/") and path.endswith(WEIGHTS_SUFFIX)
    }


def read_inversion(name: str, shapes: Mapping[str, tuple[int, ...]], pipeline: Any) -> Inversion:
    """Say what the file `name`, with tensors of these shapes, adds to `pipeline`.

    Raises: ArchiveError, where it is of another model or for no word.
    """
    if not hasattr(pipeline, "load_textual_inversion"):
        raise ArchiveError(f"{type(pipeline).__name__} takes no embeddings")
    keys = _keys(shapes, pipeline)
    own = [key for key in keys if key not in _ENCODERS]
    vocabularies = [getattr(pipeline, _TOKENIZERS[each]).get_vocab() for each in keys.values()]
    tokens = tuple(
        token
        for token in dict.fromkeys([*own, name])
        if not any(token in words for words in vocabularies)
    )
    if not tokens:
        raise ArchiveError(f"the tokenizer knows the word {name} already; pack it as another NAME")
    return Inversion(tokens, keys)


def _keys(shapes: Mapping[str, tuple[int, ...]], pipeline: Any) -> dict[str, str]:
    widths = {
        encoder: int(module.config.hidden_size)
        for encoder in _TOKENIZERS
        if (module := getattr(pipeline, encoder, None)) is not None
    }
    found = {}
    for key, shape in shapes.items():
        fitting = [encoder for encoder, width in widths.items() if shape and shape[-1] == width]
        wanted = _ENCODERS.get(key)
        encoder = wanted if wanted in fitting else next(iter(fitting), None)
        if len(shape) not in (1, 2) or encoder is None:
            ours = ", ".join(f"{width} ({encoder})" for encoder, width in widths.items())
            raise ArchiveError(
                f"it is of another model: its {key} is {list(shape)}, and the vectors of this"
                f" pipeline have {ours}"
            )
        found[key] = encoder
    if len(found) != len(widths) or len(set(found.values())) != len(found):
        raise ArchiveError(
            f"it is of another model: it has {', '.join(sorted(found))}, and this pipeline's text"
            f" encoders are {', '.join(widths)}"
        )
    return found


def load_embeddings(pipeline: Any, opened: OpenedPipeline) -> dict[str, tuple[str, ...]]:
    """Give the pipeline its textual inversions; return their words by their names.

    Raises: ArchiveError.
    """
    words = {}
    for name, path in embedding_names(opened.weights).items():
        state = map_tensors(opened.weights[path], path)
        try:
            shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
            inversion = read_inversion(name, shapes, pipeline)
            for key, encoder in inversion.keys.items():
                for token in inversion.tokens:
                    pipeline.load_textual_inversion(
                        {token: state[key]},
                        token=token,
                        tokenizer=getattr(pipeline, _TOKENIZERS[encoder]),
                        text_encoder=getattr(pipeline, encoder),
                    )
        except (ArchiveError, ValueError, RuntimeError) as error:
            raise ArchiveError(f"the embedding {name}: {first_lines(error)}") from error
        words[name] = inversion.tokens
    return words
