"""Whatever happens, every request is answered exactly once, and nothing of it is kept."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from handler.engine.ticket import Ticket
from handler.service.event_stream import EventStream
from handler.service.generation import GenerationService
from handler.service.live_requests import LiveRequest
from tests.support.clock import Clock
from tests.support.services import Make, finish, make_service, open_request, request, tick

MAX_ROWS = 6


def of_requests() -> weakref.WeakSet[Any]:
    """What there is of requests in this process now."""
    gc.collect()
    kinds = (LiveRequest, Ticket, EventStream)
    return weakref.WeakSet(each for each in gc.get_objects() if type(each) in kinds)


def test_a_hundred_requests_leave_no_reference(make: Make, quiet: None) -> None:
    service, before = make(max_rows=8, max_images=1), of_requests()
    endings = ["a cat", "crash late", "crash early", "no picture", "a cat"]
    for index in range(100):
        open_request(
            service,
            f"c{index}",
            endings[index % 5],
            stream=index % 3 == 0,
            num_inference_steps=2 if index % 5 else 30,
        )
        if index % 5 == 0:
            tick(service, 2)
            if index % 10 == 0:
                service.drop(f"c{index}")
            else:
                service.open(f"x{index}", {"body": {"cancel": f"c{index}"}}, {})
    in_flight = {type(each) for each in of_requests() - before}
    assert in_flight == {LiveRequest, Ticket, EventStream}
    assert len(finish(service)) >= 80
    assert not of_requests() - before


@pytest.fixture
def quiet() -> Iterator[None]:
    """Pytest keeps what is logged, and with it the frames of every traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("open"),
            st.fixed_dictionaries(
                {
                    "prompt": st.sampled_from(["a cat", "a dog", "refuse", "crash late", ""]),
                    "num_inference_steps": st.integers(1, 12),
                    "guidance_scale": st.sampled_from([1.0, 7.5]),
                    "stream": st.booleans(),
                    "deadline_s": st.sampled_from([None, 0.01, 3.0]),
                    "request_id": st.sampled_from([None, None, "x", "y"]),
                    "n": st.sampled_from([1, 1, 2]),
                }
            ),
        ),
        st.tuples(st.just("kserve"), st.lists(st.sampled_from(["a", "crash late"]), max_size=4)),
        st.tuples(st.just("cancel"), st.sampled_from(["x", "y", "0", "1", "2", "3"])),
        st.tuples(st.just("drop"), st.integers(0, 12)),
        st.tuples(st.just("tick"), st.integers(1, 6)),
        st.tuples(st.just("wait"), st.sampled_from([0.02, 5.0])),
        st.tuples(st.just("draw"), st.none()),
    ),
    max_size=25,
)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=ACTIONS)
def test_every_request_is_answered_exactly_once_whatever_happens(
    shared_service: tuple[GenerationService, Clock], actions: list[tuple[str, Any]]
) -> None:
    service, clock = shared_service
    opened: list[str] = []
    dropped: set[str] = set()
    answered: list[str] = []

    def opens(body: dict[str, Any]) -> None:
        opened.append(str(len(opened)))
        service.open(opened[-1], body, {})

    def collect() -> None:
        answered.extend(service.take_replies())

    for action, value in actions:
        if action == "open":
            fields = {k: v for k, v in value.items() if v is not None}
            opens({"body": {**fields, "output_format": "json"}})
        elif action == "kserve":
            opens({"body": {"instances": value}})
        elif action == "cancel":
            opens({"body": {"cancel": value}})
        elif action == "drop" and value < len(opened):
            collect()
            if opened[value] in service.live_ids:
                dropped.add(opened[value])
            service.drop(opened[value])
        elif action == "tick":
            tick(service, value)
            collect()
        elif action == "wait":
            clock.now_s += value
        elif action == "draw":
            service.draw([request(num_inference_steps=1)])
        assert service.load.num_rows <= MAX_ROWS
    service.advance()
    collect()
    assert sorted(answered) == sorted(set(opened) - dropped)
    assert not service.live_ids
    assert service.load.is_idle


@pytest.fixture(scope="module")
def shared_service() -> Iterator[tuple[GenerationService, Clock]]:
    """One for all examples: after each it must be as good as new."""
    clock = Clock()
    service = make_service(clock, max_rows=MAX_ROWS, max_images=2, max_waiting=3)
    yield service, clock
    service.close()
