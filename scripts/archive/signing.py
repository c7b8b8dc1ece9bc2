"""Signs archives with OpenSSF model-signing, and checks such signatures.

The signature is a file beside the archive, in the sigstore bundle format: whoever has the public
key can check it without us, by ``model_signing verify key``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handler.errors import ArchiveError

__all__ = ["check_signature", "sign", "signature_path"]


def signature_path(archive: Path) -> Path:
    """Return where the signature of `archive` lies."""
    return archive.with_name(f"{archive.name}.sig")


def sign(archive: Path, private_key: Path, signature: Path) -> None:
    """Sign `archive`, a file or a folder, with an elliptic-curve key. Raises: ArchiveError."""
    if not private_key.is_file():
        raise ArchiveError(f"{private_key}: no such key")
    try:
        config = _model_signing().signing.Config()
        config.use_elliptic_key_signer(private_key=private_key).sign(archive, signature)
    except (ValueError, TypeError, AttributeError) as error:  # the last for keys of other kinds
        raise ArchiveError(
            f"{private_key} does not sign: {error}; make a key with: "
            "openssl ecparam -name prime256v1 -genkey -noout -out private.pem"
        ) from error


def check_signature(archive: Path, public_key: Path, signature: Path) -> None:
    """Raise ArchiveError unless `signature` was made of `archive` with the key's other half."""
    if not public_key.is_file():
        raise ArchiveError(f"{public_key}: no such key")
    if not signature.is_file():
        raise ArchiveError(f"{signature} is missing: the archive is not signed")
    try:
        config = _model_signing().verifying.Config()
        config.use_elliptic_key_verifier(public_key=public_key).verify(archive, signature)
    except Exception as error:
        # A damaged bundle raises whatever its parsers raise; none of it is a valid signature.
        reason = (str(error).strip() or type(error).__name__).split("\n")[0].partition(": [")[0]
        raise ArchiveError(f"{signature} does not match: {reason}") from error


def _model_signing() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ArchiveError(
            f"signing needs the extra 'sign' (pip install model-signing pyopenssl): {error}"
        ) from error
    return model_signing
