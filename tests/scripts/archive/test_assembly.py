"""scripts.archive.assembly: no recipe is trusted, and no byte goes where it does not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handler.errors import ArchiveError
from scripts.archive.assembly import LayerSink, Recipe, read_recipe
from scripts.archive.image import RECIPE_NAME, SKELETON_NAME
from scripts.archive.tar_layer import TarLayer

UNET = "models/model/unet/x.safetensors"


def recipe() -> dict[str, Any]:
    return {
        "format": 1,
        "name": "sd",
        "is_folder": False,
        "layers": [{UNET: 4}],
        "outputs": {"": [[None, 2], [UNET, 4], [None, 1], ["models/config", 3]]},
    }


def parse(recipe: object, **files: bytes) -> Recipe:
    text = recipe if isinstance(recipe, bytes) else json.dumps(recipe).encode()
    small = {RECIPE_NAME: text, SKELETON_NAME: b"<>!", "models/config": b"abc", **files}
    return read_recipe(b"".join(TarLayer(small).chunks()), "image")


def test_an_archive_is_put_together(tmp_path: Path) -> None:
    found = parse(recipe())
    found.make(tmp_path)
    (layer,) = found.tar_layers(tmp_path)
    data = b"".join(TarLayer({UNET: b"1234"}).chunks())
    assert layer.size_bytes == len(data)
    sink = LayerSink(layer)
    for at in range(0, len(data), 7):
        sink.write(data[at : at + 7], at)
    assert (tmp_path / "archive").read_bytes() == b"<>1234!abc"
    assert b"".join(sink.written(1000)) == data[:1000]


def test_a_layer_that_was_made_otherwise_is_refused(tmp_path: Path) -> None:
    found = parse(recipe())
    found.make(tmp_path)
    (layer,) = found.tar_layers(tmp_path)
    data = b"".join(TarLayer({UNET.replace("unet", "Unet"): b"1234"}).chunks())
    with pytest.raises(ArchiveError, match="not as its recipe says"):
        LayerSink(layer).write(data, 0)


def change(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda recipe: {**recipe, **changes}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (change(format=2), "has the format 2; known is 1"),
        (change(name="../sd"), "not a plain relative path"),
        (change(name="a/b"), "is not an archive's name"),
        (change(name=".hidden"), "is not an archive's name"),
        (change(outputs={}), "is not an archive's name"),
        (change(outputs={"../x": [[None, 3]]}), "not a plain relative path"),
        (change(outputs={"/etc/x": [[None, 3]]}), "not a plain relative path"),
        (change(outputs={"x": [[None, 3]]}), "neither of a file nor of a folder"),
        (change(is_folder=True), "neither of a file nor of a folder"),
        (change(layers=[{"models/config": 3}]), "is in two layers"),
        (change(layers=[{UNET: 4}, {UNET: 4}]), "is in two layers"),
        (change(layers=[{UNET: 5}]), "which is not in it so"),
        (change(layers=[]), "which is not in it so"),
        (change(layers=[{UNET: 4, "models/more": 1}]), "has no place in the archive"),
        (change(layers=[{UNET: 4, "../more": 0}]), "not a plain relative path"),
        (change(layers=[{UNET: -4}]), "is damaged"),
        (change(layers=[{UNET: True}]), "is damaged"),
        (change(layers=[{UNET: 1 << 80}]), "is damaged"),
        (change(layers=7), "is damaged"),
        (change(outputs=[]), "is damaged"),
        (change(outputs={"": [[None]]}), "is damaged"),
        (change(outputs={"": [[UNET, 4], [UNET, 4]]}), "which is not in it so"),
        (change(outputs={"": [[UNET, 4], [None, 4]]}), "its skeleton is not as long"),
    ],
)
def test_a_hostile_recipe_is_refused(
    changed: Callable[[dict[str, Any]], dict[str, Any]], problem: str
) -> None:
    with pytest.raises(ArchiveError, match=problem):
        parse(changed(recipe()))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is damaged"),
        (b'{"format": 1, "format": 1}', "is not JSON"),
        (b"\xff", "is not JSON"),
    ],
)
def test_what_is_not_a_recipe(text: bytes, problem: str) -> None:
    with pytest.raises(ArchiveError, match=problem):
        parse(text)


@pytest.mark.parametrize("data", [b"", b"x" * 2000, b"\0" * 2000])
def test_what_is_not_a_layer(data: bytes) -> None:
    with pytest.raises(ArchiveError, match=r"image: its last layer (is not|lacks)"):
        read_recipe(data, "image")
