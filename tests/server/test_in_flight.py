"""Requests that share the worker: mixing, overtaking, nonsense among them, and their pixels."""

from __future__ import annotations

import inspect
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from handler.pipelines.schedulers import make_scheduler
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, curl, pixels, post_json
from tests.support.traffic import ENDLESS, cancel, watching

# Of 255. The most that was seen in hundreds of pictures is 1: a value next to a rounding edge.
BOUND = 1
DEFAULTS: dict[str, Any] = {
    "num_inference_steps": 4,
    "guidance_scale": 7.5,
    "height": 256,
    "width": 256,
}
MIXED: list[dict[str, Any]] = [
    {"prompt": "a red heart", "seed": 1, "num_inference_steps": 9},
    {"prompt": "a blue star", "seed": 2, "num_inference_steps": 4, "guidance_scale": 1.0},
    {"prompt": "a green moon", "seed": 3, "num_inference_steps": 12, "scheduler": "euler_a"},
    {"prompt": "a ring", "seed": 4, "num_inference_steps": 6, "scheduler": "dpm++"},
    {"prompt": "a cross", "seed": 5, "num_inference_steps": 5, "height": 128},
    {"prompt": "a square", "seed": 6, "num_inference_steps": 7, "negative_prompt": "blue"},
    {"prompt": "a tiny red dot", "seed": 7, "num_inference_steps": 20, "guidance_scale": 3.0},
    {"prompt": "", "seed": 8},  # 400
    {"prompt": "a large gray ring", "seed": 9, "width": 384, "scheduler": "unipc"},
    {"prompt": "a heart", "seed": 10, "stpes": 3},  # 400
    {"prompt": "a moon", "seed": 11, "num_inference_steps": 3},
    {"prompt": "a star", "seed": 12, "height": 257},  # 400
]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The unmodified pipeline, from the folder that was packed."""
    loaded = DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw_alone(pipeline: Any, fields: dict[str, Any], **changes: Any) -> Any:
    """What diffusers draws for the fields of a request, without anything of ours."""
    values = {**DEFAULTS, **fields, **changes}
    original = pipeline.scheduler
    name = values.pop("scheduler", None)
    pipeline.scheduler = make_scheduler(pipeline, name or type(original).__name__)
    generator = torch.Generator().manual_seed(values.pop("seed"))
    assert values.keys() <= inspect.signature(type(pipeline).__call__).parameters.keys()
    try:
        return np.asarray(pipeline(**values, generator=generator).images[0]).astype(int)
    finally:
        pipeline.scheduler = original


def post_all(url: str, bodies: list[dict[str, Any]]) -> list[Answer]:
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda fields: post_json(url, fields), bodies))


def test_a_mixed_load_draws_what_each_request_draws_alone(url: str, pipeline: Any) -> None:
    answers = post_all(url, MIXED)
    bad = [index for index, answer in enumerate(answers) if answer.status == 400]
    assert bad == [7, 9, 11]
    for fields, answer in zip(MIXED, answers, strict=True):
        if answer.status == 400:
            continue
        assert answer.status == 200
        picture = pixels(answer.body).astype(int)
        assert abs(draw_alone(pipeline, fields) - picture).max() <= BOUND, fields
        # Would another seed's have passed?
        other = draw_alone(pipeline, fields, seed=fields["seed"] + 100)
        assert abs(other - picture).max() > BOUND, fields


def test_the_bound_tells_other_steps_and_schedulers(url: str, pipeline: Any) -> None:
    fields = MIXED[2]
    picture = pixels(post_json(url, fields).body).astype(int)
    assert abs(draw_alone(pipeline, fields) - picture).max() <= BOUND
    for changes in ({"num_inference_steps": 13}, {"scheduler": None}, {"height": 256, "seed": 4}):
        assert abs(draw_alone(pipeline, fields, **changes) - picture).max() > BOUND, changes


def test_a_request_draws_the_same_bytes_every_time(url: str) -> None:
    answers = [post_json(url, MIXED[2]) for _ in range(2)]
    assert answers[0].body == answers[1].body


def test_short_requests_overtake_long_ones(url: str) -> None:
    order: list[str] = []
    counter = itertools.count()

    def note(name: str) -> Any:
        def done(_: Future[Answer]) -> None:
            order.append(f"{name} {next(counter)}")

        return done

    long = {"prompt": "a ring", "seed": 1, "num_inference_steps": 120}
    with ThreadPoolExecutor(8) as threads, watching(url, long) as watched:
        longs = [threads.submit(post_json, url, {**long, "seed": s}) for s in range(2, 6)]
        for future in longs:
            future.add_done_callback(note("long"))
        # All of them are under way once the first, which is ahead, has gone on for a while.
        watched.read_until('data: {"step":9,')
        shorts = [
            threads.submit(post_json, url, {"prompt": "a heart", "num_inference_steps": 3})
            for _ in range(3)
        ]
        for future in shorts:
            future.add_done_callback(note("short"))
        assert {future.result().status for future in (*shorts, *longs)} == {200}
    assert [name.split()[0] for name in order] == ["short"] * 3 + ["long"] * 4


def test_one_overtakes_a_request_of_minutes_which_is_then_cancelled(url: str) -> None:
    with watching(url, {**ENDLESS, "request_id": "long-1"}) as watched:
        short = post_json(url, {"prompt": "a heart", "num_inference_steps": 2})
        assert short.status == 200
        assert cancel(url, "long-1").status == 200
        name, data = watched.events()[-1]
    assert (name, data["status"]) == ("error", 499)


def test_nonsense_among_good_requests_disturbs_nobody(server: TorchServer, url: str) -> None:
    (worker,) = server.workers()
    good = {"prompt": "a green square", "seed": 3, "num_inference_steps": 30}
    alone = post_json(url, good)
    nonsense = [
        ("-H", "Content-Type: application/json", "-d", "{"),
        ("-H", "Content-Type: application/json", "-d", "[" * 5000),
        ("-H", "Content-Type: application/json", "-d", '{"prompt": {"a": [1, null]}}'),
        ("-H", "Content-Type: application/json", "-d", '{"instances": [{}, 3, null]}'),
        ("-H", "Content-Type: application/json", "-d", '{"cancel": {"not": "an id"}}'),
        ("-H", "Content-Type: application/json", "-d", '{"prompt": "a", "seed": 1e400}'),
        ("-H", "Content-Type: image/png", "--data-binary", "@/dev/null"),
        ("-H", "X-Request-Id: no id at all", "-H", "Content-Type: text/plain", "-d", "a"),
        ("-H", "Accept: text/event-stream", "-d", "lost"),
        ("-X", "DELETE"),
        ("-F", "prompt=a", "-F", "prompt=b", "-F", "steps=x"),
    ]
    with ThreadPoolExecutor(8) as threads:
        goods = [threads.submit(post_json, url, good) for _ in range(2)]
        odd = list(threads.map(lambda arguments: curl(url, *arguments), nonsense * 2))
        answers = [future.result() for future in goods]
    assert all(400 <= answer.status < 500 for answer in odd)
    picture = pixels(alone.body).astype(int)
    for answer in answers:
        assert abs(pixels(answer.body).astype(int) - picture).max() <= BOUND
    assert [w["pid"] for w in server.workers()] == [worker["pid"]]
    assert post_json(url, good).status == 200
