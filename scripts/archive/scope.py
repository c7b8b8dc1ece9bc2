"""Says of a pipeline class whether it can be served: it must draw pictures of what is sent."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

from handler.loading.model_index import ModelIndex

__all__ = ["scope_problem"]

# What a field of a call's output says that the pipeline gives, if it has no field of pictures.
_GIVES = {
    "frames": "videos",
    "video": "videos",
    "videos": "videos",
    "audio": "sound",
    "audios": "sound",
    "prediction": "predictions from a picture",
    "image_embeds": "embeddings for another pipeline (it is a prior)",
    "image_embeddings": "embeddings for another pipeline (it is a prior)",
    "prompt_embeds": "embeddings for another pipeline (it is a prior)",
    "text": "text",
    "texts": "text",
    "rgb": "pictures with depth",
}
# Classes whose output has the field of pictures, for something else.
_MISNAMED = {
    "QwenImageLayeredPipeline": "the layers of a picture",
    "ShapEImg2ImgPipeline": "views of a three-dimensional thing",
    "ShapEPipeline": "views of a three-dimensional thing",
    "TextToVideoZeroPipeline": "videos",
    "TextToVideoZeroSDXLPipeline": "videos",
}
# Classes whose call has a default for something else that it cannot do without.
_NEEDS_MORE = {
    "IFImg2ImgSuperResolutionPipeline": "a picture in two sizes",
    "IFInpaintingSuperResolutionPipeline": "a picture in two sizes",
    "JoyImageEditPlusPipeline": "several pictures",
    "LEditsPPPipelineStableDiffusion": "a picture that was inverted before",
    "LEditsPPPipelineStableDiffusionXL": "a picture that was inverted before",
    "StableDiffusionDiffEditPipeline": "a picture that was inverted before",
    "StableDiffusionGLIGENPipeline": "phrases with their boxes",
    "StableDiffusionGLIGENTextImagePipeline": "phrases with their boxes",
    "StableDiffusionPix2PixZeroPipeline": "embeddings of what to edit",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": "the kind of its control picture",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "the kind of its control picture",
    "StableDiffusionXLControlNetUnionPipeline": "the kind of its control picture",
    "VisualClozeGenerationPipeline": "pictures as examples",
    "VisualClozePipeline": "pictures as examples",
}
# Classes of diffusers 0.42 that fail in every call of an engine.
_FAILS = {"StableDiffusionParadigmsPipeline": "it loses count of its steps where they are reported"}


def scope_problem(cls: Any, index: ModelIndex) -> str | None:
    """Say why pipelines of `cls` are not served; None: they draw pictures.

    From text, or from the pictures that a request may have beside it.
    """
    from handler.pipelines.tasks import controlled_by, pictures_of, task_of

    name = cls.__name__
    call = cls.__call__
    if not inspect.isfunction(call):
        return f"{name} cannot be called itself: it only holds the parts of other pipelines"
    if gives := _MISNAMED.get(name) or _gives_instead(cls):
        return f"{name} gives {gives}, not pictures: only pipelines that draw pictures are served"
    if fault := _FAILS.get(name):
        return f"{name} does not draw here, by a fault of diffusers: {fault}"
    wanted = [
        each.name
        for each in inspect.signature(call).parameters.values()
        if each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        and each.name not in {"self", "prompt", controlled_by(cls), *pictures_of(task_of(cls))}
    ]
    if embeddings := [each for each in wanted if "embed" in each]:
        return (
            f"{name} needs {', '.join(embeddings)}, which another pipeline makes of the prompt: "
            "pack the pipeline that combines both"
        )
    if "control_mask" in inspect.signature(call).parameters:
        return f"{name} needs a mask for its control picture, which a request cannot give"
    if wanted or name in _NEEDS_MORE:
        what = _NEEDS_MORE.get(name) or ", ".join(wanted)
        return f"{name} needs {what}, which a request cannot give"
    return _without_text_encoder(cls, index)


def _gives_instead(cls: Any) -> str | None:
    """Say what a call returns where that is not pictures; None: pictures, or it does not tell."""
    outputs = [*_output_classes(cls)]
    fields = [each.name for output in outputs for each in dataclasses.fields(output)]
    if not fields or {"images", "image"} & {*fields}:
        return None
    known = next((gives for field, gives in _GIVES.items() if field in fields), None)
    return known or ", ".join(dict.fromkeys(fields))


def _output_classes(cls: Any) -> Iterator[Any]:
    """Yield the classes that calls return: by their annotation, else by their source."""
    module = vars(sys.modules[cls.__module__])
    annotated = cls.__call__.__annotations__.get("return")
    if isinstance(annotated, str):
        names = re.findall(r"\w+", annotated)
        found = [module.get(name) for name in names]
    else:
        found = [annotated, *typing.get_args(annotated)]
    outputs = [each for each in found if _is_output(each)]
    if not outputs:
        names = re.findall(r"\b(\w+Output)\(", inspect.getsource(cls.__call__))
        outputs = [module[name] for name in names if _is_output(module.get(name))]
    yield from outputs


def _is_output(value: Any) -> bool:
    from diffusers.utils import BaseOutput

    return isinstance(value, type) and issubclass(value, BaseOutput)


def _without_text_encoder(cls: Any, index: ModelIndex) -> str | None:
    """A pipeline whose text encoders are all left out draws from embeddings only."""
    encoders = [
        name
        for name in inspect.signature(cls.__init__).parameters
        if re.fullmatch("(prior_)?text_encoder(_[0-9])?", name)
    ]
    if encoders and not any(name in index.components for name in encoders):
        return (
            f"the pipeline has no text encoder ({', '.join(encoders)}), and needs embeddings "
            "instead of a prompt: add the encoder's folder with --component"
        )
    return None
