"""What LoRAs cost: sixteen requests with eight of them, in shared forwards and set by set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.report import Figure, Spread
from demo.build import build_pipeline
from handler.engine import InFlightEngine
from handler.engine.ticket import Ticket

__all__ = ["measure_loras"]

NUM_LORAS = 8
RANK = 16
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def measure_loras(requests: Sequence[Any], rounds: int) -> list[Figure]:
    """The same requests without LoRAs, with eight mixed, and with eight in forwards of their own.

    Each once to warm up, then in turns, of which another is the first in each round. A request is
    something with `kwargs()` and a `scheduler`.
    """
    plain, styled = build_pipeline(), _with_loras(build_pipeline())
    sets = [{f"lora{i % NUM_LORAS}": 0.8} for i in range(len(requests))]
    ways: list[Callable[[], float]] = [
        lambda: _images_per_s(plain, requests, [None] * len(requests)),
        lambda: _images_per_s(styled, requests, sets),
        lambda: _images_per_s(styled, requests, sets, is_apart=True),
    ]
    per_s: list[list[float]] = [[], [], []]
    for number in range(rounds + 1):
        for turn in range(len(ways)):
            place = (number + turn) % len(ways)
            images_per_s = ways[place]()
            if number:
                per_s[place].append(images_per_s)
    without, mixed, apart = per_s
    cost = tuple(a / b for a, b in zip(mixed, without, strict=True))
    gain = tuple(a / b for a, b in zip(mixed, apart, strict=True))
    return [
        Figure("16 requests, 8 LoRAs / none, images/s", Spread(cost), "x", at_least=0.8),
        Figure("8 LoRAs in one forward / set by set", Spread(gain), "x", at_least=1.5),
        Figure("none", Spread(tuple(without)), "images/s"),
        Figure("8 LoRAs of rank 16, mixed", Spread(tuple(mixed)), "images/s"),
        Figure("8 LoRAs of rank 16, set by set", Spread(tuple(apart)), "images/s"),
    ]


def _images_per_s(
    pipeline: Any,
    requests: Sequence[Any],
    sets: Sequence[Mapping[str, float] | None],
    *,
    is_apart: bool = False,
) -> float:
    engine = InFlightEngine(pipeline, max_rows=2 * len(requests))
    for request, adapters in zip(requests, sets, strict=True):
        ticket = engine.submit(request.kwargs(), scheduler=request.scheduler, adapters=adapters)
        if is_apart:
            _keep_apart(ticket)
    engine.run()
    seconds = engine.counters.tick_s
    engine.close()
    return len(requests) / seconds


def _keep_apart(ticket: Ticket) -> None:
    """Serve it as adapters are that cannot be mixed: PEFT's layers are switched to its set."""
    assert ticket.adapter_set is not None
    ticket.adapter_set = replace(ticket.adapter_set, is_mixable=False)


def _with_loras(pipeline: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=list(_TARGETS), init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a second adapter
        for i in range(NUM_LORAS):
            pipeline.unet.add_adapter(config, adapter_name=f"lora{i}")
    with torch.no_grad():
        for name, weight in pipeline.unet.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
