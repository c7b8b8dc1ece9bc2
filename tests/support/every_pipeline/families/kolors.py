"""Kolors: SDXL's UNet with ChatGLM as text encoder, whose output has the sequence first."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from tests.support.every_pipeline.parts.text import ALPHABET, CLIP_WIDTH
from tests.support.every_pipeline.parts.unets import xl_unet
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

_VOCABULARY = 128


def _tokenizer() -> Any:
    """A tokenizer of single characters, by the way of a file, which it wants."""
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*ALPHABET, ALPHABET]),
            model_prefix=str(Path(folder) / "tokenizer"),
            model_type="char",
            vocab_size=_VOCABULARY,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return ChatGLMTokenizer(str(Path(folder) / "tokenizer.model"))


def _text_encoder() -> Any:
    # Not at the top: torch warns of what it does when it is imported.
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    model = ChatGLMModel(
        ChatGLMConfig(
            original_rope=True,
            num_layers=2,
            padded_vocab_size=_VOCABULARY,
            hidden_size=CLIP_WIDTH,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=64,
            multi_query_attention=True,
            multi_query_group_num=1,
            apply_query_key_layer_scaling=False,
        )
    )
    # It leaves its weights as the memory was.
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    return model


_PARTS = {
    "text_encoder": _text_encoder,
    "tokenizer": _tokenizer,
    "unet": partial(xl_unet, cross_attention_dim=CLIP_WIDTH),
}

RECIPES: Mapping[str, Recipe] = {
    "KolorsPipeline": Recipe(_PARTS),
    "KolorsImg2ImgPipeline": Recipe(_PARTS),
    "KolorsPAGPipeline": Recipe(_PARTS, {"pag_scale": 2.0}),
}
