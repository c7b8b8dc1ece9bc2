"""Torch's global random generators: each request has its own state of them.

Some pipelines draw from them although they are given a generator: for a sample of the encoder, or
in a scheduler that is not passed it. Requests in flight would take each other's numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from handler.engine.ticket import Ticket
from handler.pipelines.placement import devices_of

__all__ = ["GlobalRandom"]


class GlobalRandom:
    """Switches the global generators between the states of the requests.

    Those of the CPU and of the devices that the modules of `pipelines` are on.

    A request's state starts from the seed of its own `generator`. Requests without one draw from
    the generators as everybody else in the process does.
    """

    def __init__(self, pipelines: Collection[Any]) -> None:
        indices = {each.index or 0 for each in devices_of(pipelines) if each.type == "cuda"}
        cuda = [torch.cuda.default_generators[index] for index in sorted(indices)]
        self._generators: list[torch.Generator] = [torch.default_generator, *cuda]
        self._owner: Ticket | None = None
        self._outside: list[torch.Tensor] = []

    def enter(self, ticket: Ticket | None) -> None:
        """Continue with the state of `ticket`; None is what it is outside of any request.

        Copies 5 kB twice, about 4 µs, and nothing where `ticket` ran last.
        """
        owner = ticket if ticket is not None and ticket.seed is not None else None
        if owner is self._owner:
            return
        now = [generator.get_state() for generator in self._generators]
        if self._owner is None:
            self._outside = now
        elif not self._owner.ended:
            self._owner.random_states = now
        self._owner = owner
        states = self._outside if owner is None else owner.random_states or self._seeded(owner)
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def _seeded(self, ticket: Ticket) -> list[torch.Tensor]:
        assert ticket.seed is not None
        seeds = (torch.Generator(g.device).manual_seed(ticket.seed) for g in self._generators)
        return [generator.get_state() for generator in seeds]
