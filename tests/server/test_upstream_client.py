"""With `default_output: array` the client of TorchServe's diffusers example works unmodified."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import requests
from PIL import Image

from scripts.torchserve.process import TorchServer
from tests.support.serving import QUICK, serve


@pytest.fixture(scope="module")
def array_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    # From a folder, which TorchServe links: the other form that an archive has.
    yield from serve(tmp_path_factory.mktemp("array"), "dir", default_output="array")


def test_upstream_client(array_server: TorchServer) -> None:
    # The protocol: the raw prompt without a content type; a nested list of numbers comes back.
    response = requests.post(array_server.predictions_url, data="a red heart", timeout=60)
    assert response.status_code == 200
    image = Image.fromarray(np.array(json.loads(response.text), dtype="uint8"))
    assert image.size == (QUICK["width"], QUICK["height"])
    assert len(image.getcolors(maxcolors=2**24) or ()) > 1
