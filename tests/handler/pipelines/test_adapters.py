"""LoRA adapters in flight: each request under its own set, the layers as before afterwards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig

from handler.engine import CompiledForwards
from handler.engine.ticket import Ticket
from handler.pipelines.adapters import AdapterSets, scales_adapters
from tests.support.engine_tools import opened
from tests.support.pipelines import build, example_kwargs, image_of

# What peft says of every second adapter.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

FAMILY = "stable_diffusion"
BOUND = 3e-5
VISIBLE = 1e-3
TARGETS = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}


def with_adapters() -> Any:
    """A tiny pipeline with the adapters ``a`` and ``b``; ``a`` is active, with weight 0.6."""
    pipeline = build(FAMILY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name in ("a", "b"):
            for component, targets in TARGETS.items():
                config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
                getattr(pipeline, component).add_adapter(config, adapter_name=name)
        for component in TARGETS:
            for path, parameter in getattr(pipeline, component).named_parameters():
                if "lora_B" in path:
                    torch.nn.init.normal_(parameter, std=0.5)
    pipeline.set_adapters(["a"], [0.6])
    return pipeline


def state_of(pipeline: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for component in TARGETS:
        for path, module in getattr(pipeline, component).named_modules(prefix=component):
            if hasattr(module, "scaling"):
                state[path] = (
                    module.active_adapters,
                    module.disable_adapters,
                    dict(module.scaling),
                )
        for path, parameter in getattr(pipeline, component).named_parameters(prefix=component):
            state[path] = (parameter.requires_grad, parameter._version)
    return state


Set = Mapping[str, float] | None


@functools.cache
def solo(index: int, names: tuple[tuple[str, float], ...] | None, scale: float | None) -> Any:
    """The picture of a fresh pipeline with this set active; None is how it was loaded."""
    pipeline = with_adapters()
    if names:
        pipeline.set_adapters([name for name, _ in names], [weight for _, weight in names])
    elif names is not None:
        pipeline.disable_lora()
    return image_of(pipeline(**kwargs_of(index, scale)))


def kwargs_of(index: int, scale: float | None = None) -> dict[str, Any]:
    scaled = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    return {**example_kwargs(FAMILY, index), **scaled}


def expected(index: int, adapters: Set, scale: float | None = None) -> torch.Tensor:
    names = None if adapters is None else tuple(adapters.items())
    image: torch.Tensor = solo(index, names, scale)
    return image


def difference(ticket: Ticket, image: torch.Tensor) -> float:
    return float((image_of(ticket.result()) - image).abs().max())


SETS: list[Set] = [None, {"a": 1.0}, {"b": 0.5}, {"a": 0.3, "b": 0.8}, {}]


def test_the_sets_show_in_the_picture() -> None:
    """The control of what follows: no two sets give the same."""
    images = [expected(0, adapters) for adapters in SETS]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert (image - other).abs().max() > VISIBLE


@pytest.mark.parametrize("exact", [False, True])
def test_each_request_runs_under_its_own_set(exact: bool) -> None:
    pipeline = with_adapters()
    before = state_of(pipeline)
    asked = [(index, adapters) for adapters in SETS for index in (0, 1)]
    with opened(pipeline, exact=exact, max_rows=32) as engine:
        tickets = []
        for place, (index, adapters) in enumerate(asked):
            tickets.append(engine.submit(kwargs_of(index), adapters=adapters))
            if place % 3 == 2:
                engine.step()
        engine.run()
        assert (engine.counters.merged_forwards > 0) is not exact
    for ticket, (index, adapters) in zip(tickets, asked, strict=True):
        assert difference(ticket, expected(index, adapters)) <= (0 if exact else BOUND)
    assert state_of(pipeline) == before


MIXED: list[Set] = [*SETS, {"a": 0.2}, {"b": 0.8, "a": 0.3}, {"a": -1.0}]


@pytest.mark.parametrize("buckets", [(), (4, 32)])
def test_requests_under_different_sets_share_forwards(buckets: tuple[int, ...]) -> None:
    """None, one, several, one at two scales: each as the pipeline with that set alone."""
    pipeline = with_adapters()
    before = state_of(pipeline)
    parked = ["text_encoder", "unet"]
    with opened(pipeline, max_rows=32, buckets=buckets, modules=parked) as engine:
        for _ in range(2):  # the second time nothing is left to prove
            ticks, forwards = engine.counters.ticks, engine.counters.forwards
            tickets = [engine.submit(kwargs_of(0), adapters=adapters) for adapters in MIXED]
            engine.run()
            for ticket, adapters in zip(tickets, MIXED, strict=True):
                assert difference(ticket, expected(0, adapters)) < BOUND, adapters
        assert engine.counters.forwards - forwards == engine.counters.ticks - ticks
    assert state_of(pipeline) == before


@pytest.mark.parametrize("swapped", [{"b": 1.0}, {"a": 0.9}, {}, None])
def test_another_set_would_be_seen(swapped: Set) -> None:
    """The control of the bound: what a mistaken row would give is far beyond it."""
    assert (expected(0, {"a": 1.0}) - expected(0, swapped)).abs().max() > 10 * BOUND


def test_a_set_alone_is_equal_to_the_bit_without_switching_any_layer() -> None:
    pipeline = with_adapters()
    before = state_of(pipeline)
    with opened(pipeline, exact=True) as engine:
        tickets = [engine.submit(kwargs_of(1), adapters=adapters) for adapters in MIXED]
        while engine.has_work:
            engine.step()
            assert state_of(pipeline) == before
    for ticket, adapters in zip(tickets, MIXED, strict=True):
        assert difference(ticket, expected(1, adapters)) == 0


def test_a_failing_request_takes_nobody_of_another_set_along() -> None:
    pipeline = with_adapters()
    real = pipeline.unet.forward

    def strict(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.isnan().any():
            raise FloatingPointError
        return real(sample, *args, **kwargs)

    pipeline.unet.forward = strict
    with opened(pipeline) as engine:
        bad = engine.submit(
            {**kwargs_of(0), "latents": torch.full((1, 4, 8, 8), torch.nan)}, adapters={"a": 1.0}
        )
        good = [engine.submit(kwargs_of(0), adapters=adapters) for adapters in SETS]
        engine.run()
    assert isinstance(bad.error, FloatingPointError)
    for ticket, adapters in zip(good, SETS, strict=True):
        assert difference(ticket, expected(0, adapters)) < BOUND


def test_compiled_code_is_for_rows_without_adapters() -> None:
    """What is compiled once sees neither patched layers nor a set of anybody."""
    pipeline = with_adapters()
    pipeline.disable_lora()
    ran: list[int] = []

    def compiler(forward: Any) -> Any:
        def compiled(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            ran.append(len(sample))
            own = [m for m in pipeline.unet.modules() if "forward" in vars(m)]
            assert own == [pipeline.unet], "a layer is patched"
            return forward(sample, *args, **kwargs)

        return compiled

    with opened(pipeline, wrappers=[CompiledForwards(compiler)]) as engine:
        plain = [engine.submit(kwargs_of(i)) for i in (0, 2)]
        styled = [engine.submit(kwargs_of(i), adapters={"a": 1.0}) for i in (0, 2)]
        engine.run()
    assert ran
    assert max(ran) == 4, "two guided pictures"
    for place, index in enumerate((0, 2)):
        assert difference(plain[place], expected(index, {})) < BOUND
        assert difference(styled[place], expected(index, {"a": 1.0})) < BOUND


def with_dora() -> Any:
    pipeline = with_adapters()
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(config, adapter_name="dora")
    pipeline.set_adapters(["a"], [0.6])
    return pipeline


def test_adapters_that_are_no_plain_loras_share_no_forward_with_other_sets() -> None:
    sets: list[Set] = [{"dora": 1.0}, {"a": 1.0, "dora": 0.5}, {"a": 1.0}, {"b": 0.5}]
    images = []
    for adapters in sets:
        alone = with_dora()
        alone.set_adapters(list(adapters or {}), list((adapters or {}).values()))
        images.append(image_of(alone(**kwargs_of(0))))
    assert (images[1] - images[2]).abs().max() > VISIBLE
    with opened(with_dora()) as engine:
        tickets = [engine.submit(kwargs_of(0), adapters=each) for each in sets]
        engine.run()
        assert engine.counters.merged_forwards > 0, "those of the LoRAs"
    for ticket, image in zip(tickets, images, strict=True):
        assert difference(ticket, image) < BOUND


def test_requests_under_one_set_share_a_forward() -> None:
    with opened(with_adapters()) as engine:
        tickets = [engine.submit(kwargs_of(i), adapters={"a": 0.3, "b": 0.8}) for i in (0, 2)]
        tickets += [engine.submit(kwargs_of(4), adapters={"b": 0.8, "a": 0.3})]
        engine.run()
        assert engine.counters.merged_forwards > 3
    for ticket, index in zip(tickets, (0, 2, 4), strict=True):
        assert difference(ticket, expected(index, {"a": 0.3, "b": 0.8})) < BOUND


@pytest.mark.parametrize("adapters", SETS, ids=repr)
def test_scales_apply_to_their_own_request_alone(adapters: Set) -> None:
    """A scale of zero is where diffusers forgets the weights of the set."""
    pipeline = with_adapters()
    before = state_of(pipeline)
    scales = (0.5, None, 0.0, None, 2.0)
    with opened(pipeline) as engine:
        tickets = [
            engine.submit(kwargs_of(i, scale), adapters=adapters) for i, scale in enumerate(scales)
        ]
        engine.run()
    for i, (ticket, scale) in enumerate(zip(tickets, scales, strict=True)):
        assert difference(ticket, expected(i, adapters, scale)) < BOUND, scale
    if adapters != {}:
        assert (expected(0, adapters, 0.5) - expected(0, adapters)).abs().max() > VISIBLE
    assert state_of(pipeline) == before


def test_equal_scales_share_a_forward_and_others_do_not() -> None:
    with opened(with_adapters(), modules=["unet"]) as engine:
        for i, scale in enumerate((0.5, 0.5, 0.7)):
            engine.submit(kwargs_of(i, scale))
        engine.step()
        engine.step()
        assert engine.counters.merged_forwards == 2


def test_scaled_calls_of_different_sets_share_no_forward() -> None:
    """Sets so faint that their calls agree in one forward say nothing of others."""
    pipeline = with_adapters()
    with opened(pipeline) as engine:
        for strength in (1e-6, 1.0):
            sets: list[Set] = [{"a": strength}, {"b": strength}]
            tickets = [engine.submit(kwargs_of(0, 0.5), adapters=adapters) for adapters in sets]
            engine.run()
    for ticket, adapters in zip(tickets, sets, strict=True):
        assert difference(ticket, expected(0, adapters, 0.5)) < BOUND


@pytest.mark.parametrize("was_disabled", [False, True])
def test_the_layers_are_given_back_as_they_were_found(was_disabled: bool) -> None:
    pipeline = with_adapters()
    pipeline.set_adapters(["a", "b"], [0.25, 0.75])
    if was_disabled:
        pipeline.disable_lora()
    image = image_of(pipeline(**kwargs_of(0)))
    before = state_of(pipeline)
    with opened(pipeline) as engine:
        for index, adapters in enumerate(({"b": 2.0}, {}, {"a": 1.0})):
            engine.submit(kwargs_of(index), adapters=adapters)
        plain = engine.submit(kwargs_of(0))
        engine.step()
        engine.step()
        engine.run()
        assert difference(plain, image) < BOUND
        engine.submit(kwargs_of(1, 0.5), adapters={"b": 2.0})
        engine.step()
        engine.step()
        assert state_of(pipeline) != before, "closed in the midst of a set that is scaled"
    assert state_of(pipeline) == before
    assert torch.equal(image_of(pipeline(**kwargs_of(0))), image)


def test_an_adapter_that_has_gone_fails_its_requests_alone() -> None:
    pipeline = with_adapters()
    with opened(pipeline) as engine:
        waiting = engine.submit(kwargs_of(0), adapters={"b": 1.0})
        other = engine.submit(kwargs_of(1))
        pipeline.delete_adapters("b")
        engine.run()
    assert waiting.error is not None
    assert difference(other, expected(1, None)) < BOUND


def test_unknown_adapters_are_named() -> None:
    with (
        opened(with_adapters()) as engine,
        pytest.raises(ValueError, match=r"\['c', 'd'\] are not loaded; loaded are \['a', 'b'\]"),
    ):
        engine.submit(kwargs_of(0), adapters={"d": 1.0, "a": 1.0, "c": 1.0})


def test_without_any_adapters_nothing_is_touched() -> None:
    """No request names a set, or the pipeline has none: its layers are not even looked at."""
    pipeline = build(FAMILY)
    sets = AdapterSets([pipeline])
    assert sets.checked(pipeline, None, {}) is None
    assert sets.checked(pipeline, None, {"cross_attention_kwargs": {"scale": 0.5}}) is None
    chosen = sets.checked(pipeline, {}, {})
    assert chosen is not None
    assert chosen.weights == {}
    sets.activate(pipeline, None, scaled=True)
    sets.activate(pipeline, {})
    sets.restore()


@pytest.mark.parametrize(
    ("kwargs", "scales"),
    [
        ({}, False),
        ({"cross_attention_kwargs": None}, False),
        ({"cross_attention_kwargs": {}}, False),
        ({"cross_attention_kwargs": {"scale": 1.0}}, True),
        ({"joint_attention_kwargs": {"scale": 0.0}}, True),
        ({"attention_kwargs": {"scale": 0.5, "other": 1}}, True),
        ({"scale": 0.5}, False),
    ],
)
def test_a_scale_is_found_where_diffusers_looks_for_it(
    kwargs: dict[str, Any], scales: bool
) -> None:
    assert scales_adapters(kwargs) is scales
