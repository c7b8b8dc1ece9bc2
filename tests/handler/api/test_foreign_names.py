"""Requests in other people's words: drawn as they are meant, or refused with what to send."""

from __future__ import annotations

from typing import Any

import pytest

from handler.api.foreign_names import FOREIGN_NAMES
from handler.api.schema import PICTURE_FIELDS, PICTURE_NAMES, REPLY_FIELDS
from tests.support.foreign_bodies import A1111, DRAWN, SMALL, draw, outcome, refusal, ring

# What people sent.


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


# Refusals.


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
