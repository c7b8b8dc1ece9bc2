"""Prompts longer than one window, and weights, for pipelines whose text encoders are CLIP's.

A prompt that is longer than the encoder reads becomes several windows, each encoded by itself and
joined: the denoiser attends to all of them. The pipeline's own ``encode_prompt`` does it, within
the request and through its parked encoders; for the time of that call its tokenizer makes windows
of a text, and its text encoder joins them. Weights multiply what was encoded, and each window gets
back the mean that it had before.

Source: AUTOMATIC1111's stable-diffusion-webui defines both (its wiki, "Attention/emphasis" and
"Infinite prompt length").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

from handler.api.prompt_syntax import Piece, pieces_of
from handler.pipelines.prompt_windows import Window, spelt_out, windows_of

__all__ = ["PromptReading", "kind_reads_windows", "read_prompts", "reads_windows"]

_TOKENIZERS = (CLIPTokenizer, CLIPTokenizerFast)
_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
# Where diffusers 0.42 looks for `final_layer_norm`; transformers 5 has it one level higher.
_INNER = "text_model"
# A pipeline's tokenizers, each with its encoder, and the arguments that are for it.
_PARTS = {
    "tokenizer": ("text_encoder", "prompt", "negative_prompt"),
    "tokenizer_2": ("text_encoder_2", "prompt_2", "negative_prompt_2"),
}


@dataclass(frozen=True, slots=True)
class PromptReading:
    """How the prompts of a request are read: always whole."""

    is_weighted: bool = False
    """Whether A1111's weights and breaks count, or are text."""


def reads_windows(pipeline: Any) -> bool:
    """Whether prompts in several windows and with weights can be encoded for `pipeline`."""
    parts = {
        name: type(getattr(part, "_orig_mod", part))  # which is what compiled modules hold
        for name, part in getattr(pipeline, "components", {}).items()
        if part is not None
    }
    return kind_reads_windows(type(pipeline), parts)


def kind_reads_windows(kind: type, parts: Mapping[str, type]) -> bool:
    """The same of a pipeline of the class `kind`; `parts` are the classes of its components."""
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer")]
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    return (
        bool(tokenizers)
        and all(issubclass(each, _TOKENIZERS) for each in tokenizers)
        and all(issubclass(each, _ENCODERS) for each in encoders)
        and len(tokenizers) == len(encoders)
        and "unet" in parts
        and "prompt" in inspect.signature(getattr(kind, "encode_prompt", len)).parameters
    )


def read_prompts(view: Any, reading: PromptReading) -> None:
    """Let a request's view of a pipeline read its prompts whole; mutates `view`.

    Prompts that fit, and have no weights, are encoded by the pipeline alone.
    """
    if not reads_windows(view):
        return
    encode = view.encode_prompt
    signature = inspect.signature(encode)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        texts = _Texts(view, arguments, reading)
        if not texts.need_windows:
            return encode(*args, **kwargs)
        with texts.installed():
            outputs = encode(*args, **kwargs)
        return _weighted(outputs, texts)

    view.encode_prompt = encode_prompt


@dataclass(frozen=True, slots=True)
class _Row:
    """The tokens of one text and their weights, (77 k) each for k windows, with special ones."""

    ids: list[int]
    weights: list[float]
    mask: list[int]


class _Texts:
    """The texts of one ``encode_prompt``, as each tokenizer makes windows of them."""

    def __init__(self, view: Any, arguments: Mapping[str, Any], reading: PromptReading) -> None:
        self._view = view
        self._reading = reading
        self.tokenizers = {name: t for name in _PARTS if (t := getattr(view, name, None))}
        self.prompts: dict[str, list[str]] = {}
        self.negatives: dict[str, list[str]] = {}
        is_guided = arguments.get("do_classifier_free_guidance", True)
        for name in self.tokenizers:
            _, prompt, negative = _PARTS[name]
            text = arguments.get(prompt) or arguments.get("prompt")
            opposite = arguments.get(negative) or arguments.get("negative_prompt")
            is_given = arguments.get("prompt_embeds") is not None
            self.prompts[name] = [] if is_given else _as_list(text)
            self.negatives[name] = _as_list(opposite) if is_guided and not is_given else []
        self._conversions: dict[tuple[str, str], str] = {}
        self._tokens: dict[tuple[str, str], list[Window]] = {}
        windows = [
            self._windows(name, self._converted(name, text))
            for name in self.tokenizers
            for text in (*self.prompts[name], *self.negatives[name])
        ]
        self.num_windows = max(map(len, windows), default=1)
        self.need_windows = bool(windows) and (
            self.num_windows > 1
            or (reading.is_weighted and self._have_syntax())
            or (arguments.get("clip_skip") is not None and self._lack_a_layer())
        )

    def _have_syntax(self) -> bool:
        """Whether a text has weights, breaks or escapes."""
        texts = [*self.prompts.values(), *self.negatives.values()]
        return any(pieces_of(text) != [Piece(text)] for of in texts for text in of)

    def _lack_a_layer(self) -> bool:
        """Whether a text encoder has its last norm elsewhere than pipelines look for it."""
        encoders = [getattr(self._view, _PARTS[name][0]) for name in self.tokenizers]
        return not all(hasattr(encoder, _INNER) for encoder in encoders)

    def _converted(self, name: str, text: str) -> str:
        """The text as the pipeline hands it to its tokenizer."""
        if (name, text) not in self._conversions:
            self._conversions[name, text] = spelt_out(self._view, self.tokenizers[name], text)
        return self._conversions[name, text]

    def _windows(self, name: str, text: str) -> list[Window]:
        """The tokens of a converted text with their weights, as many in a window as fit."""
        if (name, text) not in self._tokens:
            self._tokens[name, text] = windows_of(
                self.tokenizers[name], text, is_weighted=self._reading.is_weighted
            )
        return self._tokens[name, text]

    def row(self, name: str, text: str) -> _Row:
        """The windows of a converted text in one row, filled up to as many as all texts have."""
        tokenizer = self.tokenizers[name]
        length = tokenizer.model_max_length
        windows = self._windows(name, text)
        ids: list[int] = []
        weights: list[float] = []
        mask: list[int] = []
        for place in range(self.num_windows):
            window = windows[place] if place < len(windows) else []
            tokens = [tokenizer.bos_token_id, *(t for t, _ in window), tokenizer.eos_token_id]
            num_padded = length - len(tokens)
            ids += [*tokens, *[tokenizer.pad_token_id] * num_padded]
            weights += [1.0, *(weight for _, weight in window), 1.0, *[1.0] * num_padded]
            mask += [*[1] * len(tokens), *[0] * num_padded]
        return _Row(ids, weights, mask)

    def weights(self, texts: Mapping[str, list[str]]) -> list[torch.Tensor] | None:
        """The weights of `texts`, (B, 77 k) for each tokenizer; None where none weighs anything."""
        rows = [
            torch.tensor(
                [self.row(name, self._converted(name, text)).weights for text in texts[name]]
            )
            for name in self.tokenizers
            if texts[name]
        ]
        return rows if any(bool((each != 1).any()) for each in rows) else None

    @property
    def widths(self) -> list[int]:
        """The width of what each tokenizer's encoder makes."""
        encoders = [getattr(self._view, _PARTS[name][0]) for name in self.tokenizers]
        return [encoder.config.hidden_size for encoder in encoders]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the view's tokenizers and text encoders work with windows, within the context."""
        attributes = vars(self._view)
        stand_ins: dict[str, Any] = {}
        for name, tokenizer in self.tokenizers.items():
            encoder = _PARTS[name][0]
            stand_ins[name] = _Tokenizer(tokenizer, _row_of(self, name))
            stand_ins[encoder] = _Encoder(attributes[encoder], tokenizer.model_max_length)
        before = {name: attributes[name] for name in stand_ins}
        # Not by `setattr`, for which a pipeline keeps books of its components.
        attributes.update(stand_ins)
        try:
            yield
        finally:
            attributes.update(before)


def _row_of(texts: _Texts, name: str) -> Callable[[str], _Row]:
    return lambda text: texts.row(name, text)


def _as_list(text: Any) -> list[str]:
    if text is None:
        return []
    return [text] if isinstance(text, str) else list(text)


class _StandIn:
    """Passes on what it is asked for and does not have."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        if name == _INNER and not hasattr(self._real, name):
            return self._real
        return getattr(self._real, name)


class _Tokenizer(_StandIn):
    """A tokenizer that gives every text all its windows, whatever length it is asked for."""

    def __init__(self, real: Any, row: Callable[[str], _Row]) -> None:
        super().__init__(real)
        self._row = row

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> BatchEncoding:
        rows = [self._row(each) for each in _as_list(text)]
        return BatchEncoding(
            {
                "input_ids": torch.tensor([row.ids for row in rows]),
                "attention_mask": torch.tensor([row.mask for row in rows]),
            }
        )


class _Encoder(_StandIn):
    """A text encoder that reads (B, 77 k) tokens as k windows each, and joins what it reads."""

    def __init__(self, real: Any, length: int) -> None:
        super().__init__(real)
        self._length = length

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        num_texts, num_windows = len(input_ids), input_ids.shape[1] // self._length
        if attention_mask is not None:
            attention_mask = attention_mask.reshape(-1, self._length)
        windows = input_ids.reshape(-1, self._length)
        output = self._real(windows, attention_mask=attention_mask, **kwargs)

        def joined(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 2:  # of a whole text there is one, that of its first window
                return tensor.reshape(num_texts, num_windows, -1)[:, 0]
            return tensor.reshape(num_texts, num_windows * self._length, -1)

        return type(output)(
            **{
                name: joined(value)
                if isinstance(value, torch.Tensor)
                else tuple(map(joined, value))
                for name, value in output.items()
            }
        )


def _weighted(outputs: Any, texts: _Texts) -> Any:
    """What ``encode_prompt`` returned, its first two with the weights of prompt and negative."""
    if not texts._reading.is_weighted:
        return outputs
    prompt, negative, *others = outputs
    length = next(iter(texts.tokenizers.values())).model_max_length
    weighted = []
    for embeds, each in ((prompt, texts.prompts), (negative, texts.negatives)):
        weights = None if embeds is None else texts.weights(each)
        if weights is not None:
            embeds = _multiplied(embeds, weights, texts.widths, length)
        weighted.append(embeds)
    return (*weighted, *others)


def _multiplied(
    embeds: torch.Tensor, weights: Sequence[torch.Tensor], widths: Sequence[int], length: int
) -> torch.Tensor:
    """`embeds`, (B n, 77 k, C), times the weights of each encoder's share of the C channels.

    Each window of each encoder keeps its mean.
    """
    parts = []
    shares = torch.split(embeds, list(widths), dim=-1)
    for part, weight in zip(shares, weights, strict=True):
        num_rows, _, width = part.shape
        factors = weight.to(part.device).repeat_interleave(num_rows // len(weight), dim=0)
        factors = factors.reshape(num_rows, -1, length, 1)
        before = part.float().reshape(num_rows, -1, length, width)
        after = before * factors
        means = [windows.mean(dim=(2, 3), keepdim=True) for windows in (before, after)]
        is_weighted = (factors != 1).any(dim=2, keepdim=True)
        after = torch.where(is_weighted, after * (means[0] / means[1]), before)
        parts.append(after.reshape(part.shape).to(part.dtype))
    return torch.cat(parts, dim=-1)
