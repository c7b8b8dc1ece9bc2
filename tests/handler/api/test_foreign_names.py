"""Requests in other people's words: drawn as they are meant, or refused with what to send."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from handler.api.body import ALONE
from handler.api.call import Call, read_call
from handler.api.foreign_names import FOREIGN_NAMES, HOW_PICTURES_ARE_SENT
from handler.api.request import GenerationRequest
from handler.api.sampler_table import SAMPLERS, SCHEDULER_CLASSES
from handler.api.schema import PICTURE_FIELDS, PICTURE_NAMES, REPLY_FIELDS
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from tests.support.pictures import as_base64, encoded

CONFIG = HandlerConfig(default_output="json")
ALL_SCHEDULERS = tuple(
    dict.fromkeys(
        [
            *(each.class_names[0] for each in SAMPLERS.values()),
            *SCHEDULER_CLASSES.values(),
        ]
    )
)
TRAITS = PipelineTraits(
    ALL_SCHEDULERS, 8, frozenset(f.argument for f in PICTURE_FIELDS.values() if f.argument)
)
DRAWN = 99
SMALL = {"steps": 4, "width": 192, "height": 192}


def draw(
    body: dict[str, Any], traits: PipelineTraits = TRAITS, *, is_form: bool = False
) -> GenerationRequest:
    row = body if is_form else {"body": body}
    found = read_call(row, {"host": "x"}, CONFIG, traits, draw_seed=lambda: DRAWN)
    assert isinstance(found, Call)
    (request,) = found.requests
    return request


def refusal(
    body: dict[str, Any], traits: PipelineTraits = TRAITS, *, is_form: bool = False
) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        draw(body, traits, is_form=is_form)
    return caught.value.fields


def outcome(body: dict[str, Any], traits: PipelineTraits = TRAITS) -> Any:
    """What is refused, or else the scheduler that is drawn with."""
    try:
        return draw(body, traits).scheduler
    except InvalidRequest as error:
        return error.fields


def ring(**fields: Any) -> GenerationRequest:
    return draw({"prompt": "a red ring", **fields})


# What people sent.

A1111 = {
    "prompt": "a red ring",
    "negative_prompt": "blurry",
    "sampler_name": "Euler a",
    "cfg_scale": 7,
    "batch_size": 2,
    "n_iter": 1,
    "seed": -1,
    "restore_faces": False,
    **SMALL,
}


def test_a1111() -> None:
    expected = ring(
        negative_prompt="blurry",
        scheduler="euler_a",
        guidance_scale=7,
        num_images=2,
        seed=DRAWN,
        **SMALL,
    )
    assert draw(A1111) == expected
    assert draw({**A1111, "override_settings": {"CLIP_stop_at_last_layers": 1}}) == expected
    skipped = draw({**A1111, "override_settings": {"CLIP_stop_at_last_layers": 2}})
    assert skipped == draw({**A1111, "clip_skip": 1})
    assert skipped.extra["clip_skip"] == 1
    wrong = {**A1111, "override_settings": {"CLIP_stop_at_last_layers": "2"}}
    assert refusal(wrong).keys() == {"override_settings"}


def test_a1111s_whole_default_body() -> None:
    """As its own page of documentation shows it, apart from the pictures' names."""
    defaults = {
        "styles": [],
        "subseed": -1,
        "subseed_strength": 0,
        "seed_resize_from_h": -1,
        "seed_resize_from_w": -1,
        "scheduler": "Automatic",
        "tiling": False,
        "do_not_save_samples": False,
        "do_not_save_grid": False,
        "eta": None,
        "denoising_strength": 0.75,
        "s_min_uncond": 0,
        "s_churn": 0,
        "s_tmax": 0,
        "s_tmin": 0,
        "s_noise": 1,
        "override_settings": {},
        "override_settings_restore_afterwards": True,
        "refiner_checkpoint": "",
        "refiner_switch_at": 0,
        "enable_hr": False,
        "firstphase_width": 0,
        "firstphase_height": 0,
        "hr_scale": 2,
        "hr_prompt": "",
        "script_name": "",
        "script_args": [],
        "send_images": True,
        "save_images": False,
        "alwayson_scripts": {},
    }
    assert draw({**A1111, **defaults}) == draw(A1111)


def test_hugging_face() -> None:
    parameters = {
        "num_inference_steps": 4,
        "num_images_per_prompt": 2,
        "eta": 0.5,
        "target_size": {"width": 192, "height": 128},
    }
    expected = ring(steps=4, n=2, eta=0.5, width=192, height=128)
    assert draw({"inputs": "a red ring", "parameters": parameters}) == expected
    skipped = draw({"inputs": "a red ring", "parameters": {**parameters, "clip_skip": 1}})
    assert skipped == ring(steps=4, n=2, eta=0.5, width=192, height=128, clip_skip=1)


def test_hugging_faces_negative_prompt_in_a_list() -> None:
    parameters = {"guidance_scale": 7.5, "negative_prompt": ["blurry"], "seed": 1, **SMALL}
    body = {"inputs": "a red ring", "parameters": parameters}
    assert draw(body) == ring(negative_prompt="blurry", seed=1, **SMALL)
    parameters["negative_prompt"] = ["blurry", "dark"]
    assert refusal(body) == {
        "negative_prompt": "is a list of 2; a prompt has one: join them with commas"
    }


def test_hugging_faces_options() -> None:
    body = {"inputs": "a red ring", "parameters": {"seed": 1, **SMALL}}
    options = {"wait_for_model": True, "use_cache": False}
    assert draw({**body, "options": options}) == ring(seed=1, **SMALL)
    assert (
        "'wait' with true means nothing here"
        in refusal({**body, "options": {"wait": True}})["options"]
    )


def test_openai() -> None:
    body = {"prompt": "a red ring", "n": 2, "size": "512x768"}
    assert draw(body) == ring(n=2, width=512, height=768)
    found = refusal({**body, "model": "stable_diffusion", "response_format": "b64_json"})
    assert found.keys() == {"model", "response_format"}
    assert "/predictions/NAME" in found["model"]
    assert '"output_format": "json"' in found["response_format"]


@pytest.mark.parametrize(
    "size", ["512", 512, [512, 512], "axb", "512x", pytest.param(10**5000, id="huge")]
)
def test_what_is_not_a_size(size: object) -> None:
    assert '"512x768" (width x height)' in refusal({"prompt": "a", "size": size})["size"]


def test_sizes_are_checked_like_any_other() -> None:
    assert refusal({"prompt": "a", "size": "100x99999"}) == {
        "width": "100 is not a multiple of 8; nearest are 96 and 104",
        "height": "99999 is out of range; allowed: 64 to 1536",
    }
    assert ring(size="auto") == ring()


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_seed_minus_one_is_drawn(seed: object) -> None:
    assert ring(seed=seed).seed == DRAWN
    assert ring(generator=seed).seed == DRAWN


@pytest.mark.parametrize("name", ["seed", "generator"])
def test_a_seed_as_text_of_digits(name: str) -> None:
    assert ring(**{name: "7"}).seed == ring(**{name: 7}).seed == 7
    for wrong in ("7.5", "x", "-2", True, [7]):
        assert refusal({"prompt": "a", name: wrong}).keys() == {"seed"}


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    assert draw({"prompt": ["a red ring"]}) == ring()
    assert draw({"inputs": ["a red ring"], "parameters": {"steps": 4}}) == ring(steps=4)


@pytest.mark.parametrize("name", ["prompt", "inputs", "data", "text"])
def test_a_list_of_several_says_how_several_are_sent(name: str) -> None:
    found = refusal({name: ["a red ring", "a blue star"]})
    assert found.keys() == {"prompt"}
    assert found["prompt"].startswith('is a list of 2; several prompts are sent as {"instances"')
    assert refusal({"prompt": []})["prompt"].startswith("is a list of 0; ")
    assert refusal({"prompt": [5]}) == {"prompt": "must be text, not a list of 1"}


@pytest.mark.parametrize("syntax", ["a (red:1.3) ring", "a red+++ ring", "x <lora:y:0.8> BREAK"])
def test_weights_in_a_prompt_are_text(syntax: str) -> None:
    assert draw({"prompt": syntax}).prompt == syntax


# Schedulers.


@pytest.mark.parametrize("name", ["scheduler", "sampler_name", "sampler_index", "sampler"])
@pytest.mark.parametrize("karras", ["DPM++ 2M Karras", "dpm++_2m_karras", "dpm++ 2m-KARRAS"])
def test_karras_by_name(name: str, karras: str) -> None:
    request = ring(**{name: karras})
    assert (request.scheduler, request.extra["sigmas"]) == ("DPM++ 2M", "karras")
    assert request.sampler == "DPM++ 2M karras"


@pytest.mark.parametrize(
    "fields",
    [
        {"sampler_name": "DPM++ 2M Karras", "use_karras_sigmas": True},
        {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
        {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
        {"scheduler": "DPM++ 2M", "sigmas": "Karras"},
        {"scheduler": "DPM++ 2M", "schedule_type": "Karras"},
        {"scheduler": "DPM++ 2M", "karras": True},
        {"scheduler": "DPM++ 2M Karras", "sigmas": "karras", "use_beta_sigmas": False},
        {"sampler": "K_DPMPP_2M_KA"},
    ],
)
def test_karras_in_every_form(fields: dict[str, object]) -> None:
    assert ring(**fields) == ring(scheduler="DPM++ 2M Karras")


def test_sigmas_that_contradict_the_name_or_that_a_sampler_has_not() -> None:
    assert refusal({"prompt": "a", "scheduler": "LMS Karras", "sigmas": "beta"}) == {
        "sigmas": "'beta', but the scheduler says Karras: send one"
    }
    assert refusal({"prompt": "a", "use_karras_sigmas": True, "use_beta_sigmas": True}).keys() == {
        "sigmas"
    }
    assert refusal({"prompt": "a", "sampler_name": "Euler a", "scheduler": "Karras"}) == {
        "sigmas": "'Euler a': Euler a has no Karras sigmas in diffusers; its sigmas may be"
        " sgm_uniform, simple, normal, ddim_uniform"
    }
    found = refusal({"prompt": "a", "scheduler": "DPM++ 2M KL Optimal"})
    assert "DPM++ 2M has no KL-optimal sigmas in diffusers" in found["scheduler"]
    found = refusal({"prompt": "a", "scheduler": "DPM++ 2S a Karras"})
    assert "diffusers has no such solver" in found["scheduler"]
    assert refusal({"prompt": "a", "sigmas": [14.6, 0.0]}).keys() == {"sigmas"}


def test_automatic_is_what_counts_where_nothing_is_sent() -> None:
    assert ring(scheduler="Automatic", schedule_type="automatic") == ring()
    assert ring(sampler_name="Euler", scheduler="Automatic") == ring(scheduler="Euler")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, name) for name in SAMPLERS),
        *((alias, each.name) for each in SAMPLERS.values() for alias in each.aliases),
        ("k_euler_a", "Euler a"),
        ("K_DPM_2_ANCESTRAL", "DPM2 a"),
        ("k_dpmpp_2m", "DPM++ 2M"),
        ("dpmpp_2m_sde_gpu", "DPM++ 2M SDE"),
        ("dpmpp_2m_sde_gpu karras", "DPM++ 2M SDE"),
        ("dpmpp_3m_sde_gpu_exponential", "DPM++ 3M SDE"),
        ("DPM++2M", "DPM++ 2M"),
        ("DPMSolverMultistep", "DPMSolverMultistepScheduler"),
        ("eulerdiscretescheduler", "EulerDiscreteScheduler"),
        ("pndm", "PNDMScheduler"),
    ],
)
def test_samplers_by_their_names(name: str, meant: str) -> None:
    """Among them are all that the metadata of a picture may hold."""
    assert ring(sampler_name=name).scheduler == ring(scheduler=name).scheduler == meant


NEARLY = [
    *("DPM++ 2M", "DPM++ 2S a", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "DPM2", "DPM2 a"),
    *("DPM fast", "DPM adaptive", "Euler", "Euler a", "Heun", "LMS", "DDPM", "DDIM", "DDIM CFG++"),
    *("Restart", "UniPC", "PLMS", "LCM", "TCD", "SA", "DEIS", "dpmpp_2m", "heunpp2", "res_2m"),
    *(f"{name} Karras" for name in SAMPLERS),
    *(name for name in dir(diffusers) if name.endswith("Scheduler")),
]


@pytest.mark.parametrize("name", NEARLY)
def test_a_refused_scheduler_is_never_told_another_solver(name: str) -> None:
    for left in ALL_SCHEDULERS:
        found = outcome(
            {"prompt": "a", "scheduler": name}, PipelineTraits((left,), 8, TRAITS.parameters)
        )
        assert isinstance(found, str) or "did you mean" not in found["scheduler"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("eulr_a", "euler_a"), ("unpic", "unipc"), ("Flow Euller", "flow_euler")]
)
def test_a_misspelt_scheduler_is_told_its_name(typed: str, meant: str) -> None:
    found = refusal({"prompt": "a", "scheduler": typed})
    assert f"did you mean {meant}?" in found["scheduler"]


# Refusals.


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_scale", 0.6),
        ("lora_path", "style.safetensors"),
        ("cross_attention_kwargs", {"scale": 0.5}),
    ],
)
def test_loras_are_refused_by_field(name: str, value: object) -> None:
    found = refusal({"prompt": "a red boat", "steps": 1, name: value})
    assert found.keys() == {name}
    assert "--lora FILE" in found[name]


def test_a_field_under_two_names() -> None:
    assert refusal({"prompt": "a", "guidance": 5, "cfg_scale": 5}) == {
        "guidance_scale": "given more than once, as guidance and cfg_scale: send one of them"
    }
    assert refusal({"prompt": "a", "samples": 1, "batch_size": 1}) == {
        "num_images": "given more than once, as samples and batch_size: send one of them"
    }
    assert ring(guidance=None, cfg_scale=5) == ring(guidance=5, cfg_scale=None) == ring(guidance=5)


# Every form of request.


def test_forms() -> None:
    form = {name: str(value).encode() for name, value in A1111.items()}
    assert draw(form, is_form=True) == draw(A1111)
    assert refusal({"prompt": b"a", "parameters": b"{}"}, is_form=True) == {
        "parameters": "is read in JSON; in a form its fields stand beside the prompt"
    }


def test_kserve() -> None:
    assert draw({"instances": [A1111]}) == draw(A1111)
    expected = ring(guidance=5)
    assert draw({"instances": ["a red ring"], "parameters": {"cfg_scale": 5}}) == expected
    prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a red ring"]}
    scale = {"name": "cfg_scale", "shape": [1], "datatype": "FP32", "data": [5.0]}
    assert draw({"inputs": [prompt, scale]}) == expected
    twice = {"instances": [{"prompt": "a", "cfg_scale": 1}], "cfg_scale": 2}
    assert refusal(twice) == {
        "instances[0].cfg_scale": "given more than once: inside and beside instances"
    }


def test_problems_say_where_they_stand() -> None:
    inside = {"instances": [{"prompt": "a", "image": "x", "cfg_scale": 99}]}
    assert refusal(inside).keys() == {"instances[0].image", "instances[0].guidance_scale"}
    beside = {"instances": ["a"], "parameters": {"image": "x", "cfg_scale": 99}}
    assert refusal(beside).keys() == {"image", "guidance_scale"}


# The table.


def test_no_foreign_name_is_ours() -> None:
    assert not FOREIGN_NAMES.keys() & (PICTURE_NAMES | REPLY_FIELDS.keys())
    for each in FOREIGN_NAMES.values():
        assert set(each.targets) <= PICTURE_FIELDS.keys(), each.name


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES.keys() - {"instances", "parameters"}))
def test_any_value_is_translated_or_refused(name: str) -> None:
    values: list[Any] = [None, True, 0, -1, 10**5000, 0.5, float("nan"), "", "x", [], {}, [[]]]
    for value in [*values, {"a": 1}, {"width": 1, "height": []}, "9" * 5000, "[" * 20, "\ud800"]:
        found = outcome({"prompt": "a", name: value})
        if isinstance(found, dict):
            assert found.keys() <= {name, *FOREIGN_NAMES[name].targets}, value
