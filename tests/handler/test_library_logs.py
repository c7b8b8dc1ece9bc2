"""The libraries' logs and progress bars: quiet for a while, or for good."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from handler.library_logs import hub_bars_on_terminals, quiet_for_good, quiet_libraries

LIBRARIES = (diffusers_logging, transformers_logging)
QUIET = [(diffusers_logging.ERROR, False)] * 2
LOUD = [(diffusers_logging.INFO, True)] * 2


def state() -> list[tuple[int, bool]]:
    return [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in LIBRARIES]


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """Both libraries log and draw bars, and are as they were when the test is over."""
    before = state()
    for library in LIBRARIES:
        library.set_verbosity_info()
        library.enable_progress_bar()
    yield
    for library, (verbosity, has_bars) in zip(LIBRARIES, before, strict=True):
        library.set_verbosity(verbosity)
        (library.enable_progress_bar if has_bars else library.disable_progress_bar)()


def test_they_are_quiet_for_a_while_and_then_as_they_were() -> None:
    with suppress(KeyError), quiet_libraries():
        assert state() == QUIET
        raise KeyError
    assert state() == LOUD


def test_they_are_quiet_for_good() -> None:
    quiet_for_good()
    with quiet_libraries():
        assert state() == QUIET
    assert state() == QUIET


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_hub_draws_bars_on_terminals_only(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not are_progress_bars_disabled()
    with hub_bars_on_terminals():
        assert are_progress_bars_disabled() != is_terminal
    assert not are_progress_bars_disabled()


def test_not_even_errors_are_logged_where_they_are_raised_too() -> None:
    names = ("diffusers.x", "transformers.x")
    with quiet_libraries(are_errors_logged=False):
        assert not any(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in names)
    assert all(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in names)
    assert state() == LOUD
