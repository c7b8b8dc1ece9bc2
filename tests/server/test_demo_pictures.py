"""The embedded pipeline draws what the prompt says, through the real server and real curl."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from demo.grammar import Wish
from demo.judge import judge, score
from tests.support.client import MEDIA_TYPES, decode, post_json

PROMPT = "a red circle on a blue background"
WISH = Wish(shape="circle", color="red", background="blue")
# The server of these tests is configured small; the model is at home at 768×768.
FULL = {"height": 768, "width": 768, "num_inference_steps": 20, "seed": 1}
MIXED: list[tuple[Wish, dict[str, object]]] = [
    (WISH, {"prompt": PROMPT, "num_inference_steps": 50}),
    (
        Wish(shape="heart", color="yellow", background="purple", size="large"),
        {"prompt": "a large yellow heart on a purple background", "num_inference_steps": 20},
    ),
    (
        Wish(shape="square", color="green", background="white", position="left"),
        {"prompt": "a green square at the left of a white background", "scheduler": "dpm++"},
    ),
    (
        Wish(shape="ring", color="white", background="black"),
        {"prompt": "a white ring on a black background", "guidance_scale": 5.0},
    ),
]


def is_right(wish: Wish, picture: Image.Image) -> bool:
    return score(wish, judge(picture)).is_right


def test_at_the_shipped_defaults(url: str) -> None:
    answer = post_json(url, {**FULL, "prompt": PROMPT, "num_inference_steps": 50})
    assert is_right(WISH, Image.fromarray(decode("png", answer.body)))


def test_another_prompt_is_another_picture(url: str) -> None:
    """The judge is not pleased by just anything."""
    answer = post_json(url, {**FULL, "prompt": "a green square on a white background"})
    picture = Image.fromarray(decode("png", answer.body))
    assert not is_right(WISH, picture)
    assert is_right(Wish(shape="square", color="green", background="white"), picture)


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_through_every_output_format(url: str, output_format: str) -> None:
    answer = post_json(url, {**FULL, "prompt": PROMPT, "output_format": output_format})
    assert answer.status == 200, answer.body
    assert is_right(WISH, Image.fromarray(decode(output_format, answer.body)))


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_with_other_schedulers(url: str, scheduler: str) -> None:
    answer = post_json(url, {**FULL, "prompt": PROMPT, "scheduler": scheduler})
    assert answer.status == 200, answer.body
    assert is_right(WISH, Image.fromarray(decode("png", answer.body)))


def test_under_a_mixed_load(url: str) -> None:
    bodies = [{**FULL, **fields} for _, fields in MIXED]
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: post_json(url, body), bodies))
    verdicts = [
        is_right(wish, Image.fromarray(decode("png", answer.body)))
        for (wish, _), answer in zip(MIXED, answers, strict=True)
    ]
    assert all(verdicts), verdicts
