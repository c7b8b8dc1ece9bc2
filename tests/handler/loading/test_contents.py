"""handler.loading.contents: which names a pipeline's files may have."""

from __future__ import annotations

import pytest

from handler.errors import ArchiveError
from handler.loading.contents import check_names, pickled, pipeline_prefix

GOOD = ["model_index.json", "unet/config.json", "unet/model.safetensors", "tokenizer/merges.txt"]


def test_pickles_are_known_by_their_names_in_any_letters() -> None:
    names = ["unet/a.BIN", "b.ckpt", "c.pt", "d.pth", "e.pkl", "f.npz", "g.npy", "h.joblib"]
    assert pickled([*GOOD, *names]) == sorted(names)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unet/model.bin", "test: pickled weights are refused, .*: unet/model.bin; save"),
        ("pipeline.py", "test: code in a pipeline is refused: pipeline.py"),
        ("unet/EVIL.SO", "code in a pipeline is refused: unet/EVIL.SO"),
    ],
)
def test_pickles_and_code_are_refused(name: str, words: str) -> None:
    check_names(GOOD, "test")
    with pytest.raises(ArchiveError, match=words):
        check_names([*GOOD, name], "test")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (GOOD, ""),
        ([f"sd/{name}" for name in GOOD], "sd/"),
        ([*GOOD, "a/b/model_index.json"], ""),
    ],
)
def test_a_pipeline_is_at_the_root_or_in_one_folder(names: list[str], prefix: str) -> None:
    assert pipeline_prefix(names, "test") == prefix


@pytest.mark.parametrize(
    ("names", "number"),
    [([], 0), (["a/b/model_index.json"], 0), (["a/model_index.json", "b/model_index.json"], 2)],
)
def test_no_pipeline_and_several_are_refused(names: list[str], number: int) -> None:
    with pytest.raises(ArchiveError, match=f"test: holds {number} pipelines"):
        pipeline_prefix(names, "test")
