"""The fields that leave parts of the computing out, checked against what the pipeline allows."""

from __future__ import annotations

from collections.abc import Mapping

from handler.api.fields import FieldReader
from handler.api.schema import Value
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.messages import show

__all__ = ["SHORTCUTS", "check_shortcuts"]

SHORTCUTS: Mapping[str, float] = {"step_cache": 0.0, "guidance_start": 0.0, "guidance_end": 1.0}
"""The fields, by the names that the engine has for them, with the values that change nothing."""

_NEEDS = {
    "step_cache": "a pipeline that tells which step it is at",
    "guidance_start": "a pipeline whose guided rows stand together",
    "guidance_end": "a pipeline whose guided rows stand together",
}


def check_shortcuts(
    reader: FieldReader,
    sent: Mapping[str, Value],
    values: dict[str, Value],
    task: str,
    sampler: str | None,
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    """Report what does not go; mutates `values`: a default that does not go is left out.

    `task` is the engine's name of it, `sampler` the scheduler with its sigmas.
    """
    for name, neutral in SHORTCUTS.items():
        problem = _problem(name, task, sampler, config, traits)
        if problem is not None:
            if sent[name] not in (None, neutral):
                reader.report(name, problem)
            values.pop(name, None)
    if not values.get("step_cache"):
        values.pop("step_cache", None)
    start, end = values.get("guidance_start"), values.get("guidance_end")
    if isinstance(start, float) and isinstance(end, float) and start > end:
        reader.report("guidance_start", f"{show(start)} is after guidance_end, {show(end)}")


def _problem(
    name: str, task: str, sampler: str | None, config: HandlerConfig, traits: PipelineTraits
) -> str | None:
    if config.exact:
        return "not here: this server computes everything (exact: true)"
    if name not in traits.shortcuts.get(task, ()):
        others = [other for other, has in traits.shortcuts.items() if name in has]
        where = f"; {', '.join(others)} has it" if others else ""
        return f"not here: it needs {_NEEDS[name]}{where}"
    if name == "step_cache" and not traits.has_one_call_a_step(sampler):
        used = sampler or traits.schedulers[0]
        return f'{used} calls the model more than once a step; send "off", or another scheduler'
    return None
