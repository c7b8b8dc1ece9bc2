"""Fits an archive's configuration to its model: the model's defaults, and limits that allow them.

What the user has set stands: a default beyond a limit of the user's is brought within it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import yaml

from handler.config import HandlerConfig, keys

__all__ = ["describe_defaults", "fit_settings", "settings_within", "with_settings"]

_SIZES = ("height", "width")
_LIMITS = (
    *("max_num_inference_steps", "min_guidance_scale", "max_guidance_scale"),
    *("min_size_px", "max_size_px", "max_pixels"),
)
_DEFAULTS = ("num_inference_steps", "guidance_scale", *_SIZES)
_READ = (*_DEFAULTS, *_LIMITS)
_MAX_STEPS = 1000
_MULTIPLE_PX = 64


def fit_settings(
    section: Mapping[str, Any],
    settings: Mapping[str, Any],
    defaults: Mapping[str, int | float],
    *,
    is_chosen: bool,
) -> dict[str, Any]:
    """Return what changes in the ``handler:`` `section`: `settings`, and the model's `defaults`.

    `is_chosen` says that what stands in the section is the user's will, as `settings` are.
    """
    chosen = {**(section if is_chosen else {}), **settings}
    values = {**{key.name: key.default for key in keys()}, **section, **settings}
    fitted = {name: value for name, value in defaults.items() if name not in chosen}
    if not all(isinstance(values.get(name), int | float) for name in _READ):
        return dict(settings)  # which the check of the whole configuration then names
    if "num_inference_steps" in fitted:
        fitted["num_inference_steps"] = min(_MAX_STEPS, int(fitted["num_inference_steps"]))
        _within(fitted, "num_inference_steps", "max_num_inference_steps", values, chosen, max)
    if "guidance_scale" in fitted:
        _within(fitted, "guidance_scale", "max_guidance_scale", values, chosen, max)
        _within(fitted, "guidance_scale", "min_guidance_scale", values, chosen, min)
    if any(name in fitted for name in _SIZES):
        _fit_pixels(fitted, values, chosen)
    changed = {name: value for name, value in fitted.items() if section.get(name) != value}
    return {**changed, **settings}


def settings_within(section: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that bring the defaults in `section` within the limits in `settings`."""
    defaults = {
        name: section[name] for name in _DEFAULTS if name in section and name not in settings
    }
    if not all(isinstance(value, int | float) for value in defaults.values()):
        return {}  # which the check of the whole configuration names
    rest = {name: value for name, value in section.items() if name not in defaults}
    fitted = fit_settings(rest, settings, defaults, is_chosen=False)
    return {
        name: fitted[name] for name, value in defaults.items() if fitted.get(name, value) != value
    }


def _within(
    fitted: dict[str, Any],
    name: str,
    limit: str,
    values: Mapping[str, Any],
    chosen: Mapping[str, Any],
    furthest: Any,
) -> None:
    """Move the `limit` of `name`, or where the user has set it, the default. Mutates `fitted`."""
    known = fitted.get(limit, values[limit])
    if furthest(fitted[name], known) == known:
        return
    if limit in chosen:
        fitted[name] = known
    else:
        fitted[limit] = fitted[name]


def _fit_pixels(
    fitted: dict[str, Any], values: Mapping[str, Any], chosen: Mapping[str, Any]
) -> None:
    own = [name for name in _SIZES if name in fitted]
    if "max_pixels" in chosen:
        height, width = (fitted.get(name, values[name]) for name in _SIZES)
        factor = math.sqrt(min(1.0, chosen["max_pixels"] / (height * width)))
        if factor < 1:
            for name in own:
                side_px = int(fitted[name] * factor)
                fitted[name] = side_px // _MULTIPLE_PX * _MULTIPLE_PX or side_px
    for name in own:
        _within(fitted, name, "max_size_px", values, chosen, max)
        _within(fitted, name, "min_size_px", values, chosen, min)
    height, width = (fitted.get(name, values[name]) for name in _SIZES)
    if "max_pixels" not in chosen and height * width > values["max_pixels"]:
        fitted["max_pixels"] = height * width


def with_settings(data: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return the configuration file `data` with `changes` in its ``handler:`` section.

    Its comments stay where every changed key stands on a line of its own; else the section's keys
    are put in their usual order, so that it does not matter in how many steps they were changed.
    """
    config = yaml.safe_load(data) or {}
    section = {**(config.get("handler") or {}), **changes}
    wanted = {**config, "handler": section}
    if wanted == config:
        return data
    text = data.decode()
    for name, value in changes.items():
        line = re.compile(rf"(?m)^(  {re.escape(name)}: )([^\s#]+)( *)")
        text = line.sub(partial(_line, value), text, count=1)
    try:
        if yaml.safe_load(text) == wanted:
            return text.encode()
    except yaml.YAMLError:
        pass  # a value that needs more than a line
    places = {key.name: place for place, key in enumerate(keys())}
    in_order = sorted(section.items(), key=lambda item: places.get(item[0], len(places)))
    wanted = {**config, "handler": dict(in_order)}
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True).encode()


def _line(value: object, found: re.Match[str]) -> str:
    """The line with another value, its comment where it was."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]
    room = len(found[2]) + len(found[3]) - len(text)
    return found[1] + text + (" " * max(room, 1) if found[3] else "")


def describe_defaults(config: HandlerConfig) -> str:
    """Say what a request gets that asks for nothing, and the limits that differ from the usual."""
    usual = HandlerConfig()
    moved = [
        f"{key.name} {getattr(config, key.name)}"
        for key in keys()
        if key.name in _LIMITS and getattr(config, key.name) != getattr(usual, key.name)
    ]
    return (
        f"a request that asks for nothing else gets {config.height}x{config.width} (height x "
        f"width), {config.num_inference_steps} steps and guidance {config.guidance_scale:g}"
        + (f"; limits: {', '.join(moved)}" if moved else "")
    )
