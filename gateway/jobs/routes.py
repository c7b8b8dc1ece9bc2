"""POST /v1/jobs and what is asked of a job later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from gateway.body import read_sent
from gateway.door import Call
from gateway.gateway import Gateway
from gateway.jobs.job import ENDED, Drawn, Job, State
from gateway.jobs.kept import read_summary
from gateway.jobs.replies import job_json
from gateway.jobs.requests import check_idempotency_key, fingerprint, read_job
from gateway.json_replies import json_response
from gateway.picture_store import MEDIA_TYPES
from gateway.picture_urls import base_url
from handler.errors import NotFound

__all__ = ["routes"]

_POLL_AFTER_S = 1


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""
    jobs = gateway.jobs

    async def create(call: Call) -> Response:
        idempotency_key = call.request.headers.get("idempotency-key")
        check_idempotency_key(idempotency_key)
        sent = await read_sent(await gateway.door.read_body(call), call.request.headers)
        # Before anything that may have changed since: a client that asks again gets its job.
        if idempotency_key is not None:
            known = await jobs.store.find(call.key_name, idempotency_key, fingerprint(sent))
            if known is not None:
                return await _accepted(call, known)
        new = await read_job(
            gateway,
            sent,
            call.key,
            jobs.targets,
            base_url=base_url(gateway.settings, call.request),
            idempotency_key=idempotency_key,
        )
        job, is_new = await jobs.store.add(new)
        if is_new:
            jobs.runner.wake()
        return await _accepted(call, job)

    async def _accepted(call: Call, job: Job) -> Response:
        # Whoever posts it again, for the first reply was lost, may find it ended.
        headers = {"Location": f"/v1/jobs/{job.id}", **_until_ended(job)}
        return json_response(await _content(call, job), 202, headers)

    async def show(call: Call) -> Response:
        return await _reply(call, await _own(call))

    async def cancel(call: Call) -> Response:
        job = await _own(call)
        if job.state not in ENDED:
            await jobs.store.cancel(job.id)
            jobs.cancelled(job.id)
            job = await _own(call)
        return await _reply(call, job)

    async def picture(call: Call) -> Response:
        name = call.request.path_params["name"]
        content = await jobs.store.picture(call.request.path_params["id"], name)
        if content is None:
            raise NotFound("there is no such picture, or not any more")
        headers = {
            "Cache-Control": "private, max-age=3600",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'",
        }
        return Response(content, headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])

    async def _own(call: Call) -> Job:
        """The job of the path. Raises: NotFound, also where it is another key's."""
        job = await jobs.store.get(call.request.path_params["id"])
        if job is None or job.key_name != call.key_name:
            raise NotFound("there is no such job, or not any more", {"id": "unknown"})
        return job

    async def _reply(call: Call, job: Job) -> Response:
        return json_response(await _content(call, job), 200, _until_ended(job))

    async def _content(call: Call, job: Job) -> dict[str, Any]:
        """A job with its pictures. Raises: NotFound, where these have just been forgotten."""
        pictures: Sequence[Drawn] = ()
        is_inline = read_summary(job.summary).response_format == "b64_json"
        if job.state is State.SUCCEEDED and is_inline:
            pictures = await jobs.store.pictures(job.id)
            if not pictures:
                raise NotFound("there is no such job any more", {"id": "unknown"})
        return job_json(
            job,
            expires_s=gateway.settings.jobs.expires_s,
            base_url=base_url(gateway.settings, call.request),
            pictures=pictures,
            progress=jobs.runner.progress(job.id),
        )

    route = gateway.door.route
    return [
        route("/v1/jobs", create, ["POST"]),
        route("/v1/jobs/{id}", show, takes_place=False),
        route("/v1/jobs/{id}", cancel, ["DELETE"], takes_place=False),
        # Its name is unguessable: whoever knows the URL may fetch it.
        route("/v1/jobs/{id}/pictures/{name}", picture, keyless=True),
    ]


def _until_ended(job: Job) -> dict[str, str]:
    return {} if job.state in ENDED else {"Retry-After": str(_POLL_AFTER_S)}
