"""What a model draws by when nobody says otherwise: its size, steps and guidance.

Packing writes them into the archive's configuration, where the user has not said otherwise.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, cast

__all__ = ["find_defaults"]


def find_defaults(pipeline: Any) -> dict[str, int | float]:
    """Return `pipeline`'s own defaults, under the keys of the configuration; those that it has.

    Sizes are what its call makes of none; steps and guidance are the defaults of its call.
    """
    from handler.pipelines.describe import describe
    from handler.pipelines.signature import call_defaults

    call = call_defaults(pipeline)
    found: dict[str, int | float] = {}
    steps = call.get("num_inference_steps")
    if isinstance(steps, int) and steps > 0:
        found["num_inference_steps"] = steps
    guidance = call.get("guidance_scale")
    if isinstance(guidance, int | float) and guidance >= 0:
        found["guidance_scale"] = float(guidance)
    if {"height", "width"} <= call.keys():
        multiple = describe(pipeline).size_multiple_px
        sizes = {name: _side_px(pipeline, name, call[name]) for name in ("height", "width")}
        for name, side_px in sizes.items():
            if side_px is not None and side_px >= multiple:
                found[name] = side_px // multiple * multiple
    return found


def _side_px(pipeline: Any, name: str, default: object) -> int | None:
    """Return what a call makes of a `name` (height or width) that is not given."""
    if (given := _count(default)) is not None:
        return given
    for source in _fallbacks(type(pipeline), name):
        try:
            # diffusers' own expression, such as self.default_sample_size * self.vae_scale_factor.
            value = _count(eval(compile(source, "default", "eval"), {}, {"self": pipeline}))
        except Exception:
            continue  # it stands on what its call found out before
        if value is not None:
            return value
    return _native_side_px(pipeline, name)


def _fallbacks(cls: type, name: str) -> Iterator[ast.Expression]:
    """Yield what stands behind ``name = name or …`` in the source of the pipeline's call."""
    call: Any = vars(next(each for each in cls.__mro__ if "__call__" in vars(each)))["__call__"]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, SyntaxError):
        return
    for node in ast.walk(tree):
        match node:
            case ast.Assign(
                targets=[ast.Name(id=target)],
                value=ast.BoolOp(op=ast.Or(), values=[ast.Name(id=first), fallback]),
            ) if target == first == name:
                yield ast.Expression(fallback)


def _native_side_px(pipeline: Any, name: str) -> int | None:
    """Return the denoiser's sample size times the scale of its latents."""
    from handler.pipelines.describe import latent_scale

    side = "height" if name == "height" else "width"
    for part in ("unet", "transformer", "prior"):
        config = getattr(getattr(pipeline, part, None), "config", {})
        size = config.get("sample_size") or config.get(f"sample_{side}")
        if isinstance(size, list | tuple) and len(size) == 2:
            size = size[0] if side == "height" else size[1]
        if (rows := _count(size)) is not None:
            return rows * latent_scale(pipeline)
    rows = _count(getattr(pipeline, "default_sample_size", None))
    return None if rows is None else rows * latent_scale(pipeline)


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return cast(int, value) if is_count else None
