"""What a request gives up so that less is computed for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["NONE", "NUM_FIRST", "NUM_LAST", "Shortcuts"]

NUM_FIRST, NUM_LAST = 3, 1
"""Steps that are always computed: two to predict from, one to see how good that is; the last."""


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """Parts of a request's steps; by default nothing is left out.

    Raises:
        ValueError: one is not in [0, 1], or guidance would end before it begins.
    """

    step_cache: float = 0.0
    """Of all steps, how many may be predicted from those before, rather than computed."""
    guidance_start: float = 0.0
    """The part of the steps before which there is no guidance."""
    guidance_end: float = 1.0
    """The part of the steps after which there is none."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value <= 1:
                raise ValueError(f"{each.name} is {value}; it is from 0 to 1")
        if self.guidance_start > self.guidance_end:
            raise ValueError(
                f"guidance_start is {self.guidance_start}, after guidance_end, {self.guidance_end}"
            )

    @property
    def has_interval(self) -> bool:
        """Whether there may be steps without guidance."""
        return self.guidance_start > 0 or self.guidance_end < 1

    def least_forwards(self, num_steps: int) -> int:
        """How many of the steps are computed at least."""
        return num_steps - int(max(0, num_steps - NUM_FIRST - NUM_LAST) * self.step_cache)

    def is_guided(self, step: int, num_steps: int) -> bool:
        """Whether a step, counted from 0, is guided: all of it has to lie within the interval.

        So diffusers counts for ControlNets.
        """
        is_late = step / num_steps >= self.guidance_start
        return is_late and (step + 1) / num_steps <= self.guidance_end


NONE = Shortcuts()
"""Everything is computed."""
