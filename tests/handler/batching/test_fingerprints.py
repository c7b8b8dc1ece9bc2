"""Fingerprints: equal where contents are, read once, and never kept longer than their tensor."""

from __future__ import annotations

import gc

import pytest
import torch

from handler.batching.fingerprints import Fingerprints


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0, 3),
        torch.tensor(3),
        torch.arange(12.0).reshape(3, 4).T,
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float8_e4m3fn),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.tensor([1 + 2j, 3j]).conj().imag,
        torch.ones(2, requires_grad=True),
    ],
    ids=repr,
)
def test_equal_contents_have_equal_fingerprints(tensor: torch.Tensor) -> None:
    fingerprints = Fingerprints()
    assert fingerprints.of(tensor) == fingerprints.of(tensor.detach().clone())


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"]
)
def test_a_tensor_that_cannot_be_read_is_equal_to_itself_alone(tensor: torch.Tensor) -> None:
    fingerprints = Fingerprints()
    assert fingerprints.of(tensor) == fingerprints.of(tensor)
    assert fingerprints.of(tensor) != fingerprints.of(tensor.clone())


@pytest.mark.parametrize("inference", [False, True])
def test_a_fingerprint_follows_changes_in_place(inference: bool) -> None:
    with torch.inference_mode(inference):
        fingerprints, tensor = Fingerprints(), torch.zeros(3)
        before = fingerprints.of(tensor)
        tensor.add_(1)
        assert fingerprints.of(tensor) != before
        tensor.sub_(1)
        assert fingerprints.of(tensor) == before


def test_a_tensor_is_read_once_and_forgotten_with_its_death() -> None:
    fingerprints, tensor = Fingerprints(), torch.zeros(3)
    before = fingerprints.of(tensor)
    tensor.data.numpy()[0] = 1.0  # unseen by torch: shows that it is not read again
    assert fingerprints.of(tensor) == before
    assert len(fingerprints._known) == 1
    del tensor
    gc.collect()
    assert not fingerprints._known
