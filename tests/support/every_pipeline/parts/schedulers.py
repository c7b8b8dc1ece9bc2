"""Noise schedulers with the settings that checkpoints carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers

__all__ = ["PARTS", "ddim", "flow_euler"]


def ddim(**changes: Any) -> diffusers.DDIMScheduler:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return diffusers.DDIMScheduler(**{**settings, **changes})


def flow_euler(**changes: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **changes})


PARTS: Mapping[str, Callable[[], Any]] = {
    "KarrasDiffusionSchedulers": ddim,
    "DDIMScheduler": ddim,
    "DDIMInverseScheduler": diffusers.DDIMInverseScheduler,
    "DDPMScheduler": diffusers.DDPMScheduler,
    "DPMSolverMultistepScheduler": partial(
        diffusers.DPMSolverMultistepScheduler, beta_schedule="scaled_linear"
    ),
    "EulerDiscreteScheduler": partial(
        diffusers.EulerDiscreteScheduler, beta_schedule="scaled_linear"
    ),
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "HeunDiscreteScheduler": diffusers.HeunDiscreteScheduler,
    "LCMScheduler": diffusers.LCMScheduler,
    "PNDMScheduler": partial(diffusers.PNDMScheduler, skip_prk_steps=True),
    "UniPCMultistepScheduler": partial(
        diffusers.UniPCMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    ),
    "CogVideoXDDIMScheduler": partial(
        diffusers.CogVideoXDDIMScheduler, prediction_type="v_prediction"
    ),
    "CogVideoXDPMScheduler": partial(
        diffusers.CogVideoXDPMScheduler, prediction_type="v_prediction"
    ),
    "CMStochasticIterativeScheduler": diffusers.CMStochasticIterativeScheduler,
    "DDPMWuerstchenScheduler": diffusers.DDPMWuerstchenScheduler,
    "UnCLIPScheduler": partial(
        diffusers.UnCLIPScheduler,
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=5.0,
    ),
    "AmusedScheduler": partial(diffusers.AmusedScheduler, mask_token_id=31),
    "EDMEulerScheduler": diffusers.EDMEulerScheduler,
    "FlowMapEulerDiscreteScheduler": diffusers.FlowMapEulerDiscreteScheduler,
    "SCMScheduler": diffusers.SCMScheduler,
    "SchedulerMixin": flow_euler,
    "VQDiffusionScheduler": partial(diffusers.VQDiffusionScheduler, num_vec_classes=9),
}
