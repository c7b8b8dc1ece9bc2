"""The frontend's class with one method withdrawn; tests/server/test_grpc.py asks the server."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from scripts.torchserve import grpc_methods
from scripts.torchserve.grpc_methods import SERVICE, withdraw_bidirectional_streaming
from scripts.torchserve.options import ServerError


def test_only_the_name_differs_and_nobody_can_guess_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(grpc_methods.FRONTEND) as jar:
        original = jar.read(SERVICE)
    written = []
    for name in ("first", "second", "second"):
        withdraw_bidirectional_streaming(tmp_path / name)
        written.append((tmp_path / name / SERVICE).read_bytes())
    assert len({*written, original}) == 4
    at = original.index(b"\x01\x00\x12StreamPredictions2") + 3
    for each in written:
        assert each[:at] + b"StreamPredictions2" + each[at + 18 :] == original
        assert each[at : at + 18].isalnum()


def test_another_torchserve_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "model-server.jar"
    with zipfile.ZipFile(other, "w") as jar:
        jar.writestr(SERVICE, b"\xca\xfe\xba\xbe")
    monkeypatch.setattr(grpc_methods, "FRONTEND", other)
    with pytest.raises(ServerError, match=r"not that of TorchServe 0\.12\.0"):
        withdraw_bidirectional_streaming(tmp_path / "run")
