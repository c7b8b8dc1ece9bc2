"""What a loaded pipeline offers to requests, and the names of schedulers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from handler.api.tasks import TEXT_TO_IMAGE
from handler.messages import show

__all__ = [
    "SAMPLER_NAMES",
    "SCHEDULER_SHORT_NAMES",
    "PipelineTraits",
    "scheduler_choices",
    "scheduler_class",
    "scheduler_problem",
    "short_name",
    "split_schedule",
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


# AUTOMATIC1111's names for the samplers that are a diffusers class as it is configured anyway. Its
# others are such a class with options of its own (Karras sigmas, SDE), or not in diffusers.
SAMPLER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "DDIM",
        "DEISMultistepScheduler": "DEIS",
        "DPMSolverMultistepScheduler": "DPM++ 2M",
        "DPMSolverSDEScheduler": "DPM++ SDE",
        "EulerAncestralDiscreteScheduler": "Euler a",
        "EulerDiscreteScheduler": "Euler",
        "HeunDiscreteScheduler": "Heun",
        "KDPM2AncestralDiscreteScheduler": "DPM2 a",
        "KDPM2DiscreteScheduler": "DPM2",
        "LCMScheduler": "LCM",
        "LMSDiscreteScheduler": "LMS",
        "PNDMScheduler": "PLMS",
        "UniPCMultistepScheduler": "UniPC",
    }
)
# k-diffusion's names, which several APIs use.
_K_DIFFUSION_NAMES = {
    "k_dpm_2": "KDPM2DiscreteScheduler",
    "k_dpm_2_a": "KDPM2AncestralDiscreteScheduler",
    "k_dpm_2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "k_dpmpp_2m": "DPMSolverMultistepScheduler",
    "k_euler": "EulerDiscreteScheduler",
    "k_euler_a": "EulerAncestralDiscreteScheduler",
    "k_euler_ancestral": "EulerAncestralDiscreteScheduler",
    "k_heun": "HeunDiscreteScheduler",
    "k_lms": "LMSDiscreteScheduler",
}
# Schedules of sigmas, which other front ends choose beside the sampler or at the end of its name.
_SIGMA_SCHEDULES = {
    "align_your_steps": "Align Your Steps",
    "beta": "beta",
    "exponential": "exponential",
    "karras": "Karras",
    "kl_optimal": "KL-optimal",
    "normal": "normal",
    "polyexponential": "polyexponential",
    "sgm_uniform": "SGM-uniform",
    "simple": "simple",
    "uniform": "uniform",
}
_MIN_MISSPELT_CHARS, _MIN_LIKENESS = 4, 0.8


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

    def __post_init__(self) -> None:
        if not self.tasks:
            object.__setattr__(self, "tasks", {TEXT_TO_IMAGE: self.parameters})

    def least_steps_with(self, scheduler: str | None) -> int:
        """The steps that a scheduler needs at least, by either name; None is the pipeline's own."""
        name = scheduler or next(iter(self.schedulers), "")
        return self.least_steps.get(scheduler_class(name, self) or "", 1)


def scheduler_class(name: str, traits: PipelineTraits) -> str | None:
    """The class name for any name of a scheduler; None if the pipeline cannot run with it."""
    known = _CLASSES.get(_normal(name), name.strip())
    return known if known in traits.schedulers else None


def scheduler_choices(traits: PipelineTraits) -> list[str]:
    """The names to offer for the schedulers that the pipeline may run with."""
    return [short_name(class_name) for class_name in traits.schedulers]


def scheduler_problem(name: str, traits: PipelineTraits) -> str:
    """What to say of a name for which `scheduler_class` finds nothing.

    It never names another solver than the one that was meant.
    """
    choices = scheduler_choices(traits)
    allowed = f"allowed: {', '.join(choices)}"
    scheduled = split_schedule(name)
    if scheduled is not None:
        solver, schedule = scheduled
        without = scheduler_class(solver, traits)
        hint = "" if without is None else f"without them it is {short_name(without)}; "
        return f"{show(name)}: a request cannot choose {schedule} sigmas; {hint}{allowed}"
    match = None if _normal(name) in _CLASSES else _misspelt(_normal(name), choices)
    hint = f"did you mean {match}? " if match else ""
    return f"{show(name)} does not go with this pipeline; {hint}{allowed}"


def split_schedule(name: str) -> tuple[str, str] | None:
    """The solver and the schedule of sigmas in a name such as ``DPM++ 2M Karras``.

    None where the name has no schedule; the solver is empty where it has nothing else.
    """
    normal = f"_{_normal(name)}"
    ends = [each for each in _SIGMA_SCHEDULES if normal.endswith(f"_{each}")]
    longest = max(ends, key=len, default=None)
    if longest is None:
        return None
    return normal.removesuffix(f"_{longest}").removeprefix("_"), _SIGMA_SCHEDULES[longest]


def short_name(class_name: str) -> str:
    """The short name of a scheduler's class, or else the class name itself."""
    return _SHORT_NAMES.get(class_name, class_name)


def _normal(name: str) -> str:
    return "_".join(name[:100].lower().replace("-", " ").replace("_", " ").split())


_SHORT_NAMES = {class_name: short for short, class_name in SCHEDULER_SHORT_NAMES.items()}
_CLASSES = {
    **{_normal(label): class_name for class_name, label in SAMPLER_NAMES.items()},
    **_K_DIFFUSION_NAMES,
    **SCHEDULER_SHORT_NAMES,
}


def _misspelt(name: str, choices: list[str]) -> str | None:
    """The choice that `name` is with letters of its words mistaken.

    Solvers differ by single signs (2s, 2m, a, sde), so short words must be equal.
    """
    for choice in choices:
        if choice not in SCHEDULER_SHORT_NAMES:
            continue  # a class name, which is alike to those of other solvers
        pairs = list(zip(name.split("_"), choice.split("_"), strict=False))
        is_alike = all(
            sent == word
            or (
                min(len(sent), len(word)) >= _MIN_MISSPELT_CHARS
                and word.isalpha()
                and difflib.SequenceMatcher(None, sent, word).ratio() >= _MIN_LIKENESS
            )
            for sent, word in pairs
        )
        if is_alike and name.count("_") == choice.count("_"):
            return choice
    return None
