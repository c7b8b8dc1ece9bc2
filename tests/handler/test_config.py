"""The handler section of model-config.yaml: defaults, ranges, and every problem at once."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from handler.config import OUTPUT_FORMATS, HandlerConfig
from handler.errors import ConfigError
from scripts.repository import REPOSITORY

SHIPPED = REPOSITORY / "config" / "model-config.yaml"


def test_defaults_are_the_documented_ones() -> None:
    config = HandlerConfig()
    assert (config.num_inference_steps, config.guidance_scale) == (50, 7.5)
    assert (config.height, config.width) == (768, 768)
    assert config.default_output == "png"
    assert config.embed_metadata


@pytest.mark.parametrize("section", [None, {}])
def test_nothing_set_is_the_defaults(section: dict[str, object] | None) -> None:
    assert HandlerConfig.from_mapping(section) == HandlerConfig()


def test_integers_become_floats_where_a_number_is_wanted() -> None:
    config = HandlerConfig.from_mapping({"guidance_scale": 5, "deadline_s": 30})
    assert (config.guidance_scale, config.deadline_s) == (5.0, 30.0)
    assert isinstance(config.guidance_scale, float)
    assert isinstance(config.deadline_s, float)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        HandlerConfig.from_mapping(
            {
                "max_row": 8,
                "height": "768",
                "exact": 1,
                "num_inference_steps": True,
                "guidance_scale": float("nan"),
                "dtype": "float8",
                "device": "gpu",
                True: 1,  # type: ignore[dict-item]  # YAML 1.1 reads `on:` as this
            }
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    assert "did you mean max_rows?" in lines[1]
    assert "True: unknown key" in lines[2]
    assert "height: '768' is not allowed; must be an integer from 8 to 16384" in lines[3]
    assert any("exact: 1" in line and "true or false" in line for line in lines)
    assert any("float16, bfloat16, float32" in line for line in lines)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"num_inference_steps": 151}, "above max_num_inference_steps, 150"),
        ({"guidance_scale": 31}, "above max_guidance_scale"),
        ({"min_guidance_scale": 8}, "below min_guidance_scale"),
        ({"height": 2000}, "height: 2000 is above max_size_px"),
        ({"width": 32}, "width: 32 is below min_size_px"),
        ({"max_pixels": 256 * 256}, "768x768 has more pixels than max_pixels"),
        ({"max_images": 9}, "must be 18 or more"),
        ({"max_rows": 6}, "max_rows: 6 is too few for max_images, 4"),
        ({"max_pixels_in_flight": 1000}, "would never be drawn"),
        ({"warm_up_sizes": ["768x768", "768x2000"]}, "768x2000 is not a size that a request may"),
        ({"warm_up_sizes": ["1536x1536"]}, "see min_size_px, max_size_px and max_pixels"),
        ({"speed": "max", "exact": True}, "which speed: max does not"),
        ({"negative_prompt": "x" * 11, "max_prompt_chars": 10}, "longer than max_prompt_chars"),
    ],
)
def test_keys_are_checked_against_each_other(section: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        HandlerConfig.from_mapping(section)


def test_a_section_that_is_no_mapping() -> None:
    with pytest.raises(ConfigError, match="a list of 1"):
        HandlerConfig.from_mapping(["max_rows"])  # type: ignore[arg-type]


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="max_rows"):
        HandlerConfig(max_rows=0)


@pytest.mark.parametrize(("written", "speed"), [("off", "off"), ("max", "max"), (None, "safe")])
def test_speeds(written: str | None, speed: str) -> None:
    """YAML makes false of a bare `off`."""
    section = {} if written is None else yaml.safe_load(f"speed: {written}")
    assert HandlerConfig.from_mapping(section).speed == speed


@pytest.mark.parametrize("wrong", [True, "fast", 1])
def test_no_other_speed(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"speed: .* must be one of off, safe, max"):
        HandlerConfig.from_mapping({"speed": wrong})


def test_sizes_to_warm_up() -> None:
    config = HandlerConfig.from_mapping({"warm_up_sizes": ["512x768", "64x64"]})
    assert config.warm_up_sizes == ((512, 768), (64, 64))
    assert dataclasses.replace(config, exact=True).warm_up_sizes == config.warm_up_sizes


@pytest.mark.parametrize(
    "wrong", [[], "512x512", [512], ["512"], ["512x512x3"], ["x"], ["8x8"] * 17]
)
def test_no_other_sizes_to_warm_up(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"warm_up_sizes: .* such as 512x768, height x width"):
        HandlerConfig.from_mapping({"warm_up_sizes": wrong})


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:3", "mps", "xpu:0"])
def test_devices(device: str) -> None:
    assert HandlerConfig.from_mapping({"device": device}).device == device


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(HandlerConfig)]) | st.text(),
        st.none()
        | st.booleans()
        | st.integers()
        | st.builds(lambda digits: 10**digits, st.integers(400, 5000))
        | st.floats()
        | st.text()
        | st.sampled_from(OUTPUT_FORMATS)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(), st.integers(), max_size=2),
        max_size=8,
    )
)
def test_no_section_raises_anything_but_config_error(section: dict[str, object]) -> None:
    try:
        config = HandlerConfig.from_mapping(section)
    except ConfigError:
        return
    assert 2 * config.max_images <= config.max_rows
    assert config.min_size_px <= config.height <= config.max_size_px
    assert config.height * config.width <= config.max_pixels


def _handler_section_as_written() -> dict[str, object]:
    """The shipped section with its commented keys switched on; every key has its comment."""
    section = SHIPPED.read_text().partition("\nhandler:")[2]
    lines = re.findall(r"^  (?:# )?([a-z_]+: \S+) +# \S.*$", section, re.MULTILINE)
    return dict(yaml.safe_load("\n".join(lines)))


def test_the_shipped_file_has_every_key_with_its_default() -> None:
    written = _handler_section_as_written()
    fields = dataclasses.fields(HandlerConfig)
    assert list(written) == [field.name for field in fields]
    # Those that are commented out because their default is None show an example instead.
    for field in fields:
        if field.default is not None:
            assert written[field.name] == field.default, field.name
    unset = {field.name: written[field.name] for field in fields if field.default is None}
    for name, value in unset.items():
        HandlerConfig.from_mapping({name: value})


def test_the_shipped_file_is_valid() -> None:
    document = yaml.safe_load(SHIPPED.read_text())
    assert HandlerConfig.from_mapping(document["handler"]) == HandlerConfig()
    assert document["minWorkers"] == document["maxWorkers"] == 1
    assert document["continuousBatching"] is True
    assert document["maxBatchDelay"] == 1
    # Cancelling must get through while the waiting room is full.
    config = HandlerConfig()
    assert document["batchSize"] > config.max_rows + config.max_waiting


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"ink": 1, "style": -10}, {"ink": 1.0, "style": -10.0}),
        (["ink", "style"], {"ink": 1.0, "style": 1.0}),
        ([], {}),
    ],
)
def test_default_loras(written: object, read: dict[str, float]) -> None:
    assert HandlerConfig.from_mapping({"default_loras": written}).default_loras == read


@pytest.mark.parametrize(
    "wrong",
    [
        [{"name": "a"}],
        ["a", 1],
        "a",
        {"a": 10.5},
        {"a": True},
        {"a": None},
        {"": 1},
        {f"l{i}": 1 for i in range(17)},
        [f"l{i}" for i in range(17)],
    ],
)
def test_what_are_no_default_loras(wrong: object) -> None:
    with pytest.raises(ConfigError, match="up to 16 names with scales, -10 to 10"):
        HandlerConfig.from_mapping({"default_loras": wrong})
