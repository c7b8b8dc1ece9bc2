"""Whole calls, rows of TorchServe's data with their headers, and what is read of them."""

from __future__ import annotations

import pytest

from handler.api.call import Call, CancelCall, DescribeCall, read_call
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import InvalidRequest

CONFIG = HandlerConfig()
TRAITS = PipelineTraits(
    schedulers=("PNDMScheduler", "DDIMScheduler"),
    size_multiple_px=8,
    parameters=frozenset(
        [
            "prompt",
            "negative_prompt",
            "num_inference_steps",
            "guidance_scale",
            "height",
            "width",
            "num_images_per_prompt",
        ]
    ),
)
HTTP = {"host": "localhost"}
"""Over HTTP there are always some."""
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


def read(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> Call | CancelCall | DescribeCall:
    """What a row is."""
    return read_call(
        row, HTTP if headers is None else headers, config, TRAITS, draw_seed=lambda: 99
    )


def call(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> Call:
    """The call that a row is."""
    found = read(row, headers, config)
    assert isinstance(found, Call)
    return found


def problems(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> dict[str, str]:
    """What is wrong with a row, by field."""
    with pytest.raises(InvalidRequest) as caught:
        read(row, headers, config)
    return caught.value.fields


def body(**fields: object) -> dict[str, object]:
    """A row of JSON with these fields and a prompt."""
    return {"body": {"prompt": "a cat", **fields}}
