"""Reads a body into a job: checked as far as the gateway can, its seed fixed."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from gateway.body import Sent
from gateway.gateway import Gateway
from gateway.image_request import num_previews, read_image_request
from gateway.jobs.job import NewJob
from gateway.jobs.kept import Summary, keep_request, keep_summary
from gateway.jobs.webhook_targets import WebhookTargets
from gateway.keys import Key
from gateway.openai_edits import is_edit, read_edit
from gateway.openai_fields import OPENAI_FIELDS, field_table
from handler.api.fields import FieldReader
from handler.api.schema import Field, Kind
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import summarise

__all__ = ["JOB_FIELDS", "check_idempotency_key", "fingerprint", "read_job"]

_MAX_PREVIEWS = 3
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_BOUNDS = HandlerConfig()

JOB_FIELDS: Mapping[str, Field] = field_table(
    Field(
        name="webhook_url",
        kind=Kind.TEXT,
        minimum=1,
        maximum=2000,
        meaning="the job is posted there when it has ended; its host must be allowed",
    ),
    replace(
        OPENAI_FIELDS["partial_images"],
        default=_MAX_PREVIEWS,
        meaning="how many previews each picture has while it is drawn",
    ),
)


def check_idempotency_key(sent: str | None) -> None:
    """Raise InvalidRequest where the header is not one that can be kept."""
    if sent is not None and not _KEY.fullmatch(sent):
        problem = "is not 1 to 255 printable ASCII characters without spaces"
        raise InvalidRequest(f"Idempotency-Key {problem}", {"Idempotency-Key": problem})


def fingerprint(sent: Sent) -> str:
    """The same for the same fields and files, however they were encoded."""
    digest = hashlib.sha256(json.dumps(sent.fields, sort_keys=True, default=str).encode("ascii"))
    for name, files in sorted(sent.files.items()):
        for content in files:
            digest.update(f"\n{json.dumps(name)} {len(content)}\n".encode("ascii"))
            digest.update(content)
    return digest.hexdigest()


async def read_job(
    gateway: Gateway,
    sent: Sent,
    key: Key | None,
    targets: WebhookTargets,
    *,
    base_url: str,
    idempotency_key: str | None,
) -> NewJob:
    """Check what a client sent as far as the gateway can.

    Raises:
        RequestError: as for a request whose picture is waited for, and where its webhook may not be
            sent.
    """
    reader = FieldReader(sent.fields, allow_text=sent.is_form)
    webhook_url = reader.read(JOB_FIELDS["webhook_url"], _BOUNDS)
    asked = reader.read(JOB_FIELDS["partial_images"], _BOUNDS)
    if reader.boolean("stream"):
        reader.report("stream", "a job is asked for by GET /v1/jobs/ID; leave it out")
    if webhook_url is not None and (problem := targets.problem_of(str(webhook_url))):
        reader.report("webhook_url", problem)
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    rest = Sent(reader.rest(), sent.is_form, sent.files)
    if is_edit(rest):
        request = await read_edit(gateway, rest, key)
    else:
        request = read_image_request(rest, gateway.fleet, gateway.settings, key)
    summary = Summary(
        request.num_images,
        request.seed,
        request.output_format,
        request.response_format,
        base_url,
    )
    previews = num_previews(
        _MAX_PREVIEWS if asked is None else cast(int, asked), request.model.config.handler
    )
    return NewJob(
        id=f"job_{secrets.token_hex(16)}",
        key_name="" if key is None else key.name,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint(sent),
        model=request.model.name,
        request=keep_request(replace(request, is_stream=True, num_partial_images=previews)),
        summary=keep_summary(summary),
        webhook_url=None if webhook_url is None else str(webhook_url),
    )
