from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from ts.protocol.otf_message_handler import _retrieve_input_data

from handler.torchserve_logs import shorten_torchserve_logs


class Wire:
    """What TorchServe's frontend sends for one field of a request."""

    def __init__(self, *parts: bytes) -> None:
        self._stream = io.BytesIO(b"".join(len(p).to_bytes(4, "big") + p for p in parts))

    def recv(self, num_bytes: int) -> bytes:
        return self._stream.read(num_bytes)


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = list(logger.filters)
    yield logger
    logger.filters = before


@pytest.mark.parametrize(
    ("content_type", "value"),
    [(b"application/json", b'{"prompt": "a secret'), (b"text/plain", b"\xff a secret")],
)
def test_what_is_not_json_or_text_is_one_line(
    root: logging.Logger, caplog: pytest.LogCaptureFixture, content_type: bytes, value: bytes
) -> None:
    shorten_torchserve_logs()
    shorten_torchserve_logs()
    received = _retrieve_input_data(Wire(b"body", content_type, value))
    assert bytes(received["value"]) == value
    (record,) = caplog.records
    assert record.exc_info is None
    assert "Failed" in record.message
    assert "secret" not in caplog.text


def test_other_tracebacks_stay(root: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    shorten_torchserve_logs()
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logging.exception("a message")
    assert "what went wrong" in caplog.text
