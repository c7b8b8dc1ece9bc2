"""LoRAs by name through the service: read at first use, kept, and out when there is no room."""

from __future__ import annotations

import base64
import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.loading.lora_files import LoraReader
from handler.loading.pipeline import LoadedPipeline
from handler.service.generation import GenerationService
from tests.support.loras import kohya_lora
from tests.support.pipelines import build
from tests.support.services import HTTP, error_of, finish, tick

FAMILY = "stable_diffusion"
SIDE = 32
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 4,
    "max_num_inference_steps": 1000,
    "height": SIDE,
    "width": SIDE,
    "min_size_px": 8,
    "default_output": "npy",
}


def lora(seed: int) -> dict[str, torch.Tensor]:
    pipeline = build(FAMILY)
    return kohya_lora(
        {"lora_unet": pipeline.unet, "lora_te": pipeline.text_encoder}, seed=seed, alpha=3.0
    )


@contextmanager
def serving(folder: Path, pipeline: Any = None, **settings: Any) -> Iterator[GenerationService]:
    pipeline = pipeline or build(FAMILY)
    config = HandlerConfig(**{**SETTINGS, "lora_dir": str(folder), **settings})
    loaded = LoadedPipeline(
        pipeline, torch.device("cpu"), torch.float32, lora_reader=LoraReader(pipeline)
    )
    service = assemble(loaded, config, model_name="tiny", warm_up=False)
    try:
        yield service
    finally:
        service.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("ink", "style", "wool")):
        save_file(lora(seed), tmp_path / f"{name}.safetensors")
    return tmp_path


@functools.cache
def solo(seed: int | None, scale: float) -> Any:
    """What diffusers draws with the LoRA loaded by itself."""
    pipeline = build(FAMILY)
    if seed is not None:
        pipeline.load_lora_weights(lora(seed), adapter_name="a")
        pipeline.set_adapters(["a"], [scale])
    generator = torch.Generator().manual_seed(3)
    (image,) = pipeline(
        "a cat", num_inference_steps=4, height=SIDE, width=SIDE, generator=generator
    ).images
    return np.asarray(image, dtype=np.int16)


def ask(service: GenerationService, request_id: str, **fields: Any) -> None:
    body = {"prompt": "a cat", "seed": 3, **fields}
    service.open(request_id, {"body": body}, HTTP)


def picture(body: bytes) -> Any:
    return np.load(BytesIO(body)).astype(np.int16)


def test_requests_of_several_loras_at_once_are_each_as_alone(folder: Path) -> None:
    asked: Mapping[str, tuple[Any, int | None, float]] = {
        "none": ({}, None, 1.0),
        "object": ({"style": 0.8}, 1, 0.8),
        "list": (["ink"], 0, 1.0),
        "entries": ([{"name": "style", "scale": -0.5}], 1, -0.5),
        "text": ("ink:0.3", 0, 0.3),
    }
    with serving(folder) as service:
        for request_id, (loras, _, _) in asked.items():
            ask(service, request_id, loras=loras)
        ask(service, "left out")
        replies = finish(service)
        assert {reply.status for reply in replies.values()} == {200}
        for request_id, (_, seed, scale) in asked.items():
            drawn = picture(replies[request_id].body)
            assert np.abs(drawn - solo(seed, scale)).max() <= 1, request_id
        assert np.abs(picture(replies["left out"].body) - solo(None, 1.0)).max() <= 1
    assert np.abs(solo(1, 0.8) - solo(0, 0.8)).max() > 10
    assert np.abs(solo(1, 0.8) - solo(1, -0.5)).max() > 10


@pytest.mark.parametrize("num_threads", [1, 2])
def test_requests_with_a_lora_and_without_share_forwards_however_many_threads_there_are(
    folder: Path, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    rows: list[int] = []
    pipeline = build(FAMILY)
    pipeline.unet.conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with serving(folder, pipeline) as service:
        ask(service, "first", loras=["style"])
        ask(service, "second", loras=["ink"])
        finish(service)
        rows.clear()
        for request_id, loras in (("none", []), ("style", ["style"]), ("ink", ["ink"])):
            ask(service, request_id, loras=loras)
        replies = finish(service)
    assert {reply.status for reply in replies.values()} == {200}
    # All in every step; besides, some run alone where it is proved what may be merged.
    assert rows.count(3 * 2) == SETTINGS["num_inference_steps"]


def test_a_lora_that_comes_while_others_draw_changes_nothing_of_theirs(folder: Path) -> None:
    with serving(folder) as service:
        ask(service, "early")
        tick(service, 2)
        ask(service, "late", lora={"name": "wool"})
        replies = finish(service)
    assert np.abs(picture(replies["early"].body) - solo(None, 1.0)).max() <= 1
    assert np.abs(picture(replies["late"].body) - solo(2, 1.0)).max() <= 1


@pytest.mark.parametrize(
    ("loras", "words"),
    [
        ({"stile": 1}, "'stile': no such LoRA; did you mean style? there are ink, style, wool"),
        ({"style": 11}, "the scale of style is 11; allowed: -10 to 10"),
        ({"style": "x"}, "the scale of style is 'x', not a number"),
        ({"style": True}, "the scale of style is true, not a number"),
        (["style", "style:0.5"], "style is given twice"),
        ("../style", "'../style' is not the name of a LoRA"),
        (["https://example.org/a"], "is not the name of a LoRA"),
        (7, "7 names no LoRAs; send"),
        ([{"name": "style", "weight": 1}], "'weight' says nothing of a LoRA; send"),
        ({f"l{i}": 1 for i in range(17)}, "17 LoRAs are named; allowed are 16"),
    ],
)
def test_what_is_wrong_is_told_with_what_there_is(folder: Path, loras: Any, words: str) -> None:
    with serving(folder) as service:
        ask(service, "r", loras=loras, guidance_scale=-1)
        reply = finish(service)["r"]
    assert reply.status == 400
    fields = error_of(reply)["fields"]
    assert words in fields["loras"]
    assert "guidance_scale" in fields, "with all else that is wrong"


def test_a_file_that_does_not_fit_is_refused_by_its_keys(folder: Path) -> None:
    bad = {key.replace("lora_unet", "lora_unet_other"): each for key, each in lora(5).items()}
    save_file(bad, folder / "bad.safetensors")
    (folder / "torn.safetensors").write_bytes(b"no header")
    with serving(folder) as service:
        for name in ("bad", "torn"):
            ask(service, name, loras=[name])
        replies = finish(service)
    assert {reply.status for reply in replies.values()} == {400}
    assert "lora_unet_other_down" in error_of(replies["bad"])["fields"]["loras"]
    assert "torn cannot be used" in error_of(replies["torn"])["fields"]["loras"]


def test_what_the_engine_does_not_take_is_the_requests_own_error(folder: Path) -> None:
    with serving(folder) as service:
        service._engine.attach_lora(
            "ink", service._engine.prepare_lora({})
        )  # by that name there is one already
        ask(service, "r", loras=["ink"])
        ask(service, "other", loras=["wool"])
        replies = finish(service)
    assert (replies["r"].status, replies["other"].status) == (400, 200)
    assert "ink cannot be used: there is" in error_of(replies["r"])["fields"]["loras"]


def test_all_that_takes_its_time_is_done_beside_the_engines_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read once for all that ask, and never for long without giving way to the engine's thread."""
    at_work: list[tuple[str, int, float]] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            at_work.append((name, threading.get_ident(), sys.getswitchinterval()))
            return function(*args)

        return noted

    usual_s = sys.getswitchinterval()
    monkeypatch.setattr(LoraReader, "read_file", noting("read", LoraReader.read_file))
    monkeypatch.setattr(
        InFlightEngine, "prepare_lora", noting("place", InFlightEngine.prepare_lora)
    )
    with serving(folder) as service:
        for request_id in "abc":
            ask(service, request_id, loras=["wool"])
        replies = finish(service)
    assert {reply.status for reply in replies.values()} == {200}
    assert [name for name, *_ in at_work].count("read") == 1
    assert {name for name, *_ in at_work} == {"read", "place"}
    assert threading.get_ident() not in {thread for _, thread, _ in at_work}
    assert max(interval_s for *_, interval_s in at_work) <= usual_s / 10
    assert sys.getswitchinterval() == usual_s


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    read_file = LoraReader.read_file

    def noted(reader: LoraReader, path: Path) -> Any:
        names.append(path.stem)
        return read_file(reader, path)

    monkeypatch.setattr(LoraReader, "read_file", noted)
    return names


def test_the_longest_unused_goes_and_never_one_in_use(folder: Path, read: list[str]) -> None:
    with serving(folder, max_loras=2) as service:
        engine = service._engine
        for name in ("ink", "style", "ink", "wool", "ink", "wool"):
            ask(service, name, loras=[name])
            finish(service)
        assert read == ["ink", "style", "wool"], "style made room for wool"
        ask(service, "long", loras=["ink", "wool"], steps=900)
        tick(service, 2)
        while not engine.num_running:
            tick(service)
        ask(service, "third", loras=["style"])
        while "third" not in (replies := service.take_replies()):
            tick(service)
        assert replies["third"].status == 503
        assert "2 LoRAs are in use" in error_of(replies["third"])["message"]
        service.drop("long")
        ask(service, "again", loras=["style"])
        assert finish(service)["again"].status == 200


def test_one_that_is_larger_than_all_may_be_is_refused(folder: Path) -> None:
    with serving(folder, max_lora_bytes=1024) as service:
        ask(service, "r", loras=["ink"])
        reply = finish(service)["r"]
    assert reply.status == 400
    assert "max_lora_bytes allows 1024" in error_of(reply)["fields"]["loras"]


def test_more_than_there_may_be_at_a_time_are_refused_and_nobody_makes_room(
    folder: Path, read: list[str]
) -> None:
    """That would be told to try again for ever."""
    with serving(folder, max_loras=2) as service:
        for loras in (["wool"], ["ink", "style", "wool"], ["wool"]):
            ask(service, "r", loras=loras)
            reply = finish(service)["r"]
            if len(loras) == 1:
                assert reply.status == 200
            else:
                assert reply.status == 400
                problem = error_of(reply)["fields"]["loras"]
                assert problem == "3 are named; max_loras allows 2 at a time"
    assert read == ["wool"]


def test_those_that_are_too_large_together_are_refused(folder: Path, read: list[str]) -> None:
    size = sum(each.numel() * each.element_size() for each in lora(0).values())
    with serving(folder, max_lora_bytes=int(1.5 * size)) as service:
        statuses = []
        for loras in (["wool"], ["ink", "wool"], ["wool"], ["ink"]):
            ask(service, "r", loras=loras)
            reply = finish(service)["r"]
            statuses.append(reply.status)
            if len(loras) == 2:
                assert error_of(reply)["fields"]["loras"].startswith("ink, wool: ")
    assert statuses == [200, 400, 200, 200]
    assert read.count("wool") == 1, "it made room for nobody who was refused"


def test_a_file_that_is_being_written_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_file, is_written = LoraReader.read_file, True

    def read_and_write(reader: LoraReader, path: Path) -> Any:
        layers = read_file(reader, path)
        if is_written:
            os.utime(path, ns=(0, 0))
        return layers

    monkeypatch.setattr(LoraReader, "read_file", read_and_write)
    with serving(folder) as service:
        ask(service, "r", loras=["ink"])
        reply = finish(service)["r"]
        assert reply.status == 400
        assert "its file is being written" in error_of(reply)["fields"]["loras"]
        is_written = False
        ask(service, "r", loras=["ink"])
        assert finish(service)["r"].status == 200


def test_a_file_that_is_too_large_is_refused_without_being_read(folder: Path) -> None:
    with (folder / "huge.safetensors").open("wb") as file:
        file.truncate(10**12)
    with serving(folder, max_lora_bytes=10**9) as service:
        ask(service, "r", loras=["huge"])
        reply = finish(service)["r"]
    assert reply.status == 400
    assert "max_lora_bytes allows 1000000000" in error_of(reply)["fields"]["loras"]


def test_those_that_are_on_unnamed_are_told(folder: Path) -> None:
    with serving(folder, default_loras={"ink": 0.5}, default_output="json") as service:
        ask(service, "default")
        ask(service, "other", loras={"style": 1})
        ask(service, "none", loras={})
        replies = {name: json.loads(reply.body) for name, reply in finish(service).items()}
    assert replies["default"]["parameters"]["loras"] == {"ink": 0.5}
    assert replies["other"]["parameters"]["loras"] == {"style": 1.0}
    assert replies["none"]["parameters"]["loras"] == {}
    png = base64.b64decode(replies["default"]["images"][0])
    assert b"Lora: ink: 0.5" in png or b"ink: 0.5" in png
