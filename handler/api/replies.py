"""Makes replies: finished pictures or an error become status, headers and body."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from handler.api.accept import MEDIA_TYPES
from handler.api.call import Call, Envelope
from handler.api.description import describe
from handler.api.encoding import array_json, encode_image, npy_bytes, to_pixels
from handler.api.metadata import ImageMetadata, request_parameters
from handler.api.result import Result
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import RequestError

__all__ = ["FLAGGED", "Reply", "cancel_reply", "describe_reply", "error_reply", "success_reply"]

FLAGGED = "X-Content-Flagged"
"""The header that says of each picture whether the safety checker flags it, where it flags one."""

_JSON = "application/json"
# Enough for all the warnings below with every character escaped: none is cut in its quotes.
_MAX_HEADER_CHARS = 4000
_MAX_WARNINGS = 8
_MAX_WARNING_CHARS = 200


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP reply. Names and values of `headers` are printable ASCII."""

    status: int
    phrase: str
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def success_reply(
    call: Call,
    results: Sequence[Result],
    *,
    request_id: str,
    model_name: str,
    config: HandlerConfig,
    clock_s: Callable[[], float] = time.perf_counter,
) -> Reply:
    """Encode the results of a call, one for each of its requests and in their order.

    Slow (tens of milliseconds a picture) and touches nothing shared: made for a thread pool.
    The body depends on the pictures and their parameters alone, so equal calls get equal bytes.
    """
    started_s = clock_s()
    encoder = _Encoder(model_name, call.jpeg_quality, config.embed_metadata)
    if call.envelope is Envelope.KSERVE_V1:
        content_type, body = _JSON, _kserve_v1_body(call, results, encoder)
    elif call.envelope is Envelope.KSERVE_V2:
        content_type, body = _JSON, _kserve_v2_body(call, results, encoder)
    else:
        content_type = MEDIA_TYPES[call.output_format]
        body = _plain_body(call.output_format, results[0], encoder)
    headers = {
        "X-Request-Id": request_id,
        "Server-Timing": _server_timing(results, encode_s=clock_s() - started_s),
    }
    if call.envelope is Envelope.PLAIN:
        headers["X-Seed"] = ", ".join(map(str, results[0].request.seeds))
    if any(flag for result in results for flag in result.flagged):
        flags = (flag for result in results for flag in result.flagged)
        headers[FLAGGED] = ", ".join("true" if flag else "false" for flag in flags)
    warnings = dict.fromkeys(warning for result in results for warning in result.warnings)
    if warnings:
        headers["Warning"] = _warning_header(warnings)
    return Reply(200, "OK", content_type, body, _printable(headers))


def error_reply(error: RequestError, *, request_id: str) -> Reply:
    """The reply that an error stands for."""
    headers = {"X-Request-Id": request_id, **error.headers}
    body = _json_bytes(error.body())
    return Reply(error.status, error.phrase, _JSON, body, _printable(headers))


def cancel_reply(request_id_cancelled: str, *, request_id: str) -> Reply:
    """What the canceller gets; who was cancelled gets the error `Cancelled`."""
    body = _json_bytes({"cancelled": request_id_cancelled})
    return Reply(200, "OK", _JSON, body, _printable({"X-Request-Id": request_id}))


def describe_reply(traits: PipelineTraits, *, request_id: str) -> Reply:
    """What the pipeline has."""
    body = _json_bytes(describe(traits))
    return Reply(200, "OK", _JSON, body, _printable({"X-Request-Id": request_id}))


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Encodes the pictures of a result, with what all of a reply have in common."""

    model_name: str
    jpeg_quality: int
    embeds_metadata: bool

    def pictures(self, result: Result, image_format: str) -> list[bytes]:
        """The files of a result's pictures, in their order."""
        request = result.request
        encoded = []
        flags = result.flagged or (False,) * len(result.images)
        for seed, image, flag in zip(request.seeds, result.images, flags, strict=True):
            metadata = (
                ImageMetadata(request, seed, self.model_name, flag)
                if self.embeds_metadata
                else None
            )
            encoded.append(encode_image(image, image_format, metadata, self.jpeg_quality))
        return encoded


def _plain_body(output_format: str, result: Result, encoder: _Encoder) -> bytes:
    pictures = [to_pixels(image) for image in result.images]
    if output_format == "array":
        lists = [array_json(pixels) for pixels in pictures]
        return lists[0] if len(lists) == 1 else b"[" + b",".join(lists) + b"]"
    if output_format == "npy":
        return npy_bytes(pictures[0] if len(pictures) == 1 else np.stack(pictures))
    if output_format == "json":
        return _json_bytes(_result_object(result, "png", encoder))
    return encoder.pictures(result, output_format)[0]


def _kserve_v1_body(call: Call, results: Sequence[Result], encoder: _Encoder) -> bytes:
    predictions = [_result_object(result, call.output_format, encoder) for result in results]
    return _json_bytes({"predictions": predictions})


def _kserve_v2_body(call: Call, results: Sequence[Result], encoder: _Encoder) -> bytes:
    """All pictures in the order of their prompts, as a BYTES tensor in base64."""
    pictures = [
        _base64(picture)
        for result in results
        for picture in encoder.pictures(result, call.output_format)
    ]
    seeds = [seed for result in results for seed in result.request.seeds]
    identity = {} if call.envelope_id is None else {"id": call.envelope_id}
    images_output = {
        "name": "images",
        "shape": [len(pictures)],
        "datatype": "BYTES",
        "parameters": {"content_type": MEDIA_TYPES[call.output_format]},
        "data": pictures,
    }
    seeds_output = {"name": "seeds", "shape": [len(seeds)], "datatype": "INT64", "data": seeds}
    outputs = [images_output, seeds_output]
    if flags := [flag for result in results for flag in result.flagged]:
        outputs.append(
            {
                "name": "content_flagged",
                "shape": [len(flags)],
                "datatype": "BOOL",
                "data": flags,
            }
        )
    return _json_bytes({"model_name": encoder.model_name, **identity, "outputs": outputs})


def _result_object(result: Result, image_format: str, encoder: _Encoder) -> dict[str, object]:
    pictures = encoder.pictures(result, image_format)
    return {
        "images": [_base64(picture) for picture in pictures],
        "content_type": MEDIA_TYPES[image_format],
        "seeds": list(result.request.seeds),
        **({"content_flagged": list(result.flagged)} if result.flagged else {}),
        "parameters": request_parameters(result.request),
        "warnings": list(result.warnings),
    }


def _server_timing(results: Sequence[Result], *, encode_s: float) -> str:
    """Requests of one call run side by side, so the longest stands for all."""
    stages_s = {
        "queue": max(r.timings.queue_s for r in results),
        "denoise": max(r.timings.denoise_s for r in results),
        "decode": max(r.timings.decode_s for r in results),
        "encode": encode_s,
    }
    return ", ".join(f"{stage};dur={1000 * s:.1f}" for stage, s in stages_s.items())


def _warning_header(warnings: Iterable[str]) -> str:
    """``299 - "text"`` each (RFC 7234, 5.5: miscellaneous, persistent; the agent unnamed)."""
    quoted = []
    for warning in list(warnings)[:_MAX_WARNINGS]:
        text = warning[:_MAX_WARNING_CHARS].replace("\\", "\\\\").replace('"', '\\"')
        quoted.append(f'299 - "{text}"')
    return ", ".join(quoted)


def _printable(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that cannot break the reply apart, whatever their values were made of."""
    return {
        name: "".join(c if " " <= c <= "~" else "?" for c in value[:_MAX_HEADER_CHARS])
        for name, value in headers.items()
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")
