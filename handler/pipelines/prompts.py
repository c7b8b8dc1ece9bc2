"""What a pipeline does not read of a prompt: what its tokenizers drop, and syntax it has not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from handler.api.request import GenerationRequest
from handler.pipelines.prompt_embeddings import reads_windows

__all__ = ["prompt_warnings"]

# Tokenizers without a limit of their own report a number as large as this.
_NO_LIMIT = 10**9
# What front ends make of a prompt before a pipeline sees it; named by an example, for a warning
# must not quote the prompt.
_SYNTAX = {
    "(word:1.3)": re.compile(r"\([^()]{1,200}:\s*(?:[0-9](?:\.[0-9]+)?|\.[0-9]+)\s*\)"),
    "((word))": re.compile(r"\(\([^()]{1,200}\)\)"),
    "[word]": re.compile(r"\[[^\[\]]{1,200}\]"),
    "word++": re.compile(r"(?:\w\w|\))\+{2,}"),
    "(word)1.3": re.compile(r"\)[0-9]*\.[0-9]"),
    "<lora:name:1>": re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>"),
    "BREAK": re.compile(r"\bBREAK\b"),
    "[from:to:0.5]": re.compile(
        r"\[[^\[\]:]{0,200}:(?:[^\[\]:]{0,200}:)?\s{0,8}[0-9.]{1,9}\s{0,8}\]"
    ),
    "[one|two]": re.compile(r"\[[^\[\]|]{0,200}\|[^\[\]]{0,200}\]"),
    "AND": re.compile(r"\bAND\b"),
}


# Those that count where words have weights.
_WEIGHTING = ("(word:1.3)", "((word))", "[word]", "BREAK")
_A1111 = {*_WEIGHTING, "<lora:name:1>"}
_HOW_TO_WEIGH = '; "prompt_weighting": true reads A1111\'s weights'


def prompt_warnings(pipeline: Any, request: GenerationRequest) -> tuple[str, ...]:
    """Warnings about each prompt of a request; they never quote it.

    A pipeline with several tokenizers is judged by the one with the largest window.
    """
    tokenizers = [
        part
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    ]
    reads_whole = reads_windows(pipeline)
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    warnings = []
    for name, text in prompts.items():
        syntax = [example for example, pattern in _SYNTAX.items() if pattern.search(text or "")]
        if request.is_weighted:
            syntax = [example for example in syntax if example not in _WEIGHTING]
        if syntax:
            would_count = reads_whole and not request.is_weighted and _A1111 & {*syntax}
            can = _HOW_TO_WEIGH if would_count else ""
            warnings.append(f"the {name} has {', '.join(syntax)}: it is read as plain text{can}")
        if not text or not tokenizers or reads_whole:
            continue
        length = request.extra.get("max_sequence_length")
        dropped, window = min(_dropped_tokens(pipeline, t, text, length) for t in tokenizers)
        if dropped:
            warnings.append(
                f"the last {dropped} tokens of the {name} were dropped:"
                f" the text encoder reads {window}"
            )
    return tuple(warnings)


def _dropped_tokens(
    pipeline: Any, tokenizer: Any, text: str, length: Any = None
) -> tuple[int, int]:
    """How many tokens of `text` are cut off, and the tokenizer's window without special tokens.

    `length` is the window that the request asks for, where it does.
    """
    window = tokenizer.model_max_length
    call = inspect.signature(type(pipeline).__call__).parameters
    if "max_sequence_length" in call and "CLIP" not in type(tokenizer).__name__:
        window = min(window, length or call["max_sequence_length"].default)
    if window > _NO_LIMIT:
        return 0, window
    ids: Sequence[int] = tokenizer(text, truncation=False, verbose=False).input_ids
    num_special = tokenizer.num_special_tokens_to_add()
    return max(0, len(ids) - window), window - num_special
