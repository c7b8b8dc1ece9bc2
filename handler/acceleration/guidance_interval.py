"""A guidance interval: outside it the rows without the prompt are not computed.

Early and late steps draw as well, or better, without guidance. Source: Kynkäänniemi et al. 2024,
"Applying guidance in a limited interval improves sample and distribution quality in diffusion
models".

The pipeline gets the rows with the prompt in place of both: the difference that guidance multiplies
is nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from inspect import BoundArguments
from typing import Any

from handler.batching.halves import doubled, second_half
from handler.engine.parking import ModuleCall
from handler.engine.wrappers import ForwardWrapper
from handler.pipelines.steps import num_steps_of

__all__ = ["GuidanceInterval"]


class GuidanceInterval(ForwardWrapper):
    """Computes half of a guided call's rows in the steps that a request wants unguided.

    Of pipelines whose calls are made of rows without the prompt, then as many with it: see
    `handler.pipelines.steps.guides_in_halves`.
    """

    def narrow(self, call: ModuleCall) -> ModuleCall:
        """The rows with the prompt alone, where the step is not guided."""
        half = second_half(call.bound.arguments, call.num_rows) if _is_unguided(call) else None
        if half is None:
            return call
        bound = BoundArguments(call.bound.signature, OrderedDict(half))
        return replace(call, bound=bound, num_rows=call.num_rows // 2)

    def widen(self, call: ModuleCall, output: Any) -> Any:
        """The output of the rows with the prompt, for both halves."""
        return doubled(output, call.num_rows) if _is_unguided(call) else output


def _is_unguided(call: ModuleCall) -> bool:
    """Whether a call has rows for guidance, in a step without."""
    ticket, cost = call.ticket, call.ticket.cost
    if not ticket.shortcuts.has_interval or not cost.image_pixels:
        return False
    if call.num_rows != 2 * (cost.pixels // cost.image_pixels):
        return False
    num_steps = num_steps_of(ticket.view)
    return bool(num_steps) and not ticket.shortcuts.is_guided(ticket.num_steps_done, num_steps or 1)
