"""Cancelling over the wire: who gets what, and under which names."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.client import post_json
from tests.support.traffic import ENDLESS, cancel, watching


@pytest.mark.parametrize("where", ["field", "header"])
def test_the_cancelled_gets_499_and_the_canceller_200(url: str, where: str) -> None:
    fields = {**ENDLESS, "request_id": "mine"} if where == "field" else ENDLESS
    arguments = ("-H", "X-Request-Id: mine") if where == "header" else ()
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(post_json, url, fields, *arguments)
        canceller = cancel(url, "mine")
        assert canceller.status == 200
        assert canceller.json() == {"cancelled": "mine"}
        assert long.result().status == 499
        assert long.result().error()["code"] == "cancelled"


def test_what_a_reply_shows_as_its_id_is_what_cancel_takes(url: str, tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    with watching(url, {**ENDLESS, "request_id": "mine"}, "-D", str(headers)) as watched:
        shown = [
            line.split(":", 1)[1].strip()
            for line in headers.read_text().splitlines()
            if line.lower().startswith("x-request-id:")
        ]
        assert len(shown) >= 1
        assert len(set(shown)) == 1
        assert cancel(url, shown[0]).json() == {"cancelled": shown[0]}
        assert watched.events()[-1][1]["status"] == 499


def test_a_plain_reply_and_an_error_show_one_id_each(url: str) -> None:
    answers = [post_json(url, {"prompt": "a", "request_id": "mine"}), post_json(url, {})]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    # Both are answered: nothing is there to cancel.
    assert {post_json(url, {"cancel": i}).status for i in (*ids, "mine")} == {404}


def test_a_live_id_is_taken_and_then_free_again(url: str) -> None:
    with watching(url, {**ENDLESS, "request_id": "taken"}):
        duplicate = post_json(url, {"prompt": "a heart", "request_id": "taken"})
        assert duplicate.status == 409
        assert "request_id" in duplicate.error()["fields"]
        assert cancel(url, "taken").status == 200
    assert post_json(url, {"prompt": "a heart", "request_id": "taken"}).status == 200


def test_cancelling_nothing_is_404(url: str) -> None:
    answer = post_json(url, {"cancel": "nobody"})
    assert answer.status == 404
    assert answer.error()["code"] == "not_found"


def test_cancelling_frees_the_rows_for_those_that_wait(url: str) -> None:
    """Twice four guided pictures fill the sixteen rows; who comes then waits for one of them."""
    first, second = ({**ENDLESS, "request_id": f"full-{index}"} for index in range(2))
    with ThreadPoolExecutor(1) as thread, watching(url, first) as watched, watching(url, second):
        waiting = thread.submit(post_json, url, {"prompt": "a heart", "num_inference_steps": 2})
        assert post_json(url, {"prompt": "a heart", "deadline_s": 0.5}).status == 504
        assert not waiting.done()
        assert cancel(url, "full-0").status == 200
        assert waiting.result().status == 200
        assert watched.events()[-1][1]["status"] == 499
        assert cancel(url, "full-1").status == 200
