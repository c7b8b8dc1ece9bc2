"""Requests that run out of time: 504 for them alone, and their rows are free."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from tests.support.client import post_json
from tests.support.traffic import ENDLESS, SSE

SHORT: dict[str, object] = {"prompt": "a heart", "seed": 3, "num_inference_steps": 3}


def test_a_request_that_runs_out_of_time_gets_504(url: str) -> None:
    started_s = time.monotonic()
    answer = post_json(url, {**ENDLESS, "deadline_s": 0.5})
    assert answer.status == 504
    assert answer.error()["code"] == "deadline_exceeded"
    assert 0.4 < time.monotonic() - started_s < 20


def test_others_go_on_and_the_rows_are_free(url: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        # 4 x 8 rows: two run, two wait, none of them to its end.
        late = [
            threads.submit(post_json, url, {**ENDLESS, "deadline_s": 1 + index / 10})
            for index in range(4)
        ]
        shorts = [threads.submit(post_json, url, {**SHORT, "deadline_s": 60}) for _ in range(2)]
        assert [future.result().status for future in late] == [504] * 4
        assert [future.result().status for future in shorts] == [200, 200]
    assert post_json(url, SHORT).status == 200


def test_all_of_a_kserve_call_has_one_deadline(url: str) -> None:
    steps = [{"prompt": "a", "num_inference_steps": n} for n in (1, 1000)]
    body = {"instances": steps, "parameters": {"height": 768, "width": 768}, "deadline_s": 0.5}
    answer = post_json(url, body)
    assert answer.status == 504
    assert answer.error()["code"] == "deadline_exceeded"


def test_a_stream_ends_with_the_error(url: str) -> None:
    answer = post_json(url, {**ENDLESS, "deadline_s": 2}, *SSE)
    if answer.status == 504:  # on a machine so slow that the stream had not begun
        assert answer.error()["code"] == "deadline_exceeded"
        return
    assert answer.status == 200
    last = answer.body.decode("ascii").strip().split("\n\n")[-1]
    assert last.startswith("event: error\n")
    assert '"status":504' in last


def test_a_deadline_that_holds_changes_nothing(url: str) -> None:
    assert post_json(url, {**SHORT, "deadline_s": 60}).body == post_json(url, SHORT).body
