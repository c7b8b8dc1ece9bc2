"""Tiny language models that read pictures too, or are decoders, with their processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers

from tests.support.every_pipeline.parts.text import ALPHABET
from tests.support.tiny_models import qwen3

__all__ = [
    "PARTS",
    "WIDTH",
    "chat_tokenizer",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen2_vl_processor",
    "qwen3_causal",
]

WIDTH = 16
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_TOKENS = [*_SPECIAL, "Ġ", "Ċ", *ALPHABET]  # byte-level BPE's way to write a space, a line's end
_IDS = {token: index for index, token in enumerate(_TOKENS)}
_CHAT = (
    "{% for message in messages %}<|im_start|>{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)

DECODER: dict[str, Any] = {
    "vocab_size": len(_TOKENS),
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": _IDS["<|im_start|>"],
    "eos_token_id": _IDS["<|im_end|>"],
    "pad_token_id": _IDS["<|endoftext|>"],
}
"""Settings of a language model, as most of them name them."""

_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_VISION = {
    "depth": 2,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
}
_MULTIMODAL_IDS = {
    "image_token_id": _IDS["<|image_pad|>"],
    "video_token_id": _IDS["<|video_pad|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
}


def chat_tokenizer() -> transformers.Qwen2Tokenizer:
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=dict(_IDS), merges=[], additional_special_tokens=list(_SPECIAL), pad_token=_SPECIAL[0]
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def qwen2_vl_processor() -> transformers.Qwen2VLProcessor:
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 32}
    )
    return _without_videos(transformers.Qwen2VLProcessor, pictures)


def qwen3_vl_processor() -> transformers.Qwen3VLProcessor:
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 32}
    )
    return _without_videos(transformers.Qwen3VLProcessor, pictures)


def _without_videos(kind: type[Any], pictures: Any) -> Any:
    """A processor of text and pictures: that of videos needs torchvision."""

    class PictureProcessor(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None

    PictureProcessor.__name__ = kind.__name__
    return PictureProcessor(
        image_processor=pictures,
        tokenizer=chat_tokenizer(),
        video_processor=None,
        chat_template=_CHAT,
    )


def qwen2_5_vl() -> transformers.Qwen2_5_VLForConditionalGeneration:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**DECODER, "rope_parameters": _ROPE},
        vision_config={
            **_VISION,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_MULTIMODAL_IDS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl() -> transformers.Qwen2VLForConditionalGeneration:
    config = transformers.Qwen2VLConfig(
        text_config={**DECODER, "rope_parameters": _ROPE},
        vision_config={
            "depth": 1,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
        **_MULTIMODAL_IDS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen3_vl() -> transformers.Qwen3VLForConditionalGeneration:
    config = transformers.Qwen3VLConfig(
        text_config={**DECODER, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
        vision_config={
            **_VISION,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **_MULTIMODAL_IDS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen3_causal() -> transformers.Qwen3ForCausalLM:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER))


PARTS: Mapping[str, Callable[[], Any]] = {
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Qwen3VLModel": lambda: qwen3_vl().model,
    "Qwen2VLProcessor": qwen2_vl_processor,
    "Qwen3VLProcessor": qwen3_vl_processor,
    "Qwen2Tokenizer": chat_tokenizer,
    "Qwen3ForCausalLM": qwen3_causal,
    "Qwen3Model": qwen3,
}
