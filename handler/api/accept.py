"""Which output format an ``Accept`` header asks for (RFC 9110, 12.5.1).

The highest quality wins, then the more specific range, then the one named first; where a range
leaves a choice, the configured default is taken before any other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["EVENT_STREAM", "MEDIA_TYPES", "Negotiated", "negotiate"]

EVENT_STREAM = "text/event-stream"
MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "npy": "application/x-npy",
    "json": "application/json",
    "array": "application/json",
}
# `image/jpg` is not registered, but people write it.
_SYNONYMS = {"image/jpg": "image/jpeg"}
_QUALITY = re.compile(r"\s*q\s*=\s*(0(\.[0-9]{0,3})?|1(\.0{0,3})?)\s*", re.IGNORECASE)
_RANGE = re.compile(r"[\w!#$&^.+*-]+/[\w!#$&^.+*-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What is to be sent; `output_format` is None when nothing that exists is acceptable."""

    output_format: str | None
    stream: bool = False


def negotiate(accept: str, default: str) -> Negotiated:
    """The output format for an Accept header; `default` when it is empty or says ``*/*``."""
    ranges = _parse(accept)
    stream_quality = max((q for media, q in ranges if media == EVENT_STREAM), default=0.0)
    ranges = [(media, q) for media, q in ranges if media != EVENT_STREAM]
    stream = stream_quality > 0 and stream_quality >= max((q for _, q in ranges), default=0.0)
    if not ranges:
        return Negotiated(default, stream)
    candidates = [default, *(name for name in MEDIA_TYPES if name != default)]
    ranked = []
    for preference, name in enumerate(candidates):
        match = _best_match(MEDIA_TYPES[name], ranges)
        if match is not None and match[0] > 0:
            ranked.append((match, -preference, name))
    # Nobody asks for `array` by its media type unless it is the default: JSON comes before it.
    if not ranked:
        return Negotiated(default if stream else None, stream)
    return Negotiated(max(ranked)[2], stream)


def _parse(accept: str) -> list[tuple[str, float]]:
    """Ranges and their qualities, in the order sent; what is malformed is left out."""
    ranges = []
    for element in accept.split(","):
        media, *parameters = element.split(";")
        media = media.strip().lower()
        if _RANGE.fullmatch(media):
            quality = 1.0
            for parameter in parameters:
                match = _QUALITY.fullmatch(parameter)
                if match:
                    quality = float(match.group(1))
            ranges.append((_SYNONYMS.get(media, media), quality))
    return ranges


def _best_match(media_type: str, ranges: list[tuple[str, float]]) -> tuple[float, int, int] | None:
    """(quality, specificity, earliness) of the most specific range that covers `media_type`."""
    main = media_type.partition("/")[0]
    matches = []
    for position, (media, quality) in enumerate(ranges):
        for specificity, covering in enumerate(("*/*", f"{main}/*", media_type)):
            if media == covering:
                matches.append((specificity, -position, quality))
    if not matches:
        return None
    specificity, earliness, quality = max(matches)
    return quality, specificity, earliness
