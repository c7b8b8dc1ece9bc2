"""Quiets the logs and progress bars of diffusers and transformers, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_prompts_out_of_the_log", "quiet_diffusers", "quiet_libraries"]


def keep_prompts_out_of_the_log() -> None:
    """Pipelines warn of truncated prompts by quoting them; progress bars are for terminals."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the libraries' progress bars, and transformers' tables, out of the log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in libraries:
        library.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for library in libraries:
            library.enable_progress_bar()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep warnings about sizes that nobody asked for out of the log."""
    from diffusers.utils import logging as diffusers_logging

    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
