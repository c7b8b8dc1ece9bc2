"""Reads a request: a body as TorchServe delivers it and its headers become a checked `Call`.

    body ─▶ body.open_body ─▶ kserve.open_message ─▶ request_fields.parse_fields ─▶ Call
            what was sent     its wrapping           one prompt's fields

Here are the fields that steer the reply: output format, id, deadline, stream, cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from handler.api.accept import EVENT_STREAM, MEDIA_TYPES, negotiate
from handler.api.body import ALONE, HOW_TO_SEND, Payload, media_type, open_body
from handler.api.decoding import to_decode
from handler.api.fields import ID_RULE, FieldReader, is_id
from handler.api.images import SentPicture
from handler.api.kserve import Envelope, Message, open_message
from handler.api.request import GenerationRequest
from handler.api.request_fields import parse_fields
from handler.api.schema import REPLY_FIELDS, SENT_PICTURES, Value, default_of
from handler.api.traits import PipelineTraits
from handler.api.translation import names_for
from handler.config import HandlerConfig
from handler.errors import InvalidRequest, RequestError
from handler.messages import show, summarise

__all__ = ["Call", "CancelCall", "DescribeCall", "Envelope", "read_call"]

_IMAGE_FORMATS = ("png", "jpeg", "webp")


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that one HTTP or gRPC request asks for; KServe's may hold several prompts."""

    requests: tuple[GenerationRequest, ...]
    envelope: Envelope
    output_format: str
    """One of OUTPUT_FORMATS; in a KServe call, how the pictures inside the reply are encoded."""
    request_id: str | None
    """The id that the client chose, if it did."""
    deadline_s: float | None
    stream: bool
    preview_every: int
    """A preview every so many steps; 0 is none."""
    envelope_id: str | None
    """The ``id`` of a KServe v2 request."""
    jpeg_quality: int
    """Of JPEG and WebP."""
    paths: tuple[str, ...] = ()
    """Where each of `requests` stood in the body, for messages: ``instances[1].``, or nothing."""


@dataclass(frozen=True, slots=True)
class CancelCall:
    """``{"cancel": "<id>"}``: end the live request of that id."""

    request_id: str


@dataclass(frozen=True, slots=True)
class DescribeCall:
    """``{"describe": true}``: say what the pipeline has."""


def read_call(
    body: Mapping[str, object],
    headers: Mapping[str, str],
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    draw_seed: Callable[[], int],
) -> Call | CancelCall | DescribeCall:
    """Read one item of TorchServe's data; `headers` have lower-cased names.

    Raises:
        RequestError: the one thing that it raises, for any input: InvalidRequest with every
            problem, or TooLarge.
    """
    payload = open_body(body, headers, max_body_bytes=config.max_body_bytes)
    message = open_message(payload, max_instances=config.max_instances)
    reader = FieldReader(message.shared, allow_text=payload.is_form)
    if message.shared.get("cancel") is not None:
        return _read_cancel(reader, message)
    if message.shared.get("describe") is not None and reader.boolean("describe") is True:
        return _read_describe(reader, message)
    call = _read_reply_fields(reader, headers, message, config)
    problems = {**message.problems, **reader.problems}
    requests, paths = [], []
    pictures: dict[int, SentPicture] = {}
    for instance in message.instances:
        for name in REPLY_FIELDS.keys() & instance.fields.keys():
            problems[instance.path + name] = "counts for the whole body: put it beside instances"
        try:
            request = parse_fields(
                {**reader.rest(), **_without_reply_fields(instance.fields)},
                config,
                traits,
                is_form=payload.is_form,
                draw_seed=draw_seed,
                known_pictures=pictures,
            )
        except InvalidRequest as error:
            for name, problem in error.fields.items():
                path = "" if _is_shared(name, message) else instance.path
                problems.setdefault(path + name, problem)
        else:
            requests.append(request)
            paths.append(instance.path)
            _check_image_count(request, call, problems)
    _check_all_pictures(requests, message.envelope, config, problems)
    if problems:
        raise _invalid(problems, payload, headers)
    return replace(call, requests=tuple(requests), paths=tuple(paths))


def _read_cancel(reader: FieldReader, message: Message) -> CancelCall:
    request_id = reader.id("cancel")
    _check_alone("cancel", reader, message)
    if request_id is None or reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    return CancelCall(request_id)


def _read_describe(reader: FieldReader, message: Message) -> DescribeCall:
    _check_alone("describe", reader, message)
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    return DescribeCall()


def _check_alone(field: str, reader: FieldReader, message: Message) -> None:
    wrapped = {Envelope.KSERVE_V1: ["instances"], Envelope.KSERVE_V2: ["inputs"]}
    for name in [*reader.rest(), *wrapped.get(message.envelope, ()), *message.problems]:
        reader.report(field, f"must be sent alone, without {show(name)}")


def _read_reply_fields(
    reader: FieldReader, headers: Mapping[str, str], message: Message, config: HandlerConfig
) -> Call:
    """What counts for the whole body, as a call that has no requests yet."""
    envelope = message.envelope
    sent = {name: reader.read(each, config) for name, each in REPLY_FIELDS.items()}
    defaults = {name: default_of(each, config) for name, each in REPLY_FIELDS.items()}
    values = {name: defaults[name] if each is None else each for name, each in sent.items()}
    request_id, header_id = sent["request_id"], headers.get("x-request-id")
    if request_id is None and header_id is not None:
        request_id = header_id
        if not is_id(header_id):
            reader.report("X-Request-Id", f"{show(header_id)} is not an id; allowed are {ID_RULE}")
    output_format, accepts_stream = _choose_output_format(
        reader, sent["output_format"], headers, envelope, config
    )
    stream = bool(values["stream"]) or (sent["stream"] is None and accepts_stream)
    if stream and not headers:
        # Only gRPC has none, and its unary calls have one reply.
        reader.report("stream", "only over HTTP, not over gRPC")
    if stream and envelope is not Envelope.PLAIN:
        reader.report("stream", "only plain requests are streamed, not KServe's")
    if values["previews"] and not stream:
        reader.report("previews", f'needs "stream": true or Accept: {EVENT_STREAM}')
    if values["previews"] and config.safety_checker == "refuse":
        reader.report(
            "previews", "not here: nothing checks previews, and flagged pictures are refused"
        )
    return Call(
        requests=(),
        envelope=envelope,
        output_format=output_format,
        request_id=cast("str | None", request_id),
        deadline_s=cast("float | None", values["deadline_s"]),
        stream=stream,
        preview_every=cast("int", values["previews"]),
        envelope_id=message.envelope_id,
        jpeg_quality=cast("int", values["jpeg_quality"]),
    )


def _choose_output_format(
    reader: FieldReader,
    sent: Value,
    headers: Mapping[str, str],
    envelope: Envelope,
    config: HandlerConfig,
) -> tuple[str, bool]:
    """The output format, and whether the Accept header asks for a stream."""
    chosen = cast("str | None", sent)
    if envelope is not Envelope.PLAIN:
        # The protocol fixes the reply's type; its pictures are PNG unless the body says otherwise.
        if chosen == "array":
            reader.report("output_format", "KServe replies hold png, jpeg, webp or npy, not array")
        return ("png" if chosen is None or chosen == "json" else chosen), False
    accept = headers.get("accept", "")
    negotiated = negotiate(accept, config.default_output)
    if chosen is not None:
        return chosen, negotiated.stream
    if negotiated.output_format is None:
        known = ", ".join(dict.fromkeys(MEDIA_TYPES.values()))
        reader.report("Accept", f"{show(accept)} allows none of {known}, {EVENT_STREAM}")
    return negotiated.output_format or config.default_output, negotiated.stream


def _check_image_count(request: GenerationRequest, call: Call, problems: dict[str, str]) -> None:
    is_one_image = call.envelope is Envelope.PLAIN and call.output_format in _IMAGE_FORMATS
    if is_one_image and request.num_images > 1:
        problems["num_images"] = (
            f"{request.num_images} pictures do not fit into one {call.output_format};"
            ' ask for JSON: Accept: application/json or "output_format": "json"'
        )


def _check_all_pictures(
    requests: Sequence[GenerationRequest],
    envelope: Envelope,
    config: HandlerConfig,
    problems: dict[str, str],
) -> None:
    """Bound what one body makes the server decode: a small file may have many pixels.

    A picture that is drawn from in several sizes is decoded for each.
    """
    found = {
        each.key: each.picture
        for request in requests
        for each in to_decode(request, config).values()
    }
    pixels = sum(each.width_px * each.height_px for each in found.values())
    allowed = len(SENT_PICTURES) * config.max_picture_pixels
    if pixels > allowed:
        name = "inputs" if envelope is Envelope.KSERVE_V2 else "instances"
        problems[name] = (
            f"have {len(found)} pictures of {pixels} pixels together, a picture counted once for"
            f" each size that it is brought to; allowed are {allowed}"
        )


def _without_reply_fields(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in REPLY_FIELDS}


def _is_shared(name: str, message: Message) -> bool:
    return any(known in message.shared for known in names_for(name))


def _invalid(
    problems: dict[str, str], payload: Payload, headers: Mapping[str, str]
) -> RequestError:
    is_urlencoded = media_type(headers) == "application/x-www-form-urlencoded"
    if payload.is_form and is_urlencoded and problems.get("prompt") == "is missing":
        problems["prompt"] = HOW_TO_SEND
    if payload.is_picture and "prompt" in problems:
        problems["prompt"] = ALONE
    return InvalidRequest(summarise(problems), problems)
