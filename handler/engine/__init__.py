"""Requests in flight: many calls of unmodified pipelines, one forward for all of them."""

from handler.engine.in_flight import BUCKETS, InFlightEngine
from handler.engine.wrappers import CompiledForwards, ForwardWrapper

__all__ = ["BUCKETS", "CompiledForwards", "ForwardWrapper", "InFlightEngine"]
