"""The names of tasks: what a request wants drawn, by the pictures that it comes with."""

from __future__ import annotations

from typing import Final

__all__ = [
    "CONTROLLED",
    "IMAGE_TO_IMAGE",
    "INPAINTING",
    "TASKS",
    "TEXT_TO_IMAGE",
    "engine_task",
]

TEXT_TO_IMAGE: Final = "text-to-image"
IMAGE_TO_IMAGE: Final = "image-to-image"
INPAINTING: Final = "inpainting"
TASKS: Final = (TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINTING)

CONTROLLED: Final = "+control"
"""Ends the engine's name of a task that has a control picture."""


def engine_task(name: str, control: bool) -> str:
    """The engine's name of the task `name`, with or without a control picture."""
    return f"{name}{CONTROLLED}" if control else name
