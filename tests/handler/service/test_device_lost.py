"""A device that fails for good: everybody is told, nothing is drawn any more, the worker ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handler.diffusers_handler import EXIT_DEVICE_LOST
from handler.engine import InFlightEngine
from handler.errors import DeviceLost
from scripts.repository import REPOSITORY
from tests.support.clock import Clock
from tests.support.pipelines import build
from tests.support.services import (
    Faulty,
    error_of,
    faulty,
    finish,
    make_service,
    open_request,
    request,
    statuses,
    tick,
)

ASSERTED = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in the manual."


class Asserting(Faulty):
    """Its denoiser trips over the prompt "assert", and over everything from then on."""

    def encode_prompt(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        if prompt == "assert":
            hook = self.unet.register_forward_pre_hook(_fail)
            self.text_encoder.register_forward_pre_hook(_fail)
            assert hook is not None
        return super().encode_prompt(prompt, *args, **kwargs)


def _fail(*args: Any) -> None:
    raise RuntimeError(ASSERTED)


def asserting() -> Asserting:
    return Asserting(**build("stable_diffusion").components, requires_safety_checker=False)


def test_all_are_told_and_told_when_to_come_back(clock: Clock) -> None:
    service = make_service(clock, pipeline=asserting())
    open_request(service, "beside", num_inference_steps=50)
    tick(service, 3)
    open_request(service, "cause", "assert")
    replies = finish(service)
    assert statuses(replies) == {"beside": 503, "cause": 503}
    assert {error_of(reply)["code"] for reply in replies.values()} == {"device_lost"}
    assert all(int(reply.headers["Retry-After"]) > 1 for reply in replies.values())
    assert service.is_device_lost

    open_request(service, "late")
    assert statuses(finish(service)) == {"late": 503}
    with pytest.raises(DeviceLost):
        service.draw([request()])


def test_an_error_between_forwards_is_no_different(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device reports the assertion at any later call, such as one of the engine's own."""
    service = make_service(clock, pipeline=faulty())
    open_request(service, "one", num_inference_steps=50)
    tick(service, 3)
    monkeypatch.setattr(InFlightEngine, "step", _fail)
    assert statuses(finish(service)) == {"one": 503}
    assert service.is_device_lost


def test_an_ordinary_failure_loses_no_device(clock: Clock) -> None:
    service = make_service(clock, pipeline=faulty())
    open_request(service, "bad", "crash early")
    open_request(service, "good")
    assert statuses(finish(service)) == {"bad": 500, "good": 200}
    assert not service.is_device_lost


SCRIPT = """
import sys, time
from pathlib import Path
from handler.diffusers_handler import DiffusersHandler
from tests.support.frontend import CONTINUOUS, QUICK, Frontend

handler = DiffusersHandler()
frontend = Frontend(handler, Path(sys.argv[1]), {**CONTINUOUS, "handler": dict(QUICK)})
handler.initialize(frontend.context)

def fail(*args):
    raise RuntimeError("CUDA error: device-side assert triggered")

posted = frontend.post({"prompt": "a cat"})
handler.pipeline.unet.register_forward_pre_hook(fail)
frontend.run()
print(posted.status, posted.json()["error"]["code"], flush=True)
time.sleep(60)
"""


def test_the_worker_ends_once_it_has_told_its_clients(tmp_path: Path) -> None:
    build("stable_diffusion").save_pretrained(tmp_path / "model")
    worker = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert worker.stdout.strip().endswith("503 device_lost"), worker.stderr
    assert worker.returncode == EXIT_DEVICE_LOST
