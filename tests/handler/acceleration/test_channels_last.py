"""handler.acceleration.channels_last: pictures stay, and so does what workers share."""

from __future__ import annotations

import pytest
import torch

from handler.acceleration import channels_last
from handler.acceleration.channels_last import is_mapped, put_channels_last
from tests.support.pipelines import build, example_kwargs, image_of

BOUND = 1e-4


def _map_weights(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        data = bytearray(parameter.detach().numpy().tobytes())
        flat = torch.frombuffer(data, dtype=parameter.dtype)
        parameter.data = flat.reshape(parameter.shape)


def _places(module: torch.nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


def test_large_mapped_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_last, "_MOST_COPIED_BYTES", 1000)
    pipeline = build("stable_diffusion")
    modules = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    expected = image_of(pipeline(**example_kwargs("stable_diffusion", 0)))
    for module in modules.values():
        _map_weights(module)
        assert all(is_mapped(each) for each in module.parameters())
    before = {name: _places(module) for name, module in modules.items()}
    put_channels_last(modules)
    seen: list[bool] = []
    pipeline.vae.decoder.conv_out.register_forward_hook(
        lambda _, inputs, output: seen.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    found = image_of(pipeline(**example_kwargs("stable_diffusion", 0)))
    assert {name: _places(module) for name, module in modules.items()} == before
    assert seen == [True]
    assert (found - expected).abs().max() < BOUND


def test_small_mapped_weights_are_copied() -> None:
    pipeline = build("stable_diffusion")
    _map_weights(pipeline.unet)
    put_channels_last({"unet": pipeline.unet})
    weight = pipeline.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not is_mapped(weight)


def test_what_torch_allocated_is_not_mapped() -> None:
    assert not is_mapped(torch.zeros(3))
    assert is_mapped(torch.frombuffer(bytearray(4), dtype=torch.float32))
