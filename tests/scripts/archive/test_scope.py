"""scripts.archive.scope: which pipelines draw pictures, and what the others are."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from handler.loading.model_index import ModelIndex
from scripts.archive.scope import scope_problem


def problem_of(name: str, *, without: tuple[str, ...] = ()) -> str | None:
    """What is said of the class `name`, with all its components but those `without`."""
    cls: Any = getattr(diffusers, name)
    names = inspect.signature(cls.__init__).parameters.keys() - {"self", *without}
    return scope_problem(cls, ModelIndex(name, dict.fromkeys(names, ("diffusers", "X")), {}))


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "FluxKontextPipeline",  # takes a picture, and draws without one too
        "Flux2Pipeline",
        "QwenImagePipeline",
        "SanaPipeline",
        "PixArtSigmaPipeline",
        "LatentConsistencyModelPipeline",
        "KandinskyV22CombinedPipeline",
        "StableCascadeCombinedPipeline",
        "WuerstchenCombinedPipeline",
        "Kandinsky5T2IPipeline",
        "ZImagePipeline",
        "IFPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "FluxControlPipeline",
        "FluxFillPipeline",
        "QwenImageEditPipeline",
    ],
)
def test_what_draws_pictures_is_served(name: str) -> None:
    assert problem_of(name) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WanPipeline", "gives videos, not pictures"),
        ("AnimateDiffPipeline", "gives videos, not pictures"),
        ("TextToVideoZeroPipeline", "gives videos, not pictures"),
        ("StableVideoDiffusionPipeline", "gives videos, not pictures"),
        ("StableAudioPipeline", "gives sound, not pictures"),
        ("MusicLDMPipeline", "gives sound, not pictures"),
        ("KandinskyV22PriorPipeline", "gives embeddings for another pipeline (it is a prior)"),
        ("StableCascadePriorPipeline", "gives embeddings for another pipeline (it is a prior)"),
        ("WuerstchenPriorPipeline", "gives embeddings for another pipeline (it is a prior)"),
        ("FluxPriorReduxPipeline", "gives embeddings for another pipeline (it is a prior)"),
        ("MarigoldDepthPipeline", "gives predictions from a picture"),
        ("ShapEPipeline", "gives views of a three-dimensional thing"),
        ("KandinskyV22Pipeline", "needs image_embeds, negative_image_embeds, which another"),
        ("StableCascadeDecoderPipeline", "needs image_embeddings, which another pipeline makes"),
        ("QwenImageLayeredPipeline", "gives the layers of a picture, not pictures"),
        ("PaintByExamplePipeline", "needs example_image, which a request cannot give"),
        ("StableDiffusionXLControlNetUnionPipeline", "needs the kind of its control picture"),
        ("StableDiffusion3ControlNetInpaintingPipeline", "needs a mask for its control picture"),
        ("StableDiffusionGLIGENPipeline", "needs phrases with their boxes"),
        ("StableDiffusionParadigmsPipeline", "does not draw here, by a fault of diffusers"),
        ("DiTPipeline", "needs class_labels, which a request cannot give"),
        ("VersatileDiffusionPipeline", "cannot be called itself"),
    ],
)
def test_others_are_refused_for_what_they_are(name: str, words: str) -> None:
    problem = problem_of(name)
    assert problem is not None
    assert problem.startswith(f"{name} {words}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_every_class_of_diffusers_is_judged() -> None:
    """Whatever a class is like, it is taken or there is a sentence about it."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    classes = [getattr(diffusers, name) for name in names]
    found = {
        cls.__name__: problem_of(cls.__name__)
        for cls in classes
        if isinstance(cls, type)
        and issubclass(cls, diffusers.DiffusionPipeline)
        and cls is not diffusers.DiffusionPipeline
        and ".dummy_" not in cls.__module__
    }
    assert len(found) > 250
    assert 120 < sum(problem is None for problem in found.values()) < 200


def test_a_pipeline_whose_text_encoders_are_all_left_out_needs_embeddings() -> None:
    name = "StableDiffusionXLPipeline"
    assert problem_of(name, without=("text_encoder",)) is None
    problem = problem_of(name, without=("text_encoder", "text_encoder_2"))
    assert problem is not None
    assert problem.startswith("the pipeline has no text encoder (text_encoder, text_encoder_2)")
