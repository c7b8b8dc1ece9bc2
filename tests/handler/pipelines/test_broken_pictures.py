"""Pictures that are not finite are an error; those that are only black are pictures."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from handler.engine import InFlightEngine
from handler.errors import PipelineFailed
from handler.pipelines.broken_pictures import check_decoded, watch_pictures
from tests.support.pipelines import build, example_kwargs, overflowing

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_number_that_is_not_finite_is_an_error(value: float, dtype: torch.dtype) -> None:
    picture = torch.zeros(1, 3, 8, 8, dtype=dtype)
    picture[0, 1, 2, 3] = value
    name = str(dtype).removeprefix("torch.")
    for output in (picture, (picture,), SimpleNamespace(sample=picture)):
        with pytest.raises(PipelineFailed, match=name):
            check_decoded(output)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 65504.0])
def test_a_picture_of_one_colour_is_a_picture(value: float) -> None:
    check_decoded(torch.full((1, 3, 8, 8), value, dtype=torch.float16))
    check_decoded(np.full((1, 8, 8, 3), value))
    check_decoded(SimpleNamespace(sample=torch.full((1, 3, 8, 8), value)))


def test_the_error_names_the_remedies() -> None:
    with pytest.raises(PipelineFailed) as error:
        check_decoded(torch.tensor([NAN]))
    for remedy in ("DTYPE=float32", "DTYPE=bfloat16", "--component vae=", "force_upcast"):
        assert remedy in error.value.message
    assert (error.value.status, error.value.code) == (500, "pipeline_failed")


def test_a_view_is_watched_and_its_pipeline_is_not() -> None:
    processor = VaeImageProcessor()
    pipeline = SimpleNamespace(image_processor=processor)
    view = SimpleNamespace(image_processor=processor)
    watch_pictures(view)
    broken = torch.full((1, 3, 8, 8), INF)  # which the processor would clamp to white
    with pytest.raises(PipelineFailed):
        view.image_processor.postprocess(broken)
    assert np.asarray(pipeline.image_processor.postprocess(broken)[0]).min() == 255


def test_pixels_of_pipelines_without_a_processor_are_watched() -> None:
    view = SimpleNamespace(numpy_to_pil=diffusers.DiffusionPipeline.numpy_to_pil)
    watch_pictures(view)
    with pytest.raises(PipelineFailed):
        view.numpy_to_pil(np.full((1, 8, 8, 3), NAN))
    assert len(view.numpy_to_pil(np.zeros((2, 8, 8, 3)))) == 2


@pytest.mark.parametrize("parked", [None, ["unet"]], ids=["decoder parks", "decoder runs within"])
def test_a_pipeline_that_overflows_fails_its_requests(parked: list[str] | None) -> None:
    engine = InFlightEngine(overflowing(build("stable_diffusion")), modules=parked)
    tickets = [
        engine.submit({**example_kwargs("stable_diffusion", seed), "output_type": "pil"})
        for seed in range(2)
    ]
    engine.run()
    assert [type(ticket.error) for ticket in tickets] == [PipelineFailed] * 2
    engine.close()


def test_a_request_whose_numbers_overflow_ends_alone() -> None:
    engine = InFlightEngine(build("stable_diffusion"))
    kwargs = {**example_kwargs("stable_diffusion", 0), "output_type": "pil"}
    bad = engine.submit({**kwargs, "latents": torch.full((1, 4, 8, 8), INF)})
    good = engine.submit({**example_kwargs("stable_diffusion", 1), "output_type": "pil"})
    engine.run()
    assert isinstance(bad.error, PipelineFailed)
    assert len(good.result().images) == 1
    engine.close()


def test_a_black_picture_is_drawn() -> None:
    pipeline = build("stable_diffusion")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(-1.0)
    engine = InFlightEngine(pipeline)
    ticket = engine.submit({**example_kwargs("stable_diffusion", 0), "output_type": "pil"})
    engine.run()
    assert np.asarray(ticket.result().images[0]).max() == 0
    engine.close()
