"""Which noise schedulers go with a pipeline, and fresh ones by name."""

from __future__ import annotations

from typing import Any

import diffusers

from handler.api.traits import SCHEDULER_SHORT_NAMES
from handler.messages import first_lines

__all__ = ["compatible_schedulers", "least_steps", "make_scheduler"]


def compatible_schedulers(pipeline: Any) -> tuple[str, ...]:
    """Class names of the schedulers that `pipeline` may run with, its own first.

    Those whose own dependencies are not installed are left out.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return ()
    own = type(scheduler).__name__
    usable = {kind.__name__ for kind in scheduler.compatibles if ".dummy_" not in kind.__module__}
    return (own, *sorted(usable - {own}))


def least_steps(pipeline: Any) -> dict[str, int]:
    """Class names of the schedulers that need more than one step with this pipeline, and how many.

    PNDM's Runge-Kutta steps at the start take three, unless the configuration skips them.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    skips = scheduler is None or scheduler.config.get("skip_prk_steps", False)
    names = compatible_schedulers(pipeline)
    return {"PNDMScheduler": 4} if "PNDMScheduler" in names and not skips else {}


def make_scheduler(pipeline: Any, name: str) -> Any:
    """A fresh scheduler of the named class with the configuration of the pipeline's own.

    Raises:
        ValueError: no compatible scheduler has this class name or short name, or it cannot be made
            with the configuration of the pipeline's own.
    """
    class_name = SCHEDULER_SHORT_NAMES.get(name, name)
    compatible = compatible_schedulers(pipeline)
    if class_name not in compatible:
        raise ValueError(f"scheduler {name!r} does not fit; this pipeline takes {list(compatible)}")
    try:
        return getattr(diffusers, class_name).from_config(pipeline.scheduler.config)
    except Exception as error:  # each class has its own way to refuse what another one configured
        raise ValueError(
            f"scheduler {name!r} does not go with the configuration of this pipeline's own: "
            f"{first_lines(error, 1)}"
        ) from error
