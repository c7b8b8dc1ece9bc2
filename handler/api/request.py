"""What one request asks of the pipeline, once it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from handler.api.images import SentPicture
from handler.api.schema import PICTURE_FIELDS, Value
from handler.api.tasks import TEXT_TO_IMAGE, engine_task

__all__ = ["ATTRIBUTES", "GenerationRequest"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request; picture k of it is drawn with the seed ``seed + k``.

    Fields of the table that need no code of their own are in `extra`, those that were given or
    have a default.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_images: int
    scheduler: str | None
    """A sampler's name, or a diffusers class; None is the pipeline's own."""
    extra: Mapping[str, Value] = field(default_factory=dict, hash=False)
    task: str = TEXT_TO_IMAGE
    """Without what a control picture adds; see `engine_task`."""
    pictures: Mapping[str, SentPicture] = field(default_factory=dict, hash=False)
    """What was sent to begin with, by field."""

    @property
    def engine_task(self) -> str:
        """What the engine calls the task."""
        return engine_task(self.task, control="control_image" in self.pictures)

    @property
    def loras(self) -> Mapping[str, float] | None:
        """The scale of each LoRA that it is drawn with; None: what the pipeline came with."""
        found = self.extra.get("loras")
        return found if isinstance(found, Mapping) else None

    def values(self) -> dict[str, Value]:
        """The fields by name, in the order of the table."""
        return {
            name: getattr(self, name) if name in ATTRIBUTES else self.extra[name]
            for name in PICTURE_FIELDS
            if name in ATTRIBUTES or name in self.extra
        }

    @property
    def is_weighted(self) -> bool:
        """Whether words of its prompts have weights."""
        return bool(self.extra.get("prompt_weighting"))

    @property
    def sampler(self) -> str | None:
        """The scheduler with its sigmas, under one name; None is the pipeline's own as it is."""
        named = [each for each in (self.scheduler, self.extra.get("sigmas")) if each is not None]
        return " ".join(map(str, named)) or None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every picture."""
        return tuple(range(self.seed, self.seed + self.num_images))


ATTRIBUTES = frozenset(each.name for each in dataclasses.fields(GenerationRequest)) - {
    "extra",
    "pictures",
}
"""The fields of the table that a request has as attributes of its own."""
