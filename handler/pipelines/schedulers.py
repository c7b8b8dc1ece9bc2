"""Which noise schedulers go with a pipeline, and fresh ones by the names of samplers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers

from handler.api.samplers import find_sampler
from handler.errors import InvalidRequest
from handler.messages import first_lines

__all__ = [
    "check_num_steps",
    "compatible_schedulers",
    "compatible_with",
    "least_steps",
    "make_scheduler",
    "seed_noise",
    "start_at_the_first",
]

# For any noise schedule of the usual kind, though diffusers lists them as compatible with none.
_DISTILLED = ("LCMScheduler", "SASolverScheduler", "TCDScheduler")


# Solvers that divide by the distance between steps, so that two at one sigma are not finite.
_DIVIDING = frozenset(
    [
        *("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
        *("SASolverScheduler", "UniPCMultistepScheduler"),
    ]
)


def compatible_schedulers(pipeline: Any) -> tuple[str, ...]:
    """Class names of the schedulers that `pipeline` may run with, its own first.

    Those whose own dependencies are not installed are left out.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    return () if scheduler is None else compatible_with(type(scheduler))


def compatible_with(own: Any) -> tuple[str, ...]:
    """Class names of the schedulers that may run in place of one of the class `own`, it first."""
    kinds = own._get_compatibles()
    usable = {kind.__name__ for kind in kinds if ".dummy_" not in kind.__module__}
    if "EulerDiscreteScheduler" in usable:
        usable.update(_DISTILLED)
    return (own.__name__, *sorted(usable - {own.__name__}))


def least_steps(pipeline: Any) -> dict[str, int]:
    """Class names of the schedulers that need more than one step with this pipeline, and how many.

    PNDM's Runge-Kutta steps at the start take three, unless the configuration skips them.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    skips = scheduler is None or scheduler.config.get("skip_prk_steps", False)
    names = compatible_schedulers(pipeline)
    return {"PNDMScheduler": 4} if "PNDMScheduler" in names and not skips else {}


def make_scheduler(pipeline: Any, name: str) -> Any:
    """A fresh scheduler for the name of a sampler or class, with its sigmas where it says so.

    What the name does not say is as the pipeline's own scheduler is configured.

    Raises:
        ValueError: no compatible scheduler has this name, or it cannot be made with the
            configuration of the pipeline's own.
    """
    compatible = compatible_schedulers(pipeline)
    sampler = find_sampler(name, compatible) if name else None
    if sampler is None:
        raise ValueError(f"scheduler {name!r} does not fit; this pipeline takes {list(compatible)}")
    kind = getattr(diffusers, sampler.class_name, type(pipeline.scheduler))
    parameters = inspect.signature(kind.__init__).parameters
    options = {key: value for key, value in sampler.options.items() if key in parameters}
    try:
        return kind.from_config(pipeline.scheduler.config, **options)
    except Exception as error:  # each class has its own way to refuse what another one configured
        raise ValueError(
            f"scheduler {name!r} does not go with the configuration of this pipeline's own: "
            f"{first_lines(error, 1)}"
        ) from error


def seed_noise(scheduler: Any, generator: Any) -> None:
    """Let a scheduler that draws noise from a seed of its own draw from that of the request.

    DPMSolverSDEScheduler follows Brownian paths, and has no use for a generator: of the request's
    `generator` it gets the seed, of a list of them one a picture. A seed that its configuration
    fixes stays. Mutates `scheduler`.
    """
    if getattr(scheduler, "noise_sampler_seed", 0) is not None:
        return
    if isinstance(generator, (list, tuple)):
        scheduler.noise_sampler_seed = [each.initial_seed() for each in generator] or None
    elif generator is not None:
        scheduler.noise_sampler_seed = generator.initial_seed()


def start_at_the_first(scheduler: Any) -> None:
    """Let a scheduler whose first two timesteps are one number begin with the first of them.

    Sigmas of Karras and the like lie so close at the noisy end that their timesteps are rounded to
    one. Schedulers take the second of such, for those that begin in the middle, and find no sigma
    for the last step: a pipeline that begins at the start does not say so to them. Mutates
    `scheduler`, which must be private to its request.
    """
    find = getattr(scheduler, "index_for_timestep", None)
    if find is None:
        return

    def index_for_timestep(timestep: Any, *given: Any, **named: Any) -> Any:
        timesteps = next(iter((*given, *named.values())), None)
        all_of_them = scheduler.timesteps if timesteps is None else timesteps
        if len(all_of_them) > 1 and bool(all_of_them[0] == timestep == all_of_them[1]):
            return 0
        return find(timestep, *given, **named)

    scheduler.index_for_timestep = index_for_timestep


def check_num_steps(scheduler: Any, num_steps: Any) -> None:
    """Refuse steps that begin beyond the noisiest one that the model was trained with.

    Steps that are spaced ``leading`` are offset, by one for Stable Diffusion: as many steps as in
    training would begin one too far. Steps that are spaced ``linspace`` have both ends in them: as
    many as in training would meet one timestep twice, which some solvers divide by. Schedulers of
    distilled models have no more steps than these were distilled from.

    Raises:
        InvalidRequest: with how many steps are allowed.
    """
    config = getattr(scheduler, "config", {})
    num_trained = config.get("num_train_timesteps")
    if not isinstance(num_steps, int) or not num_trained:
        return
    num_distilled = config.get("original_inference_steps") or num_steps
    is_dense, spacing = 2 * num_steps > num_trained, config.get("timestep_spacing")
    divides = type(scheduler).__name__ in _DIVIDING and not config.get("use_flow_sigmas")
    is_suspect = is_dense and (spacing == "leading" or (spacing == "linspace" and divides))
    if not (is_suspect or num_steps > num_distilled) or _takes(scheduler, num_steps):
        return
    highest = min(num_steps - 1, num_distilled)
    most = next(n for n in range(highest, 0, -1) if _takes(scheduler, n))
    name = type(scheduler).__name__
    problem = f"{num_steps} is too many for {name} as it is configured; allowed: 1 to {most}"
    raise InvalidRequest(f"num_inference_steps: {problem}", {"num_inference_steps": problem})


def _takes(scheduler: Any, num_steps: int) -> bool:
    probe = copy.deepcopy(scheduler)
    try:
        probe.set_timesteps(num_steps)
    except Exception:  # too many for it in a way of its own
        return False
    if type(probe).__name__ in _DIVIDING:
        of_steps = probe.sigmas[:-1]  # the last one is where the last step ends
        if bool((of_steps[1:] == of_steps[:-1]).any()):
            return False
    first, last = max(probe.timesteps), min(probe.timesteps)
    # Multistep solvers stay where they are when there is no whole step of training for each.
    return bool(first < probe.config.num_train_timesteps and (first > last or num_steps == 1))
