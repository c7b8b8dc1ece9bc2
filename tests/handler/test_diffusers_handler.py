"""The handler between TorchServe's own worker code and a tiny pipeline in a folder."""

from __future__ import annotations

import gc
import io
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from PIL import Image

from handler.diffusers_handler import DiffusersHandler
from handler.errors import ConfigError, InvalidRequest
from handler.service.draining import DRAIN_FILE_VARIABLE, Drain
from tests.support.frontend import CONTINUOUS, QUICK, Frontend, Posted
from tests.support.pipelines import build

Server = tuple[Frontend, DiffusersHandler]
Serve = Callable[..., Server]
SSE = {"Accept": "text/event-stream"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model_dir as TorchServe unpacks it, with the pipeline as a folder."""
    folder = tmp_path_factory.mktemp("model")
    build("stable_diffusion").save_pretrained(folder / "model")
    return folder


@pytest.fixture
def serve(model_folder: Path) -> Iterator[Serve]:
    """Start a handler with these settings of its section."""

    def start(top: Mapping[str, Any] = CONTINUOUS, **settings: Any) -> Server:
        handler = DiffusersHandler()
        config = {**top, "handler": {**QUICK, **settings}}
        frontend = Frontend(handler, model_folder, config)
        handler.initialize(frontend.context)
        return frontend, handler

    yield start
    gc.unfreeze()  # of a process that goes on with other tests


def prompt(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "seed": 7, **fields}


def pixels(posted: Posted) -> np.ndarray[Any, Any]:
    assert posted.status == 200, posted.body
    return np.asarray(Image.open(io.BytesIO(posted.body)))


def draw_alone(
    folder: Path, *, seed: int, scheduler: str | None = None, **kwargs: Any
) -> np.ndarray[Any, Any]:
    """The same from diffusers alone, without anything of ours."""
    pipeline = DiffusionPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    (picture,) = pipeline("a cat", height=32, width=32, generator=generator, **kwargs).images
    return np.asarray(picture).astype(int)


def test_the_contract_that_torchserve_users_know(serve: Serve) -> None:
    _, handler = serve()
    arrays = handler.postprocess(
        handler.inference(handler.preprocess([{"body": "A photograph of a cat"}]))
    )
    assert [(a.shape, a.dtype) for a in arrays] == [((32, 32, 3), np.uint8)]
    assert handler.initialized
    assert handler.pipeline is not None


def test_collections_of_garbage_leave_out_what_was_loaded(serve: Serve) -> None:
    gc.unfreeze()
    _, handler = serve()
    assert gc.get_freeze_count() > 10_000
    kept = handler.pipeline.unet.conv_in
    assert not any(each is kept for each in gc.get_objects())
    gc.unfreeze()
    assert any(each is kept for each in gc.get_objects())


def test_preprocess_gives_the_prompts_in_order(serve: Serve) -> None:
    _, handler = serve()
    bodies = [{"data": b"one"}, {"body": {"instances": ["two", "three"]}}, {"body": "four"}]
    assert handler.preprocess(bodies) == ["one", "two", "three", "four"]
    with pytest.raises(InvalidRequest, match="curl"):
        handler.preprocess([{}])


def test_before_initialize_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="initialize"):
        DiffusersHandler().handle([], None)


def test_requests_join_while_others_run_and_leave_when_done(serve: Serve) -> None:
    frontend, _ = serve(cycle_ms=0)
    long = frontend.post(prompt(num_inference_steps=40))
    frontend.cycle()
    short = frontend.post(prompt(num_inference_steps=2))
    frontend.run(until=lambda: short.is_answered)
    assert not long.is_answered
    frontend.run()
    assert (long.status, short.status) == (200, 200)
    assert long.reply_headers["content-type"] == "image/png"
    assert long.reply_headers["X-Request-Id"] == long.request_id


def test_a_picture_equals_the_pipelines_own_whoever_else_is_in_flight(
    serve: Serve, model_folder: Path
) -> None:
    frontend, _ = serve(cycle_ms=0)
    mixed: list[dict[str, Any]] = [
        {"seed": 1, "num_inference_steps": 5, "guidance_scale": 7.5},
        {"seed": 2, "num_inference_steps": 3, "guidance_scale": 1.0},
        {"seed": 3, "num_inference_steps": 4, "guidance_scale": 3.0, "scheduler": "euler_a"},
    ]
    posted = [frontend.post(prompt(**fields)) for fields in mixed]
    frontend.run()
    pictures = [pixels(one).astype(int) for one in posted]
    for index, fields in enumerate(mixed):
        alone = draw_alone(model_folder, **fields)
        assert abs(alone - pictures[index]).max() <= 1
        # Would a neighbour's picture have passed, or this one with another scheduler?
        assert abs(alone - pictures[index - 1]).max() > 1
        other = "euler_a" if "scheduler" not in fields else None
        assert abs(draw_alone(model_folder, **fields | {"scheduler": other}) - alone).max() > 1


def test_bad_requests_do_not_disturb_their_neighbours(serve: Serve) -> None:
    frontend, _ = serve()
    bodies: list[object] = [
        prompt(),
        {},
        prompt(num_inference_steps=-1),
        None,
        17,
        prompt(),
        bytearray(b"\xff\xfe"),
        {"cancel": "nobody"},
        {"cancel": 3},
    ]
    posted = [frontend.post(body) for body in bodies]
    frontend.run()
    assert [p.status for p in posted] == [200, 400, 400, 400, 400, 200, 400, 404, 400]
    for p in posted:
        if p.status != 200:
            assert p.json()["error"].keys() == {"code", "message", "fields"}
    assert posted[0].body == posted[5].body


def test_a_form_without_a_field_is_told_how_to_send(serve: Serve) -> None:
    frontend, _ = serve()
    lost = frontend.post({}, form=True)
    frontend.run()
    assert lost.status == 400
    assert "curl" in lost.json()["error"]["fields"]["prompt"]


@pytest.mark.parametrize("top", [CONTINUOUS, {}], ids=["continuous", "batches"])
def test_grpc_gets_last_chunks_and_http_beside_it_plain_replies(
    serve: Serve, top: Mapping[str, Any]
) -> None:
    """`Frontend` checks which of them each reply is."""
    frontend, _ = serve(top=top)
    fields = {"prompt": b"a cat", "seed": b"7", "num_inference_steps": b"9"}
    drawn = frontend.post(fields, grpc=True)
    # This one is answered before anything is drawn, in the first cycle.
    refused = frontend.post({**fields, "num_inference_steps": b"0"}, grpc=True)
    nothing = frontend.post({}, grpc=True)
    plain, stream = frontend.post(prompt(num_inference_steps=9)), frontend.post(prompt(), SSE)
    frontend.run()
    assert [p.status for p in (drawn, refused, nothing)] == [200, 400, 400]
    assert refused.json()["error"]["fields"].keys() == {"num_inference_steps"}
    assert drawn.body == plain.body
    assert [name for name, _ in stream.events()][-1] == "image"


def test_a_worker_drains_while_the_file_that_asks_for_it_is_there(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "drain.json"
    monkeypatch.setenv(DRAIN_FILE_VARIABLE, str(file))
    frontend, _ = serve(cycle_ms=0)
    plain = frontend.post(prompt(num_inference_steps=900))
    stream = frontend.post(prompt(num_inference_steps=900), SSE)
    short = frontend.post(prompt())
    frontend.cycle()
    Drain(time.monotonic() + 1000, "mine").write(file)
    refused = [frontend.post(prompt()), frontend.post(prompt(), SSE)]
    over_grpc = frontend.post({"prompt": b"a cat"}, grpc=True)
    frontend.run(until=lambda: short.is_answered)
    assert [p.status for p in (short, *refused, over_grpc)] == [200, 503, 503, 503]
    assert int(refused[0].reply_headers["Retry-After"]) > 1000
    # Two that stop the server one after the other: the later one says until when.
    Drain(time.monotonic(), "mine").write(file)
    asked = frontend.post({"cancel": "mine"})
    frontend.run()
    assert asked.json() == {"live": 2}
    assert plain.status == 503
    assert [name for name, _ in stream.events()][-1] == "error"
    file.unlink()
    again = frontend.post(prompt())
    frontend.run()
    assert again.status == 200


def test_an_empty_batch_is_no_work(serve: Serve) -> None:
    frontend, _ = serve()
    assert frontend.cycle() == []


def test_without_continuous_batching_a_batch_runs_to_its_end(serve: Serve) -> None:
    frontend, _ = serve(top={})
    plain = frontend.post(prompt(num_inference_steps=30))
    stream = frontend.post(prompt(num_inference_steps=4), SSE)
    bad = frontend.post({})
    answered = frontend.cycle()
    assert set(answered) == {plain, stream, bad}
    assert (plain.status, stream.status, bad.status) == (200, 200, 400)
    assert stream.reply_headers["content-type"] == "text/event-stream"
    assert [name for name, _ in stream.events()] == ["step"] * 4 + ["image"]
    again = frontend.post(prompt())
    frontend.cycle()
    assert again.status == 200


def test_a_stream_gives_its_events_while_others_run(serve: Serve) -> None:
    frontend, _ = serve(cycle_ms=0)
    plain = frontend.post(prompt(num_inference_steps=6))
    stream = frontend.post(prompt(num_inference_steps=6, previews=3), SSE)
    frontend.cycle()
    assert stream.is_streaming
    assert stream.reply_headers["content-type"] == "text/event-stream"
    assert not plain.chunks
    frontend.run()
    names = [name for name, _ in stream.events()]
    assert names == [*["step"] * 3, "preview", *["step"] * 3, "preview", "image"]
    steps = [data for name, data in stream.events() if name == "step"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert {s["num_steps"] for s in steps} == {6}
    assert len(stream.chunks) > 3


def test_a_streams_later_bodies_carry_only_its_id(serve: Serve) -> None:
    """`Frontend` sends {} for them: were it read, it would be a request without a prompt."""
    frontend, _ = serve(cycle_ms=0)
    stream = frontend.post(prompt(num_inference_steps=5), SSE)
    frontend.run()
    assert stream.status == 200
    assert [name for name, _ in stream.events()][-1] == "image"


@pytest.mark.parametrize("deadline_s", [1e-3, 1e-2])
def test_a_stream_may_end_in_its_first_cycle(serve: Serve, deadline_s: float) -> None:
    frontend, _ = serve(cycle_ms=10_000)
    late = frontend.post(prompt(num_inference_steps=900, deadline_s=deadline_s, stream=True))
    quick = frontend.post(prompt(num_inference_steps=1, stream=True))
    frontend.run()
    assert quick.status == 200
    assert [name for name, _ in quick.events()] == ["step", "image"]
    # Its status was not frozen yet, so it says what happened.
    assert late.status == 504
    assert late.reply_headers["content-type"] == "application/json"
    assert late.json()["error"]["code"] == "deadline_exceeded"


def test_an_invalid_stream_is_an_ordinary_error(serve: Serve) -> None:
    frontend, _ = serve()
    stream = frontend.post({"stream": True})
    frontend.run()
    assert stream.status == 400
    assert stream.reply_headers["content-type"] == "application/json"


def test_a_client_that_goes_away_is_cancelled_in_the_next_cycle(serve: Serve) -> None:
    frontend, handler = serve(cycle_ms=0)
    gone = frontend.post(prompt(num_inference_steps=900, request_id="gone"), SSE)
    other = frontend.post(prompt(num_inference_steps=50))
    frontend.cycle()
    assert handler.service.load.num_running == 2
    frontend.disconnect(gone)
    frontend.cycle()
    assert handler.service.load.num_running == 1
    reuse = frontend.post(prompt(request_id="gone"))
    frontend.run()
    assert (other.status, reuse.status) == (200, 200)


def test_when_torchserve_falls_silent_nothing_is_held(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """The last client has left its stream, so that no cycle comes to say so."""
    frontend, handler = serve(cycle_ms=0)
    gone = frontend.post(prompt(num_inference_steps=900), SSE)
    frontend.cycle()
    frontend.disconnect(gone)
    ours, theirs = socket.socketpair()
    frontend.context.cl_socket = ours
    # Something is on its way: not silent after all.
    theirs.send(b"I")
    handler.on_silence()
    assert handler.service.load.num_running == 1
    ours.recv(1)
    # The watchdog may time out when TorchServe's next message has just been unpacked.
    frontend.context.request_ids = {0: "next"}
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        handler.on_silence()
    assert frontend.context.request_ids == {0: "next"}
    assert handler.service.load.num_running == 0
    assert "diffusers_rows_in_flight.Count:0.0" in caplog.text
    assert "outcome:disconnected" in caplog.text
    after = frontend.post(prompt())
    frontend.run()
    assert after.status == 200
    ours.close()
    theirs.close()


def test_a_stream_that_was_given_up_in_a_pause_is_told_so_and_ends(serve: Serve) -> None:
    """TorchServe was paused without letting go: its clients are still there afterwards."""
    frontend, handler = serve(cycle_ms=0)
    stream = frontend.post(prompt(num_inference_steps=900), SSE)
    plain = frontend.post(prompt(num_inference_steps=4))
    frontend.cycle()
    ours, theirs = socket.socketpair()
    frontend.context.cl_socket = ours
    handler.on_silence()
    frontend.run()
    ours.close()
    theirs.close()
    kind, data = stream.events()[-1]
    assert (kind, data["status"]) == ("error", 503)
    # TorchServe sends the whole of a plain request in every cycle, so it just begins anew.
    assert plain.status == 200
    # Its client was told, once: the same id is a new request again.
    again = frontend.post(prompt(), request_id=stream.request_id)
    frontend.run()
    assert again.status == 200


def test_an_id_may_come_back_after_its_answer(serve: Serve) -> None:
    frontend, _ = serve()
    first = frontend.post(prompt(), request_id="same")
    frontend.run()
    second = frontend.post(prompt(), SSE, request_id="same")
    frontend.run()
    third = frontend.post({}, request_id="same")
    frontend.run()
    assert (first.status, second.status, third.status) == (200, 200, 400)


def test_stopping_criteria_are_fresh_in_every_cycle(serve: Serve) -> None:
    frontend, _ = serve(cycle_ms=0)
    frontend.context.stopping_criteria = [lambda _: True] * 9
    frontend.post(prompt(num_inference_steps=5))
    frontend.cycle()
    first = frontend.context.stopping_criteria
    assert [criterion(b"") for criterion in first] == [None]
    frontend.post(prompt(), SSE)
    frontend.cycle()
    assert frontend.context.stopping_criteria is not first
    assert len(frontend.context.stopping_criteria) == 2
    frontend.run()


def test_inference_leaves_requests_in_flight_where_they_are(serve: Serve) -> None:
    frontend, handler = serve(cycle_ms=0)
    waiting = [frontend.post(prompt(num_inference_steps=n)) for n in (1, 2, 30)]
    frontend.cycle()
    (picture,) = handler.inference(["a dog"])
    assert picture.size == (32, 32)
    frontend.run()
    assert [p.status for p in waiting] == [200, 200, 200]


def test_cancelling_by_what_a_reply_shows(serve: Serve) -> None:
    frontend, _ = serve(cycle_ms=0)
    target = frontend.post(prompt(num_inference_steps=900))
    frontend.cycle()
    canceller = frontend.post({"cancel": target.request_id})
    frontend.cycle()
    assert canceller.json() == {"cancelled": target.request_id}
    assert target.status == 499
    assert target.reply_headers["X-Request-Id"] == target.request_id


def test_metrics_are_emitted_when_all_is_done(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    frontend, _ = serve(cycle_ms=0)
    posted = frontend.post(prompt())
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        frontend.run()
    assert posted.status == 200
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("[METRICS]")]
    names = [line.removeprefix("[METRICS]").partition(".")[0] for line in lines]
    assert "diffusers_images_total" in names
    gauges = [line for line in lines if "diffusers_requests_in_flight" in line]
    assert gauges[-1].startswith("[METRICS]diffusers_requests_in_flight.Count:0.0|")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_prompts_are_never_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"secret{number}" for number in range(150)]
    with caplog.at_level(logging.DEBUG):
        frontend, _ = serve(cycle_ms=0, max_prompt_chars=8000, max_prompt_windows=100)
        text = " ".join(words) + " (secret:1.3)"
        posted = [
            frontend.post(prompt(prompt=text, negative_prompt=text)),
            frontend.post(prompt(prompt=text), SSE),
            frontend.post(prompt(prompt=text, num_inference_steps=0)),
            frontend.post(prompt(prompt=text, deadline_s=0.001, num_inference_steps=1000)),
        ]
        frontend.run()
    assert [p.status for p in posted][:3] == [200, 200, 400]
    assert "read as plain text" in posted[0].reply_headers["Warning"]
    captured = capfd.readouterr()
    assert caplog.text
    assert "secret" not in caplog.text + captured.out + captured.err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"handler": {"heigth": 512}}, "did you mean height"),
        ({"handler": {"height": 31}}, "height"),
        ({"handler": {**QUICK, "scheduler": "eulr"}}, "scheduler"),
        ({"handler": {**QUICK, "device": "gpu"}}, "device"),
        ({"handler": QUICK, **CONTINUOUS, "maxWorkers": 2}, "maxWorkers: 1"),
        ({"handler": QUICK, "continuousBatching": True}, "minWorkers: 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_configuration_stops_the_start_with_one_clear_line(
    model_folder: Path,
    config: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = DiffusersHandler()
    frontend = Frontend(handler, model_folder, config)
    with pytest.raises(ConfigError):
        handler.initialize(frontend.context)
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert errors[0].getMessage().startswith("cannot serve this model: ")
    assert message in errors[0].getMessage()
    assert not handler.initialized


_PROCESS = """
import sys
from pathlib import Path
import torch
from handler.diffusers_handler import DiffusersHandler
from tests.support.frontend import CONTINUOUS, QUICK, Frontend
torch.set_num_threads(1)
handler = DiffusersHandler()
frontend = Frontend(handler, Path(sys.argv[1]), {**CONTINUOUS, "handler": QUICK})
handler.initialize(frontend.context)
posted = frontend.post({"prompt": "a cat", "seed": 7})
frontend.run()
sys.stdout.buffer.write(posted.body)
"""


@pytest.mark.slow
def test_two_processes_may_start_from_one_folder_at_once(
    model_folder: Path, tmp_path: Path
) -> None:
    """As those of two servers, which each link the folder at a place of their own."""
    before = sorted(path for path in model_folder.rglob("*") if path.suffix != ".yaml")
    both = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(model_folder)
        command = [sys.executable, "-c", _PROCESS, str(tmp_path / name / "model")]
        both.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(b"\x89PNG")
    assert sorted(p for p in model_folder.rglob("*") if p.suffix != ".yaml") == before


def test_the_entry_module_has_the_one_class_that_torchserve_looks_for() -> None:
    import handler.torchserve_entry as entry

    defined = [
        value
        for value in vars(entry).values()
        if isinstance(value, type) and value.__module__ == entry.__name__
    ]
    assert defined == [entry.Entry]
    assert issubclass(entry.Entry, DiffusersHandler)
