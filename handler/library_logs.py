"""The one place that quiets the logs and progress bars of diffusers, transformers and the hub.

`quiet_for_good` is the worker's: pipelines warn of truncated prompts by quoting them, and progress
bars are for terminals. `quiet_libraries` is for a while, where the libraries are called with what
no user asked for, or report in tables what we report in a line. `hub_bars_on_terminals` is for
downloads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL, ERROR
from types import ModuleType

__all__ = ["hub_bars_on_terminals", "quiet_for_good", "quiet_libraries"]


def quiet_for_good() -> None:
    """Let the libraries log errors only, and draw no progress bars, for as long as we run."""
    for library in _libraries():
        if library.get_verbosity() != ERROR:  # setting it makes all loggers forget what they know
            library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def quiet_libraries(*, are_errors_logged: bool = True) -> Iterator[None]:
    """Let the libraries log errors only, and draw no progress bars, within the context.

    Not even errors where those are raised too, unless `are_errors_logged`.
    """
    libraries = _libraries()
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    quiet_for_good()
    if not are_errors_logged:
        for library in libraries:
            library.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        for library, (verbosity, had_bars) in zip(libraries, before, strict=True):
            if library.get_verbosity() != verbosity:
                library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()


@contextmanager
def hub_bars_on_terminals() -> Iterator[None]:
    """Let the hub's client draw progress bars on a terminal only, within the context."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr.isatty():
        yield
    else:
        with disable_progress_bars():
            yield


def _libraries() -> tuple[ModuleType, ModuleType]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    return diffusers_logging, transformers_logging
