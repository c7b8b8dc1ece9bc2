"""What the name of a sampler means for a pipeline, and what to say of one that means nothing.

Under a class's own name a scheduler is what the pipeline's configuration makes of it; under a
sampler's name, of `sampler_table`, it is that sampler, whatever the configuration says.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from handler.api.sampler_table import (
    ABSENT_SCHEDULES,
    ABSENT_SOLVERS,
    SAMPLERS,
    SCHEDULER_CLASSES,
    SCHEDULES,
    Options,
    even_spacing,
)
from handler.messages import show

__all__ = [
    "Sampler",
    "SamplerName",
    "find_sampler",
    "offered",
    "parse_name",
    "sampler_problem",
    "samplers_of",
]


@dataclass(frozen=True, slots=True)
class Sampler:
    """What a name means for a pipeline."""

    name: str
    """The solver's, or a class's where the pipeline's own configuration counts."""
    class_name: str
    options: Options
    """What differs from the configuration of the pipeline's own scheduler."""
    sigmas: str | None = None
    """The key of a schedule in `SCHEDULES`, where one was named."""


@dataclass(frozen=True, slots=True)
class SamplerName:
    """A name such as ``DPM++ 2M Karras``, taken apart."""

    solver: str
    """The solver's normal name, whether there is one or not; empty where nothing else is named."""
    schedule: str | None
    """The schedule of sigmas as people call it; None where the name has none."""
    sigmas: str | None
    """Its key in `SCHEDULES`; None where diffusers has no such schedule, or the name has none."""


_MIN_MISSPELT_CHARS, _MIN_LIKENESS = 4, 0.8


def find_sampler(
    name: str | None, compatible: Sequence[str], sigmas: str | None = None
) -> Sampler | None:
    """What `name` means for a pipeline that may run with the classes `compatible`, its own first.

    `name` may end with a schedule; None is the pipeline's own scheduler, and a name that is nothing
    but a schedule its own with that. `sigmas` is a key of `SCHEDULES`. None where the pipeline
    cannot run with it, or not with such sigmas.
    """
    parsed = parse_name(name or "")
    if parsed.schedule is not None and parsed.sigmas is None:
        return None
    solver_name, sigmas = parsed.solver, sigmas or parsed.sigmas
    named: str
    options: Options
    if not solver_name:
        if not compatible or (name and parsed.sigmas is None):
            return None
        named = class_name = compatible[0]
        options = {}
    elif solver_name in _SOLVERS:
        solver = _SOLVERS[solver_name]
        fitting = [each for each in solver.class_names if each in compatible]
        if not fitting:
            return None
        named, class_name = solver.name, fitting[0]
        options = {**even_spacing(class_name), **solver.options}
    else:
        known = _class_of(solver_name, compatible)
        if known is None:
            return None
        named = class_name = known
        options = {}
    if sigmas is not None:
        scheduled_options = SCHEDULES[sigmas].options_for(class_name)
        if scheduled_options is None:
            return None
        options = {**options, **scheduled_options}
    return Sampler(named, class_name, options, sigmas)


def samplers_of(compatible: Sequence[str]) -> dict[str, list[str]]:
    """The names of the samplers that go with a pipeline, each with its schedules' keys."""
    return {
        solver.name: [
            sigmas for sigmas in SCHEDULES if find_sampler(solver.name, compatible, sigmas)
        ]
        for solver in SAMPLERS.values()
        if find_sampler(solver.name, compatible) is not None
    }


def offered(compatible: Sequence[str]) -> list[str]:
    """The names to offer for what a pipeline may run with: one a solver, and classes else."""
    names = []
    for class_name in compatible:
        solvers = [each for each in SAMPLERS.values() if class_name in each.class_names]
        short = [short for short, known in SCHEDULER_CLASSES.items() if known == class_name]
        names += [each.aliases[0] for each in solvers] + short or [class_name]
    return list(dict.fromkeys(names))


def sampler_problem(name: str, compatible: Sequence[str], sigmas: str | None = None) -> str:
    """What to say of a name for which `find_sampler` finds nothing, or of `sigmas` with it.

    It never names another solver than the one that was meant.
    """
    choices = offered(compatible)
    allowed = f"allowed: {', '.join(choices)}"
    parsed = parse_name(name)
    solver_name = parsed.solver
    if solver_name in ABSENT_SOLVERS:
        return f"{show(name)}: diffusers has no such solver; {allowed}"
    earlier = parse_name(solver_name).schedule
    if parsed.schedule is not None and earlier is not None:
        return f"{show(name)} names two schedules of sigmas, {earlier} and {parsed.schedule}"
    alone = find_sampler(solver_name, compatible) if solver_name else None
    schedule = parsed.schedule if sigmas is None else SCHEDULES[sigmas].name
    if schedule is not None and alone is not None:
        kinds = [k for k in SCHEDULES if find_sampler(solver_name, compatible, k)]
        can = f"its sigmas may be {', '.join(kinds)}" if kinds else "a request cannot choose them"
        sent = name if sigmas is None else sigmas
        return f"{show(sent)}: {alone.name} has no {schedule} sigmas in diffusers; {can}"
    is_known = solver_name in _SOLVERS or solver_name in SCHEDULER_CLASSES
    match = None if is_known else _misspelt(solver_name, choices)
    hint = f"did you mean {match}? " if match else ""
    return f"{show(name)} does not go with this pipeline; {hint}{allowed}"


def parse_name(name: str) -> SamplerName:
    """The solver and the schedule of sigmas in a name, in any of the spellings that people use."""
    normal = _normal(name)
    if normal in _SOLVERS:
        return SamplerName(normal, None, None)
    ends = [each for each in _SCHEDULE_ENDS if f"_{normal}".endswith(f"_{each}")]
    end = max(ends, key=len, default=None)
    # Alone, k and ka could be anything.
    if end is None or (end == normal and len(end) <= 2):
        return SamplerName(normal, None, None)
    schedule, sigmas = _SCHEDULE_ENDS[end]
    return SamplerName(normal.removesuffix(end).removesuffix("_"), schedule, sigmas)


def _normal(name: str) -> str:
    """A name in lower case with underscores between its words, in A1111's spelling."""
    words = name[:100].lower().replace("-", " ").replace("_", " ").split()
    normal = "_".join(words).replace("dpmpp", "dpm++")
    if normal.startswith("dpm++") and normal[5:6].isalnum():
        normal = f"dpm++_{normal[5:]}"
    if normal.startswith("dpm++"):
        # ComfyUI's name for where the noise is drawn, also before a schedule.
        normal = "_".join(word for word in normal.split("_") if word != "gpu")
    normal = _WHOLE.get(normal, normal)
    normal = normal.replace("_ancestral", "_a")
    return normal.removeprefix("k_") if normal.removeprefix("k_").startswith(_K_SOLVERS) else normal


_WHOLE = {"karrasdpm": "dpm++_2m_karras"}
_K_SOLVERS = ("euler", "heun", "lms", "dpm")
# What a name may end with: the schedule as people call it, and its key where diffusers has it.
_SCHEDULE_ENDS: dict[str, tuple[str, str | None]] = {
    **{end: (name, None) for end, name in ABSENT_SCHEDULES.items()},
    **{
        end: (schedule.name, key)
        for key, schedule in SCHEDULES.items()
        for end in (key, *schedule.aliases)
    },
}
_SOLVERS = {
    alias: solver
    for solver in SAMPLERS.values()
    for alias in ("_".join(solver.name.lower().split()), *solver.aliases)
}


def _class_of(name: str, compatible: Collection[str]) -> str | None:
    """The class with this name in any case, or short name, or without ``Scheduler`` at its end."""
    known = {each.lower(): each for each in compatible}
    known.update({each.lower().removesuffix("scheduler"): each for each in compatible})
    known.update({s: each for s, each in SCHEDULER_CLASSES.items() if each in compatible})
    return known.get(name)


def _misspelt(name: str, choices: Sequence[str]) -> str | None:
    """The choice that `name` is with letters of its words mistaken.

    Solvers differ by single signs (2s, 2m, a, sde), so short words must be equal.
    """
    for choice in choices:
        if choice not in _SOLVERS and choice not in SCHEDULER_CLASSES:
            continue  # a class name, which is alike to those of other solvers
        pairs = list(zip(name.split("_"), choice.split("_"), strict=False))
        is_alike = all(
            sent == word
            or (
                min(len(sent), len(word)) >= _MIN_MISSPELT_CHARS
                and word.isalpha()
                and difflib.SequenceMatcher(None, sent, word).ratio() >= _MIN_LIKENESS
            )
            for sent, word in pairs
        )
        if is_alike and name.count("_") == choice.count("_"):
            return choice
    return None
