"""LoRAs of other kinds, as far as diffusers converts them: DoRA in PEFT's names, and LoKr."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig

from handler.engine import InFlightEngine
from handler.errors import ArchiveError
from handler.loading.lora_files import LoraReader
from tests.support.pipelines import build, example_kwargs, image_of

# What peft says of every second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

BOUND = 3e-5
VISIBLE = 1e-3
Tensors = dict[str, torch.Tensor]


def dora() -> Tensors:
    """Linear layers and convolutions, as diffusers saves what PEFT trained."""
    unet = build("stable_diffusion").unet
    names = ["to_q", "to_v", "conv1", "proj_in"]
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, use_dora=True), "a")
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name="a")
    generator = torch.Generator().manual_seed(6)
    return {
        f"unet.{name}": weight.detach()
        + 0.3 * torch.randn(weight.shape, generator=generator) * weight.abs().mean().clamp(0.3)
        for name, weight in state.items()
    }


def lokr(*, is_whole: bool = False) -> Tensors:
    """As ai-toolkit writes it: alphas, and the model's own paths."""
    generator = torch.Generator().manual_seed(4)
    found: Tensors = {}
    for path, layer in build("z_image").transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.endswith(("to_q", "to_k", "to_v")):
            key = f"diffusion_model.{path}"
            found[f"{key}.lokr_w1"] = 0.5 * torch.randn(4, 4, generator=generator)
            sides = layer.out_features // 4, layer.in_features // 4
            if is_whole:
                found[f"{key}.lokr_w2"] = 0.5 * torch.randn(*sides, generator=generator)
            else:
                found[f"{key}.lokr_w2_a"] = 0.5 * torch.randn(sides[0], 1, generator=generator)
                found[f"{key}.lokr_w2_b"] = 0.5 * torch.randn(1, sides[1], generator=generator)
            found[f"{key}.alpha"] = torch.tensor(0.5)
    return found


CASES: Mapping[str, tuple[str, Callable[[], Tensors]]] = {
    "dora": ("stable_diffusion", dora),
    "lokr": ("z_image", lokr),
    "whole lokr": ("z_image", functools.partial(lokr, is_whole=True)),
}


@functools.cache
def solo(case: str, scale: float | None) -> Any:
    family, file = CASES[case]
    pipeline = build(family)
    if scale is not None:
        pipeline.load_lora_weights(file(), adapter_name="a")
        pipeline.set_adapters(["a"], [scale])
    return image_of(pipeline(**example_kwargs(family, 0)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exact", [True, False])
def test_what_diffusers_converts_draws_what_it_draws(case: str, exact: bool) -> None:
    """To the bit alone; each row at its own scale, in forwards shared with rows without any."""
    family, file = CASES[case]
    pipeline = build(family)
    engine = InFlightEngine(pipeline, exact=exact)
    engine.attach_lora("a", engine.prepare_lora(LoraReader(pipeline).read(file(), {})))
    tickets = {}
    for scale in (0.7, None, 1.0):
        adapters = None if scale is None else {"a": scale}
        tickets[scale] = engine.submit(example_kwargs(family, 0), adapters=adapters)
    engine.run()
    engine.close()
    for scale, ticket in tickets.items():
        difference = (image_of(ticket.result()) - solo(case, scale)).abs().max()
        assert difference <= (0 if exact else BOUND), scale
    assert (engine.counters.merged_forwards > 0) is not exact
    assert (solo(case, 0.7) - solo(case, None)).abs().max() > VISIBLE
    assert (solo(case, 0.7) - solo(case, 1.0)).abs().max() > 10 * BOUND


@pytest.mark.parametrize("case", CASES)
def test_one_that_is_packed_draws_the_same_in_flight(case: str) -> None:
    """There diffusers has loaded it, and PEFT's layers are switched for it."""
    family, file = CASES[case]
    pipeline = build(family)
    pipeline.load_lora_weights(file(), adapter_name="a")
    engine = InFlightEngine(pipeline)
    tickets = {
        scale: engine.submit(example_kwargs(family, 0), adapters=adapters)
        for scale, adapters in ((None, {}), (1.0, None), (0.7, {"a": 0.7}))
    }
    engine.run()
    engine.close()
    for scale, ticket in tickets.items():
        assert (image_of(ticket.result()) - solo(case, scale)).abs().max() <= BOUND, scale


def changed(tensors: Tensors, end: str, value: torch.Tensor | None) -> Tensors:
    """`tensors` with the first one whose name ends so replaced, or without it."""
    name = next(each for each in tensors if each.endswith(end))
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    return others if value is None else {**others, name: value}


@pytest.mark.parametrize(
    ("case", "end", "value", "words"),
    [
        ("dora", "lora_A.weight", None, "half a LoRA"),
        ("dora", "to_q.lora_magnitude_vector", torch.ones(7), "has the shape (7,)"),
        ("lokr", "lokr_w2_b", None, "keys are diffusion_model."),
        ("lokr", "lokr_w1", torch.ones(4, 2), "to_q is changed by a product of the shape (16, 8)"),
    ],
)
def test_what_does_not_fit_is_named(
    case: str, end: str, value: torch.Tensor | None, words: str
) -> None:
    family, file = CASES[case]
    with pytest.raises(ArchiveError) as raised:
        LoraReader(build(family)).read(changed(file(), end, value), {})
    assert words in str(raised.value)


def test_a_file_may_be_checked_by_its_header_alone() -> None:
    """As packing does: only shapes are there."""
    for family, file in CASES.values():
        meta = {name: torch.ones(()).expand(each.shape) for name, each in file().items()}
        assert LoraReader(build(family)).read(meta, {})
