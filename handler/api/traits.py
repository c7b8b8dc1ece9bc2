"""What a loaded pipeline offers to requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from handler.api.samplers import find_sampler
from handler.api.tasks import TEXT_TO_IMAGE

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
    tasks: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By the engine's name of each task that it serves, the arguments of that ``__call__``; left
    out: text to image alone, with `parameters`."""
    required: frozenset[str] = frozenset()
    """The pictures that it cannot do without, by field."""
    loras: Collection[str] = ()
    """The names of the LoRAs that a request may name; what is in a folder may come and go."""
    controls: tuple[str, ...] = ()
    """The names of its ControlNets; empty where it has none, or one without a name."""

    clip_layers: int | None = None
    """Layers of its CLIP text encoders, of the one with fewest; None: it has none."""
    reads_weights: bool = False
    """Whether words of a prompt can have weights."""
    count_windows: Callable[[str, bool], int] | None = None
    """In how many windows its text encoders read a prompt, whose weights and breaks count or are
    text; None: in one, whatever its length."""
    shortcuts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Fields that leave parts of the computing out, by the engine's name of each task."""
    several_calls: frozenset[str] = frozenset()
    """Class names of the schedulers that call the denoiser more than once a step."""

    def __post_init__(self) -> None:
        if not self.tasks:
            object.__setattr__(self, "tasks", {TEXT_TO_IMAGE: self.parameters})

    def has_one_call_a_step(self, scheduler: str | None) -> bool:
        """Whether a sampler, by any name, calls the denoiser once a step; None is the own one."""
        sampler = find_sampler(scheduler, self.schedulers)
        if sampler is None or sampler.options.get("skip_prk_steps"):
            return True
        return sampler.class_name not in self.several_calls

    def least_steps_with(self, scheduler: str | None) -> int:
        """The steps that a sampler needs at least, by any name; None is the pipeline's own."""
        sampler = find_sampler(scheduler, self.schedulers)
        if sampler is None or sampler.options.get("skip_prk_steps"):
            return 1
        return self.least_steps.get(sampler.class_name, 1)
