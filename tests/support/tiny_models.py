"""Tiny parts of diffusers pipelines, for `tests/support/pipelines.py`.

Built from configurations alone, with random weights: a caller that wants the same ones every time
seeds torch first (`pipelines.build` does).
"""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
import transformers

SIDE_PX = 32  # height and width that the parts are made for
MAX_TOKENS = 32  # for the text encoders whose sequence length a call may choose
_ALPHABET = string.ascii_lowercase + string.digits + string.punctuation


def make_every_parameter_count(module: torch.nn.Module) -> None:
    """Add noise to parameters initialised to one value, so that no zeroed layer hides an error.

    ControlNet's outputs, all biases and all norms start that way. Mutates `module`.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() and parameter.max() == parameter.min():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


# Tokenizers: one token a character, vocabularies in memory.


def clip_tokenizer() -> transformers.CLIPTokenizer:
    pieces = [*_ALPHABET, *(f"{character}</w>" for character in _ALPHABET)]
    tokens = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in _ALPHABET]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_ALPHABET]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], model_max_length=MAX_TOKENS)


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    # "Ġ" is how byte-level BPE writes a space, "Ċ" a line's end.
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *_ALPHABET]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


# Text encoders.


def clip(projected: bool = False, act: str = "quick_gelu") -> transformers.PreTrainedModel:
    vocab_size = len(_ALPHABET) * 2 + 2
    config = transformers.CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=act,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    if projected:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def t5() -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


_DECODER_TEXT_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def gemma2() -> transformers.Gemma2Model:
    vocab_size = len(gemma_tokenizer())
    config = transformers.Gemma2Config(
        vocab_size=vocab_size, sliding_window=MAX_TOKENS // 2, **_DECODER_TEXT_MODEL
    )
    return transformers.Gemma2Model(config)


def qwen3() -> transformers.Qwen3Model:
    config = transformers.Qwen3Config(vocab_size=len(qwen_tokenizer()), **_DECODER_TEXT_MODEL)
    return transformers.Qwen3Model(config)


def vision_encoder() -> transformers.CLIPVisionModelWithProjection:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE_PX,
        patch_size=SIDE_PX // 2,
    )
    return transformers.CLIPVisionModelWithProjection(config)


# Autoencoders and the UNet family.


def vae(force_upcast: bool = False, **changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIDE_PX,
        scaling_factor=1.0,
        force_upcast=force_upcast,
        **changes,
    )


def flow_vae(**changes: Any) -> diffusers.AutoencoderKL:
    return vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, **changes)


UNET = {
    "sample_size": SIDE_PX // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(**{**UNET, **changes})
