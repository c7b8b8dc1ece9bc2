"""Says of a pipeline class whether it can be served: it must draw pictures, from text alone."""

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
    "ShapEImg2ImgPipeline": "views of a three-dimensional thing",
    "ShapEPipeline": "views of a three-dimensional thing",
    "TextToVideoZeroPipeline": "videos",
    "TextToVideoZeroSDXLPipeline": "videos",
}
# Classes whose call has a default for the picture that it cannot do without, and nothing else that
# tells it from those that draw with and without one.
_NEEDS_A_PICTURE = {
    "BriaFiboEditPipeline": "it edits a picture",
    "HunyuanImageRefinerPipeline": "it refines a picture",
    "IFSuperResolutionPipeline": "it enlarges a picture",
    "JoyImageEditPipeline": "it edits a picture",
    "JoyImageEditPlusPipeline": "it edits pictures",
    "LDMSuperResolutionPipeline": "it enlarges a picture",
    "LEditsPPPipelineStableDiffusion": "it edits a picture",
    "LEditsPPPipelineStableDiffusionXL": "it edits a picture",
    "LongCatImageEditPipeline": "it edits a picture",
    "QwenImageEditPipeline": "it edits a picture",
    "QwenImageEditPlusPipeline": "it edits pictures",
    "QwenImageLayeredPipeline": "it takes a picture apart",
    "StableDiffusionInstructPix2PixPipeline": "it edits a picture",
    "StableDiffusionLatentUpscalePipeline": "it enlarges a picture",
    "StableDiffusionPix2PixZeroPipeline": "it edits a picture",
    "StableDiffusionUpscalePipeline": "it enlarges a picture",
    "StableDiffusionXLInstructPix2PixPipeline": "it edits a picture",
    "StableUnCLIPImg2ImgPipeline": "it varies a picture",
    "UnCLIPImageVariationPipeline": "it varies a picture",
    "VisualClozeGenerationPipeline": "it draws by examples",
    "VisualClozePipeline": "it draws by examples",
}
# Classes whose call has a default for something else that it cannot do without.
_NEEDS_MORE = {
    "StableDiffusionGLIGENPipeline": "phrases with their boxes",
    "StableDiffusionGLIGENTextImagePipeline": "phrases with their boxes",
}
# What only those calls have that start from a picture, and only those constructors that are
# controlled by one.
_CALL_OF_PICTURES = {
    "mask_image": "it fills in a part of a picture",
    "strength": "it changes a picture",
    "control_image": "it is controlled by a picture",
}
_CONSTRUCTOR_OF_PICTURES = {
    "controlnet": "it is controlled by a picture",
    "adapter": "it is controlled by a picture",
}
_NOT_YET = "pictures cannot be sent with a request yet"


def scope_problem(cls: Any, index: ModelIndex) -> str | None:
    """Say why pipelines of `cls` are not served; None: they draw pictures from text."""
    name = cls.__name__
    call = cls.__call__
    if not inspect.isfunction(call):
        return f"{name} cannot be called itself: it only holds the parts of other pipelines"
    if gives := _MISNAMED.get(name) or _gives_instead(cls):
        return f"{name} gives {gives}, not pictures: only pipelines that draw pictures are served"
    wanted = [
        each.name
        for each in inspect.signature(call).parameters.values()
        if each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        and each.name not in ("self", "prompt")
    ]
    if embeddings := [each for each in wanted if "embed" in each]:
        return (
            f"{name} needs {', '.join(embeddings)}, which another pipeline makes of the prompt: "
            "pack the pipeline that combines both"
        )
    if reason := _picture_reason(cls, wanted):
        return f"{name} needs a picture ({reason}): {_NOT_YET}"
    if wanted or name in _NEEDS_MORE:
        what = _NEEDS_MORE.get(name) or ", ".join(wanted)
        return f"{name} needs {what}, which a request cannot give"
    return _without_text_encoder(cls, index)


def _picture_reason(cls: Any, wanted: list[str]) -> str | None:
    call = inspect.signature(cls.__call__).parameters
    constructor = inspect.signature(cls.__init__).parameters
    for name, reason in _CALL_OF_PICTURES.items():
        if name in call:
            return reason
    for name, reason in _CONSTRUCTOR_OF_PICTURES.items():
        if name in constructor:
            return reason
    pictures = [each for each in wanted if re.search("image|hint|video", each)]
    return ", ".join(pictures) or _NEEDS_A_PICTURE.get(cls.__name__)


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
