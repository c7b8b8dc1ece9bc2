"""The contents of tensors as values that can be compared and hashed."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Hashable

import torch

__all__ = ["Fingerprints"]


class Fingerprints:
    """The contents of shared tensors as hashable values, each tensor read once while it lives.

    Reading a CUDA tensor waits for the device, hence the memory: a pipeline passes the very same
    tensor in every step.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, Hashable]] = {}

    def of(self, tensor: torch.Tensor) -> Hashable:
        """A value that is equal for tensors of equal contents."""
        if tensor.is_inference():  # counts no versions, so nothing tells whether it has changed
            return _contents(tensor)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        contents = _contents(tensor)
        key = id(tensor)
        reference = weakref.ref(tensor, lambda _: self._known.pop(key, None))
        self._known[key] = (reference, tensor._version, contents)
        return contents


def _contents(tensor: torch.Tensor) -> Hashable:
    """What `tensor` holds, or which one it is where that cannot be read (sparse, meta)."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return ("the very same", id(tensor))
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()
