"""handler.loading.model_dir: every form opens, hostile ones do not, nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.errors import ArchiveError
from handler.loading.model_dir import open_pipeline
from tests.support.archives import members, safetensors, save_pipeline, write_model_zip
from tests.support.zips import zip_bytes

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refusal(model_dir: Path) -> str:
    with pytest.raises(ArchiveError) as caught, open_pipeline(model_dir):
        pass
    return str(caught.value)


def content(model_dir: Path) -> bytes:
    """The weights, read as the opened pipeline says where they are."""
    with open_pipeline(model_dir) as opened:
        extent = opened.weights[WEIGHTS]
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.size_bytes)


def test_a_stored_zip_is_opened_in_place(tmp_path: Path, scratch: Path) -> None:
    model_dir = write_model_zip(tmp_path / "m", zip_bytes(members(**{"README.md": b"# card"})))
    with open_pipeline(model_dir) as opened:
        assert opened.weights[WEIGHTS].path == model_dir / "model.zip"
        assert not opened.is_whole
        assert opened.slow_reason is None
        names = {path.relative_to(opened.folder).as_posix() for path in opened.folder.rglob("*.*")}
        assert names == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
        assert opened.folder.parent == scratch
        assert opened.folder.stat().st_mode & 0o077 == 0
    assert content(model_dir) == safetensors()
    assert list(scratch.iterdir()) == []
    assert [path.name for path in model_dir.iterdir()] == ["model.zip"]


def test_a_deflated_zip_is_unpacked_and_says_so(
    tmp_path: Path, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = zip_bytes(members(), zipfile.ZIP_DEFLATED)
    with caplog.at_level(logging.WARNING):
        assert content(write_model_zip(tmp_path / "m", data)) == safetensors()
    assert len(caplog.messages) == 1
    assert "model.zip is deflated" in caplog.messages[0]
    assert "diffusers-torchserve pack" in caplog.messages[0]
    assert list(scratch.iterdir()) == []


def test_a_zipped_folder_opens_too(tmp_path: Path) -> None:
    inside = {f"pipeline/{name}": data for name, data in members().items()}
    assert content(write_model_zip(tmp_path / "m", zip_bytes(inside))) == safetensors()


@pytest.mark.parametrize("place", ["model", "."])
def test_a_plain_folder_opens(tmp_path: Path, place: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in members().items():
            archive.writestr(name, data)
    shutil.unpack_archive(tmp_path / "a.zip", tmp_path / "m" / place)
    assert content(tmp_path / "m") == safetensors()
    with open_pipeline(tmp_path / "m") as opened:
        assert opened.is_whole


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    assert "holds neither model.zip nor a pipeline folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet/weights.bin": b""}, "pickled weights are refused"),
        ({"unet/WEIGHTS.PT": b""}, "unet/WEIGHTS.PT"),
        ({"pipeline.py": b""}, "code in a pipeline is refused: pipeline.py"),
        ({"unet/evil.so": b""}, "code in a pipeline"),
        ({"model_index.json": b"{"}, "is not JSON"),
        ({"model_index.json": b"[" * 100_000}, "is not JSON"),
        ({"model_index.json": b"[]"}, "does not hold a JSON object"),
        ({"model_index.json": b"{}"}, "_class_name is null"),
    ],
)
def test_refuses_what_could_run_code_or_is_no_pipeline(
    tmp_path: Path, scratch: Path, changes: dict[str, bytes], words: str
) -> None:
    message = refusal(write_model_zip(tmp_path / "m", zip_bytes(members(**changes))))
    assert words in message
    assert list(scratch.iterdir()) == []


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_link_to_nothing, _make_fifo])
def test_what_is_no_file_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    pipeline = save_pipeline(tmp_path / "m" / "model")
    damage(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert "is not a file" in refusal(tmp_path / "m")


@pytest.mark.parametrize("is_zipped", [False, True])
def test_an_index_of_any_length_is_refused_in_one_short_line(
    tmp_path: Path, is_zipped: bool
) -> None:
    pipeline = save_pipeline(tmp_path / "m" / "model")
    index = json.loads((pipeline / "model_index.json").read_bytes())
    for num_letters, words in ((300_000, "only classes of"), (2 << 20, "it may have 1048576")):
        text = json.dumps({**index, "unet": ["x", "y" * num_letters]})
        (pipeline / "model_index.json").write_text(text)
        if is_zipped:
            shutil.make_archive(str(tmp_path / "m" / "model"), "zip", pipeline)
        message = refusal(tmp_path / "m")
        assert words in message
        assert len(message) < 500


def test_refuses_flipped_bits_in_weights(tmp_path: Path, scratch: Path) -> None:
    data = bytearray(zip_bytes(members()))
    data[data.index(safetensors()) + 100] ^= 1
    message = refusal(write_model_zip(tmp_path / "m", bytes(data)))
    assert f"{WEIGHTS} is damaged" in message
    assert list(scratch.iterdir()) == []


def test_refuses_small_files_that_claim_too_much(tmp_path: Path) -> None:
    data = bytearray(zip_bytes(members(**{"vae/big.json": bytes(1 << 20)}), zipfile.ZIP_DEFLATED))
    struct.pack_into("<L", data, data.rindex(b"vae/big.json") - 46 + 24, 900 << 20)
    struct.pack_into("<L", data, data.index(b"vae/big.json") - 30 + 22, 900 << 20)
    assert "vae/big.json claims" in refusal(write_model_zip(tmp_path / "m", bytes(data)))


def test_refuses_weights_that_do_not_fit_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    data = zip_bytes(members(), zipfile.ZIP_DEFLATED)
    assert "where 9 are free" in refusal(write_model_zip(tmp_path / "m", data))


def test_refuses_two_pipelines(tmp_path: Path) -> None:
    files = members(**{"other/model_index.json": b"{}"})
    assert "holds 2 pipelines" in refusal(write_model_zip(tmp_path / "m", zip_bytes(files)))


def test_two_processes_open_one_archive_at_once(tmp_path: Path, scratch: Path) -> None:
    big = members(**{WEIGHTS: safetensors(3_000_000)})
    model_dir = write_model_zip(tmp_path / "m", zip_bytes(big, zipfile.ZIP_DEFLATED))
    code = (
        "import sys, pathlib; from handler.loading.model_dir import open_pipeline\n"
        "for _ in range(20):\n"
        " with open_pipeline(pathlib.Path(sys.argv[1])) as opened:\n"
        "  assert (opened.folder / 'unet/config.json').read_bytes() == b'{}'\n"
        "  assert opened.weights['unet/diffusion_pytorch_model.safetensors'].path.stat().st_size\n"
    )
    environment = {**os.environ, "TMPDIR": str(scratch)}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(model_dir)], env=environment)
        for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    assert list(scratch.iterdir()) == []
    assert [path.name for path in model_dir.iterdir()] == ["model.zip"]


def test_copies_weights_for_a_loader_that_wants_files(tmp_path: Path) -> None:
    model_dir = write_model_zip(tmp_path / "m", zip_bytes(members()))
    with open_pipeline(model_dir) as opened:
        opened.copy_weights("vae")
        assert not (opened.folder / WEIGHTS).exists()
        opened.copy_weights("unet")
        opened.copy_weights("unet")
        assert (opened.folder / WEIGHTS).read_bytes() == safetensors()


def _everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def _mutated(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Apply edits: (what, where, how), as a byte fuzzer does."""
    changed = bytearray(data)
    for what, where, how in edits:
        at = where % (len(changed) or 1)
        if what == "set":
            changed[at : at + 1] = bytes([how])
        elif what == "word":
            changed[at : at + 4] = struct.pack("<L", (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)[how % 4])
        elif what == "delete":
            del changed[at : at + how]
        elif what == "repeat":
            changed[at:at] = changed[how : how + 50]
        else:
            del changed[at:]
    return bytes(changed)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["set", "set", "word", "delete", "repeat", "cut"]),
            st.integers(0, 5000),
            st.integers(0, 255),
        ),
        max_size=4,
    ),
    names=st.lists(
        st.text(st.sampled_from("a./\\:é"), min_size=1, max_size=6), max_size=2, unique=True
    ),
)
def test_any_edit_is_refused_or_harmless(
    tmp_path: Path, compression: int, edits: list[tuple[str, int, int]], names: list[str]
) -> None:
    """No crash, and no write outside the private folder, whatever bytes and names are changed."""
    data = zip_bytes(members(**dict.fromkeys(names, b"x")), compression)
    model_dir = write_model_zip(tmp_path / "m", _mutated(data, edits))
    before = _everything(tmp_path)
    with contextlib.suppress(ArchiveError), open_pipeline(model_dir) as opened:
        found = json.loads((opened.folder / "model_index.json").read_bytes())
        assert found["_class_name"].isidentifier()
    after = _everything(tmp_path)
    scratch_name = str(tmp_path / "scratch")
    after[scratch_name] = before[scratch_name]
    assert after == before
