"""The JSON of a job, as clients and webhooks get it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.jobs.job import ENDED, Drawn, Job, Progress
from gateway.jobs.kept import read_summary

__all__ = ["job_json"]


def job_json(
    job: Job,
    *,
    expires_s: float,
    base_url: str | None = None,
    pictures: Sequence[Drawn] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A job.

    Args:
        job: as the store knows it.
        expires_s: how long it is kept when it has ended.
        base_url: where its pictures are fetched; None: as its client reached the gateway.
        pictures: are put in as base64, where it was asked for so.
        progress: what is known of it beyond the store.
    """
    summary = read_summary(job.summary)
    progress = progress or job.progress
    content: dict[str, Any] = {
        "id": job.id,
        "object": "image.job",
        "state": job.state.value,
        "model": job.model,
        "n": summary.num_images,
        "seed": summary.seed,
        "created_at": int(job.created_s),
        "started_at": None if job.started_s is None else int(job.started_s),
        "finished_at": None if job.finished_s is None else int(job.finished_s),
        "expires_at": None if job.finished_s is None else int(job.finished_s + expires_s),
        "picture": progress.picture,
        "step": progress.step,
        "num_steps": progress.num_steps,
        "preview": None,
        "result": None,
        "error": None,
    }
    if progress.preview is not None and job.state not in ENDED:
        content["preview"] = base64.b64encode(progress.preview).decode("ascii")
    if job.error is not None:
        content["error"] = json.loads(job.error)
    if job.result is not None:
        base = (base_url or summary.base_url).rstrip("/")
        content["result"] = _result(
            json.loads(job.result), f"{base}/v1/jobs/{job.id}/pictures/", pictures
        )
    if job.webhook_state is not None:
        content["webhook"] = {"state": job.webhook_state.value, "tries": job.webhook_tries}
    return content


def _result(kept: Mapping[str, Any], url: str, pictures: Sequence[Drawn]) -> dict[str, Any]:
    """The reply of the images API: its pictures in place of their names."""
    data = []
    for index, entry in enumerate(kept["data"]):
        rest = {name: value for name, value in entry.items() if name != "url"}
        if pictures:
            encoded = base64.b64encode(pictures[index].content).decode("ascii")
            data.append({"b64_json": encoded, **rest})
        else:
            data.append({"url": url + entry["url"], **rest})
    return {**kept, "data": data}
