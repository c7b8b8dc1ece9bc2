"""The names of what a request may ask for: what it begins with, and what it gives back.

A pipeline that also follows a control picture is another pipeline of the same task: the engine
knows it as the task's name with ``+control`` at its end.
"""

from __future__ import annotations

__all__ = ["IMAGE_TO_IMAGE", "INPAINTING", "TASKS", "TEXT_TO_IMAGE", "engine_task"]

TEXT_TO_IMAGE = "text-to-image"
IMAGE_TO_IMAGE = "image-to-image"
INPAINTING = "inpainting"
TASKS = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING)


def engine_task(name: str, *, control: bool) -> str:
    """Return what the engine calls the task `name`, with or without a control picture."""
    return f"{name}+control" if control else name
