"""All tasks of one model at once over curl: every picture is what diffusers draws alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handler.pipelines.arguments import name_control_picture
from handler.pipelines.describe import describe
from handler.pipelines.tasks import pipeline_name, pipelines_of, split_name
from scripts.build_archive import main as build_archive
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, curl, pixels, post_json
from tests.support.drawings import as_base64, as_png, drawing, half_mask
from tests.support.picture_tasks import make_controlnet
from tests.support.pipelines import build

SIDE = 64
# Of 255: a value next to a rounding edge. What another argument makes is many times as much.
BOUND = 1
CONTROLS = ("depth", "edges")


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """The pipelines that diffusers draws with, of the weights that are packed."""
    pipeline = build("stable_diffusion")
    return pipelines_of(pipeline, {each: make_controlnet(pipeline, each) for each in CONTROLS})


@pytest.fixture(scope="module")
def url(pipelines: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where requests for a tiny model of all tasks are posted."""
    folder = tmp_path_factory.mktemp("tasks")
    pipelines["text-to-image"].save_pretrained(folder / "pipeline")
    flags = []
    for each in CONTROLS:
        pipelines[f"text-to-image+control:{each}"].controlnet.save_pretrained(folder / each)
        flags += ["--controlnet", f"{each}={folder / each}"]
    settings = {"height": SIDE, "width": SIDE, "min_size_px": 32, "num_threads": 1}
    flags += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    common = ["--pipeline", str(folder / "pipeline"), "--name", "tiny", "--out", str(folder)]
    assert build_archive([*common, *flags]) == 0
    server = TorchServer(
        Options(folder / "tiny.mar", folder / "run", Ports.free()), ("tiny", "1.0")
    )
    with server.running(timeout_s=120):
        yield server.predictions_url


@dataclass(frozen=True)
class Request:
    """One request: its task, its fields, its pictures, and how they are sent."""

    task: str
    seed: int
    form: bool = False
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def all_fields(self) -> dict[str, Any]:
        return {"prompt": f"a boat {self.seed}", "num_inference_steps": 6, **self.fields}

    def send(self, url: str, folder: Path) -> Answer:
        fields = {**self.all_fields(), "seed": self.seed}
        if not self.form:
            sent = {name: as_base64(image) for name, image in self.pictures.items()}
            file = folder / f"{self.seed}.json"
            file.write_text(json.dumps({**fields, **sent}))
            return curl(url, "-H", "Content-Type: application/json", "-d", f"@{file}")
        parts = [f"{name}={value}" for name, value in fields.items()]
        for name, image in self.pictures.items():
            file = folder / f"{self.seed}-{name}.png"
            file.write_bytes(as_png(image))
            parts.append(f"{name}=@{file}")
        return curl(url, *(part for each in parts for part in ("-F", each)))

    def alone(self, pipelines: dict[str, Any], **changes: Any) -> Any:
        """What diffusers draws, with nothing of ours on it."""
        fields = {**self.all_fields(), "height": SIDE, "width": SIDE}
        name = pipeline_name(self.task, fields.pop("control", None))
        parameters = describe(pipelines[name]).parameters
        pictures = name_control_picture(self.pictures, parameters)
        kwargs = {"seed": self.seed, **fields, **pictures, **changes}
        generator = torch.Generator().manual_seed(kwargs.pop("seed"))
        known = {key: value for key, value in kwargs.items() if key in parameters}
        picture = pipelines[name](**known, generator=generator).images[0]
        return np.asarray(picture).astype(int)


IMAGE, MASK, CONTROL = drawing(1, SIDE, SIDE), half_mask(SIDE, SIDE), drawing(2, SIDE, SIDE)
ONE, BOTH = {"image": IMAGE}, {"image": IMAGE, "mask_image": MASK}
REQUESTS = [
    Request("text-to-image", 1),
    Request("text-to-image", 2, form=True, fields={"guidance_scale": 1.0}),
    Request("image-to-image", 3, form=True, pictures=ONE, fields={"strength": 0.6}),
    Request("image-to-image", 4, pictures=ONE, fields={"strength": 0.9}),
    Request("image-to-image", 5, pictures={"image": CONTROL}, fields={"scheduler": None}),
    Request("inpainting", 6, form=True, pictures=BOTH),
    Request("inpainting", 7, pictures=BOTH, fields={"strength": 0.7, "guidance_scale": 4.0}),
    Request(
        "text-to-image+control", 8, pictures={"control_image": CONTROL}, fields={"control": "edges"}
    ),
    Request(
        "image-to-image+control",
        9,
        form=True,
        pictures={"image": IMAGE, "control_image": CONTROL},
        fields={"control": "depth", "controlnet_conditioning_scale": 0.8},
    ),
    Request(
        "inpainting+control",
        10,
        pictures={**BOTH, "control_image": CONTROL},
        fields={"control": "edges"},
    ),
]


def test_all_tasks_at_once_draw_what_each_request_draws_alone(
    url: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        answers = list(threads.map(lambda each: each.send(url, tmp_path), REQUESTS))
    for request, answer in zip(REQUESTS, answers, strict=True):
        assert answer.status == 200, (request.task, answer.body)
        picture = pixels(answer.body).astype(int)
        assert abs(request.alone(pipelines) - picture).max() <= BOUND, request
        # Negative control: would another seed's have passed?
        assert abs(request.alone(pipelines, seed=77) - picture).max() > BOUND, request


@pytest.mark.parametrize(
    ("index", "changes"),
    [
        (3, {"strength": 0.4}),
        (3, {"image": CONTROL}),
        (6, {"mask_image": half_mask(SIDE, SIDE).rotate(180)}),
        (8, {"control_image": IMAGE}),
    ],
)
def test_the_bound_tells_pictures_and_strength(
    index: int, changes: dict[str, Any], url: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    answer = REQUESTS[index].send(url, tmp_path)
    assert answer.status == 200
    wrong = REQUESTS[index].alone(pipelines, **changes)
    assert abs(wrong - pixels(answer.body).astype(int)).max() > BOUND


def test_the_same_request_is_the_same_bytes(url: str, tmp_path: Path) -> None:
    first, again = (REQUESTS[3].send(url, tmp_path) for _ in range(2))
    assert np.array_equal(pixels(first.body), pixels(again.body))


def test_a_stream_tells_the_steps_that_strength_leaves(url: str) -> None:
    body = {
        "prompt": "a boat",
        "seed": 3,
        "image": as_base64(IMAGE),
        "strength": 0.5,
        "num_inference_steps": 8,
        "stream": True,
        "previews": 1,
    }
    events = post_json(url, body).body.decode().split("\n\n")
    steps = [json.loads(each.partition("data: ")[2]) for each in events if "event: step" in each]
    assert [(each["step"], each["num_steps"]) for each in steps] == [(n, 4) for n in (1, 2, 3, 4)]
    assert sum("event: preview" in each for each in events) == 4
    assert sum("event: image" in each for each in events) == 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask_image": MASK}, "mask_image"),
        ({"control_image": CONTROL}, "control"),
        ({"control_image": CONTROL, "control": "pose"}, "control"),
        ({"image": IMAGE, "strength": 0.1}, "strength"),
        ({"image": IMAGE, "num_inference_steps": 1}, "strength"),
        ({"image": IMAGE, "controlnet_conditioning_scale": 0.5}, "controlnet_conditioning_scale"),
    ],
)
def test_what_does_not_go_together_is_refused_by_field(
    fields: dict[str, Any], name: str, url: str
) -> None:
    pictures = {k: as_base64(v) for k, v in fields.items() if isinstance(v, Image.Image)}
    answer = post_json(url, {"prompt": "a", "num_inference_steps": 5, **fields, **pictures})
    assert answer.status == 400
    assert name in answer.error()["fields"]


def test_the_tasks_are_named_to_who_asks_for_another(url: str, pipelines: dict[str, Any]) -> None:
    answer = post_json(url, {"prompt": "a", "task": "upscaling"})
    assert answer.status == 400
    for name in pipelines:
        assert split_name(name)[0].partition("+")[0] in answer.error()["fields"]["task"]
