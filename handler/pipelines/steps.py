"""What a pipeline tells of its denoising steps, and of the rows that guidance adds to them."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from handler.pipelines.schedulers import compatible_schedulers, least_steps
from handler.pipelines.shared_state import swaps_processors
from handler.pipelines.signature import defaults_of

__all__ = [
    "guides_in_halves",
    "is_one_call_a_step",
    "num_steps_of",
    "several_calls_a_step",
    "shortcuts_of",
    "shortcuts_of_kind",
]


def num_steps_of(view: Any) -> int | None:
    """How many steps the present call of a pipeline has, once its denoising begins.

    None where it does not tell.
    """
    num_steps = getattr(view, "num_timesteps", None)
    if num_steps is None:
        # Those with the older callback: a step has `order` timesteps there, the last one of Heun's
        # kind only one.
        scheduler = getattr(view, "scheduler", None)
        num_times = len(getattr(scheduler, "timesteps", ()))
        num_steps = math.ceil(num_times / getattr(scheduler, "order", 1))
    return int(num_steps) or None


def shortcuts_of(pipeline: Any) -> frozenset[str]:
    """The fields of `handler.engine.shortcuts.Shortcuts` that a pipeline can do with."""
    scheduler = type(getattr(pipeline, "scheduler", None))
    return shortcuts_of_kind(type(pipeline), scheduler, pipeline.components)


def shortcuts_of_kind(kind: type, scheduler: type, components: Collection[str]) -> frozenset[str]:
    """The same of a class, with a scheduler of that class and components of these names."""
    if not _tells_steps(kind, scheduler, components):
        return frozenset()
    interval = {"guidance_start", "guidance_end"} if guides_in_halves(kind) else set[str]()
    return frozenset({"step_cache", *interval})


def _tells_steps(kind: type, scheduler: type, components: Collection[str]) -> bool:
    """Whether one of several steps can be told from the others, and the last from the rest.

    Those that report to the older callback tell the number of their scheduler's steps, which is
    theirs unless a picture to begin with leaves some out. With a prior there are steps of two kinds
    in one call.
    """
    parameters = defaults_of(kind)
    if not issubclass(scheduler, SchedulerMixin):
        return False
    if any(name.startswith("prior") for name in components):
        return False
    if "callback_on_step_end" in parameters:
        return hasattr(kind, "num_timesteps")
    return "callback" in parameters and "strength" not in parameters


def several_calls_a_step(pipeline: Any) -> frozenset[str]:
    """Class names of the compatible schedulers that call the denoiser more than once a step.

    Heun's method and its like: every other call is at a guess of the next latents. PNDM begins with
    Runge-Kutta steps unless its configuration skips them.
    """
    kinds = (getattr(diffusers, name) for name in compatible_schedulers(pipeline))
    names = {kind.__name__ for kind in kinds if getattr(kind, "order", 1) != 1}
    return frozenset(names | least_steps(pipeline).keys())


def is_one_call_a_step(scheduler: Any) -> bool:
    """Whether each time of a scheduler has one call of the denoiser: see `several_calls_a_step`."""
    config = getattr(scheduler, "config", {})
    return getattr(scheduler, "order", 1) == 1 and config.get("skip_prk_steps", True) is not False


@functools.cache
def guides_in_halves(kind: type) -> bool:
    """Whether a pipeline's guided rows are those without the prompt, then as many with it.

    As the code of ``kind.__call__`` says:
    ``noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)``. Where it takes them apart in
    another way too, makes a call for each half, or exchanges attention processors, it is not so
    simple.
    """
    if swaps_processors(kind):
        return False
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
    except (OSError, TypeError):  # it has none that can be read
        return False
    origins = list(_origins(ast.parse(source)))
    return bool(origins) and all(
        len(names) == 2 and "uncond" in names[0] and "uncond" not in names[1] for names in origins
    )


def _origins(tree: ast.AST) -> Iterator[list[str]]:
    """The names on the left where an unguided output comes from: ``…_uncond, … = ….chunk(n)``.

    And ``…_uncond = self.transformer(…)[0]``, which has one.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[target], value=ast.Subscript(value=ast.Call() as call)):
                pass
            case ast.Assign(targets=[target], value=ast.Call() as call):
                pass
            case _:
                continue
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        names = [each.id for each in parts if isinstance(each, ast.Name)]
        if any("uncond" in name for name in names) and _makes_outputs(call):
            yield names


def _makes_outputs(call: ast.Call) -> bool:
    """Whether `call` is of one of the pipeline's modules, or takes an output apart."""
    match call.func:
        case ast.Attribute(attr="chunk" | "split"):
            return True
        case ast.Attribute(value=ast.Name(id="self"), attr="unet" | "transformer"):
            return True
    return False
