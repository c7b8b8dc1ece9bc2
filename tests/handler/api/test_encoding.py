"""Pictures to bytes: what decodes comes back, metadata is where tools look, bytes repeat."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from handler.api.encoding import array_json, encode_image, to_pixels
from handler.api.metadata import ImageMetadata, parameters_line
from handler.api.request import GenerationRequest

USER_COMMENT = 0x9286
EXIF_IFD = 0x8769


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    """Smooth colours, as the lossy formats like them."""
    y, x = np.mgrid[0:size, 0:size]
    planes = [128 + 100 * np.sin((x + y * (k + 1)) / 20 + seed) for k in range(3)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def metadata(
    prompt: str = "a cat", negative_prompt: str | None = None, scheduler: str | None = None
) -> ImageMetadata:
    request = GenerationRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=41,
        num_inference_steps=20,
        guidance_scale=7.5,
        height=32,
        width=64,
        num_images=2,
        scheduler=scheduler,
    )
    return ImageMetadata(request, seed=42, model_name="sd")


def decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def user_comment(data: bytes) -> str:
    comment = decode(data).getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    return comment[8:].decode("utf-16-be")


def test_png_and_npy_are_lossless() -> None:
    image = picture()
    png = decode(encode_image(image, "png", metadata(), 90))
    assert png.format == "PNG"
    assert np.array_equal(np.asarray(png), np.asarray(image))
    npy = np.load(io.BytesIO(encode_image(image, "npy", None, 90)), allow_pickle=False)
    assert npy.dtype == np.uint8
    assert np.array_equal(npy, np.asarray(image))


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_come_close_and_quality_counts(output_format: str) -> None:
    image = picture()
    fine = encode_image(image, output_format, None, 95)
    decoded = decode(fine)
    assert decoded.format == output_format.upper()
    error = np.abs(to_pixels(decoded).astype(int) - np.asarray(image).astype(int)).mean()
    assert error < 4
    other = np.abs(to_pixels(decoded).astype(int) - np.asarray(picture(seed=3)).astype(int)).mean()
    assert other > 20
    assert len(encode_image(image, output_format, None, 10)) < len(fine)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy"])
def test_same_input_same_bytes(output_format: str) -> None:
    first = encode_image(picture(), output_format, metadata(), 90)
    assert encode_image(picture(), output_format, metadata(), 90) == first
    assert encode_image(picture(seed=1), output_format, metadata(), 90) != first


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy"])
def test_any_mode_becomes_rgb(mode: str, output_format: str) -> None:
    data = encode_image(picture().convert(mode), output_format, None, 90)
    if output_format == "npy":
        assert np.load(io.BytesIO(data)).shape == (32, 32, 3)
    else:
        assert decode(data).mode == "RGB"


def test_what_a_picture_carried_before_is_not_written() -> None:
    image = picture()
    image.info = {"exif": b"Exif\0\0secret", "comment": b"secret", "icc_profile": b"secret"}
    for output_format in ("png", "jpeg", "webp"):
        assert b"secret" not in encode_image(image, output_format, None, 90)
    assert "comment" in image.info, "the caller's picture was changed"


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="png, jpeg, webp or npy"):
        encode_image(picture(), "gif", None, 90)


def test_parameters_line() -> None:
    full = metadata("a cat", "blurry", "Euler a")
    assert parameters_line(full) == (
        "a cat\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 64x32, Model: sd"
    )
    assert parameters_line(metadata()) == (
        "a cat\nSteps: 20, CFG scale: 7.5, Seed: 42, Size: 64x32, Model: sd"
    )
    assert "Sampler: SASolverScheduler," in parameters_line(metadata(scheduler="SASolverScheduler"))


def test_a_model_name_with_commas_is_quoted() -> None:
    strange = ImageMetadata(metadata().request, 1, "a, Seed: 9")
    assert parameters_line(strange).endswith('Model: "a, Seed: 9"')


@pytest.mark.parametrize("prompt", ["a cat", "ein Kätzchen", "一只猫", "two\nlines"])
def test_png_carries_the_line_and_the_json(prompt: str) -> None:
    meta = metadata(prompt, "blurry")
    text = decode(encode_image(picture(), "png", meta, 90)).text  # type: ignore[attr-defined]
    assert text["parameters"] == parameters_line(meta)
    assert json.loads(text["generation"]) == {
        "prompt": prompt,
        "negative_prompt": "blurry",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 64,
        "scheduler": None,
        "seed": 42,
        "model": "sd",
    }


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a cat", "一只猫 🐈"])
def test_exif_carries_the_line(output_format: str, prompt: str) -> None:
    meta = metadata(prompt, "blurry")
    assert user_comment(encode_image(picture(), output_format, meta, 90)) == parameters_line(meta)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_without_metadata_nothing_is_carried(output_format: str) -> None:
    image = decode(encode_image(picture(), output_format, None, 90))
    assert not dict(image.getexif())
    assert not getattr(image, "text", {})


def test_the_longest_prompts_fit_the_exif_block_of_jpeg() -> None:
    # 8000 is the most that the configuration allows; beyond the BMP a character has four bytes.
    longest = metadata("🐈" * 8000, "🐕" * 8000, "KDPM2AncestralDiscreteScheduler")
    assert user_comment(encode_image(picture(), "jpeg", longest, 90)) == parameters_line(longest)


text_without_nul = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(text_without_nul, text_without_nul, st.sampled_from(["png", "jpeg", "webp"]))
def test_any_prompt_survives(prompt: str, negative_prompt: str, output_format: str) -> None:
    meta = metadata(prompt, negative_prompt)
    data = encode_image(picture(size=8), output_format, meta, 90)
    is_png = output_format == "png"
    line = decode(data).text["parameters"] if is_png else user_comment(data)  # type: ignore[attr-defined]
    assert line == parameters_line(meta)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3))))
def test_array_json_is_what_the_json_module_writes(pixels: np.ndarray) -> None:
    assert array_json(pixels) == json.dumps(pixels.tolist(), separators=(",", ":")).encode()


def test_array_json_holds_every_value() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    text = array_json(pixels)
    assert np.array_equal(np.array(json.loads(text), dtype="uint8"), pixels)
    assert not re.search(rb"[^0-9\[\],]", text)
