"""Prompts in windows: the tokens of a text, as many in each window as CLIP's encoders read."""

from __future__ import annotations

from typing import Any

from handler.api.prompt_syntax import Piece, pieces_of

__all__ = ["Window", "count_windows", "spelt_out", "windows_of"]

Window = list[tuple[int, float]]
"""Tokens with their weights, without the special ones."""


def windows_of(tokenizer: Any, text: str, *, is_weighted: bool) -> list[Window]:
    """The tokens of a text that is spelt out, as many in a window as fit.

    With `is_weighted`, A1111's weights and breaks count; else they are text.
    """
    size = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    windows: list[Window] = [[]]
    for piece in pieces_of(text) if is_weighted else [Piece(text)]:
        if piece.text is None:
            windows.append([])
            continue
        # Not `verbose`: it would warn of a length that is about to be cut, and quote nothing.
        ids = tokenizer(piece.text, add_special_tokens=False, verbose=False).input_ids
        for token in ids:
            if len(windows[-1]) == size:
                windows.append([])
            windows[-1].append((token, piece.weight))
    return windows


def spelt_out(pipeline: Any, tokenizer: Any, text: str) -> str:
    """The text as `pipeline` hands it to `tokenizer`: words of several vectors spelt out.

    Once only: what is spelt out holds the word again.
    """
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return text if convert is None else str(convert(text, tokenizer))


def count_windows(pipeline: Any, text: str, is_weighted: bool) -> int:
    """In how many windows the encoders of `pipeline` read a prompt: the most of any of them."""
    tokenizers = [
        part
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    ]
    return max(
        len(windows_of(each, spelt_out(pipeline, each, text), is_weighted=is_weighted))
        for each in tokenizers
    )
