"""Back-pressure: how many requests may wait, and what those beyond are told."""

from __future__ import annotations

from tests.support.pipelines import build
from tests.support.services import Make, error_of, finish, open_request, statuses, tick


def test_a_full_queue_says_when_to_come_back(make: Make) -> None:
    service = make(max_rows=4, max_images=1, max_waiting=2)
    for index in range(5):  # two run, two wait
        open_request(service, f"c{index}")
    replies = service.take_replies()
    assert statuses(replies) == {"c4": 503}
    assert int(replies["c4"].headers["Retry-After"]) >= 1
    assert error_of(replies["c4"])["code"] == "queue_full"
    assert [r.status for r in finish(service).values()] == [200] * 4
    assert service.load.is_idle


def test_a_request_that_must_be_alone_has_no_second_beside_it(make: Make) -> None:
    pipeline = build("stable_diffusion_pag")
    service = make(pipeline=pipeline, max_rows=16, max_images=1, max_waiting=1)
    for index in range(4):  # one runs, one waits
        open_request(service, f"c{index}")
        tick(service)
    assert statuses(service.take_replies()) == {"c2": 503, "c3": 503}
    assert [r.status for r in finish(service).values()] == [200] * 2


def test_requests_that_fit_at_once_do_not_wait(make: Make) -> None:
    service = make(max_rows=8, max_images=1, max_waiting=0)
    for index in range(5):
        open_request(service, f"c{index}")
    assert service.take_replies().keys() == {"c4"}
    assert len(finish(service)) == 4


def test_a_request_larger_than_the_queue_is_taken_in_alone(make: Make) -> None:
    service = make(max_rows=2, max_images=1, max_waiting=0)
    service.open("kserve", {"body": {"instances": ["a", "b", "c"]}}, {})
    open_request(service, "plain")
    assert statuses(finish(service)) == {"kserve": 200, "plain": 503}


def test_a_prompt_of_many_windows_is_refused_before_it_is_taken_in(make: Make) -> None:
    service = make(max_prompt_windows=2)
    open_request(service, "breaks", "a BREAK b BREAK c", prompt_weighting=True)
    open_request(service, "emoji", "\U0001f468\u200d" * 90)
    open_request(service, "negative", negative_prompt="a " * 200)
    open_request(service, "fits", "a BREAK b", prompt_weighting=True, negative_prompt="c " * 80)
    assert service.load.num_running + service.load.num_waiting == 1
    refused = service.take_replies()
    assert statuses(refused) == {"breaks": 400, "emoji": 400, "negative": 400}
    assert error_of(refused["breaks"])["fields"].keys() == {"prompt"}
    assert error_of(refused["negative"])["fields"].keys() == {"negative_prompt"}
    assert statuses(finish(service)) == {"fits": 200}
