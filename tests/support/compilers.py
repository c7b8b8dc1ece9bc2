"""Stand-ins for torch.compile and CUDA graphs that run on the CPU and count what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Compiler", "Graphs"]


class Graphs:
    """Records like CUDA graphs do, on the CPU."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        output = run()

        def replay() -> None:
            self.num_replays += 1
            for place, value in zip(output, run(), strict=True):
                place.copy_(value)

        return replay, output


class Compiler:
    """Counts what it compiles: `torch.compile` in all but the making of machine code."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.num_graphs += 1
            return graph.forward

        return torch.compile(forward, dynamic=False, backend=backend)
