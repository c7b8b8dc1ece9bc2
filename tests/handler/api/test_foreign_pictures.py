"""Pictures in other people's words, and in every form of a request."""

from __future__ import annotations

from typing import Any

import pytest

from handler.api.body import ALONE
from handler.api.call import read_call
from handler.api.foreign_names import HOW_PICTURES_ARE_SENT
from handler.api.request import GenerationRequest
from handler.api.traits import PipelineTraits
from handler.errors import InvalidRequest
from tests.support.foreign_bodies import A1111, ALL_SCHEDULERS, CONFIG, TRAITS, draw, refusal
from tests.support.pictures import as_base64, encoded

PIXELS = encoded((256, 192))
PICTURE = as_base64(PIXELS)
EDITING = TRAITS.parameters | {"image"}
EVERY_TASK = PipelineTraits(
    ALL_SCHEDULERS,
    8,
    TRAITS.parameters,
    tasks=dict.fromkeys(("text-to-image", "image-to-image", "inpainting"), EDITING),
)


def edit(**fields: Any) -> GenerationRequest:
    return draw({"prompt": "a red ring", "image": PICTURE, **fields}, EVERY_TASK)


def test_a1111s_image_to_image() -> None:
    body = {
        **{name: value for name, value in A1111.items() if name not in ("width", "height")},
        "init_images": [f"data:image/png;base64,{PICTURE}"],
        "denoising_strength": 0.6,
        "resize_mode": 0,
        "mask_blur": 0,
        "inpainting_fill": 1,
        "inpaint_full_res": False,
        "inpaint_full_res_padding": 32,
        "inpainting_mask_invert": 0,
        "initial_noise_multiplier": 1,
        "include_init_images": False,
    }
    expected = edit(
        negative_prompt="blurry",
        scheduler="euler_a",
        guidance_scale=7,
        num_images=2,
        steps=4,
        strength=0.6,
    )
    assert draw(body, EVERY_TASK) == expected
    masked = draw({**body, "mask": PICTURE}, EVERY_TASK)
    assert (masked.task, masked.extra["strength"]) == ("inpainting", 0.6)
    refused = {"mask_blur": 4, "inpainting_fill": 0, "inpaint_full_res": True, "resize_mode": 1}
    assert refusal({**body, "mask": PICTURE, **refused}, EVERY_TASK).keys() == refused.keys()
    assert refusal({**body, "init_images": [PICTURE] * 2}, EVERY_TASK) == {
        "init_images": "is a list of 2; a request begins with one picture"
    }


@pytest.mark.parametrize("name", ["denoising_strength", "prompt_strength"])
def test_a_strength_counts_with_a_picture_alone(name: str) -> None:
    assert edit(**{name: 0.3}) == edit(strength=0.3)
    assert "strength" not in draw({"prompt": "a", name: 0.3}, EVERY_TASK).extra
    twice = {"prompt": "a", "image": PICTURE, name: 0.3, "strength": 0.3}
    assert refusal(twice, EVERY_TASK).keys() == {"strength"}


def test_hugging_faces_image_to_image() -> None:
    parameters = {"prompt": "a red ring", "num_inference_steps": 4, "strength": 0.5}
    body = {"inputs": PICTURE, "parameters": parameters}
    assert draw(body, EVERY_TASK) == edit(steps=4, strength=0.5)
    sized = {**parameters, "target_size": {"width": 64, "height": 96}, "negative_prompt": "b"}
    assert draw({"inputs": PICTURE, "parameters": sized}, EVERY_TASK) == edit(
        steps=4, strength=0.5, width=64, height=96, negative_prompt="b"
    )
    with_mask = {**parameters, "mask_image": PICTURE}
    assert draw({"inputs": PICTURE, "parameters": with_mask}, EVERY_TASK).task == "inpainting"
    # A picture without a prompt, and one that is no picture.
    assert refusal({"inputs": PICTURE, "parameters": {"seed": 1}}, EVERY_TASK) == {
        "prompt": "is missing"
    }
    gif = as_base64(b"GIF89a" + bytes(60))
    assert refusal({"inputs": gif, "parameters": parameters}, EVERY_TASK) == {
        "image": "is a GIF; allowed are PNG, JPEG and WebP"
    }
    assert refusal({"inputs": "a", "parameters": {"prompt": "b"}}, EVERY_TASK).keys() == {"prompt"}
    inside = {"instances": [{"inputs": gif, "parameters": parameters}, {"prompt": "a"}]}
    assert refusal(inside, EVERY_TASK).keys() == {"instances[0].image"}
    beside = {"instances": [{"prompt": "a"}, {"prompt": "b"}], "image": gif}
    assert refusal(beside, EVERY_TASK).keys() == {"image"}


@pytest.mark.parametrize(
    "name", ["images", "image_base64", "init_img", "source_image", "init_images", "image[]"]
)
def test_other_names_of_a_picture(name: str) -> None:
    assert draw({"prompt": "a red ring", name: PICTURE}, EVERY_TASK) == edit()
    assert draw({"prompt": "a red ring", name: [PICTURE]}, EVERY_TASK) == edit()
    form = {"prompt": b"a red ring", name: PIXELS}
    assert draw(form, EVERY_TASK, is_form=True) == edit()


def test_openais_edits() -> None:
    form = {"prompt": b"a red ring", "image[]": PIXELS, "size": b"64x96", "n": b"2"}
    assert draw(form, EVERY_TASK, is_form=True) == edit(width=64, height=96, n=2)


def test_image_strength_is_the_other_way_round() -> None:
    body = {"prompt": "a", "image": PICTURE, "image_strength": 0.3}
    assert "strength is 1 less" in refusal(body, EVERY_TASK)["image_strength"]


def test_every_form_of_a_picture() -> None:
    expected = edit(seed=5)
    assert draw({"prompt": b"a red ring", "image": PIXELS, "seed": b"5"}, EVERY_TASK, is_form=True)
    tensors = [
        {"name": name, "shape": [1], "datatype": "BYTES", "data": [value]}
        for name, value in (("prompt", "a red ring"), ("image", PICTURE))
    ]
    for body in (
        {"instances": [{"prompt": "a red ring", "image": {"b64": PICTURE}, "seed": 5}]},
        {"instances": ["a red ring"], "parameters": {"image": PICTURE, "seed": 5}},
        {"inputs": tensors, "parameters": {"seed": 5}},
        {"prompt": "a red ring", "image": [PICTURE], "seed": 5},
    ):
        assert draw(body, EVERY_TASK) == expected


def test_a_body_that_is_a_picture() -> None:
    for headers in ({"content-type": "image/png"}, {"host": "x"}):
        with pytest.raises(InvalidRequest) as caught:
            read_call({"body": PIXELS}, headers, CONFIG, EVERY_TASK, draw_seed=lambda: 1)
        assert caught.value.fields == {"prompt": ALONE}


NOT_SERVED = "this archive does not serve {}; it serves text-to-image"


@pytest.mark.parametrize(
    ("name", "field", "task"),
    [
        ("image", "image", "image-to-image"),
        ("images", "image", "image-to-image"),
        ("init_image", "image", "image-to-image"),
        ("init_images", "image", "image-to-image"),
        ("control_image", "control_image", "text-to-image with control_image"),
        ("controlnet_image", "control_image", "text-to-image with control_image"),
    ],
)
def test_an_archive_that_draws_from_text_says_so(name: str, field: str, task: str) -> None:
    expected = {field: NOT_SERVED.format(task)}
    assert refusal({"prompt": "a", name: "data:image/png;base64,xyz"}) == expected
    assert refusal({"prompt": b"a", name: b"\x89PNG\r\n"}, is_form=True) == expected


@pytest.mark.parametrize("name", ["ip_adapter_image_embeds", "inputImage", "img2", "first_image"])
def test_unknown_names_of_pictures_are_told_ours(name: str) -> None:
    assert refusal({"prompt": "a", name: "x"}) == {name: HOW_PICTURES_ARE_SENT}
    file = {"prompt": b"a", name: b"\x89PNG\r\n"}
    assert refusal(file, is_form=True) == {name: HOW_PICTURES_ARE_SENT}


@pytest.mark.parametrize("name", ["image_url", "image_urls", "mask_url"])
def test_names_of_urls_are_refused(name: str) -> None:
    found = refusal({"prompt": "a", name: "https://example.org/cat.png"})
    assert found.keys() == {name}
    assert "no request makes the server fetch anything" in found[name]


@pytest.mark.parametrize("name", ["num_image", "images_per_prompt", "n_images", "image_size"])
def test_counts_of_pictures_are_not_pictures(name: str) -> None:
    assert refusal({"prompt": "a", name: 2})[name].startswith("unknown field")
    assert refusal({"prompt": "a", "num_image": 2})["num_image"].endswith("mean num_images?")
