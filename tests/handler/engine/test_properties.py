"""Random mixes of requests in flight, and what holds for every one of them.

A plan is drawn (who arrives when, wanting what, and what goes wrong with whom), played to its end,
and checked at every tick. Two pipelines: a toy that makes thousands of plans affordable, and a
tiny Stable Diffusion. The short profile is what `make test` runs; ten thousand plans of the one
and four hundred of the other take four minutes of one core:

    HYPOTHESIS_PROFILE=thorough python -m pytest tests/test_engine_properties.py --timeout=0
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.engine import BUCKETS, InFlightEngine
from handler.engine.ticket import State, StepEnd, Ticket
from handler.errors import Cancelled, DeadlineExceeded, PipelineFailed, TooLarge
from handler.pipelines.cost import Cost
from handler.pipelines.schedulers import compatible_schedulers, make_scheduler, seed_noise
from tests.support.pipelines import build
from tests.support.toy_pipeline import Denoise, ToyPipeline, ToyUNet, toy

IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# What the project promises; 1.2e-5 was seen, with a scheduler of large sigmas (EDM Euler).
BOUND = 1e-4
NOTHING = Cost(0, 0)

FATES = (
    "fine",
    "raises",  # in its own code, at step `at`
    "poisons",  # the forward that it shares, after step `at`
    "cancelled",  # from outside, `at` ticks after its arrival
    "stubborn",  # the same, and its pipeline swallows what should end it
    "cancels itself",  # at step `at`
    "cancels others",  # everyone in flight, at step `at`
    "late",  # its deadline is `at` seconds after its arrival, a tick takes one
    "larger",  # its denoiser is called with twice the rows that its arguments tell
    "differentiates",  # its denoiser is called with gradients on
    "submits",  # a copy of itself that is fine, at step `at`
)


@dataclass(frozen=True)
class Wish:
    """One request of a plan: what it asks for, when, and what becomes of it."""

    arrival: int
    seed: int
    steps: int
    is_guided: bool
    scheduler: str | None
    width: int
    images: int
    exact: bool
    fate: str
    at: int

    @property
    def ends_well(self) -> bool:
        return self.fate in ("fine", "cancels others", "larger", "differentiates", "submits")


@dataclass(frozen=True)
class Plan:
    wishes: list[Wish]
    max_rows: int
    max_images_px: int | None  # of 64 × 64, together in flight
    max_overtakes: int
    buckets: tuple[int, ...]


class Strict(ToyUNet):
    """A denoiser that refuses what is not a number, whoever's rows it is in."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.isnan().any():
            raise FloatingPointError("not a number")
        return super().forward(sample, *args, **kwargs)


class Fated(ToyPipeline):
    """Does what the request's fate wants, which its generator carries: views share the rest."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.fate = getattr(kwargs["generator"], "fate", "fine")
        self.at, self.calls = getattr(kwargs["generator"], "at", 0), 0
        return super().__call__(*args, **kwargs)

    def denoise(self, *args: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fate == "larger":
            args = tuple(x.repeat(2, *[1] * (x.ndim - 1)) if x.ndim else x for x in args)
        if self.fate == "stubborn":
            return self.resist(lambda: ToyPipeline.denoise(self, *args))
        with torch.set_grad_enabled(self.fate == "differentiates"):
            noise = super().denoise(*args).detach()
        if self.fate == "raises" and self.calls == self.at:
            raise ZeroDivisionError
        return noise[: len(noise) // 2] if self.fate == "larger" else noise

    def resist(self, denoise: Denoise) -> torch.Tensor:
        try:
            return denoise()
        except BaseException:
            return denoise()


class Fate(torch.Generator):
    """A generator that says what becomes of its request."""

    def __new__(cls, wish: Wish) -> Fate:
        return super().__new__(cls)

    def __init__(self, wish: Wish) -> None:
        self.fate, self.at = wish.fate, wish.at
        self.manual_seed(wish.seed)


# Solo runs


@functools.cache
def pipelines(family: str) -> Any:
    """The pipeline under test; between plans it is as it was built."""
    if family == "toy":
        return toy(Fated, unet=Strict())
    pipeline = build(family)
    pipeline.scheduler.register_to_config(clip_sample=False)
    return pipeline


# Half the time of all plans when the toy had them, for they search their schedule in numpy. The
# real pipeline has them, and `test_engine_families` mixes every one.
SLOW = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


@functools.cache
def schedulers(family: str) -> tuple[str | None, ...]:
    names = compatible_schedulers(pipelines(family))
    return (None, *(name for name in names if family != "toy" or name not in SLOW))


def kwargs_of(family: str, wish: Wish) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "prompt": f"toy {wish.seed}",
        "num_inference_steps": wish.steps,
        "guidance_scale": 5.0 if wish.is_guided else 1.0,
        "width": wish.width,
        "height": 64,
        "num_images_per_prompt": wish.images,
        "generator": Fate(wish),
    }
    if family != "toy":
        kwargs.update(height=32, width=wish.width // 2, output_type="pt")
    if wish.fate == "poisons":
        kwargs["callback_on_step_end"] = functools.partial(poison, wish.at)
    return kwargs


def poison(at: int, view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    latents = tensors["latents"]
    return {"latents": latents * float("nan") if step + 1 == at else latents}


@functools.cache
def solo(family: str, wish: Wish) -> torch.Tensor | type[Exception]:
    """The picture of the pipeline called directly, or what it raises."""
    view = pipelines(family).__class__(**pipelines(family).components, **MORE.get(family, {}))
    view.set_progress_bar_config(disable=True)
    if wish.scheduler is not None:
        view.scheduler = make_scheduler(view, wish.scheduler)
        seed_noise(view.scheduler, torch.Generator().manual_seed(wish.seed))
    try:
        images: torch.Tensor = view(**kwargs_of(family, wish)).images
        return images
    except Exception as error:
        return type(error)


MORE = {"stable_diffusion": {"requires_safety_checker": False}}


def expected(family: str, wish: Wish) -> torch.Tensor | type[Exception]:
    return solo(family, dataclasses.replace(wish, arrival=0, exact=False, fate="fine", at=0))


# Playing a plan


@dataclass
class Watch:
    """What is noted of one ticket while it lives."""

    ticket: Ticket
    wish: Wish
    cost: Cost
    ahead: list[Ticket]
    returned: int = 0
    waited: int = 0
    lived: int = 0
    left_out: int = 0
    others: int = 0
    is_condemned: bool = False
    passed_by: list[Ticket] = field(default_factory=list)
    born: list[weakref.ref[Any]] = field(default_factory=list)


class Player:
    """Plays `plan` on a new engine, and checks at every tick what has to hold at each."""

    def __init__(self, family: str, plan: Plan) -> None:
        self.family, self.plan = family, plan
        self.tick = 0
        area = 64 * 64 if family == "toy" else 32 * 32
        max_pixels = None if plan.max_images_px is None else plan.max_images_px * area
        self.engine = InFlightEngine(
            pipelines(family),
            max_rows=plan.max_rows,
            max_pixels=max_pixels,
            max_overtakes=plan.max_overtakes,
            buckets=plan.buckets,
            clock=lambda: float(self.tick),
        )
        self.watches: dict[Ticket, Watch] = {}

    def play(self) -> None:
        coming = sorted(self.plan.wishes, key=lambda wish: wish.arrival)
        try:
            while coming or self.engine.has_work:
                while coming and coming[0].arrival <= self.tick:
                    self.submit(coming.pop(0))
                self.cancel_from_outside()
                self.step()
                assert self.tick < 2000, "it never ends"
        finally:
            self.engine.close()

    def submit(self, wish: Wish) -> None:
        kwargs = kwargs_of(self.family, wish)
        live = [t for t in self.watches if not t.ended]
        try:
            ticket = self.engine.submit(
                kwargs,
                scheduler=wish.scheduler,
                deadline_s=float(wish.at) if wish.fate == "late" else None,
                exact=wish.exact,
            )
        except TooLarge:
            assert self.is_too_large(wish)
            return
        ticket.on_step = functools.partial(self.listen, ticket)
        watch = Watch(ticket, wish, ticket.cost, live)
        watch.born.append(weakref.ref(kwargs["generator"]))
        self.watches[ticket] = watch

    def is_too_large(self, wish: Wish) -> bool:
        rows = wish.images * (2 if wish.is_guided else 1)
        limit = self.plan.max_images_px
        return rows > self.plan.max_rows or (
            limit is not None and wish.images * wish.width > 64 * limit
        )

    def listen(self, ticket: Ticket, end: StepEnd) -> None:
        watch = self.watches[ticket]
        wish = watch.wish
        watch.born += [weakref.ref(end.latents), weakref.ref(ticket.run)]
        if end.step != wish.at:
            return
        if wish.fate == "cancels itself":
            assert self.engine.cancel(ticket)
        elif wish.fate == "cancels others":
            for other in self.watches.values():
                if other.ticket is not ticket and self.engine.cancel(other.ticket):
                    other.is_condemned = True
        elif wish.fate == "submits":
            self.submit(dataclasses.replace(wish, fate="fine", arrival=self.tick))

    def cancel_from_outside(self) -> None:
        for watch in self.watches.values():
            wish = watch.wish
            if wish.fate in ("cancelled", "stubborn") and self.tick == wish.arrival + wish.at:
                watch.is_condemned |= self.engine.cancel(watch.ticket)
                assert watch.ticket.ended

    def step(self) -> None:
        engine, limits = self.engine, self.engine.limits
        before = {t: t.cost for t, w in self.watches.items() if t.state is State.RUNNING}
        waiting = [t for t in self.watches if t.state is State.WAITING]
        context = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        ended = engine.step()
        self.tick += 1

        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == context
        for ticket in ended:
            assert ticket.ended
            self.watches[ticket].returned += 1
        served = [t for t in self.watches if t.last_tick == engine.counters.ticks]
        held = [before.get(ticket, self.watches[ticket].cost) for ticket in served]
        assert limits.hold(sum(held, NOTHING)) or len(held) == 1

        joined = [ticket for ticket in waiting if ticket.admitted_s is not None]
        num_running = engine.num_running
        for ticket in waiting:
            if ticket.state is State.WAITING:
                watch = self.watches[ticket]
                watch.waited += 1
                watch.passed_by += [t for t in joined if t.serial > ticket.serial]
        for ticket in (*before, *joined):
            watch = self.watches[ticket]
            watch.lived += 1
            if ticket in served or ticket.ended:
                watch.left_out = 0
            else:
                watch.left_out += 1
                assert watch.left_out <= max(watch.others, len(joined) + len(before) - 1)
            if ticket in served or ticket in joined:
                watch.others = num_running - 1


def check(family: str, plan: Plan, player: Player) -> None:
    """What has to hold of every ticket, once all have ended."""
    assert player.engine.step() == []
    assert player.engine.num_running == player.engine.num_waiting == 0
    for watch in player.watches.values():
        ticket, wish = watch.ticket, watch.wish
        assert watch.returned == 1
        assert len(watch.passed_by) <= plan.max_overtakes
        # The bound that `policy.admit` states.
        lives = [player.watches[t].lived for t in (*watch.ahead, *watch.passed_by)]
        assert watch.waited <= sum(lives)
        alone = expected(family, wish)
        if ticket.state is State.DONE:
            assert not watch.is_condemned
            assert wish.fate != "cancels itself" or wish.at > ticket.num_steps_done
            images = ticket.result().images
            assert isinstance(alone, torch.Tensor)
            assert images.shape == alone.shape
            assert float((images - alone).abs().max()) < BOUND
            assert images.grad_fn is None
        else:
            check_error(watch, alone, plan)


def check_error(watch: Watch, alone: torch.Tensor | type[Exception], plan: Plan) -> None:
    error, fate = watch.ticket.error, watch.wish.fate
    if isinstance(error, Cancelled):
        assert watch.is_condemned or fate == "cancels itself"
    elif isinstance(error, DeadlineExceeded):
        assert fate == "late"
    elif isinstance(error, TooLarge):
        assert fate == "larger"
        assert 2 * watch.cost.rows > plan.max_rows
    elif isinstance(error, ZeroDivisionError):
        assert fate == "raises"
    elif isinstance(error, (FloatingPointError, PipelineFailed)):
        assert fate == "poisons"
    else:
        assert type(error) is alone, repr(error)


def check_nothing_is_left(player: Player) -> None:
    """Though tickets, results and errors are kept."""
    gc.collect()
    for watch in player.watches.values():
        left = [thing for reference in watch.born if (thing := reference()) is not None]
        assert not left, (watch.wish, left)


# Plans


def wishes(family: str) -> st.SearchStrategy[Wish]:
    fates = FATES if family == "toy" else tuple(f for f in FATES if f not in TOY_ONLY)
    return st.builds(
        Wish,
        arrival=st.integers(0, 8),
        seed=st.integers(0, 2),
        steps=st.integers(1, 4),
        is_guided=st.booleans(),
        scheduler=st.sampled_from(schedulers(family)),
        width=st.sampled_from([64, 64, 96]),
        images=st.sampled_from([1, 1, 1, 2]),
        exact=st.sampled_from([False, False, False, True]),
        fate=st.one_of(st.just("fine"), st.sampled_from(fates)),
        at=st.integers(1, 4),
    )


# These need a pipeline that knows of its fate.
TOY_ONLY = ("raises", "poisons", "stubborn", "larger", "differentiates")


def plans(family: str, max_size: int) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        wishes=st.lists(wishes(family), min_size=1, max_size=max_size),
        max_rows=st.integers(2, 12),
        max_images_px=st.one_of(st.none(), st.integers(1, 6)),
        max_overtakes=st.sampled_from([0, 1, 2, 16]),
        buckets=st.sampled_from([(), (), BUCKETS, (3, 6)]),
    )


def forget_the_past() -> None:
    """So that collecting garbage after a plan looks at what this plan made, and at nothing else.

    Not at torch, nor at what hypothesis keeps of every plan: thousands would take quadratic time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    diffusers.logging.set_verbosity_error()
    for family in ("toy", "stable_diffusion"):
        schedulers(family)
    yield
    gc.unfreeze()
    diffusers.logging.set_verbosity_warning()


@settings(max_examples=10_000 if IS_THOROUGH else 300, deadline=None)
@given(plans("toy", max_size=9))
def test_every_plan_keeps_every_promise(plan: Plan) -> None:
    forget_the_past()
    player = Player("toy", plan)
    player.play()
    check("toy", plan, player)
    check_nothing_is_left(player)


@settings(max_examples=400 if IS_THOROUGH else 12, deadline=None)
@given(plans("stable_diffusion", max_size=6))
def test_a_real_pipeline_keeps_them_too(plan: Plan) -> None:
    forget_the_past()
    player = Player("stable_diffusion", plan)
    player.play()
    check("stable_diffusion", plan, player)
    check_nothing_is_left(player)
