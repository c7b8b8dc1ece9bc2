"""The task that a request's pictures make, what does not go together, and the sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handler.api.call import Call, read_call
from handler.api.decoding import decode_all, decode_pictures, forget_contents
from handler.api.metadata import ImageMetadata, parameters_line, request_parameters, to_json
from handler.api.request import GenerationRequest
from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import ConfigError, InvalidRequest
from tests.support.pictures import as_base64, encoded, header_only_png

CONFIG = HandlerConfig()
TEXT = frozenset(
    ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "height", "width"]
)
# As diffusers has it: Stable Diffusion's image to image takes no size.
IMAGE = (TEXT - {"height", "width"}) | {"image", "strength"}
MASK = TEXT | {"image", "mask_image", "strength", "padding_mask_crop"}
CONTROL = {"controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"}
TASKS = {
    TEXT_TO_IMAGE: TEXT,
    IMAGE_TO_IMAGE: IMAGE,
    INPAINTING: MASK,
    "text-to-image+control": TEXT | {"image"} | CONTROL,
    "image-to-image+control": TEXT | {"image", "control_image", "strength"} | CONTROL,
}
ALL_TASKS = (
    "text-to-image, image-to-image, inpainting, text-to-image with control_image, image-to-image"
    " with control_image"
)


def traits(*tasks: str, multiple: int = 8, **more: Any) -> PipelineTraits:
    served = {name: TASKS[name] for name in tasks or TASKS}
    return PipelineTraits(("DDIMScheduler",), multiple, TEXT, tasks=served, **more)


SERVED = traits(controls=("canny", "depth"))
PICTURE = as_base64(encoded((256, 192)))
SMALL_MASK = as_base64(encoded((128, 96), "PNG", "L", 255))


def draw(
    fields: dict[str, Any], served: PipelineTraits = SERVED, config: HandlerConfig = CONFIG
) -> GenerationRequest:
    body = fields if "instances" in fields else {"prompt": "a", **fields}
    call = read_call({"body": body}, {"host": "x"}, config, served, draw_seed=lambda: 1)
    assert isinstance(call, Call)
    (request,) = call.requests
    return request


def refusal(
    fields: dict[str, Any], served: PipelineTraits = SERVED, config: HandlerConfig = CONFIG
) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        draw(fields, served, config)
    return caught.value.fields


# Tasks.


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({}, "text-to-image"),
        ({"image": PICTURE}, "image-to-image"),
        ({"init_image": PICTURE, "task": "img2img"}, "image-to-image"),
        ({"image": PICTURE, "mask": SMALL_MASK}, "inpainting"),
        ({"image": PICTURE, "mask_image": SMALL_MASK, "task": "inpainting"}, "inpainting"),
        ({"control_image": PICTURE, "control": "canny"}, "text-to-image+control"),
        (
            {"control_image": PICTURE, "control": "depth", "image": PICTURE},
            "image-to-image+control",
        ),
        ({"task": "Text-To-Image"}, "text-to-image"),
        ({"image": None, "mask": None}, "text-to-image"),
    ],
)
def test_the_task_follows_from_the_pictures(fields: dict[str, Any], task: str) -> None:
    request = draw(fields)
    assert request.engine_task == task
    assert request.task == task.removesuffix("+control")
    assert request.extra.get("control") == fields.get("control")


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        ({"mask_image": PICTURE}, {"mask_image": "needs image, the picture that it masks"}),
        (
            {"task": "image-to-image"},
            {"image": "is missing; the task image-to-image needs it"},
        ),
        (
            {"task": "inpainting", "image": PICTURE},
            {"mask_image": "is missing; the task inpainting needs it"},
        ),
        (
            {"task": "text-to-image", "image": PICTURE},
            {"image": "does not go with the task text-to-image; leave one of them out"},
        ),
        (
            {"task": "image-to-image", "image": PICTURE, "mask": PICTURE},
            {"mask_image": "does not go with the task image-to-image; leave one of them out"},
        ),
        (
            {"image": PICTURE, "mask": PICTURE, "control_image": PICTURE, "control": "canny"},
            {
                "control_image": "this archive does not serve inpainting with control_image; it"
                f" serves {ALL_TASKS}"
            },
        ),
        (
            {"strength": 0.5},
            {
                "strength": "this task has no such parameter; image-to-image, inpainting,"
                " image-to-image+control have it"
            },
        ),
        ({"control": "canny"}, {"control": "needs control_image, the picture that it follows"}),
        ({"control_image": PICTURE}, {"control": "is missing; one of canny, depth"}),
        (
            {"control_image": PICTURE, "control": "cany"},
            {"control": "'cany' is not packed; did you mean canny? one of canny, depth"},
        ),
        (
            {"image": PICTURE, "strength": 0.01},
            {"strength": "0.01 of 50 steps is less than one step; ask for more of either"},
        ),
        (
            {"image": PICTURE, "strength": 0},
            {"strength": "0 of 50 steps is less than one step; ask for more of either"},
        ),
        (
            {"control_image": PICTURE, "control": "canny", "control_guidance_end": 0},
            {"control_guidance_end": "the start, 0, must be below the end, 0"},
        ),
        (
            {"control_image": PICTURE, "control": "canny", "control_guidance_start": 1},
            {"control_guidance_start": "the start, 1, must be below the end, 1"},
        ),
        (
            {"image": PICTURE, "mask": as_base64(encoded((96, 128)))},
            {
                "mask_image": "is 96x128 (width x height) and image is 256x192; they must have the"
                " same ratio"
            },
        ),
        (
            {"image": PICTURE, "input_image": PICTURE},
            {"image": "given more than once, as image and input_image: send one of them"},
        ),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], problems: dict[str, str]) -> None:
    assert refusal(fields) == problems


def test_an_archive_says_what_it_serves() -> None:
    text_only, both = traits(TEXT_TO_IMAGE), traits(TEXT_TO_IMAGE, IMAGE_TO_IMAGE)
    broken = "this is no picture, and that is not what is wrong"
    assert refusal({"image": broken}, text_only) == {
        "image": "this archive does not serve image-to-image; it serves text-to-image"
    }
    assert refusal({"image": broken, "mask": broken}, text_only).keys() == {"image", "mask_image"}
    assert refusal({"image": broken, "mask": broken}, both) == {
        "mask_image": "this archive does not serve inpainting; it serves text-to-image,"
        " image-to-image"
    }
    assert refusal({"task": "inpainting"}, text_only).keys() == {"image", "mask_image"}


def test_a_packed_class_may_need_a_picture() -> None:
    served = traits(IMAGE_TO_IMAGE, required=frozenset({"image"}))
    assert refusal({}, served) == {"image": "is missing: this archive serves image-to-image"}
    assert draw({"image": PICTURE}, served).task == IMAGE_TO_IMAGE
    masks = traits(INPAINTING, required=frozenset({"image", "mask_image"}))
    assert refusal({"image": PICTURE}, masks).keys() == {"mask_image"}


def test_one_packed_control_needs_no_name() -> None:
    for controls, name in ((("canny",), "canny"), ((), None)):
        served = traits(controls=controls)
        assert draw({"control_image": PICTURE}, served).extra.get("control") == name
    assert refusal({"control_image": PICTURE, "control": "x"}, served)["control"].endswith(
        "leave it out"
    )


def test_all_that_is_wrong_is_told_at_once() -> None:
    found = refusal({"image": "http://x.y/z.png", "mask": "?", "strength": 7, "stpes": 1})
    assert found.keys() == {"image", "mask_image", "strength", "stpes"}


# Sizes.


def size(width: int, height: int, multiple: int = 8, /, **fields: Any) -> tuple[int, int]:
    config = fields.pop("config", CONFIG)
    fields = {"image": as_base64(header_only_png(width, height)), **fields}
    request = draw(fields, traits(multiple=multiple, controls=("canny",)), config)
    return request.width, request.height


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ((256, 192), (256, 192)),
        ((263, 199), (256, 192)),  # rounded down
        ((1536, 400), (1536, 400)),
        ((2048, 2048), (1024, 1024)),  # max_pixels
        ((4000, 1000), (1536, 384)),  # max_size_px
        ((1000, 3000), (512, 1536)),
        ((3001, 2003), (1248, 832)),
        ((32, 48), (64, 96)),  # min_size_px
        ((1, 1), (64, 64)),
    ],
)
def test_the_pictures_own_size(sent: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size(*sent) == expected
    assert size(*sent[::-1]) == expected[::-1]


def test_every_size_is_one_that_may_be_asked_for() -> None:
    config = HandlerConfig(max_pixels=700_000, min_size_px=100, height=512, width=512)
    for multiple in (8, 16, 64):
        for width in range(50, 3000, 330):
            for height in range(50, 3000, 370):
                if max(width, height) > 6 * min(width, height):
                    continue
                found = size(width, height, multiple, config=config)
                assert not [side for side in found if side % multiple or side < 100]
                assert found[0] * found[1] <= 700_000
                if min(width, height) > 2 * multiple:
                    # Each side loses less than a multiple.
                    lost = abs(found[0] * height - found[1] * width) / max(width, height)
                    assert lost < multiple


def test_a_ratio_that_no_size_has() -> None:
    assert refusal({"image": as_base64(header_only_png(2000, 20))}) == {
        "image": "is 2000x20 (width x height): no size of this ratio is allowed (64 to 1536 a side,"
        " 1048576 pixels); send height and width"
    }


def test_sizes_that_are_sent() -> None:
    assert size(256, 192, height=512, width=512) == (512, 512)
    assert size(256, 192, height=384) == (512, 384)
    assert size(256, 192, width=128) == (128, 96)
    assert size(250, 190, width=128) == (128, 96)
    assert size(256, 192, size="320x320") == (320, 320)
    wide = {"image": as_base64(header_only_png(640, 64)), "height": 512}
    assert refusal(wide) == {
        "height": "512 makes a width of 5120 by the picture's ratio; allowed: 64 to 1536; or send"
        " width too"
    }
    assert refusal({"image": PICTURE, "height": 100, "width": 99}).keys() == {"height", "width"}


def test_the_size_of_a_control_picture_counts_where_there_is_no_other() -> None:
    other = as_base64(encoded((320, 320)))
    request = draw({"control_image": PICTURE, "control": "canny"})
    assert (request.width, request.height) == (256, 192)
    request = draw({"control_image": other, "control": "canny", "image": PICTURE})
    assert (request.width, request.height) == (256, 192)
    assert decode_pictures(request, CONFIG)["control_image"].size == (256, 192)


def test_a_size_is_refused_only_where_nothing_can_be_made_of_it() -> None:
    served = PipelineTraits(("DDIMScheduler",), 8, TEXT - {"height"})
    assert refusal({"height": 512}, served).keys() == {"height"}


# What is decoded, and what is written of it.


def test_pictures_agree_once_they_are_decoded() -> None:
    request = draw({"image": PICTURE, "mask": SMALL_MASK, "width": 512})
    decoded = decode_pictures(request, CONFIG)
    assert {name: (each.size, each.mode) for name, each in decoded.items()} == {
        "image": ((512, 384), "RGB"),
        "mask_image": ((512, 384), "L"),
    }


def test_with_padding_mask_crop_pictures_keep_their_size() -> None:
    fields = {"image": PICTURE, "mask": SMALL_MASK, "padding_mask_crop": 8}
    request = draw({**fields, "height": 64, "width": 64})
    assert (request.width, request.height) == (64, 64)
    decoded = decode_pictures(request, CONFIG)
    assert [each.size for each in decoded.values()] == [(256, 192), (256, 192)]
    large = {**fields, "image": as_base64(encoded((2000, 1500))), "height": 64, "width": 64}
    assert decode_pictures(draw(large), CONFIG)["image"].size == (1182, 886)
    black = {**fields, "mask": as_base64(encoded((128, 96), "PNG", "L", 0))}
    with pytest.raises(InvalidRequest) as caught:
        decode_pictures(draw(black), CONFIG, "instances[3].")
    assert caught.value.fields == {
        "instances[3].mask_image": "is black: with padding_mask_crop it must mask something"
    }


def test_prompts_that_share_a_picture_read_it_once() -> None:
    shared = {"instances": ["a", "b"], "parameters": {"image": PICTURE, "mask": SMALL_MASK}}
    call = read_call({"body": shared}, {}, CONFIG, SERVED, draw_seed=lambda: 1)
    assert isinstance(call, Call)
    first, second = call.requests
    assert first.pictures["image"] is second.pictures["image"]
    assert call.paths == ("instances[0].", "instances[1].")
    decoded = decode_all(call.requests, CONFIG, call.paths)
    assert decoded[0]["mask_image"] is decoded[1]["mask_image"]
    assert decoded[0]["image"] is not decoded[0]["mask_image"]


def test_the_pictures_of_a_body_are_bounded_together() -> None:
    def body(number: int) -> dict[str, Any]:
        return {
            "instances": [
                {"prompt": "a", "image": as_base64(header_only_png(4096, 4096 - index))}
                for index in range(number)
            ]
        }

    call = read_call({"body": body(3)}, {}, CONFIG, SERVED, draw_seed=lambda: 1)
    assert isinstance(call, Call)
    assert refusal(body(4)) == {
        "instances": "have 4 pictures of 67084288 pixels together, a picture counted once for each"
        " size that it is brought to; allowed are 50331648"
    }


def test_a_picture_counts_for_each_size_that_it_is_decoded_in() -> None:
    def body(*sizes: int) -> dict[str, Any]:
        return {
            "image": as_base64(header_only_png(4096, 4096)),
            "instances": [{"prompt": "a", "width": size, "height": size} for size in sizes],
        }

    sent = {"body": body(64, 128, 192, 64, 128, 192)}
    assert isinstance(read_call(sent, {}, CONFIG, SERVED, draw_seed=lambda: 1), Call)
    found = refusal(body(64, 128, 192, 256))
    assert "have 4 pictures of 67108864 pixels together" in found["instances"]


def test_metadata() -> None:
    request = draw({"image": PICTURE, "strength": 0.5, "seed": 7})
    assert request_parameters(request) == {
        "prompt": "a",
        "negative_prompt": None,
        "num_inference_steps": 50,
        "scheduler": None,
        "guidance_scale": 7.5,
        "height": 192,
        "width": 256,
        "task": "image-to-image",
        "strength": 0.5,
    }
    metadata = ImageMetadata(forget_contents(request), 7, "sd")
    assert len(json.loads(to_json(metadata))["image_sha256"]) == 64
    assert PICTURE[:40] not in to_json(metadata)
    assert "Size: 256x192, Denoising strength: 0.5, Model: sd" in parameters_line(metadata)
    assert "task" not in request_parameters(draw({}))
    # What a reply says of a request can be sent again.
    again = {**request_parameters(request), "image": PICTURE, "seed": 7}
    assert draw(again) == request


def test_bodies_must_hold_the_pictures_that_are_allowed() -> None:
    needed = 4 * CONFIG.max_picture_bytes + 65536
    HandlerConfig(max_body_bytes=needed)
    with pytest.raises(ConfigError, match=f"max_body_bytes: {needed - 1} is too few .* {needed}"):
        HandlerConfig(max_body_bytes=needed - 1)
    HandlerConfig(max_body_bytes=2**20, max_picture_bytes=2**17)
