"""What a loaded pipeline offers to requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from handler.api.samplers import find_sampler

__all__ = ["PipelineTraits"]


@dataclass(frozen=True, slots=True)
class PipelineTraits:
    """What a loaded pipeline can do, as far as a request may ask for it."""

    schedulers: tuple[str, ...]
    """Class names of the schedulers that it may run with."""
    size_multiple_px: int
    """Heights and widths are multiples of this."""
    parameters: frozenset[str]
    """Names of its ``__call__``'s arguments."""
    least_steps: Mapping[str, int] = field(default_factory=dict)
    """Steps that a scheduler needs, by class name, for those that need more than one."""

    def least_steps_with(self, scheduler: str | None) -> int:
        """The steps that a sampler needs at least, by any name; None is the pipeline's own."""
        sampler = find_sampler(scheduler, self.schedulers)
        if sampler is None or sampler.options.get("skip_prk_steps"):
            return 1
        return self.least_steps.get(sampler.class_name, 1)
