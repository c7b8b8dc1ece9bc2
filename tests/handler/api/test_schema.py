"""The table of request fields, and that one entry is all that a field needs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest

from handler.api.call import Call, read_call
from handler.api.metadata import ImageMetadata, parameters_line, to_json
from handler.api.request import GenerationRequest
from handler.api.schema import PICTURE_FIELDS, REPLY_FIELDS, Field, Setting, bounds_of, default_of
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.pipelines.arguments import pipeline_arguments

CONFIG = HandlerConfig()
ALL_PARAMETERS = frozenset(f.argument for f in PICTURE_FIELDS.values() if f.argument is not None)
FIELDS: list[Field] = [*PICTURE_FIELDS.values(), *REPLY_FIELDS.values()]


def traits(*lacking: str) -> PipelineTraits:
    return PipelineTraits(("DDIMScheduler",), 8, ALL_PARAMETERS - set(lacking))


def request_of(
    row: dict[str, object], headers: dict[str, str] | None = None, *lacking: str
) -> GenerationRequest:
    """The only request in a row of TorchServe's data."""
    headers = {"host": "x"} if headers is None else headers
    found = read_call(row, headers, CONFIG, traits(*lacking), draw_seed=lambda: 7)
    assert isinstance(found, Call)
    (request,) = found.requests
    return request


def test_no_name_is_used_twice() -> None:
    names = Counter(name for field in FIELDS for name in field.names)
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_settings_are_keys_of_the_configuration(field: Field) -> None:
    keys = {f.name for f in dataclasses.fields(HandlerConfig)}
    used = [v for v in (field.minimum, field.maximum, field.default) if isinstance(v, Setting)]
    assert {setting.key for setting in used} <= keys
    assert field.meaning


def test_bounds_and_defaults_are_the_configured_ones() -> None:
    config = HandlerConfig(max_guidance_scale=20.0, guidance_scale=3.0, deadline_s=60.0)
    assert bounds_of(PICTURE_FIELDS["guidance_scale"], config) == (0.0, 20.0)
    assert default_of(PICTURE_FIELDS["guidance_scale"], config) == 3.0
    assert bounds_of(REPLY_FIELDS["deadline_s"], config) == (0.001, 60.0)
    assert bounds_of(REPLY_FIELDS["deadline_s"], CONFIG) == (0.001, 86400.0)
    assert default_of(REPLY_FIELDS["deadline_s"], CONFIG) is None


JSON = {"content-type": "application/json"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
ETA_TENSORS = [
    {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]},
    {"name": "eta", "shape": [1], "datatype": "FP32", "data": [0.5]},
]


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": {"prompt": "a", "eta": 0.5}}, JSON),
        ({"body": {"inputs": "a", "parameters": {"eta": 0.5}}}, JSON),
        ({"prompt": b"a", "eta": b"0.5"}, URLENCODED),
        ({"prompt": b"a", "eta": b"0.5"}, {}),  # gRPC
        ({"body": {"instances": [{"prompt": "a", "eta": 0.5}]}}, JSON),
        ({"body": {"instances": ["a"], "parameters": {"eta": 0.5}}}, JSON),
        ({"body": {"inputs": ETA_TENSORS}}, JSON),
    ],
)
def test_eta_through_every_form_of_request(row: dict[str, object], headers: dict[str, str]) -> None:
    request = request_of(row, headers)
    assert request.extra == {"eta": 0.5}
    assert pipeline_arguments(request, ALL_PARAMETERS)["eta"] == 0.5
    metadata = ImageMetadata(request, seed=7, model_name="sd")
    assert json.loads(to_json(metadata))["eta"] == 0.5
    assert "Size: 768x768, Eta DDIM: 0.5, Model: sd" in parameters_line(metadata)


def test_eta_that_is_left_out_is_left_to_the_pipeline() -> None:
    request = request_of({"body": {"prompt": "a", "eta": None}})
    assert "eta" not in pipeline_arguments(request, ALL_PARAMETERS)
    metadata = ImageMetadata(request, seed=7, model_name="sd")
    assert "eta" not in json.loads(to_json(metadata))
    assert "Eta" not in parameters_line(metadata)
    assert (
        pipeline_arguments(request_of({"body": {"prompt": "a", "eta": 0}}), ALL_PARAMETERS)["eta"]
        == 0.0
    )


@pytest.mark.parametrize(
    ("eta", "problem"),
    [
        (1.5, "1.5 is out of range; allowed: 0 to 1"),
        ("high", "'high' is not a number; allowed: 0 to 1"),
        ("0.5", "'0.5' is not a number; write it without quotes; allowed: 0 to 1"),
    ],
)
def test_eta_is_checked(eta: object, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        request_of({"body": {"prompt": "a", "eta": eta}})
    assert caught.value.fields == {"eta": problem}


def test_eta_is_refused_by_a_pipeline_without_it() -> None:
    with pytest.raises(InvalidRequest) as caught:
        request_of({"body": {"prompt": "a", "eta": 0.5}}, JSON, "eta")
    assert caught.value.fields == {"eta": "this pipeline has no such parameter"}
    assert request_of({"body": {"prompt": "a"}}, JSON, "eta").extra == {}
