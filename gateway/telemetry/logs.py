"""The log: lines of text, or of JSON; one line a request, and nothing of what it sent."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

from gateway.telemetry.facts import Facts, current_facts

__all__ = ["JsonLines", "log_request", "set_up_logs"]

_access = logging.getLogger("gateway.access")
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def set_up_logs(log_format: str = "text") -> None:
    """Write what is logged from now on to standard error, as ``text`` or as ``json``."""
    logging.basicConfig(level=logging.INFO, format=_TEXT, stream=sys.stderr)
    formatter = JsonLines() if log_format == "json" else logging.Formatter(_TEXT)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def log_request(facts: Facts) -> None:
    """Write the line of a request that is over; none for probes and scrapes, which never end."""
    if facts.is_keyless:
        return
    _access.info(
        "%s %s %s %d %d ms key %s",
        *(facts.request_id, facts.method, facts.path),
        *(facts.status, round(1000 * facts.seconds), facts.key_name or "-"),
        extra={"facts": facts},
    )


class JsonLines(logging.Formatter):
    """Every record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`; that of a request has its parts as fields, not as a message."""
        line: dict[str, Any] = {
            "time": _time_text(record.created),
            "level": record.levelname,
            "logger": record.name,
        }
        facts = getattr(record, "facts", None)
        if isinstance(facts, Facts):
            line.update(_fields(facts))
        else:
            line["message"] = record.getMessage()
            if (current := current_facts()) is not None:
                line["request_id"] = current.request_id
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=True)


def _time_text(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def _fields(facts: Facts) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "request_id": facts.request_id,
        "method": facts.method,
        "path": facts.path,
        "status": facts.status,
        "ms": round(1000 * facts.seconds),
    }
    if facts.key_name:
        fields["key"] = facts.key_name
    if facts.code:
        fields["error"] = facts.code
    if facts.has_left:
        fields["client_left"] = True
    if facts.trace_id:
        fields["trace_id"] = facts.trace_id
    if facts.model:
        fields |= {
            "model": facts.model,
            "waited_ms": round(1000 * facts.waited_s),
            "instances": facts.instances,
            "upstream_ids": facts.upstream_ids,
            "resent": facts.num_resent,
        }
    return fields
