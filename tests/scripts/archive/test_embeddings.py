"""Textual inversions in an archive: packed, loaded, and words of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handler.config import HandlerConfig
from handler.errors import ArchiveError
from handler.loading.pipeline import load_pipeline
from handler.pipelines.prompt_embeddings import PromptReading, read_prompts
from scripts.archive.checks import check_models
from scripts.archive.reader import open_archive
from scripts.build_archive import main as build_archive
from scripts.console import FAILED
from scripts.errors import UsageError
from scripts.inspect_archive import inspect
from tests.support.archives import save_pipeline
from tests.support.packing import build, manifest, pack, unpack
from tests.support.pipelines import build as build_pipeline

WIDTH = 16


def vectors(num: int = 1, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(num))


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def load(archive: Path, folder: Path) -> Any:
    return load_pipeline(unpack(archive, folder), HandlerConfig(device="cpu"), None).pipeline


def encoded(pipeline: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        embeds: torch.Tensor = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    return embeds


@pytest.mark.parametrize("num_vectors", [1, 3])
@pytest.mark.parametrize(("key", "word"), [("<thing>", "<thing>"), ("emb_params", "ink")])
def test_its_word_draws_what_diffusers_draws(
    tmp_path: Path, key: str, word: str, num_vectors: int
) -> None:
    path = saved(tmp_path / "e.safetensors", **{key: vectors(num_vectors)})
    archive = build(tmp_path, "--embedding", f"ink={path}")
    assert manifest(archive)["embeddings"] == ["ink"]
    pipeline = load(archive, tmp_path / "unpacked")
    expected = build_pipeline("stable_diffusion")
    expected.load_textual_inversion({word: vectors(num_vectors)}, token=word)
    found = encoded(pipeline, f"a {word} b")
    assert torch.equal(found, encoded(expected, f"a {word} b"))
    assert torch.equal(found, encoded(pipeline, "a ink b"))
    assert not torch.equal(found, encoded(build_pipeline("stable_diffusion"), f"a {word} b"))
    assert torch.equal(encoded(pipeline, "a b"), encoded(build_pipeline("stable_diffusion"), "a b"))


def test_its_word_works_in_weighted_and_long_prompts(tmp_path: Path) -> None:
    path = saved(tmp_path / "e.safetensors", emb_params=vectors(2))
    pipeline = load(build(tmp_path, "--embedding", f"ink={path}"), tmp_path / "unpacked")
    short = encoded(pipeline, "a ink")
    read_prompts(pipeline, PromptReading(is_weighted=True))
    assert encoded(pipeline, "a ink BREAK b")[:, :77].allclose(short, atol=1e-6)
    assert not encoded(pipeline, "a (ink:1.5)").allclose(short, atol=1e-3)


def test_both_encoders_of_sdxl_have_their_vectors(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "xl", "stable_diffusion_xl")
    path = saved(tmp_path / "e.safetensors", clip_l=vectors(1), clip_g=vectors(2)[:1])
    pipeline = load(pack(tmp_path, folder, embeddings={"ink": path}), tmp_path / "unpacked")
    for encoder, tokenizer, wanted in (
        (pipeline.text_encoder, pipeline.tokenizer, vectors(1)[0]),
        (pipeline.text_encoder_2, pipeline.tokenizer_2, vectors(2)[0]),
    ):
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[tokenizer.convert_tokens_to_ids("ink")], wanted)
    one = saved(tmp_path / "one.safetensors", emb_params=vectors())
    with pytest.raises(ArchiveError, match="text encoders are text_encoder, text_encoder_2"):
        pack(tmp_path, folder, embeddings={"ink": one}, is_checked=True)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"emb_params": vectors(1, 24)}, "it is of another model: its emb_params is [1, 24]"),
        ({"clip_l": vectors(), "clip_g": vectors()}, "it is of another model: it has clip_g"),
        (
            {"unet.to_q.lora_A.weight": vectors(), "unet.to_q.lora_B.weight": vectors()},
            "it is a LoRA, not an embedding; pack it with --lora",
        ),
        ({"decoder.conv_in.weight": vectors()}, "it is a VAE alone, not an embedding"),
    ],
)
def test_what_is_no_embedding_of_the_pipeline_is_told_what_it_is(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = saved(tmp_path / "e.safetensors", **tensors)
    pipeline = save_pipeline(tmp_path / "pipeline")
    arguments = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path)]
    assert build_archive([*arguments, "--embedding", f"ink={path}"]) == FAILED
    assert problem in capsys.readouterr().err


def test_an_embedding_given_as_a_lora_is_told_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "e.safetensors", **{"<thing>": vectors()})
    pipeline = save_pipeline(tmp_path / "pipeline")
    arguments = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path)]
    assert build_archive([*arguments, "--lora", f"ink={path}"]) == FAILED
    assert "an embedding (a textual inversion), not a LoRA" in capsys.readouterr().err


def test_a_word_that_the_tokenizer_knows_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "e.safetensors", emb_params=vectors())
    folder = save_pipeline(tmp_path / "pipeline")
    with pytest.raises(ArchiveError, match="knows the word a already; pack it as another NAME"):
        pack(tmp_path, folder, embeddings={"a": path}, is_checked=True)
    archive = pack(tmp_path, folder, embeddings={"a": path})
    with open_archive(archive) as view:
        assert any("knows the word a already" in problem for problem in check_models(view))
    with pytest.raises(ArchiveError, match="the embedding a: the tokenizer knows"):
        load(archive, tmp_path / "unpacked")


def test_packing_again_keeps_and_leaves_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "e.safetensors", emb_params=vectors())
    first = build(tmp_path, "--embedding", f"ink={path}", "--embedding", f"oil={path}")
    second = pack(tmp_path / "again", first, is_repacked=True, embeddings={"oil": None})
    assert manifest(second)["embeddings"] == inspect(second)["embeddings"] == ["ink"]
    pipeline = load(second, tmp_path / "unpacked")
    assert "ink" in pipeline.tokenizer.get_vocab()
    assert "oil" not in pipeline.tokenizer.get_vocab()
    with pytest.raises(UsageError, match="there is no embedding of that name"):
        pack(tmp_path / "again", first, is_repacked=True, embeddings={"pen": None})
