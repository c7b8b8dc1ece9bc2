"""handler.pipelines.tasks: which tasks a pipeline serves, and that they share its modules."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import diffusers
import pytest
import torch

from handler.pipelines.describe import describe
from handler.pipelines.tasks import pipelines_of, task_classes, task_of
from tests.support.picture_tasks import make_controlnet
from tests.support.pipelines import build, shared

TEXT, IMAGE, MASKED = "text-to-image", "image-to-image", "inpainting"


def storages(pipelines: Iterable[Any]) -> set[int]:
    return {
        tensor.data_ptr()
        for pipeline in pipelines
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in (*part.parameters(), *part.buffers())
        if tensor.numel()
    }


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3_16", "flux"]
)
def test_no_weight_is_there_twice(name: str) -> None:
    pipeline = build(name)
    controlnet = make_controlnet(pipeline)
    own = storages([pipeline])
    made = pipelines_of(pipeline, {"edges": controlnet})
    assert len(made) >= 4
    assert next(iter(made.values())) is pipeline
    assert storages(each for key, each in made.items() if "+control" not in key) == own
    tensors = (*controlnet.parameters(), *controlnet.buffers())
    controls = {tensor.data_ptr() for tensor in tensors if tensor.numel()}
    assert storages(made.values()) == own | controls


def test_an_autoencoder_of_another_class_than_annotated_is_shared_too() -> None:
    """`from_pipe` would leave out the demo's, and fail."""
    pipeline = build("stable_diffusion")
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipeline.register_modules(vae=tiny)
    made = pipelines_of(pipeline)
    assert [*made] == [TEXT, IMAGE, MASKED]
    assert all(each.vae is tiny for each in made.values())


@pytest.mark.parametrize(
    ("family", "tasks", "required"),
    [
        ("stable_diffusion", [TEXT, IMAGE, MASKED], set()),
        ("stable_diffusion_img2img", [IMAGE, MASKED], {"image"}),
        ("stable_diffusion_inpaint", [MASKED], {"image", "mask_image"}),  # of nine channels
        (
            "stable_diffusion_controlnet",
            [f"{task}+control" for task in (TEXT, IMAGE, MASKED)],
            {"control_image"},
        ),
        ("stable_diffusion_pag", [TEXT, IMAGE, MASKED], set()),
        ("latent_consistency", [TEXT, IMAGE], set()),
        ("stable_diffusion_3", [TEXT, IMAGE], set()),  # of four channels
        ("flux", [TEXT, IMAGE, MASKED], set()),
        ("pixart_sigma", [TEXT], set()),
        ("kandinsky_2_2_combined", [TEXT, IMAGE, MASKED], set()),
        ("z_image", [TEXT, IMAGE, MASKED], set()),
    ],
)
def test_what_a_model_serves_and_needs(family: str, tasks: list[str], required: set[str]) -> None:
    made = pipelines_of(build(family))
    assert [*made] == tasks
    traits = describe(shared(family), made)
    assert [*traits.tasks] == tasks
    assert traits.required == required
    assert all("prompt" in parameters for parameters in traits.tasks.values())
    if IMAGE in tasks:
        assert {"image", "strength"} <= traits.tasks[IMAGE]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("FluxKontextPipeline", [TEXT, IMAGE]),
        ("QwenImageEditPipeline", [IMAGE, MASKED]),
        ("StableDiffusionInstructPix2PixPipeline", [IMAGE]),
        ("StableDiffusionUpscalePipeline", [IMAGE]),
        ("StableDiffusionXLInpaintPipeline", [MASKED]),
        ("FluxFillPipeline", [MASKED]),
        ("FluxControlPipeline", [f"{task}+control" for task in (TEXT, IMAGE, MASKED)]),
        ("StableDiffusionAdapterPipeline", [f"{TEXT}+control"]),
        ("UniDiffuserPipeline", [TEXT]),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_tasks_of_classes(name: str, tasks: list[str]) -> None:
    kind = getattr(diffusers, name)
    assert [*task_classes(kind)] == tasks
    assert task_of(kind) == tasks[0]


def test_controlnets_are_told_by_name_and_by_class() -> None:
    pipeline = build("stable_diffusion")
    nets = {name: make_controlnet(pipeline, name) for name in ("canny", "depth")}
    made = pipelines_of(pipeline, nets)
    controlled = {name: each for name, each in made.items() if "+control" in name}
    assert {each.partition(":")[2] for each in controlled} == {"canny", "depth"}
    assert len(controlled) == 6
    assert all(each.controlnet is nets[name.partition(":")[2]] for name, each in controlled.items())
    assert describe(pipeline, made).controls == ("canny", "depth")
    other = make_controlnet(build("flux"))
    assert not any("+control" in name for name in pipelines_of(pipeline, {"other": other}))


def test_a_pipeline_that_cannot_be_made_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("takes none of these")

    monkeypatch.setattr(diffusers.StableDiffusionImg2ImgPipeline, "__init__", refuse)
    with caplog.at_level(logging.WARNING):
        assert IMAGE not in pipelines_of(build("stable_diffusion"))
