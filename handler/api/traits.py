"""What a loaded pipeline can do, as far as a request may ask for it; schedulers by their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = [
    "SCHEDULER_SHORT_NAMES",
    "PipelineTraits",
    "scheduler_choices",
    "scheduler_class",
    "short_name",
]

SCHEDULER_SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "ddim": "DDIMScheduler",
        "ddpm": "DDPMScheduler",
        "deis": "DEISMultistepScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "dpm++_2s": "DPMSolverSinglestepScheduler",
        "dpm++_sde": "DPMSolverSDEScheduler",
        "dpm2": "KDPM2DiscreteScheduler",
        "dpm2_a": "KDPM2AncestralDiscreteScheduler",
        "edm_dpm++": "EDMDPMSolverMultistepScheduler",
        "edm_euler": "EDMEulerScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler_a": "EulerAncestralDiscreteScheduler",
        "flow_euler": "FlowMatchEulerDiscreteScheduler",
        "flow_heun": "FlowMatchHeunDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "lcm": "LCMScheduler",
        "lms": "LMSDiscreteScheduler",
        "pndm": "PNDMScheduler",
        "sa": "SASolverScheduler",
        "tcd": "TCDScheduler",
        "unipc": "UniPCMultistepScheduler",
    }
)


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
        """The steps that a scheduler needs at least, by either name; None is the pipeline's own."""
        name = scheduler or next(iter(self.schedulers), "")
        return self.least_steps.get(scheduler_class(name, self) or "", 1)


def scheduler_class(name: str, traits: PipelineTraits) -> str | None:
    """The class name for a short or a class name; None if the pipeline cannot run with it."""
    short = name.strip().lower().replace(" ", "_").replace("-", "_")
    known = SCHEDULER_SHORT_NAMES.get(short, name.strip())
    return known if known in traits.schedulers else None


def scheduler_choices(traits: PipelineTraits) -> list[str]:
    return [short_name(class_name) for class_name in traits.schedulers]


def short_name(class_name: str) -> str:
    short_of = {known: short for short, known in SCHEDULER_SHORT_NAMES.items()}
    return short_of.get(class_name, class_name)
