"""Ports that nobody listens on, for servers of a test."""

from __future__ import annotations

from scripts.torchserve.options import Ports

__all__ = ["free_ports"]


def free_ports() -> tuple[int, int]:
    """Two ports to start counting from: HTTP with the two after it, gRPC with the one after it."""
    ports = Ports.free()
    while Ports.starting_at(ports.inference, ports.grpc_inference).taken():
        ports = Ports.free()
    return ports.inference, ports.grpc_inference
