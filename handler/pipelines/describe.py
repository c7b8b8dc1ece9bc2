"""What requests may ask of a loaded pipeline: its parameters, schedulers and sizes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from handler.api.traits import PipelineTraits
from handler.library_logs import quiet_libraries
from handler.pipelines.prompt_embeddings import reads_windows
from handler.pipelines.prompt_windows import count_windows
from handler.pipelines.schedulers import compatible_schedulers, least_steps
from handler.pipelines.steps import several_calls_a_step, shortcuts_of
from handler.pipelines.tasks import pictures_of, split_name, task_of

__all__ = ["describe", "latent_scale", "parameters_of"]


def describe(pipeline: Any, pipelines: Mapping[str, Any] | None = None) -> PipelineTraits:
    """Say what requests may ask of `pipeline`, and of those made of it for other tasks.

    `pipelines` are what `handler.pipelines.tasks.pipelines_of` made, `pipeline` among them.
    """
    own = task_of(type(pipeline))
    named = {own: pipeline} if pipelines is None else pipelines
    tasks = {split_name(name)[0]: each for name, each in named.items()}
    controls = (split_name(name)[1] for name in named)
    return PipelineTraits(
        schedulers=compatible_schedulers(pipeline),
        size_multiple_px=math.lcm(*(_size_multiple_px(each) for each in named.values())),
        parameters=_parameters(pipeline),
        clip_layers=_clip_layers(pipeline),
        least_steps=least_steps(pipeline),
        reads_weights=reads_windows(pipeline),
        count_windows=partial(count_windows, pipeline) if reads_windows(pipeline) else None,
        tasks={task: _parameters(each) for task, each in tasks.items()},
        required=pictures_of(own),
        shortcuts={task: shortcuts_of(each) for task, each in tasks.items()},
        several_calls=several_calls_a_step(pipeline),
        controls=tuple(dict.fromkeys(name for name in controls if name is not None)),
    )


def _parameters(pipeline: Any) -> frozenset[str]:
    transformer: Any = getattr(pipeline, "transformer", None)
    return parameters_of(type(pipeline), getattr(transformer, "config", {}))


def parameters_of(kind: type, transformer_config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the arguments of ``kind.__call__`` that do something.

    Flux and Qwen-Image ignore `guidance_scale` unless the model was distilled with it.
    """
    names = frozenset(inspect.signature(kind.__call__).parameters) - {"self"}
    is_idle = "true_cfg_scale" in names and transformer_config.get("guidance_embeds") is False
    return names - {"guidance_scale"} if is_idle else names


def _clip_layers(pipeline: Any) -> int | None:
    """Return how many layers the shallowest of CLIP's text encoders has; None: there is none."""
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    configs: list[Any] = [getattr(encoder, "config", None) for encoder in encoders]
    layers = [
        int(config.num_hidden_layers)
        for config in configs
        if str(getattr(config, "model_type", "")).startswith("clip")
    ]
    return min(layers, default=None)


def _size_multiple_px(pipeline: Any) -> int:
    """Return what height and width must be multiples of, to come out exactly as asked.

    The latents' scale, times the patch that the transformer cuts them into; and never less than
    the pipeline's own check wants (Stable Diffusion's is 8 whatever its VAE).
    """
    return math.lcm(latent_scale(pipeline) * _patch_size(pipeline), _checked_multiple_px(pipeline))


def latent_scale(pipeline: Any) -> int:
    """Return how many pixels of height a row of the latents stands for."""
    scale = getattr(pipeline, "vae_scale_factor", None)
    return int(scale or getattr(pipeline, "movq_scale_factor", None) or 8)


def _patch_size(pipeline: Any) -> int:
    if hasattr(pipeline, "_pack_latents"):
        return 2
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    sizes = config.get("patch_size") or config.get("all_patch_size") or 1
    return sizes if isinstance(sizes, int) else max(int(size) for size in sizes)


def _checked_multiple_px(pipeline: Any) -> int:
    """Return the smallest power of two whose odd multiples pass the pipeline's check_inputs."""
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return 1
    parameters = inspect.signature(check).parameters
    if not {"height", "width"} <= parameters.keys():
        return 1
    known = {"prompt": "a", "callback_steps": 1, "callback_on_step_end_tensor_inputs": []}
    fixed = {
        name: known.get(name)
        for name, each in parameters.items()
        if name not in ("height", "width")
        and (name in known or each.default is inspect.Parameter.empty)
        and each.kind is not inspect.Parameter.VAR_KEYWORD
    }
    for power in range(9):
        side_px = 33 << power
        try:
            with quiet_libraries():
                check(**fixed, height=side_px, width=side_px)
        except (ValueError, TypeError, AttributeError) as error:
            if "divisible" in str(error):
                continue
        return 1 << power
    return 1
