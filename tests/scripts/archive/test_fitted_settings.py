"""scripts.archive.fitted_settings: the model's defaults, within what the user has set."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from handler.config import HandlerConfig
from scripts.archive.fitted_settings import (
    describe_defaults,
    fit_settings,
    settings_within,
    with_settings,
)
from scripts.repository import REPOSITORY

OWN = (REPOSITORY / "config" / "model-config.yaml").read_bytes()
SECTION: dict[str, Any] = yaml.safe_load(OWN)["handler"]
SD_1 = {"num_inference_steps": 50, "guidance_scale": 7.5, "height": 512, "width": 512}


def fitted(defaults: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What changes in the project's own configuration; it is one that a worker takes."""
    changes = fit_settings(SECTION, settings, defaults, is_chosen=False)
    HandlerConfig.from_mapping({**SECTION, **changes})
    return changes


def test_the_defaults_of_the_model_replace_the_projects_own() -> None:
    assert fitted(SD_1) == {"height": 512, "width": 512}
    lcm = {**SD_1, "num_inference_steps": 4, "guidance_scale": 8.5}
    assert fitted(lcm) == {**lcm}
    assert fitted({"guidance_scale": 0.0, "num_inference_steps": 1}) == {
        "guidance_scale": 0.0,
        "num_inference_steps": 1,
    }
    assert fitted({}) == {}


def test_what_the_user_sets_beats_the_model() -> None:
    settings = {"height": 640, "num_inference_steps": 30}
    assert fitted(SD_1, **settings) == {"width": 512, **settings}
    chosen = fit_settings({"height": 256, "max_images": 2}, {}, SD_1, is_chosen=True)
    assert chosen == {"width": 512, "num_inference_steps": 50, "guidance_scale": 7.5}


@pytest.mark.parametrize(
    ("defaults", "limits"),
    [
        ({"height": 1024, "width": 1024}, {}),
        ({"height": 1328, "width": 1328}, {"max_pixels": 1328 * 1328}),
        ({"height": 2048, "width": 2048}, {"max_size_px": 2048, "max_pixels": 2048 * 2048}),
        ({"height": 768, "width": 1360}, {}),
        ({"height": 32, "width": 32}, {"min_size_px": 32}),
        ({"num_inference_steps": 250}, {"max_num_inference_steps": 250}),
        ({"guidance_scale": 40.0}, {"max_guidance_scale": 40.0}),
    ],
)
def test_limits_are_moved_for_the_models_defaults(
    defaults: dict[str, Any], limits: dict[str, Any]
) -> None:
    wanted = {**defaults, **limits}
    assert fitted(defaults) == {name: v for name, v in wanted.items() if SECTION[name] != v}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_size_px": 768}, {"height": 768, "width": 768}),
        ({"max_pixels": 768 * 768}, {"height": 768, "width": 768}),
        ({"max_pixels": 700 * 700}, {"height": 640, "width": 640}),
        ({"min_size_px": 1088, "max_pixels": 1088 * 1088}, {"height": 1088, "width": 1088}),
        ({"max_num_inference_steps": 20}, {"num_inference_steps": 20}),
        ({"max_guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"min_guidance_scale": 6.0}, {"guidance_scale": 6.0}),
    ],
)
def test_defaults_stay_within_the_users_limits(
    limits: dict[str, Any], expected: dict[str, Any]
) -> None:
    sdxl = {"num_inference_steps": 30, "guidance_scale": 5.0, "height": 1024, "width": 1024}
    changes = fitted(sdxl, **limits)
    values = {**SECTION, **changes}
    assert {name: values[name] for name in (*expected, *limits)} == {**expected, **limits}


def test_more_steps_than_a_configuration_may_have() -> None:
    assert fitted({"num_inference_steps": 2000}) == {
        "num_inference_steps": 1000,
        "max_num_inference_steps": 1000,
    }


def test_values_of_the_wrong_type_are_left_to_their_check() -> None:
    section = {"max_pixels": "many"}
    assert fit_settings(section, {"height": 8}, SD_1, is_chosen=True) == {"height": 8}


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"max_size_px": 512}, {"height": 512, "width": 512}),
        ({"max_size_px": 512, "width": 256}, {"height": 512}),
        ({"max_pixels": 512 * 512}, {"height": 512, "width": 512}),
        ({"max_num_inference_steps": 20}, {"num_inference_steps": 20}),
        ({"max_guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"max_size_px": 1024, "max_waiting": 3}, {}),
    ],
)
def test_what_a_limit_makes_necessary(settings: dict[str, Any], needed: dict[str, Any]) -> None:
    packed = {**SECTION, **fitted({**SD_1, "height": 1024, "width": 1024})}
    assert settings_within(packed, settings) == needed
    HandlerConfig.from_mapping({**packed, **settings, **needed})


def test_wrong_values_make_nothing_necessary() -> None:
    assert settings_within({"height": "x"}, {"max_size_px": 64}) == {}


def test_comments_stay_where_values_change() -> None:
    changes = {"height": 512, "guidance_scale": 5.0, "max_pixels": 16777216}
    text = with_settings(OWN, changes)
    assert yaml.safe_load(text)["handler"] == {**SECTION, **changes}
    assert text.count(b"#") == OWN.count(b"#")
    assert b"  height: 512                    # pixels: min_size_px to max_size_px\n" in text
    assert with_settings(OWN, {}) == OWN
    assert with_settings(OWN, {"height": 768}) == OWN


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (OWN, {"scheduler": "ddim", "warm_up_sizes": ["512x512", "64x64"]}),
        (OWN, {"negative_prompt": "two\nlines: #1"}),
        (b"handler: {height: 8}\n", {"height": 16}),
        (b"minWorkers: 1\n", {"height": 16}),
        (b"", {"height": 16}),
        (b"a:\n  height: 1\nhandler:\n  height: 8\n", {"height": 16}),
    ],
)
def test_any_file_takes_the_settings(data: bytes, changes: dict[str, Any]) -> None:
    before = yaml.safe_load(data) or {}
    expected = {**before, "handler": {**before.get("handler", {}), **changes}}
    assert yaml.safe_load(with_settings(data, changes)) == expected


def test_says_what_a_request_gets() -> None:
    assert describe_defaults(HandlerConfig()) == (
        "a request that asks for nothing else gets 768x768 (height x width), 50 steps and"
        " guidance 7.5"
    )
    config = HandlerConfig(height=1328, width=1328, max_pixels=1328 * 1328, guidance_scale=4.0)
    assert describe_defaults(config).endswith("guidance 4; limits: max_pixels 1763584")
