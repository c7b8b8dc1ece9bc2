"""What a picture says about how it was drawn, in the forms that image tools read."""

from __future__ import annotations

import json
from dataclasses import dataclass

from handler.api.request import GenerationRequest

__all__ = ["ImageMetadata", "parameters_line", "request_parameters", "to_json"]

# The names that the web front ends for Stable Diffusion gave to diffusers' schedulers; tools that
# read the line know these. Others are written as their class name.
_SAMPLER_NAMES = {
    "DDIMScheduler": "DDIM",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}


@dataclass(frozen=True, slots=True)
class ImageMetadata:
    """The request behind one picture, the seed of that picture, and the model's name."""

    request: GenerationRequest
    seed: int
    model_name: str


def request_parameters(request: GenerationRequest) -> dict[str, object]:
    """The request as JSON values, without its seed: that differs from picture to picture."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "height": request.height,
        "width": request.width,
        "scheduler": request.scheduler,
    }


def parameters_line(metadata: ImageMetadata) -> str:
    """Prompt, negative prompt and settings, laid out as AUTOMATIC1111's web UI does."""
    request = metadata.request
    settings = {
        "Steps": str(request.num_inference_steps),
        "Sampler": _SAMPLER_NAMES.get(request.scheduler or "", request.scheduler),
        "CFG scale": f"{request.guidance_scale:.17g}",
        "Seed": str(metadata.seed),
        "Size": f"{request.width}x{request.height}",
        "Model": _quoted(metadata.model_name),
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    # Without a scheduler of its own a request runs with the pipeline's, whose name is not known.
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value))
    return "\n".join(lines)


def to_json(metadata: ImageMetadata) -> str:
    """Everything, as one line of ASCII."""
    return json.dumps(
        {
            **request_parameters(metadata.request),
            "seed": metadata.seed,
            "model": metadata.model_name,
        }
    )


def _quoted(value: str) -> str:
    """Quoted where the line's own punctuation would break it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') else value
