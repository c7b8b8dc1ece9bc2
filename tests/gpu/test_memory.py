"""Memory of a device that runs out for real: in halves, and nobody else's picture suffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from handler.engine import InFlightEngine
from tests.support.on_device import difference, draw_alone, kwargs_of, pipeline_of

_ROW_BYTES = 256 << 20
# Rows of which one forward fits the device: of two guided requests, but not of three.
_FITTING_ROWS = 4


@contextmanager
def full_above(rows: int, device: torch.device) -> Iterator[Callable[[int], None]]:
    """What a forward of so many rows needs beside its own; above `rows` it does not fit."""
    if device.type == "cpu":

        def pretend(wanted: int) -> None:
            if wanted > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

        yield pretend
        return

    def allocate(wanted: int) -> None:
        torch.empty(wanted * _ROW_BYTES, dtype=torch.uint8, device=device)

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_reserved(device) + int((rows + 0.9) * _ROW_BYTES)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    try:
        yield allocate
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_is_split_in_halves(device: torch.device) -> None:
    name, guided = "stable_diffusion", {"guidance_scale": 7.5, "num_inference_steps": 4}
    pipeline = pipeline_of(name, device)
    expected = draw_alone(pipeline, [kwargs_of(name, i, **guided) for i in range(4)])
    engine = InFlightEngine(pipeline)
    with full_above(_FITTING_ROWS, device) as need:
        hook = pipeline.unet.conv_in.register_forward_pre_hook(
            lambda _, inputs: need(len(inputs[0]))
        )
        tickets = [engine.submit(kwargs_of(name, i, **guided)) for i in range(4)]
        large = engine.submit(kwargs_of(name, 4, num_images_per_prompt=3, **guided))
        engine.run()
        hook.remove()
    assert engine.counters.out_of_memory_retries > 0
    engine.close()
    assert isinstance(large.error, torch.OutOfMemoryError)
    assert max(difference(t, e) for t, e in zip(tickets, expected, strict=True)) < 1e-4


def test_half_precision_decodes_in_single_and_is_half_again(device: torch.device) -> None:
    """Also where the decoding of one fails in between."""
    name = "stable_diffusion_xl"
    pipeline = pipeline_of(name, device, torch.float16)
    expected = draw_alone(pipeline, [kwargs_of(name, i) for i in range(3)])
    seen: list[torch.dtype] = []

    def look(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].dtype)
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = InFlightEngine(pipeline)
    hook = pipeline.vae.decoder.register_forward_pre_hook(look)
    tickets = [engine.submit(kwargs_of(name, i)) for i in range(3)]
    engine.run()
    engine.close()
    hook.remove()
    failed = [ticket for ticket in tickets if ticket.error is not None]
    assert len(failed) == 1
    assert seen == [torch.float32] * 3
    assert pipeline.vae.dtype == torch.float16
    for ticket, image in zip(tickets, expected, strict=True):
        if ticket not in failed:
            assert difference(ticket, image) < 2e-2
            assert torch.isfinite(torch.as_tensor(ticket.result().images)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_the_requests_took_is_given_back() -> None:
    name, device = "stable_diffusion", torch.device("cuda")
    pipeline = pipeline_of(name, device)
    engine = InFlightEngine(pipeline)

    def draw() -> int:
        for i in range(4):
            engine.submit(kwargs_of(name, i))
        engine.run()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    # The first also leaves what the engine learns about the pipeline.
    first, *later = (draw() for _ in range(4))
    assert max(later) <= first
    assert len(set(later)) == 1
    engine.close()
