"""Every scheduler that goes with a family, made by name and drawn with."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from handler.api.sampler_table import SAMPLERS, SCHEDULER_CLASSES
from handler.api.samplers import samplers_of
from handler.errors import InvalidRequest
from handler.pipelines.schedulers import (
    check_num_steps,
    compatible_schedulers,
    least_steps,
    make_scheduler,
    seed_noise,
    start_at_the_first,
)
from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared

SD_SCHEDULERS = compatible_schedulers(shared("stable_diffusion"))
FLOW = "FlowMatchEulerDiscreteScheduler"


def test_its_own_comes_first_and_none_comes_twice() -> None:
    assert SD_SCHEDULERS[0] == "DDIMScheduler"
    assert len(set(SD_SCHEDULERS)) == len(SD_SCHEDULERS) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_every_compatible_one_can_be_made(family: str) -> None:
    pipeline = shared(family)
    names = compatible_schedulers(pipeline)
    assert names[0] == type(pipeline.scheduler).__name__
    for name in names:
        assert type(make_scheduler(pipeline, name)).__name__ == name


def test_a_pipeline_without_a_scheduler_has_none() -> None:
    class Nothing:
        scheduler = None

    assert compatible_schedulers(Nothing()) == ()
    assert compatible_schedulers(object()) == ()


def test_pndm_needs_no_more_steps_where_it_skips_its_first_ones() -> None:
    pipeline = build("stable_diffusion")
    assert least_steps(pipeline) == {"PNDMScheduler": 4}
    pipeline.scheduler.register_to_config(skip_prk_steps=True)
    assert least_steps(pipeline) == {}
    pipeline.scheduler = make_scheduler(pipeline, "pndm")
    kwargs: dict[str, Any] = example_kwargs("stable_diffusion", 0) | {"num_inference_steps": 1}
    assert torch.isfinite(image_of(pipeline(**kwargs))).all()
    assert least_steps(shared("flux")) == least_steps(object()) == {}


def test_flow_and_noise_schedulers_do_not_mix() -> None:
    assert FLOW not in SD_SCHEDULERS
    assert "DDIMScheduler" not in compatible_schedulers(shared("flux"))
    with pytest.raises(ValueError, match="does not fit"):
        make_scheduler(shared("stable_diffusion"), FLOW)


@pytest.mark.parametrize("name", ["eulr", "", "torch", "UNet2DConditionModel", "DDIM Karras"])
def test_an_unknown_name_is_refused_with_those_that_fit(name: str) -> None:
    with pytest.raises(ValueError, match=r"this pipeline takes.*DDIMScheduler"):
        make_scheduler(shared("stable_diffusion"), name)


@pytest.mark.parametrize("short", SCHEDULER_CLASSES)
def test_short_names_are_diffusers_classes(short: str) -> None:
    class_name = SCHEDULER_CLASSES[short]
    assert hasattr(diffusers, class_name)
    if class_name in SD_SCHEDULERS:
        made = make_scheduler(shared("stable_diffusion"), short)
        assert type(made).__name__ == class_name


# What diffusers documents for each name (api/schedulers/overview): class and what to set.
DOCUMENTED: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    # Not on that page: of the classes' own.
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DPM++ 2M SDE Heun": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    ),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "DPM++ 3M SDE": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    ),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "SA Solver": ("SASolverScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "uni_pc": (
        "UniPCMultistepScheduler",
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ),
    "uni_pc_bh2": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
}
DOCUMENTED_SIGMAS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "normal": {"timestep_spacing": "linspace"},
    "ddim_uniform": {"timestep_spacing": "leading", "steps_offset": 1},
}
PAIRS = [
    (name, sigmas)
    for name, schedules in samplers_of(SD_SCHEDULERS).items()
    for sigmas in (None, *schedules)
]
# Configurations that a solver must not inherit from the one that was packed.
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "an SDE solver with Karras sigmas": (
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3,
            "solver_type": "heun",
            "use_karras_sigmas": True,
        },
    ),
    "PNDM with its Runge-Kutta steps": ("PNDMScheduler", {"skip_prk_steps": False}),
}


def packed_with(packed: str) -> Any:
    """What has a scheduler, as a pipeline has."""
    pipeline = SimpleNamespace(scheduler=shared("stable_diffusion").scheduler)
    class_name, options = PACKED[packed]
    kind = getattr(diffusers, class_name)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **options)
    return pipeline


def denoised(scheduler: Any, num_steps: int) -> torch.Tensor:
    """What a scheduler makes of noise, with a small model in place of the denoiser."""
    generator = torch.Generator().manual_seed(0)
    seed_noise(scheduler, generator)
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(1, 4, 4, 4, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = torch.sin(3 * scheduler.scale_model_input(latents, t)) * (1 + t / 1000)
        parameters = inspect.signature(scheduler.step).parameters
        draws = {"generator": generator} if "generator" in parameters else {}
        latents = scheduler.step(noise, t, latents, **draws).prev_sample
    assert torch.isfinite(latents).all()
    return latents


def test_every_sampler_has_its_documented_pair() -> None:
    assert DOCUMENTED.keys() == SAMPLERS.keys() == samplers_of(SD_SCHEDULERS).keys()


@pytest.mark.parametrize(("name", "sigmas"), PAIRS)
def test_a_sampler_draws_as_its_documented_pair(name: str, sigmas: str | None) -> None:
    pipeline = shared("stable_diffusion")
    class_name, options = DOCUMENTED[name]
    documented = getattr(diffusers, class_name).from_config(
        pipeline.scheduler.config, **options, **DOCUMENTED_SIGMAS.get(sigmas or "", {})
    )
    made = make_scheduler(pipeline, f"{name} {sigmas or ''}".strip())
    assert type(made) is type(documented)
    for num_steps in (1, 7):
        assert torch.equal(denoised(made, num_steps), denoised(documented, num_steps))


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_itself_whatever_was_packed(name: str, packed: str) -> None:
    """The noise schedule is the packed one; solver and sigmas are those of the name."""
    class_name, options = DOCUMENTED[name]
    kind = getattr(diffusers, class_name)
    # UniPC and DEIS have orders that their names do not say: those are the packed ones.
    order = {} if name.startswith("DPM++") else {"solver_order": 2}
    wanted = kind.from_config(shared("stable_diffusion").scheduler.config, **options)
    pipeline = packed_with(packed)
    pipeline.scheduler.register_to_config(**order)
    assert torch.equal(denoised(make_scheduler(pipeline, name), 7), denoised(wanted, 7))


def test_no_two_samplers_are_the_same() -> None:
    """So that the tests above would tell one from the other."""
    pipeline = shared("stable_diffusion")
    drawn = {name: denoised(make_scheduler(pipeline, name), 7) for name in SAMPLERS}
    same = [
        pair
        for pair in itertools.combinations(SAMPLERS, 2)
        if torch.equal(*(drawn[n] for n in pair))
    ]
    assert same == [("UniPC", "uni_pc_bh2")]  # which is UniPC's default


def test_a_class_is_what_the_packed_configuration_makes_of_it() -> None:
    pipeline = packed_with("an SDE solver with Karras sigmas")
    made = make_scheduler(pipeline, "DPMSolverMultistepScheduler")
    assert made.config == pipeline.scheduler.config
    assert make_scheduler(pipeline, "beta").config.algorithm_type == "sde-dpmsolver++"
    assert make_scheduler(pipeline, "beta").config.use_beta_sigmas
    assert not make_scheduler(pipeline, "beta").config.use_karras_sigmas


@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ 2M", "PLMS", "UniPC", "Heun", "LMS"])
def test_as_many_steps_as_in_training_are_drawn_or_refused(name: str) -> None:
    pipeline = shared("stable_diffusion")
    scheduler = make_scheduler(pipeline, f"{name} ddim_uniform")
    with pytest.raises(InvalidRequest) as error:
        check_num_steps(scheduler, 1000)
    problem = error.value.fields["num_inference_steps"]
    most = int(problem.rpartition("1 to ")[2])
    assert most in (998, 999)
    all_steps = 999 if name in ("DPM++ 2M", "UniPC") else 1000
    for each, steps in ((scheduler, most), (make_scheduler(pipeline, f"{name} normal"), all_steps)):
        check_num_steps(each, steps)
        each.set_timesteps(steps)
        assert 0 <= each.timesteps.min() <= each.timesteps.max() < 1000


@pytest.mark.parametrize("name", ["DPM++ 2M", "DPM++ 3M SDE", "DEIS", "UniPC", "SA Solver"])
def test_steps_that_a_solver_would_divide_by_nothing_at_are_refused(name: str) -> None:
    scheduler = make_scheduler(shared("stable_diffusion"), f"{name} normal")
    with pytest.raises(InvalidRequest) as error:
        check_num_steps(scheduler, 1000)
    problem = error.value.fields["num_inference_steps"]
    assert problem.startswith(f"1000 is too many for {type(scheduler).__name__}")
    assert problem.endswith("allowed: 1 to 999")
    with pytest.raises(AssertionError, match="isfinite"):
        denoised(scheduler, 1000)
    for schedule, steps in (("normal", 999), ("sgm_uniform", 1000), ("karras", 1000)):
        check_num_steps(make_scheduler(shared("stable_diffusion"), f"{name} {schedule}"), steps)


@pytest.mark.parametrize("name", ["uni_pc normal", "Euler normal", "DPM2 normal", "LMS normal"])
def test_other_solvers_take_as_many_steps_as_in_training(name: str) -> None:
    steps = 999 if name.startswith("uni_pc") else 1000
    check_num_steps(make_scheduler(shared("stable_diffusion"), name), steps)


@pytest.mark.parametrize("name", ["DPM++ 2M beta", "DEIS beta", "UniPC beta", "SA Solver beta"])
def test_steps_so_close_that_two_have_one_timestep_are_drawn(name: str) -> None:
    """In diffusers alone the last step has no sigma."""
    scheduler = make_scheduler(shared("stable_diffusion"), name)
    scheduler.set_timesteps(150)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    with pytest.raises((IndexError, AssertionError)):
        denoised(scheduler, 150)
    start_at_the_first(scheduler)
    assert len(scheduler.timesteps) == 150
    denoised(scheduler, 150)


def test_no_more_steps_than_a_distilled_model_has() -> None:
    pipeline = shared("stable_diffusion")
    scheduler = make_scheduler(pipeline, "lcm")
    check_num_steps(scheduler, 50)
    with pytest.raises(InvalidRequest) as error:
        check_num_steps(scheduler, 60)
    problem = error.value.fields["num_inference_steps"]
    assert problem.startswith("60 is too many for LCMScheduler")
    assert problem.endswith("allowed: 1 to 50")


def test_each_is_fresh_and_has_the_pipelines_configuration() -> None:
    pipeline = build("stable_diffusion_v")
    first, second = make_scheduler(pipeline, "euler"), make_scheduler(pipeline, "euler")
    assert first is not second
    assert first is not pipeline.scheduler
    assert first.config.prediction_type == "v_prediction"
    assert first.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", SD_SCHEDULERS)
def test_every_compatible_one_draws_in_its_least_steps(name: str) -> None:
    pipeline = build("stable_diffusion")
    steps = least_steps(pipeline).get(name, 1)
    pipeline.scheduler = make_scheduler(pipeline, name)
    kwargs: dict[str, Any] = example_kwargs("stable_diffusion", 0) | {"num_inference_steps": steps}
    if steps > 1:
        with pytest.raises(ValueError, match="broadcast"):
            pipeline(**kwargs | {"num_inference_steps": steps - 1})
    image = image_of(pipeline(**kwargs))
    assert torch.isfinite(image).all()
    assert image.std() > 0


def test_one_that_the_pipelines_configuration_does_not_suit_is_the_requests_problem() -> None:
    pipeline = build("stable_diffusion")
    solver = diffusers.DPMSolverMultistepScheduler
    pipeline.scheduler = solver.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++"
    )
    with pytest.raises(ValueError, match="'DEISMultistepScheduler' does not go with the conf"):
        make_scheduler(pipeline, "DEISMultistepScheduler")
