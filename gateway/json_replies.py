"""Replies of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

__all__ = ["MEDIA_TYPE", "json_response"]

MEDIA_TYPE = "application/json"


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A reply of `content` as JSON."""
    return Response(json.dumps(content).encode("ascii"), status, headers, MEDIA_TYPE)
