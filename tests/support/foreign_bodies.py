"""Bodies of requests in anybody's words, and what is read of them where a pipeline takes all."""

from __future__ import annotations

from typing import Any

import pytest

from handler.api.call import Call, read_call
from handler.api.request import GenerationRequest
from handler.api.sampler_table import SAMPLERS, SCHEDULER_CLASSES
from handler.api.schema import PICTURE_FIELDS
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import InvalidRequest

CONFIG = HandlerConfig(default_output="json")
"""Several pictures need no other format."""
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
"""The seed of those that say none."""
SMALL = {"steps": 4, "width": 192, "height": 192}
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
"""What a client of AUTOMATIC1111 sends."""


def draw(
    body: dict[str, Any], traits: PipelineTraits = TRAITS, *, is_form: bool = False
) -> GenerationRequest:
    """The request that `body` is."""
    row = body if is_form else {"body": body}
    found = read_call(row, {"host": "x"}, CONFIG, traits, draw_seed=lambda: DRAWN)
    assert isinstance(found, Call)
    (request,) = found.requests
    return request


def refusal(
    body: dict[str, Any], traits: PipelineTraits = TRAITS, *, is_form: bool = False
) -> dict[str, str]:
    """What is wrong with `body`, by field."""
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
    """A request with these fields and a prompt."""
    return draw({"prompt": "a red ring", **fields})
