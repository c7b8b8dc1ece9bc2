"""Samplers by every name that people have for them: drawn with as meant, or refused."""

from __future__ import annotations

import diffusers
import pytest

from handler.api.sampler_table import SAMPLERS
from handler.api.traits import PipelineTraits
from tests.support.foreign_bodies import ALL_SCHEDULERS, TRAITS, outcome, refusal, ring


@pytest.mark.parametrize("name", ["scheduler", "sampler_name", "sampler_index", "sampler"])
@pytest.mark.parametrize("karras", ["DPM++ 2M Karras", "dpm++_2m_karras", "dpm++ 2m-KARRAS"])
def test_karras_by_name(name: str, karras: str) -> None:
    request = ring(**{name: karras})
    assert (request.scheduler, request.extra["sigmas"]) == ("DPM++ 2M", "karras")
    assert request.sampler == "DPM++ 2M karras"


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler_name": "DPM++ 2M Karras", "use_karras_sigmas": True},
        {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
        {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
        {"scheduler": "DPM++ 2M", "sigmas": "Karras"},
        {"scheduler": "DPM++ 2M", "schedule_type": "Karras"},
        {"scheduler": "DPM++ 2M", "karras": True},
        {"scheduler": "DPM++ 2M Karras", "sigmas": "karras", "use_beta_sigmas": False},
        {"sampler": "K_DPMPP_2M_KA"},
    ],
)
def test_karras_in_every_form(fields: dict[str, object]) -> None:
    assert ring(**fields) == ring(scheduler="DPM++ 2M Karras")


def test_sigmas_that_contradict_the_name_or_that_a_sampler_has_not() -> None:
    assert refusal({"prompt": "a", "scheduler": "LMS Karras", "sigmas": "beta"}) == {
        "sigmas": "'beta', but the scheduler says Karras: send one"
    }
    assert refusal({"prompt": "a", "use_karras_sigmas": True, "use_beta_sigmas": True}).keys() == {
        "sigmas"
    }
    assert refusal({"prompt": "a", "sampler_name": "Euler a", "scheduler": "Karras"}) == {
        "sigmas": "'karras': Euler a has no Karras sigmas in diffusers; its sigmas may be"
        " sgm_uniform, simple, normal, ddim_uniform"
    }
    assert refusal({"prompt": "a", "scheduler": "Euler Karras Beta"}) == {
        "scheduler": "'Euler Karras Beta' names two schedules of sigmas, Karras and Beta"
    }
    found = refusal({"prompt": "a", "scheduler": "DPM++ 2M KL Optimal"})
    assert "DPM++ 2M has no KL-optimal sigmas in diffusers" in found["scheduler"]
    found = refusal({"prompt": "a", "scheduler": "DPM++ 2S a Karras"})
    assert "diffusers has no such solver" in found["scheduler"]
    assert refusal({"prompt": "a", "sigmas": [14.6, 0.0]}).keys() == {"sigmas"}


def test_automatic_is_what_counts_where_nothing_is_sent() -> None:
    assert ring(scheduler="Automatic", schedule_type="automatic") == ring()
    assert ring(sampler_name="Euler", scheduler="Automatic") == ring(scheduler="Euler")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, name) for name in SAMPLERS),
        *((alias, each.name) for each in SAMPLERS.values() for alias in each.aliases),
        ("k_euler_a", "Euler a"),
        ("K_DPM_2_ANCESTRAL", "DPM2 a"),
        ("k_dpmpp_2m", "DPM++ 2M"),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE"),
        ("dpmpp_2m_sde_gpu karras", "DPM++ 2M SDE"),
        ("dpmpp_3m_sde_gpu_exponential", "DPM++ 3M SDE"),
        ("DPM++2M", "DPM++ 2M"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("eulerdiscretescheduler", "EulerDiscreteScheduler"),
        ("pndm", "PNDMScheduler"),
    ],
)
def test_samplers_by_their_names(name: str, meant: str) -> None:
    """Among them are all that the metadata of a picture may hold."""
    assert ring(sampler_name=name).scheduler == ring(scheduler=name).scheduler == meant


NEARLY = [
    *("DPM++ 2M", "DPM++ 2S a", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "DPM2", "DPM2 a"),
    *("DPM fast", "DPM adaptive", "Euler", "Euler a", "Heun", "LMS", "DDPM", "DDIM", "DDIM CFG++"),
    *("Restart", "UniPC", "PLMS", "LCM", "TCD", "SA", "DEIS", "dpmpp_2m", "heunpp2", "res_2m"),
    *(f"{name} Karras" for name in SAMPLERS),
    *(name for name in dir(diffusers) if name.endswith("Scheduler")),
]


@pytest.mark.parametrize("name", NEARLY)
def test_a_refused_scheduler_is_never_told_another_solver(name: str) -> None:
    for left in ALL_SCHEDULERS:
        found = outcome(
            {"prompt": "a", "scheduler": name}, PipelineTraits((left,), 8, TRAITS.parameters)
        )
        assert isinstance(found, str) or "did you mean" not in found["scheduler"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("eulr_a", "euler_a"), ("unpic", "unipc"), ("Flow Euller", "flow_euler")]
)
def test_a_misspelt_scheduler_is_told_its_name(typed: str, meant: str) -> None:
    found = refusal({"prompt": "a", "scheduler": typed})
    assert f"did you mean {meant}?" in found["scheduler"]
