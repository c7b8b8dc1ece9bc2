"""Which calls are parked, what runs where it stands, and how a parked request is ended."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from greenlet import GreenletExit

from handler.engine.parking import ModuleCall, RequestGreenlet, Slot, find_slots
from handler.engine.ticket import Ticket
from handler.pipelines.cost import Cost
from tests.support.pipelines import build, shared
from tests.support.toy_pipeline import toy


def request(call: Callable[[], Any], **kwargs: Any) -> RequestGreenlet:
    return RequestGreenlet(Ticket(kwargs=kwargs, cost=Cost(1, 0)), call)


@pytest.fixture
def pipeline() -> Iterator[Any]:
    """A toy pipeline whose slots are installed, as by an engine, and removed afterwards."""
    pipeline = toy()
    slots = find_slots(pipeline)
    for slot in slots:
        slot.install()
    with torch.no_grad():
        yield pipeline
    for slot in slots:
        slot.remove()


SAMPLE = {
    "sample": torch.zeros(2, 4, 8, 8),
    "timestep": torch.tensor(1),
    "encoder_hidden_states": torch.zeros(2, 6, 8),
}


# Finding

VAE = ("vae.encode", "vae.decode")


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("stable_diffusion", ["unet", "text_encoder", *VAE]),
        ("stable_diffusion_xl", ["unet", "text_encoder", "text_encoder_2", *VAE]),
        (
            "stable_diffusion_3",
            ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", *VAE],
        ),
        ("stable_diffusion_controlnet", ["unet", "controlnet", "text_encoder", *VAE]),
        ("kandinsky_2_2", ["unet", "movq.encode", "movq.decode"]),
        ("stable_cascade_prior", ["prior", "text_encoder"]),
    ],
)
def test_the_modules_are_found_by_their_names(family: str, names: list[str]) -> None:
    found = {slot.name for slot in find_slots(shared(family))}
    assert found == {name if "." in name else f"{name}.forward" for name in names}


@pytest.mark.parametrize(
    ("dtype", "parked"),
    [
        (torch.float16, set[str]()),
        # Around its encoding it is cast whatever it is in.
        (torch.bfloat16, {"vae.decode"}),
        (torch.float32, {*VAE}),
    ],
)
def test_an_autoencoder_that_is_cast_around_its_work_is_not_parked(
    dtype: torch.dtype, parked: set[str]
) -> None:
    pipeline = build("stable_diffusion_xl").to(dtype)
    assert {slot.name for slot in find_slots(pipeline)} & {*VAE} == parked


def test_the_denoisers_are_told_from_their_helpers() -> None:
    slots = find_slots(shared("stable_diffusion_controlnet"))
    assert {slot.name for slot in slots if slot.is_denoiser} == {"unet.forward"}


def test_modules_can_be_named() -> None:
    slots = find_slots(toy(), names=["unet", "vae.decode", "unet.forward"])
    assert [slot.name for slot in slots] == ["unet.forward", "vae.decode"]


@pytest.mark.parametrize("name", ["transformer", "unet.step", "scheduler", "", "vae.nothing"])
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"the pipeline's modules are \['text_encoder', 'unet'"):
        find_slots(toy(), names=[name])


def test_a_module_under_two_names_is_parked_once() -> None:
    pipeline = build("stable_diffusion_3")
    pipeline.register_modules(text_encoder_2=pipeline.text_encoder)
    names = [slot.name for slot in find_slots(pipeline)]
    assert sum(name.startswith("text_encoder") for name in names) == 2


@pytest.mark.parametrize("name", ["unet", "vae.decode"])
def test_a_compiled_module_is_parked_by_the_parameters_of_what_it_wraps(name: str) -> None:
    pipeline = toy()
    component, _, _ = name.partition(".")
    original = pipeline.components[component]
    compiled = torch.compile(original, backend="eager")
    setattr(pipeline, component, compiled)
    (slot,) = find_slots(pipeline, names=[name])
    before = [dict(vars(original)), dict(vars(compiled))]
    assert "args" not in slot.signature.parameters
    slot.install()
    assert [dict(vars(original)), dict(vars(compiled))] != before
    slot.remove()
    assert [dict(vars(original)), dict(vars(compiled))] == before


def test_a_module_compiled_in_place_is_refused() -> None:
    """Its calls enter the compiler before they reach `park`, which it would go on to compile."""
    pipeline = toy()
    pipeline.unet.compile(backend="eager")
    with pytest.raises(ValueError, match=r"unet was compiled in place.*CompiledForwards.torch"):
        find_slots(pipeline)


# Replacing


def test_removing_leaves_the_class_method_as_it_was() -> None:
    unet = toy().unet
    before = dict(vars(unet))
    (slot,) = find_slots(toy_with(unet), names=["unet"])
    slot.install()
    assert "forward" in vars(unet)
    slot.remove()
    assert vars(unet) == before


def test_removing_gives_back_a_replaced_method_and_not_its_compiled_form() -> None:
    """Hooks and quantizers put a forward of their own on the instance."""
    unet = toy().unet
    theirs = functools.partial(type(unet).forward, unet)
    unet.forward = theirs
    (slot,) = find_slots(toy_with(unet), names=["unet"])
    slot.real = functools.partial(slot.real)  # as by compilation
    slot.install()
    assert unet.forward is not theirs
    slot.remove()
    assert unet.forward is theirs


def toy_with(unet: torch.nn.Module) -> Any:
    return toy(unet=unet)


# Parking


def test_a_call_from_outside_any_request_runs_where_it_stands(pipeline: Any) -> None:
    assert isinstance(pipeline.unet(**SAMPLE)[0], torch.Tensor)
    with torch.enable_grad():
        assert pipeline.unet(**SAMPLE)[0].requires_grad


def test_a_call_of_a_request_waits_for_its_result(pipeline: Any) -> None:
    run = request(lambda: pipeline.unet(SAMPLE["sample"], **dict(list(SAMPLE.items())[1:])))
    parked = run.switch()
    assert isinstance(parked, ModuleCall)
    assert parked.slot.name == "unet.forward"
    assert parked.ticket is run.ticket
    assert parked.num_rows == 2
    assert parked.bound.arguments == SAMPLE
    assert run.switch("the result") == "the result"
    assert run.dead


def test_a_call_of_other_arguments_than_the_module_has_is_the_requests_error(pipeline: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        request(lambda: pipeline.unet(**SAMPLE, mask=None)).switch()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_call_under_a_context_of_its_own_runs_where_it_stands(
    pipeline: Any, context: str
) -> None:
    """ModuleCall, it would put the others under its context, and leave in any order."""

    def call() -> Any:
        with CONTEXTS[context]():
            return pipeline.unet(**SAMPLE)[0]

    run = request(call)
    assert isinstance(run.switch(), torch.Tensor)
    assert run.dead


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_that_is_everyones_is_no_context_of_its_own(pipeline: Any, context: str) -> None:
    with CONTEXTS[context]():
        run = request(lambda: pipeline.unet(**SAMPLE)[0])
        assert isinstance(run.switch(), ModuleCall)
        run.exit()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_that_was_left_again_does_not_matter(pipeline: Any, context: str) -> None:
    def call() -> Any:
        with CONTEXTS[context](), torch.no_grad():
            pass
        return pipeline.unet(**SAMPLE)[0]

    run = request(call)
    assert isinstance(run.switch(), ModuleCall)
    run.exit()


@pytest.mark.parametrize(
    ("kwargs", "parks"),
    [
        ({}, True),
        ({"cross_attention_kwargs": None}, True),
        ({"cross_attention_kwargs": {"gate": 1.0}}, True),
        ({"cross_attention_kwargs": {"scale": 0.5}}, False),
        ({"joint_attention_kwargs": {"scale": 0.5}}, False),
        ({"attention_kwargs": {"scale": 0.5}}, False),
    ],
)
def test_a_text_encoder_with_scaled_adapters_runs_where_it_stands(
    pipeline: Any, kwargs: dict[str, Any], parks: bool
) -> None:
    ids = torch.zeros(1, 6, dtype=torch.long)
    run = request(lambda: pipeline.text_encoder(ids), **kwargs)
    assert isinstance(run.switch(), ModuleCall) is parks
    run.exit()
    run = request(lambda: pipeline.unet(**SAMPLE), **kwargs)
    assert isinstance(run.switch(), ModuleCall), "a denoiser scales within its own forward"
    run.exit()


# Ending


def test_exit_runs_the_clauses_on_the_way_out(pipeline: Any) -> None:
    steps: list[str] = []

    def call() -> None:
        try:
            pipeline.unet(**SAMPLE)
        except Exception:
            steps.append("swallowed")
        except GreenletExit:
            steps.append("told")
            raise
        finally:
            steps.append("cleaned")

    run = request(call)
    run.switch()
    run.exit()
    assert run.dead
    assert steps == ["told", "cleaned"]


def swallow(unet: Any) -> str:
    try:
        unet(**SAMPLE)
    except BaseException:
        return "as if nothing had been"
    return "unreachable"


def park_again(unet: Any) -> None:
    for _ in range(5):
        try:
            unet(**SAMPLE)
        except BaseException:
            continue


def raise_another(unet: Any) -> None:
    try:
        unet(**SAMPLE)
    finally:
        raise ValueError("cleaning failed")


@pytest.mark.parametrize("call", [swallow, park_again, raise_another])
def test_exit_ends_whatever_a_pipeline_does_about_it(
    pipeline: Any, call: Callable[[Any], Any]
) -> None:
    run = request(lambda: call(pipeline.unet))
    run.switch()
    run.exit()
    assert run.dead


def test_exit_before_the_start_and_after_the_end_does_nothing(pipeline: Any) -> None:
    called: list[int] = []
    run = request(lambda: called.append(1))
    run.exit()
    run.exit()
    assert run.dead
    assert not called


def test_a_pipeline_that_never_ends_is_abandoned(
    pipeline: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The worker must not hang; greenlet itself complains once more when it is collected."""
    immortal = True

    def call() -> None:
        while immortal:
            park_again(pipeline.unet)

    run = request(call)
    run.switch()
    with caplog.at_level(logging.ERROR):
        run.exit()
    assert f"request {run.ticket.serial} does not end when told to" in caplog.text
    immortal = False
    run.exit()
    assert run.dead


def test_an_interrupt_on_the_way_out_is_not_swallowed(pipeline: Any) -> None:
    def call() -> None:
        try:
            pipeline.unet(**SAMPLE)
        finally:
            raise KeyboardInterrupt

    run = request(call)
    run.switch()
    with pytest.raises(KeyboardInterrupt):
        run.exit()


def test_a_dead_request_keeps_nothing(pipeline: Any) -> None:
    latents = torch.zeros(2, 4, 8, 8)
    kept = weakref.ref(latents)

    def call(sample: torch.Tensor) -> None:
        with nullcontext():
            pipeline.unet(**{**SAMPLE, "sample": sample})

    run = request(functools.partial(call, latents))
    parked = run.switch()
    run.exit()
    del latents, parked
    gc.collect()
    assert kept() is None


def test_a_slot_is_compared_by_identity() -> None:
    one, other = (find_slots(toy(), names=["unet"])[0] for _ in range(2))
    assert isinstance(one, Slot)
    assert one != other
