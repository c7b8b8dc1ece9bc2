"""scripts.archive.signing: what is signed, and what a signature does not fit."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from handler.errors import ArchiveError
from scripts.console import DONE
from scripts.verify_archive import main, verify
from tests.support.packing import make_keys, pack


def test_a_key_of_another_kind_signs_nothing(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private = tmp_path / "private.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(ArchiveError, match=r"does not sign: .* make a key with"):
        pack(tmp_path, sign_key=private)
    assert not (tmp_path / "tiny.mar").exists()


def test_signatures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = make_keys(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = make_keys(tmp_path / "other")
    mar = pack(tmp_path, sign_key=private)
    assert main([str(mar), "--key", str(public)]) == DONE
    assert "Key mismatch" in verify(mar, key=other)[0]

    data = bytearray(mar.read_bytes())
    struct.pack_into("<H", data, data.rindex(b"PK\1\2") + 12, 1)  # a time, which no hash covers
    mar.write_bytes(data)
    assert verify(mar) == []
    assert "does not match" in verify(mar, key=public)[0]

    signature = tmp_path / "tiny.mar.sig"
    signature.write_text("{")
    assert "does not match" in verify(mar, key=public)[0]
    signature.unlink()
    assert "is missing: the archive is not signed" in verify(mar, key=public)[0]
    assert "no such key" in verify(mar, key=tmp_path / "none.pem")[0]


def test_a_new_unsigned_archive_has_no_old_signature(tmp_path: Path) -> None:
    private, _ = make_keys(tmp_path)
    pack(tmp_path, sign_key=private)
    assert (tmp_path / "tiny.mar.sig").exists()
    pack(tmp_path, tmp_path / "pipeline")
    assert not (tmp_path / "tiny.mar.sig").exists()


def test_a_folder_is_signed_too(tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    folder = pack(tmp_path, sign_key=private, is_folder=True)
    assert verify(folder, key=public) == []
    (folder / "requirements.txt").write_text("evil")
    assert "does not match" in verify(folder, key=public)[0]
