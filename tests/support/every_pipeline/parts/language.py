"""Tiny language models that serve as text encoders: BERT, Gemma, GLM, Llama and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers

from tests.support.every_pipeline.parts.text import ALPHABET
from tests.support.every_pipeline.parts.vision_language import DECODER, qwen2_5_vl
from tests.support.tiny_models import MAX_TOKENS, gemma_tokenizer

__all__ = [
    "PARTS",
    "bert",
    "decoder",
    "gemma_vocabulary",
    "llama_tokenizer",
    "roberta_tokenizer",
    "siglip_processor",
    "siglip_vision",
]


def decoder(name: str, **changes: Any) -> Any:
    """A language model by the name of its class, such as ``LlamaModel``."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**{**DECODER, **changes}))


def bert_tokenizer() -> transformers.BertTokenizer:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ALPHABET]
    tokens += [f"##{character}" for character in ALPHABET]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=77)


def bert(**changes: Any) -> transformers.BertModel:
    settings = {
        "vocab_size": len(bert_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 96,
    }
    return transformers.BertModel(transformers.BertConfig(**{**settings, **changes}))


def llama_tokenizer() -> transformers.LlamaTokenizer:
    tokens = ["<unk>", "<s>", "</s>", "▁", *ALPHABET]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.LlamaTokenizer(
        vocab=vocab, merges=[], pad_token="</s>", model_max_length=MAX_TOKENS
    )


def siglip_vision(**changes: Any) -> transformers.SiglipVisionModel:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**{**settings, **changes})
    )


def siglip_processor() -> transformers.SiglipImageProcessorPil:
    return transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})


def qwen2_5_text() -> transformers.PreTrainedModel:
    """The language half of Qwen2.5-VL."""
    return qwen2_5_vl().model.language_model


def gemma_vocabulary() -> dict[str, int]:
    """The settings of a language model that go with Gemma's tokenizer."""
    size = len(gemma_tokenizer())
    return {"vocab_size": size, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def roberta_tokenizer() -> transformers.RobertaTokenizer:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *ALPHABET]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.RobertaTokenizer(vocab=vocab, merges=[], model_max_length=77)


PARTS: Mapping[str, Callable[[], Any]] = {
    "BertModel": bert,
    "BertTokenizer": bert_tokenizer,
    "GemmaPreTrainedModel": partial(decoder, "GemmaModel", **gemma_vocabulary()),
    "GlmModel": partial(decoder, "GlmModel"),
    "LlamaModel": partial(decoder, "LlamaModel"),
    "LlamaForCausalLM": partial(decoder, "LlamaForCausalLM"),
    "LlamaTokenizer": llama_tokenizer,
    "SmolLM3ForCausalLM": partial(decoder, "SmolLM3ForCausalLM"),
    "SiglipVisionModel": siglip_vision,
    "SiglipImageProcessorPil": siglip_processor,
    "ByT5Tokenizer": transformers.ByT5Tokenizer,
    "Qwen2_5_VLTextModel": qwen2_5_text,
}
