"""LoRAs as files: what they add is what diffusers would load, and every tensor is accounted for."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handler.engine import InFlightEngine
from handler.errors import ArchiveError
from handler.loading.lora_files import LoraReader
from tests.support.loras import kohya_lora
from tests.support.pipelines import build, example_kwargs, image_of

PREFIXES = {
    "stable_diffusion": {"lora_unet": "unet", "lora_te": "text_encoder"},
    "stable_diffusion_xl": {
        "lora_unet": "unet",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
    },
}
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def kohya(family: str, **options: Any) -> dict[str, torch.Tensor]:
    pipeline = build(family)
    modules = {prefix: getattr(pipeline, name) for prefix, name in PREFIXES[family].items()}
    return kohya_lora(modules, alpha=3.0, **options)


def diffusers_own(family: str) -> dict[str, torch.Tensor]:
    """PEFT's names, of which one layer has another rank."""
    found = {}
    for name, module in (("unet", build(family).unet),):
        for path, layer in module.named_modules():
            if path.endswith(("to_q", "to_v")):
                rank = 3 if path.endswith("attn2.to_v") else 2
                seed = torch.Generator().manual_seed(rank)
                down = torch.randn(rank, layer.in_features, generator=seed)
                up = torch.randn(layer.out_features, rank, generator=seed)
                found[f"{name}.{path}.lora_A.weight"] = down * 0.3
                found[f"{name}.{path}.lora_B.weight"] = up * 0.3
    return found


FILES = {"kohya": kohya, "diffusers": diffusers_own}


@functools.cache
def solo(family: str, form: str) -> Any:
    pipeline = build(family)
    pipeline.load_lora_weights(FILES[form](family), adapter_name="a")
    pipeline.set_adapters(["a"], [0.7])
    return image_of(pipeline(**example_kwargs(family, 0)))


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("form", FILES)
def test_what_is_read_draws_what_diffusers_draws(family: str, form: str) -> None:
    """To the bit alone; in company within the bound, while nothing of the modules is changed."""
    pipeline = build(family)
    names = [name for name, _ in pipeline.unet.named_modules()]
    layers = LoraReader(pipeline).read(FILES[form](family), {})
    plain = image_of(build(family)(**example_kwargs(family, 0)))
    for exact in (True, False):
        engine = InFlightEngine(pipeline, exact=exact)
        engine.attach_lora("a", engine.prepare_lora(layers))
        styled = engine.submit(example_kwargs(family, 0), adapters={"a": 0.7})
        other = engine.submit(example_kwargs(family, 0))
        engine.run()
        engine.close()
        bound = 0 if exact else 3e-5
        assert (image_of(styled.result()) - solo(family, form)).abs().max() <= bound
        assert (image_of(other.result()) - plain).abs().max() <= bound
        assert (engine.counters.merged_forwards > 0) is not exact
    assert (plain - solo(family, form)).abs().max() > 1e-3
    assert [name for name, _ in pipeline.unet.named_modules()] == names


def test_a_text_encoder_is_applied_whole_where_diffusers_drops_its_attention() -> None:
    """Kohya's usual file: attention and MLP. PEFT is handed the one under names that it has not."""
    pipeline = build("stable_diffusion")
    ends = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    file = kohya_lora({"lora_te": pipeline.text_encoder}, alpha=1.0, ends=ends)
    layers = LoraReader(pipeline).read(file, {})["text_encoder"]
    assert 3 * len(layers) == len(file)
    path = "encoder.layers.0.self_attn.q_proj"
    down = file["lora_te_encoder_layers_0_self_attn_q_proj.lora_down.weight"]
    assert torch.equal(layers[path].down, down)
    assert (layers[path].alpha, layers[path].divisor) == (1.0, 2)


def test_the_scale_stands_in_the_files_metadata() -> None:
    """As diffusers saves it: there are no alphas among the tensors."""
    pipeline = build("stable_diffusion")
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"attn2.to_v": 3}}
    config["alpha_pattern"] = {r"^down.*\.nothing\d+$": 1}
    written = {f"unet.{key}": value for key, value in config.items()}
    metadata = {"lora_adapter_metadata": json.dumps({**written, "unet.use_rslora": True})}
    layers = LoraReader(pipeline).read(diffusers_own("stable_diffusion"), metadata)["unet"]
    found = {path.rpartition("_blocks.0.")[2]: layer for path, layer in layers.items()}
    assert (found["attn1.to_q"].alpha, found["attn1.to_q"].divisor) == (8.0, 2**0.5)
    assert (found["attn2.to_v"].alpha, found["attn2.to_v"].divisor) == (8.0, 3**0.5)
    wrong = {"lora_adapter_metadata": json.dumps({**written, "unet.rank_pattern": {}})}
    with pytest.raises(ArchiveError, match="has the rank 3, and its metadata says 2"):
        LoraReader(pipeline).read(diffusers_own("stable_diffusion"), wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank_pattern": {"(": 2}},
        # Each takes for ever to find no match.
        {"rank_pattern": {"([a-z0-9_.]+)+!": 2}},
        {"alpha_pattern": {"a?" * 40 + "!": 2}},
        {"alpha_pattern": {".*" * 8 + "!": 2}},
        {"lora_alpha": "much"},
        {"alpha_pattern": [1]},
        {"r": None, "x": 1},
    ],
    ids=repr,
)
def test_metadata_that_cannot_be_read_is_the_files_error(wrong: dict[str, Any]) -> None:
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"attn2.to_v": 3}, **wrong}
    if "x" in wrong:
        del config["r"]
    text = json.dumps({f"unet.{key}": value for key, value in config.items()})
    with pytest.raises(ArchiveError, match="its lora_adapter_metadata cannot be read"):
        LoraReader(build("stable_diffusion")).read(
            diffusers_own("stable_diffusion"), {"lora_adapter_metadata": text}
        )


def test_reading_ranks_that_differ_takes_about_as_long_as_equal_ones() -> None:
    """The name of every layer may be the pattern of every other: compile each of them once."""
    num_layers = 700
    pipeline = build("stable_diffusion")
    pipeline.unet.many = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(num_layers))
    reader = LoraReader(pipeline)

    def seconds(num_ranks: int) -> float:
        file = {}
        for i in range(num_layers):
            rank = i % num_ranks + 1
            file[f"unet.many.{i}.lora_A.weight"] = torch.ones(rank, 2)
            file[f"unet.many.{i}.lora_B.weight"] = torch.ones(2, rank)
        started_s = time.thread_time()
        layers = reader.read(file, {})["unet"]
        seconds = time.thread_time() - started_s
        assert [layer.divisor for layer in layers.values()] == [
            i % num_ranks + 1 for i in range(num_layers)
        ]
        return seconds

    equal_s = seconds(1)
    assert seconds(4) < 20 * equal_s


def dora() -> dict[str, torch.Tensor]:
    return {**kohya("stable_diffusion"), f"{KEY}.dora_scale": torch.ones(8, 1)}


def without(end: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in kohya("stable_diffusion").items() if k != f"{KEY}.{end}"}


def with_other(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {**kohya("stable_diffusion"), **named}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (dora, f"would not be applied, such as {KEY}.dora_scale"),
        (lambda: without("lora_up.weight"), KEY),
        (lambda: without("lora_down.weight"), KEY),
        (
            lambda: with_other(lora_unet_other__lora_down__weight=torch.ones(2, 8)),
            "lora_unet_other",
        ),
        (lambda: with_other(stray=torch.ones(3, 3, 3)), "stray"),
        (lambda: {f"unet.{PATH}.lora_magnitude_vector": torch.ones(8)}, "it does not fit"),
        (
            lambda: {f"{KEY}.lokr_w1": torch.ones(2, 2)},
            "not applied to a StableDiffusionPipeline (",
        ),
        (lambda: {f"{KEY}.lokr_w1": torch.ones(2, 2)}, f"its keys are {KEY}.lokr_w1"),
        (lambda: {f"{KEY}.hada_w1_a": torch.ones(2, 2)}, "it is a LoHa of LyCORIS"),
        (dict, "it is empty"),
        (lambda: {"emb_params": torch.ones(1, 5)}, "it is a textual inversion"),
        (lambda: {"foo": torch.ones(2)}, "its keys are foo"),
    ],
)
def test_what_is_not_applied_is_named(tensors: Any, words: str) -> None:
    with pytest.raises(ArchiveError) as raised:
        LoraReader(build("stable_diffusion")).read(tensors(), {})
    assert words in str(raised.value)


def test_a_whole_model_is_refused_without_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build("stable_diffusion")
    save_file(pipeline.unet.state_dict(), tmp_path / "unet.safetensors")
    monkeypatch.setattr("handler.loading.lora_files.read_tensors", lambda *_: pytest.fail("read"))
    with pytest.raises(ArchiveError, match="does not fit the pipeline"):
        LoraReader(pipeline).read_file(tmp_path / "unet.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_named_by_their_keys(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    reader, path = LoraReader(build("stable_diffusion")), tmp_path / "broken.safetensors"
    file = {key: value.to(dtype) for key, value in diffusers_own("stable_diffusion").items()}
    save_file(file, path)
    assert reader.read_file(path)
    file[f"unet.{PATH}.lora_A.weight"] = torch.full((2, 8), torch.nan).to(dtype)
    save_file(file, path)
    with pytest.raises(ArchiveError, match=f"not finite .*such as unet.{PATH}.lora_A.weight"):
        reader.read_file(path)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.AvgPool2d(2),
        torch.nn.ConvTranspose2d(4, 4, 1),
        torch.nn.Embedding(4, 4, max_norm=1.0),
        torch.nn.LayerNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_takes_no_lora_is_named(layer: torch.nn.Module) -> None:
    pipeline = build("stable_diffusion")
    pipeline.unet.odd = layer
    ends = (1, 1) if isinstance(layer, torch.nn.ConvTranspose2d) else ()
    down, up = torch.ones(2, 4, *ends), torch.ones(4, 2, *ends)
    file = {"unet.odd.lora_A.weight": down, "unet.odd.lora_B.weight": up}
    with pytest.raises(ArchiveError, match=f"odd is a {type(layer).__name__}, which takes no LoRA"):
        LoraReader(pipeline).read(file, {})


@pytest.mark.parametrize("shape", [(), (8,), (2, 7), (2, 8, 1, 1)])
def test_a_weight_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    file = {**diffusers_own("stable_diffusion"), name: torch.ones(shape)}
    with pytest.raises(ArchiveError, match="it does not fit the pipeline"):
        LoraReader(build("stable_diffusion")).read(file, {})


def test_a_control_lora_leaves_the_reader_as_it_was() -> None:
    """Diffusers widens Flux' first layer for one; the reader is asked again afterwards."""
    pipeline = build("flux")
    width, inner = pipeline.transformer.x_embedder.weight.shape
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.ones(2, 2 * inner),
        "transformer.x_embedder.lora_B.weight": torch.ones(width, 2),
    }
    fitting = {**wide, "transformer.x_embedder.lora_A.weight": torch.ones(2, inner)}
    reader = LoraReader(pipeline)
    with pytest.raises(ArchiveError, match="does not fit the pipeline"):
        reader.read(wide, {})
    assert list(reader.read(fitting, {})["transformer"]) == ["x_embedder"]
    assert pipeline.transformer.x_embedder.weight.shape == (width, inner)


def test_a_pipeline_without_loras_says_so() -> None:
    with pytest.raises(ArchiveError, match="takes no LoRAs"):
        LoraReader(object()).read(kohya("stable_diffusion"), {})
