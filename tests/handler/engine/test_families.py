"""Every family in flight equals the same pipeline called directly.

Each test calls the pipeline by itself first, then opens an engine on that very pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch

from handler.engine import BUCKETS, InFlightEngine
from handler.engine.parking import find_slots
from handler.engine.ticket import Ticket
from handler.pipelines.schedulers import compatible_schedulers, seed_noise
from tests.support.pipelines import FAMILIES, SIDE_PX, build, example_kwargs, image_of

families = pytest.mark.parametrize("family", FAMILIES)

# Of pixels in [0, 1]. The largest difference measured in float32 is 1.3e-5 (Kandinsky 2.2) and 3e-6
# for the others; what a wrong argument makes is above 5e-3. The room between is for processors
# that round differently.
BOUND = 1e-4
WRONG = 30 * BOUND

# Their requests run one after another: what they do to the shared modules lasts a whole call.
ONE_AT_A_TIME = {"stable_diffusion_pag"}

_KARRAS = (None, "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")
SCHEDULERS: dict[str, tuple[str | None, ...]] = {
    "stable_diffusion": _KARRAS,
    "stable_diffusion_v": (
        None,
        "DDIMScheduler",
        "HeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "stable_diffusion_xl": _KARRAS,
    "stable_diffusion_controlnet": _KARRAS,
    "stable_diffusion_img2img": _KARRAS,
    "stable_diffusion_inpaint": _KARRAS,
    "stable_diffusion_pag": _KARRAS,
    "pixart_sigma": _KARRAS,
    "sana": (None, "UniPCMultistepScheduler", "DEISMultistepScheduler"),
}


@dataclass(frozen=True)
class Request:
    """Example call `index`, submitted before tick `arrival`, with `changes` of its arguments."""

    index: int
    arrival: int = 0
    scheduler: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def kwargs(self, family: str) -> dict[str, Any]:
        return {**example_kwargs(family, self.index), **self.changes}


def mix(family: str) -> list[Request]:
    """Five requests that differ in everything and arrive at three ticks."""
    schedulers = SCHEDULERS.get(family, (None,))
    return [
        Request(index, arrival, schedulers[index % len(schedulers)])
        for index, arrival in enumerate((0, 0, 2, 3, 3))
    ]


def solo(pipeline: Any, family: str, request: Request) -> torch.Tensor:
    """The picture of the pipeline called directly, with no engine on it."""
    own = pipeline.scheduler
    if request.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, request.scheduler).from_config(own.config)
        seed_noise(pipeline.scheduler, request.kwargs(family)["generator"])
    try:
        return image_of(pipeline(**request.kwargs(family)))
    finally:
        pipeline.scheduler = own


def in_flight(engine: InFlightEngine, family: str, requests: Sequence[Request]) -> list[Ticket]:
    """Submit each request at its tick and step until all have ended."""
    tickets: dict[int, Ticket] = {}
    tick = 0
    while len(tickets) < len(requests) or engine.num_waiting or engine.num_running:
        for place, request in enumerate(requests):
            if request.arrival == tick:
                tickets[place] = engine.submit(request.kwargs(family), scheduler=request.scheduler)
        engine.step()
        tick += 1
    return [tickets[place] for place in range(len(requests))]


def difference(ticket: Ticket, expected: torch.Tensor) -> float:
    image = image_of(ticket.result())
    assert image.shape == expected.shape
    return float((image - expected).abs().max())


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    parts = pipeline.components
    return next(parts[name] for name in ("unet", "transformer", "prior") if name in parts)


@contextmanager
def forwards_of(module: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of every real forward of `module` from here on."""
    kind, rows = type(module), []
    real = kind.forward

    @functools.wraps(real)
    def counted(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        rows.append(len(output[0]))
        return output

    kind.forward = counted
    try:
        yield rows
    finally:
        kind.forward = real


@contextmanager
def grad_modes() -> Iterator[set[bool]]:
    """The grad modes that any module of any model is called in from here on."""
    seen: set[bool] = set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.add(torch.is_grad_enabled())
    )
    try:
        yield seen
    finally:
        hook.remove()


@families
def test_requests_in_flight_equal_their_solo_runs(family: str) -> None:
    pipeline, requests = build(family), mix(family)
    with forwards_of(denoiser_of(pipeline)) as alone:
        expected = [solo(pipeline, family, request) for request in requests]
    with forwards_of(denoiser_of(pipeline)) as together, grad_modes() as grad:
        engine = InFlightEngine(pipeline)
        tickets = in_flight(engine, family, requests)
        engine.close()

    differences = [difference(t, e) for t, e in zip(tickets, expected, strict=True)]
    print(f"{family}: largest difference {max(differences):.2g}")  # shown by pytest -rP
    assert max(differences) < BOUND, differences
    if family in ONE_AT_A_TIME:
        assert together == alone
    else:
        assert max(together) > max(alone), "no forward served more than one request"
        assert max(together) <= engine.limits.max_rows
        assert len(together) < 0.75 * len(alone)
    assert grad == {False}
    assert torch.is_grad_enabled()


@families
def test_the_bound_tells_requests_apart(family: str) -> None:
    """Negative control: in flight, one changed argument is far outside the bound."""
    pipeline, asked = build(family), Request(0)
    expected = solo(pipeline, family, asked)
    other = example_kwargs(family, 1)["generator"]
    steps = asked.kwargs(family)["num_inference_steps"]
    wrong = {
        "seed": Request(0, changes={"generator": other}),
        "steps": Request(0, changes={"num_inference_steps": steps + 1}),
        "guidance": Request(0, changes={"guidance_scale": 5.0}),
    }
    if family in SCHEDULERS:
        wrong["scheduler"] = Request(0, scheduler=SCHEDULERS[family][1])
    engine = InFlightEngine(pipeline)
    right, *tickets = in_flight(engine, family, [asked, *wrong.values()])
    engine.close()
    assert difference(right, expected) < BOUND
    for name, ticket in zip(wrong, tickets, strict=True):
        assert difference(ticket, expected) > WRONG, name


@families
def test_exact_requests_are_bit_equal(family: str) -> None:
    pipeline, requests = build(family), mix(family)
    expected = [solo(pipeline, family, request) for request in requests]
    engine = InFlightEngine(pipeline, exact=True)
    tickets = in_flight(engine, family, requests)
    engine.close()
    assert [difference(t, e) for t, e in zip(tickets, expected, strict=True)] == [0.0] * 5


def test_an_exact_request_among_others_is_bit_equal() -> None:
    family = "stable_diffusion"
    pipeline, requests = build(family), mix(family)
    expected = solo(pipeline, family, requests[2])
    engine = InFlightEngine(pipeline)
    for request in requests[:2]:
        engine.submit(request.kwargs(family), scheduler=request.scheduler)
    exact = engine.submit(requests[2].kwargs(family), scheduler=requests[2].scheduler, exact=True)
    engine.run()
    assert engine.counters.merged_forwards > 0
    engine.close()
    assert difference(exact, expected) == 0.0


@families
def test_padding_reaches_no_picture(family: str) -> None:
    pipeline, requests = build(family), mix(family)[:3]
    expected = [solo(pipeline, family, request) for request in requests]
    with forwards_of(denoiser_of(pipeline)) as padded:
        engine = InFlightEngine(pipeline, buckets=BUCKETS)
        tickets = in_flight(engine, family, requests)
        engine.close()
    assert max(difference(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND
    if family not in ONE_AT_A_TIME:
        assert set(padded) <= set(BUCKETS)


@families
def test_close_leaves_the_pipeline_as_it_was(family: str) -> None:
    pipeline, requests = build(family), mix(family)
    expected = solo(pipeline, family, requests[0])
    before = state_of(pipeline)
    engine = InFlightEngine(pipeline)
    assert state_of(pipeline) != before, "the engine replaces something while it is open"
    tickets = [engine.submit(r.kwargs(family), scheduler=r.scheduler) for r in requests]
    for _ in range(4):  # past the text encoders, in the midst of denoising
        engine.step()
    assert engine.num_running > 0
    engine.close()
    assert all(ticket.ended for ticket in tickets)
    assert state_of(pipeline) == before
    assert torch.equal(solo(pipeline, family, requests[0]), expected)


def state_of(pipeline: Any) -> dict[str, Any]:
    """Everything set on the pipeline, its scheduler and its modules, by identity."""
    state = {f"self.{name}": id(value) for name, value in vars(pipeline).items()}
    for name, value in vars(pipeline.scheduler).items():
        state[f"scheduler.{name}"] = id(value)
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        for path, module in component.named_modules(prefix=name):
            for attribute, value in vars(module).items():
                # The dictionaries of parameters, hooks and children stay; their members may not.
                members = sorted(value) if isinstance(value, dict) else ()
                state[f"{path}.{attribute}"] = (id(value), *members)
        for path, weight in component.named_parameters(prefix=name):
            state[f"{path}.weights"] = (id(weight), weight.dtype, weight._version)
    return state


def test_modules_of_a_pipeline_inside_another_are_parked() -> None:
    slots = find_slots(build("kandinsky_2_2_combined"))
    assert {slot.name for slot in slots if slot.is_denoiser} == {
        "unet.forward",
        "prior_prior.forward",
    }
    assert {slot.name for slot in slots if not slot.is_denoiser} == {
        "movq.encode",
        "movq.decode",
        "prior_image_encoder.forward",
        "prior_text_encoder.forward",
    }


def test_every_compatible_scheduler_shares_one_batch() -> None:
    family = "stable_diffusion"
    pipeline = build(family)
    requests = [
        Request(index, index % 4, name)
        for index, name in enumerate(compatible_schedulers(pipeline))
    ]
    assert len(requests) >= 13
    expected = [solo(pipeline, family, request) for request in requests]
    engine = InFlightEngine(pipeline, max_rows=32)
    tickets = in_flight(engine, family, requests)
    engine.close()
    for ticket, image, request in zip(tickets, expected, requests, strict=True):
        assert difference(ticket, image) < BOUND, request.scheduler


@pytest.mark.parametrize("family", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_sizes_and_image_counts_mix(family: str) -> None:
    pipeline = build(family)
    requests = [
        Request(0, 0, changes={"num_images_per_prompt": 3}),
        Request(1, 0, changes={"height": SIDE_PX + 16}),
        Request(2, 1, changes={"num_images_per_prompt": 2, "guidance_scale": 1.0}),
        Request(3, 1, changes={"height": SIDE_PX + 16}),
        Request(4, 2, changes={"width": SIDE_PX - 16, "prompt": ["fog", "sand"]}),
    ]
    expected = [solo(pipeline, family, request) for request in requests]
    engine = InFlightEngine(pipeline)
    tickets = in_flight(engine, family, requests)
    assert engine.counters.merged_forwards > 0
    engine.close()
    assert max(difference(t, e) for t, e in zip(tickets, expected, strict=True)) < BOUND


@pytest.mark.parametrize("exact", [False, True])
def test_half_precision_decodes_in_single_at_the_same_tick(exact: bool) -> None:
    """SDXL's pipeline casts its autoencoder to float32 around decoding, and back."""
    family = "stable_diffusion_xl"
    pipeline = build(family).to(torch.float16)
    weights = {name: weight.clone() for name, weight in pipeline.vae.state_dict().items()}
    same_steps = {"num_inference_steps": 4}
    requests = [Request(index, changes=same_steps) for index in range(4)]
    expected = [solo(pipeline, family, request) for request in requests]

    precisions = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(
        lambda module, args: precisions.append(args[0].dtype)
    )
    engine = InFlightEngine(pipeline, exact=exact)
    tickets = [engine.submit(request.kwargs(family)) for request in requests]
    while not (ended := engine.step()):
        pass
    engine.close()
    hook.remove()

    assert set(ended) == set(tickets)
    assert precisions == [torch.float32] * 4
    bound = 0.0 if exact else 1e-2
    for place, ticket in enumerate(tickets):
        differences = [difference(ticket, image) for image in expected]
        assert differences.pop(place) <= bound
        assert min(differences) > 0.1
    assert pipeline.vae.dtype == torch.float16
    assert all(torch.equal(w, weights[name]) for name, w in pipeline.vae.state_dict().items())


def test_an_autoencoder_that_fails_in_single_precision_is_half_again_for_the_others() -> None:
    """What runs out of memory while decoding must not leave it where it was cast to."""
    family = "stable_diffusion_xl"
    pipeline = build(family).to(torch.float16)
    expected = solo(pipeline, family, Request(1))

    def run_out_of_memory(*args: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = InFlightEngine(pipeline)
    hook = pipeline.vae.decoder.register_forward_pre_hook(run_out_of_memory)
    failed = engine.submit(Request(2).kwargs(family))
    beside = engine.submit(Request(1).kwargs(family))
    engine.run()
    engine.close()
    assert isinstance(failed.error, torch.OutOfMemoryError)
    assert difference(beside, expected) <= 1e-2
    assert pipeline.vae.dtype == torch.float16
