"""handler.loading.variants: which weights files of a component are loaded."""

from __future__ import annotations

import pytest

from handler.errors import ArchiveError
from handler.loading.variants import select_weights, variant_of


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", ""),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("model-00001-of-00002.safetensors", ""),
        ("model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.safetensors.fp16.index.json", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
        ("pytorch_model.non_ema.safetensors", "non_ema"),
        ("lora_weights.safetensors", None),
        ("config.json", None),
        ("model.bin", None),
    ],
)
def test_variants_are_read_from_names(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant


@pytest.mark.parametrize(
    ("variants", "dtype_name", "expected"),
    [
        (("", "fp16", "bf16"), "float32", None),
        (("", "fp16", "bf16"), "float16", "fp16"),
        (("", "fp16", "bf16"), "bfloat16", "bf16"),
        (("", "fp16"), "bfloat16", None),
        (("", "bf16"), "float16", None),
        (("fp16",), "float32", "fp16"),
        (("non_ema",), "float16", "non_ema"),
        (("", "non_ema"), "float16", None),
    ],
)
def test_the_nearest_variant_is_chosen(
    variants: tuple[str, ...], dtype_name: str, expected: str | None
) -> None:
    names = {each: f"unet/model.{each}.safetensors".replace("..", ".") for each in variants}
    chosen = select_weights("unet", names.values(), dtype_name)
    assert chosen == ([names[expected or ""]], expected)


def test_no_usual_name_no_choice() -> None:
    assert select_weights("unet", ["unet/a.safetensors"], "float16") == ([], None)


def test_weights_in_folders_of_a_component_are_not_its_weights() -> None:
    names = ["unet/model.safetensors", "unet/old/model.safetensors", "unet/ema/model.safetensors"]
    assert select_weights("unet", names, "float16") == (names[:1], None)
    assert select_weights("unet", names[1:], "float16") == ([], None)


@pytest.mark.parametrize(
    "left_behind",
    [
        "model.safetensors",
        "pytorch_model.safetensors",
        "model-00001-of-00004.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
    ],
)
def test_weights_that_are_there_twice_are_refused(left_behind: str) -> None:
    """Which would win depends on the library: an old file must not draw the pictures."""
    shards = [f"unet/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert select_weights("unet", shards, "float16") == (shards, None)
    with pytest.raises(ArchiveError, match=r"more than once, as unet/.* and unet/.*: remove"):
        select_weights("unet", [*shards, f"unet/{left_behind}"], "float16")


def test_shards_that_are_not_all_there_are_refused() -> None:
    shards = [f"unet/model.fp16-0000{number}-of-00003.safetensors" for number in (1, 3)]
    with pytest.raises(ArchiveError, match="2 of its 3 weights files"):
        select_weights("unet", [*shards, "unet/model.safetensors"], "float16")
