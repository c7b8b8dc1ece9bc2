"""Tokenizers with vocabularies made in memory, tiny encoders of text and of pictures."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from tests.support.tiny_models import (
    MAX_TOKENS,
    SIDE_PX,
    clip,
    clip_tokenizer,
    gemma2,
    gemma_tokenizer,
    t5,
    t5_tokenizer,
)

__all__ = ["PARTS", "clip_image_processor", "clip_vision", "umt5"]

ALPHABET = string.ascii_lowercase + string.digits + string.punctuation
CLIP_WIDTH = 16  # of all CLIP models here
T5_WIDTH = 32


def umt5() -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config(
        vocab_size=len(t5_tokenizer()), d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.UMT5EncoderModel(config)


def _vision_config(**changes: Any) -> transformers.CLIPVisionConfig:
    settings = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 32,
        "projection_dim": CLIP_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE_PX,
        "patch_size": SIDE_PX // 2,
    }
    return transformers.CLIPVisionConfig(**{**settings, **changes})


def clip_vision(projected: bool = True, **changes: Any) -> transformers.PreTrainedModel:
    if projected:
        return transformers.CLIPVisionModelWithProjection(_vision_config(**changes))
    return transformers.CLIPVisionModel(_vision_config(**changes))


def clip_image_processor() -> Any:
    return transformers.CLIPImageProcessorPil(crop_size=SIDE_PX, size=SIDE_PX)


def xlm_roberta_tokenizer() -> transformers.XLMRobertaTokenizer:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in ALPHABET] + [("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=pieces, model_max_length=MAX_TOKENS)


def _roberta(config: type[Any], **settings: Any) -> Any:
    return config(
        vocab_size=len(xlm_roberta_tokenizer()),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        pad_token_id=1,
        **settings,
    )


def multilingual_clip() -> MultilingualCLIP:
    config = _roberta(MCLIPConfig, transformerDimSize=CLIP_WIDTH, imageDimSize=CLIP_WIDTH)
    return MultilingualCLIP(config)


def roberta_series() -> RobertaSeriesModelWithTransformation:
    return RobertaSeriesModelWithTransformation(
        _roberta(RobertaSeriesConfig, project_dim=CLIP_WIDTH)
    )


PARTS: Mapping[str, Callable[[], Any]] = {
    "CLIPTextModel": clip,
    "CLIPTextModelWithProjection": partial(clip, projected=True, act="gelu"),
    "CLIPTokenizer": clip_tokenizer,
    "CLIPVisionModel": partial(clip_vision, projected=False),
    "CLIPVisionModelWithProjection": clip_vision,
    "CLIPImageProcessorPil": clip_image_processor,
    "Gemma2PreTrainedModel": gemma2,
    "Gemma2Model": gemma2,
    "GemmaTokenizer": gemma_tokenizer,
    "T5EncoderModel": t5,
    "T5Tokenizer": t5_tokenizer,
    "UMT5EncoderModel": umt5,
    "MultilingualCLIP": multilingual_clip,
    "RobertaSeriesModelWithTransformation": roberta_series,
    "XLMRobertaTokenizer": xlm_roberta_tokenizer,
    "AutoTokenizer": t5_tokenizer,
}
