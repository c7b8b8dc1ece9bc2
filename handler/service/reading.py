"""Read requests that no client waits for: the handler's contract, warming up, the smoke test."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence

from handler.api.call import Call, read_call
from handler.api.request import GenerationRequest
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig

__all__ = ["draw_seed", "read_requests"]

# Drawn seeds are short enough to be typed again.
_MAX_DRAWN_SEED = 2**32


def draw_seed() -> int:
    """Draw a seed that cannot be predicted."""
    return secrets.randbelow(_MAX_DRAWN_SEED)


def read_requests(
    bodies: Sequence[Mapping[str, object]],
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    draw_seed: Callable[[], int] = draw_seed,
) -> list[GenerationRequest]:
    """Return the checked requests of `bodies`, in their order; a KServe body holds several.

    Raises:
        RequestError: a body is not a valid request.
    """
    read = [read_call(body, {}, config, traits, draw_seed=draw_seed) for body in bodies]
    return [request for sent in read if isinstance(sent, Call) for request in sent.requests]
