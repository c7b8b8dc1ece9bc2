"""The table of samplers: the names that people use, and the diffusers class and options of each.

A sampler is a solver (AUTOMATIC1111's and k-diffusion's "DPM++ 2M") with a schedule of sigmas
("Karras"), as ComfyUI's pairs of sampler and scheduler are. The pairs are those of diffusers' own
documentation (api/schedulers/overview, for A1111 and k-diffusion).

Plain data: importing it needs neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = [
    "ABSENT_SCHEDULES",
    "ABSENT_SOLVERS",
    "SAMPLERS",
    "SCHEDULER_CLASSES",
    "SCHEDULES",
    "Options",
    "Schedule",
    "Solver",
    "even_spacing",
]

Options = Mapping[str, object]
"""Keyword arguments for a scheduler's class."""


@dataclass(frozen=True, slots=True)
class Solver:
    """One row: a solver under the name that A1111 writes into pictures, or else its usual one."""

    name: str
    class_names: tuple[str, ...]
    """The classes that are it: the first that goes with the pipeline."""
    options: Options = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    """Its other names in lower case, words joined by underscores; the first is offered."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of sigmas."""

    name: str
    """As A1111 writes it into pictures."""
    flag: str | None = None
    """The option that switches it on."""
    options: Options = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    def options_for(self, class_name: str) -> Options | None:
        """The options that give it to a scheduler of this class; None where nothing does."""
        options = dict(even_spacing(class_name))
        if self.flag is not None:
            if class_name not in _WITH_SIGMAS:
                return None
            options[self.flag] = True
        if class_name in _WITH_SPACING:
            return {**options, **self.options}
        # What has no choice of spacing: DPMSolverSinglestepScheduler is spaced as np.linspace does,
        # and the sigmas of flow matching are those that ComfyUI calls simple.
        spacing = self.options.get("timestep_spacing")
        is_same = spacing == "linspace" and (self.flag is not None or class_name == _SINGLESTEP)
        is_simple = self.name == "Simple" and class_name == "FlowMatchEulerDiscreteScheduler"
        return options if spacing is None or is_same or is_simple else None


_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Classes that take use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas.
_WITH_SIGMAS = frozenset(
    [
        *(_MULTISTEP, _SINGLESTEP, "DEISMultistepScheduler", "DPMSolverSDEScheduler"),
        *("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"),
        *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
        *("LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
    ]
)
# Classes that follow timestep_spacing; LCM and TCD take it and do not.
_WITH_SPACING = _WITH_SIGMAS - {
    *(_SINGLESTEP, "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
} | {
    *("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"),
}
_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _dpmpp(algorithm: str, order: int, solver_type: str) -> Options:
    return {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver_type}


SAMPLERS: Mapping[str, Solver] = MappingProxyType(
    {
        each.name: each
        for each in (
            Solver("DDIM", ("DDIMScheduler",), aliases=("ddim",)),
            Solver("DDPM", ("DDPMScheduler",), aliases=("ddpm",)),
            Solver(
                "DEIS",
                ("DEISMultistepScheduler",),
                {"algorithm_type": "deis", "solver_type": "logrho"},
                ("deis",),
            ),
            Solver(
                "DPM++ 2M",
                (_MULTISTEP,),
                _dpmpp("dpmsolver++", 2, "midpoint"),
                ("dpm++", "dpm++_2m"),
            ),
            Solver(
                "DPM++ 2M SDE",
                (_MULTISTEP,),
                _dpmpp("sde-dpmsolver++", 2, "midpoint"),
                ("dpm++_2m_sde",),
            ),
            Solver(
                "DPM++ 2M SDE Heun",
                (_MULTISTEP,),
                _dpmpp("sde-dpmsolver++", 2, "heun"),
                ("dpm++_2m_sde_heun",),
            ),
            Solver("DPM++ 3M", (_MULTISTEP,), _dpmpp("dpmsolver++", 3, "midpoint"), ("dpm++_3m",)),
            Solver(
                "DPM++ 3M SDE",
                (_MULTISTEP,),
                _dpmpp("sde-dpmsolver++", 3, "midpoint"),
                ("dpm++_3m_sde",),
            ),
            Solver("DPM++ 2S", (_SINGLESTEP,), _dpmpp("dpmsolver++", 2, "midpoint"), ("dpm++_2s",)),
            Solver("DPM++ SDE", ("DPMSolverSDEScheduler",), aliases=("dpm++_sde",)),
            Solver("DPM2", ("KDPM2DiscreteScheduler",), aliases=("dpm2", "dpm_2", "kdpm_2")),
            Solver(
                "DPM2 a",
                ("KDPM2AncestralDiscreteScheduler",),
                aliases=("dpm2_a", "dpm_2_a", "kdpm_2_a"),
            ),
            Solver(
                "Euler",
                ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
                aliases=("euler",),
            ),
            Solver("Euler a", ("EulerAncestralDiscreteScheduler",), aliases=("euler_a",)),
            Solver(
                "Heun", ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), {}, ("heun",)
            ),
            Solver("LCM", ("LCMScheduler", "FlowMatchLCMScheduler"), aliases=("lcm",)),
            Solver("LMS", ("LMSDiscreteScheduler",), aliases=("lms",)),
            Solver("PLMS", ("PNDMScheduler",), {"skip_prk_steps": True}, ("plms",)),
            Solver(
                "SA Solver",
                ("SASolverScheduler",),
                {"algorithm_type": "data_prediction"},
                ("sa", "sa_solver"),
            ),
            Solver("TCD", ("TCDScheduler",), aliases=("tcd",)),
            Solver("UniPC", ("UniPCMultistepScheduler",), aliases=("unipc",)),
            # ComfyUI's two variants of it.
            Solver(
                "uni_pc",
                ("UniPCMultistepScheduler",),
                # From no noise at all, B₁(h) = h is infinite.
                {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
                ("uni_pc",),
            ),
            Solver(
                "uni_pc_bh2", ("UniPCMultistepScheduler",), {"solver_type": "bh2"}, ("uni_pc_bh2",)
            ),
        )
    }
)
"""Solvers by their names."""

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "karras": Schedule("Karras", "use_karras_sigmas", aliases=("ka", "k")),
        "exponential": Schedule(
            "Exponential", "use_exponential_sigmas", {"timestep_spacing": "linspace"}
        ),
        "beta": Schedule("Beta", "use_beta_sigmas", {"timestep_spacing": "linspace"}),
        "sgm_uniform": Schedule("SGM Uniform", None, {"timestep_spacing": "trailing"}),
        "simple": Schedule("Simple", None, {"timestep_spacing": "trailing"}),
        "normal": Schedule("Normal", None, {"timestep_spacing": "linspace"}, ("uniform",)),
        "ddim_uniform": Schedule("DDIM", None, {"timestep_spacing": "leading", "steps_offset": 1}),
    }
)
"""Schedules of sigmas by the words that a request chooses them with."""

SCHEDULER_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "edm_dpm++": "EDMDPMSolverMultistepScheduler",
        "edm_euler": "EDMEulerScheduler",
        "flow_euler": "FlowMatchEulerDiscreteScheduler",
        "flow_heun": "FlowMatchHeunDiscreteScheduler",
        "pndm": "PNDMScheduler",
    }
)
"""Short names of classes, for schedulers as the pipeline's configuration makes them."""

ABSENT_SCHEDULES = {
    "align_your_steps": "Align Your Steps",
    "kl_optimal": "KL-optimal",
    "linear_quadratic": "linear-quadratic",
    "polyexponential": "polyexponential",
    "turbo": "turbo",
}
"""Schedules that others have and diffusers has not."""

ABSENT_SOLVERS = frozenset(
    [
        *("dpm++_2s_a", "dpm_fast", "dpm_adaptive", "restart", "ddim_cfg++", "euler_cfg_pp"),
        *("euler_a_cfg_pp", "heunpp2", "res_multistep", "gradient_estimation", "er_sde"),
        *("seeds_2", "seeds_3", "ipndm", "ipndm_v", "dpm++_2m_cfg_pp", "dpm++_2s_a_cfg_pp"),
    ]
)
"""Solvers that others have and diffusers has not."""


def even_spacing(class_name: str) -> dict[str, object]:
    """The options that switch every schedule off."""
    return dict.fromkeys(_FLAGS, False) if class_name in _WITH_SIGMAS else {}
