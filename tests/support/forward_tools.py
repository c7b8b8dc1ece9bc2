"""What the tests of forwards share: modules that count rows, and calls parked at them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from handler.engine.forward import BatchedForward, Failure
from handler.engine.parking import ModuleCall, Slot
from handler.engine.row_adapters import RowAdapters
from handler.engine.ticket import Ticket
from handler.pipelines.adapters import AdapterSet, AdapterSets
from handler.pipelines.cost import Cost


class Recorder(torch.nn.Module):
    """A module with the given body, which remembers the rows of each forward."""

    def __init__(self, body: Callable[[torch.Tensor, Any], Any]) -> None:
        super().__init__()
        self.body = body
        self.rows: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: Any = None, flag: Any = None) -> Any:
        self.rows.append(len(sample))
        return self.body(sample, timestep)


def doubled(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * 2


def slot_of(body: Callable[[torch.Tensor, Any], Any]) -> Slot:
    module = Recorder(body)
    return Slot(
        name="unet.forward",
        module=module,
        method="forward",
        is_denoiser=True,
        real=module.forward,
        signature=inspect.signature(module.forward),
        attribute=None,
    )


def call(
    slot: Slot,
    *values: float,
    timestep: Any = None,
    exact: bool = False,
    adapters: Mapping[str, float] | None = None,
) -> Any:
    """A parked call with one row for each value; its `adapters` cannot be mixed with others."""
    found = None if adapters is None else AdapterSet(adapters, {}, is_mixable=False)
    ticket = Ticket(kwargs={}, cost=Cost(len(values), 0), exact=exact, adapter_set=found)
    sample = torch.tensor(values, dtype=torch.float32).reshape(-1, 1).expand(-1, 3)
    bound = slot.signature.bind(sample, timestep=timestep)
    return ModuleCall(slot, ticket, bound, len(values))


def batched(max_rows: int = 16, **options: Any) -> BatchedForward:
    return BatchedForward(lambda: 0.0, max_rows, RowAdapters(AdapterSets([])), **options)


def run(forward: BatchedForward, calls: Sequence[ModuleCall]) -> list[Any]:
    """The result of each call in order: its first column, or its error."""
    results: dict[int, Any] = {}
    for group in forward.group(calls):
        for each, result in zip(group.calls, forward.run(group), strict=True):
            is_failure = isinstance(result, Failure)
            results[id(each)] = result.error if is_failure else column(result)
    return [results[id(each)] for each in calls]


def column(output: Any) -> list[float]:
    while not isinstance(output, torch.Tensor):
        output = vars(output)["sample"] if hasattr(output, "__dict__") else output[0]
    values: list[float] = output[:, 0].tolist()
    return values
