"""Requests that no client waits for: read from bodies, and drawn beside the live ones."""

from __future__ import annotations

import numpy as np
import pytest

from handler.errors import EngineFault, InvalidRequest
from handler.service.reading import draw_seed
from tests.support.pipelines import build
from tests.support.services import Make, finish, open_request, request, statuses, tick


def test_reading_gives_the_requests_of_all_bodies_in_order(make: Make) -> None:
    service = make()
    read = service.read([{"data": "one"}, {"body": {"instances": ["two", "three"]}}])
    assert [(each.prompt, each.seed, each.num_inference_steps) for each in read] == [
        ("one", 5, 4),
        ("two", 5, 4),
        ("three", 5, 4),
    ]
    with pytest.raises(InvalidRequest, match="steps"):
        service.read([{"data": "one"}, {"body": {"prompt": "two", "steps": 0}}])


def test_drawing_leaves_requests_in_flight_alive(make: Make) -> None:
    service = make()
    open_request(service, "short", num_inference_steps=1)
    open_request(service, "long", num_inference_steps=40)
    open_request(service, "bad", "crash late")
    tick(service)
    results = service.draw([request(), request(num_images=2, num_inference_steps=9)])
    assert [len(result.images) for result in results] == [1, 2]
    assert service.live_ids == {"short", "long", "bad"}
    assert statuses(finish(service)) == {"short": 200, "long": 200, "bad": 500}


def test_drawing_nothing_gives_nothing(make: Make) -> None:
    assert make().draw([]) == []


def test_drawing_raises_the_first_error_with_its_cause_and_leaves_nothing_behind(
    make: Make,
) -> None:
    service = make()
    with pytest.raises(EngineFault) as caught:
        service.draw([request(), request(prompt="crash late")])
    assert str(caught.value.__cause__) == "late"
    with pytest.raises(InvalidRequest, match="scheduler"):
        service.draw([request(), request(scheduler="NoScheduler")])
    assert service.load.is_idle


def test_drawn_seeds_differ_and_can_be_typed() -> None:
    seeds = {draw_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_prompts_are_read_whole_and_weighted_where_that_is_asked_for(make: Make) -> None:
    service = make(pipeline=build("stable_diffusion"))
    words = " ".join("abcdefghij"[place % 10] for place in range(90))
    asked: list[dict[str, object]] = [
        {"prompt": words},
        {"prompt": words[:-2]},
        {"prompt": "a (b:1.5)"},
        {"prompt": "a (b:1.5)", "prompt_weighting": True},
        {"prompt": "a b", "prompt_weighting": True},
        {"prompt": "a b"},
    ]
    results = service.draw(service.read([{"body": {"seed": 1, **each}} for each in asked]))
    pictures = [np.asarray(result.images[0]) for result in results]
    warned = [len(result.warnings) for result in results]
    assert warned == [0, 0, 1, 0, 0, 0]
    assert np.array_equal(pictures[4], pictures[5])
    for one, other in ((0, 1), (2, 3), (3, 4)):
        assert not np.array_equal(pictures[one], pictures[other])
