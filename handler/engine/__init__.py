"""Requests in flight: many calls of one unmodified pipeline, one forward for all of them."""

from handler.engine.in_flight import BUCKETS, InFlightEngine

__all__ = ["BUCKETS", "InFlightEngine"]
