"""TorchServe's own log lines inside the worker, kept to one line each."""

from __future__ import annotations

import logging

__all__ = ["shorten_torchserve_logs"]

# Where TorchServe decodes what a client sent. It logs a traceback a request that is not JSON or
# not UTF-8, which says less than the reply to that client does.
_DECODER = "otf_message_handler"


def shorten_torchserve_logs() -> None:
    """Leave the tracebacks about clients' input out of the log, in this process and for good."""
    root = logging.getLogger()
    if _without_traceback not in root.filters:
        root.addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.module == _DECODER:
        record.exc_info = record.exc_text = None
    return True
