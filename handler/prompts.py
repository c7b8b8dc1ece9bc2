"""What a prompt loses to the tokenizers of a pipeline, and how a request becomes its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from handler.request import GenerationRequest

__all__ = ["pipeline_arguments", "prompt_warnings"]

# Tokenizers without a limit of their own report a number as large as this.
_NO_LIMIT = 10**9


def pipeline_arguments(request: GenerationRequest, parameters: frozenset[str]) -> dict[str, Any]:
    """The keyword arguments of the pipeline's ``__call__``, those it has of `parameters`.

    Every picture has a generator of its own, on the CPU: the same seed gives the same noise on any
    device, and in company as alone.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "num_images_per_prompt": request.num_images,
        "generator": generators if request.num_images > 1 else generators[0],
        "output_type": "pil",
    }
    return {name: value for name, value in arguments.items() if name in parameters}


def prompt_warnings(pipeline: Any, request: GenerationRequest) -> tuple[str, ...]:
    """One warning for each prompt that no text encoder of the pipeline reads to its end.

    A pipeline with several tokenizers is judged by the one with the largest window.
    """
    tokenizers = [
        part
        for name, part in pipeline.components.items()
        if name.startswith("tokenizer") and part is not None
    ]
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    warnings = []
    for name, text in prompts.items():
        if not text or not tokenizers:
            continue
        dropped, window = min(_dropped_tokens(pipeline, t, text) for t in tokenizers)
        if dropped:
            warnings.append(
                f"the last {dropped} tokens of the {name} were dropped:"
                f" the text encoder reads {window}"
            )
    return tuple(warnings)


def _dropped_tokens(pipeline: Any, tokenizer: Any, text: str) -> tuple[int, int]:
    """How many tokens of `text` are cut off, and the tokenizer's window without special tokens."""
    window = tokenizer.model_max_length
    call = inspect.signature(type(pipeline).__call__).parameters
    if "max_sequence_length" in call and "CLIP" not in type(tokenizer).__name__:
        window = min(window, call["max_sequence_length"].default)
    if window > _NO_LIMIT:
        return 0, window
    ids: Sequence[int] = tokenizer(text, truncation=False, verbose=False).input_ids
    num_special = tokenizer.num_special_tokens_to_add()
    return max(0, len(ids) - window), window - num_special
