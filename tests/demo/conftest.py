"""The shipped pipeline, loaded once a module."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import DiffusionPipeline

from demo.evaluate import PIPELINE, Setting, load


@pytest.fixture(scope="module")
def pipeline() -> Iterator[DiffusionPipeline]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(PIPELINE, Setting("as shipped"))
    torch.set_num_threads(num_threads)
