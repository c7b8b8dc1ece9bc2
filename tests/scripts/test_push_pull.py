"""scripts.push_archive and pull_archive, against a real registry on loopback."""

from __future__ import annotations

import base64
import json
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from handler.errors import ServingError
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.console import DONE, FAILED, MISUSED
from scripts.embedded import EMBEDDED_PIPELINE
from scripts.errors import RegistryError, UsageError
from scripts.pull_archive import main as pull_main
from scripts.pull_archive import pull
from scripts.push_archive import main as push_main
from scripts.push_archive import push
from scripts.registry import transfer
from scripts.registry.auth import RegistryAuth
from scripts.registry.credentials import Credentials
from scripts.registry.reference import Reference
from scripts.verify_archive import verify
from tests.support.packing import content
from tests.support.registry import PASSWORD, USER, CuttingProxy, htpasswd_auth, serve_registry
from tests.support.token_server import IDENTITY, serve_tokens


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transfers try again at once."""
    monkeypatch.setattr(transfer, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def resigned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transfers not try again."""
    monkeypatch.setattr(transfer, "PAUSES_S", ())


def pack(folder: Path, name: str = "toy", **options: Any) -> Path:
    """Pack the embedded pipeline, whose UNet has 8.9 MB."""
    is_folder = options.get("is_folder", False)
    out = folder / (name if is_folder else f"{name}.mar")
    folder.mkdir(exist_ok=True)
    write_archive(ArchivePlan(EMBEDDED_PIPELINE, name, **options), out)
    return out


def at(host: str, text: str) -> Reference:
    return Reference.parse(f"{host}/{text}")


def test_what_is_pulled_is_what_was_pushed(
    tmp_path: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(tmp_path)
    to = f"{registry}/me/round-trip:1.0"
    assert push_main([str(archive), "--to", to]) == DONE
    shown = capsys.readouterr().out.strip()
    assert shown.startswith(f"{registry}/me/round-trip@sha256:")
    store = tmp_path / "store"
    assert pull_main(["--from", shown, "--store", str(store)]) == DONE
    assert (store / "toy.mar").read_bytes() == archive.read_bytes()
    assert [path.name for path in store.iterdir()] == ["toy.mar"]
    assert pull_main(["--from", to, "--store", str(store)]) == MISUSED
    assert "exists; pass --force" in capsys.readouterr().err
    assert pull_main(["--from", to, "--store", str(store), "--name", "other"]) == DONE
    assert (store / "other.mar").read_bytes() == archive.read_bytes()


def test_an_archive_folder_too(tmp_path: Path, registry: str) -> None:
    archive = pack(tmp_path, is_folder=True)
    digest = push(archive, at(registry, "me/folder:1.0"))
    out = pull(at(registry, f"me/folder@{digest}"), tmp_path / "store")
    assert content(out) == content(archive)
    assert verify(out) == []


def test_another_configuration_sends_kilobytes(
    tmp_path: Path, registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    push(pack(tmp_path), at(registry, "me/twice:1.0"))
    assert "sent 11." in capsys.readouterr().err
    other = pack(tmp_path, "other", version="2.0", settings={"height": 512})
    with CuttingProxy(registry).running() as proxy:
        digest = push(other, at(proxy.host, "me/twice:2.0"))
    assert proxy.sent < 600_000
    out = pull(at(registry, f"me/twice@{digest}"), tmp_path / "store")
    assert out.read_bytes() == other.read_bytes()


def test_equal_archives_have_equal_digests(tmp_path: Path, registry: str) -> None:
    first = push(pack(tmp_path / "a"), at(registry, "me/a:1"))
    assert push(pack(tmp_path / "b"), at(registry, "me/b:1")) == first


def test_an_upload_that_is_cut_is_tried_again(tmp_path: Path, registry: str, hasty: None) -> None:
    archive = pack(tmp_path)
    with CuttingProxy(registry, cut_after=4_000_000, num_cuts_left=1).running() as proxy:
        digest = push(archive, at(proxy.host, "me/cut:1.0"))
    assert proxy.num_cuts_left == 0
    assert proxy.sent < archive.stat().st_size + 5_000_000
    out = pull(at(registry, f"me/cut@{digest}"), tmp_path / "store")
    assert out.read_bytes() == archive.read_bytes()


def test_the_next_push_sends_what_is_missing(tmp_path: Path, registry: str, resigned: None) -> None:
    archive = pack(tmp_path)
    with CuttingProxy(registry, cut_after=4_000_000, num_cuts_left=1).running() as proxy:
        with pytest.raises(RegistryError, match="the same command goes on from there"):
            push(archive, at(proxy.host, "me/again:1.0"))
        with pytest.raises(RegistryError, match="not found"):
            pull(at(registry, "me/again:1.0"), tmp_path / "store")
        digest = push(archive, at(proxy.host, "me/again:1.0"))
    out = pull(at(registry, f"me/again@{digest}"), tmp_path / "store")
    assert out.read_bytes() == archive.read_bytes()


def test_a_download_goes_on_where_it_was_cut(tmp_path: Path, registry: str, hasty: None) -> None:
    archive = pack(tmp_path)
    push(archive, at(registry, "me/down:1.0"))
    with CuttingProxy(registry, cut_after=4_000_000, num_cuts_left=2).running() as proxy:
        out = pull(at(proxy.host, "me/down:1.0"), tmp_path / "store")
    assert proxy.num_cuts_left == 0
    assert proxy.received < 1.2 * archive.stat().st_size
    assert out.read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_next_pull_goes_on(
    tmp_path: Path, registry: str, resigned: None, is_damaged: bool
) -> None:
    """Also where what is there was lost, as by a machine that stopped: it is fetched again."""
    archive = pack(tmp_path)
    push(archive, at(registry, "me/later:1.0"))
    store = tmp_path / "store"
    with CuttingProxy(registry, cut_after=6_000_000, num_cuts_left=1).running() as proxy:
        with pytest.raises(RegistryError, match="the same command goes on from there"):
            pull(at(proxy.host, "me/later:1.0"), store)
        assert not (store / "toy.mar").exists()
        if is_damaged:
            (partial,) = store.glob(".*.pull/archive")
            with partial.open("r+b") as file:
                file.seek(archive.read_bytes().index(b"conv_in.weight") + 100_000)
                file.write(bytes(4096))
        before = proxy.received
        out = pull(at(proxy.host, "me/later:1.0"), store)
    again = proxy.received - before
    assert (again > 0.9 * archive.stat().st_size) == is_damaged
    assert out.read_bytes() == archive.read_bytes()
    assert [path.name for path in store.iterdir()] == ["toy.mar"]


def test_what_the_registry_changed_is_refused(tmp_path: Path, registry: str) -> None:
    """The registry's own copy of the UNet is damaged on its disk."""
    with serve_registry(tmp_path / "registry") as host:
        digest = push(pack(tmp_path), at(host, "me/bad:1.0"))
        data = tmp_path / "registry" / "data"
        largest = max(data.rglob("data"), key=lambda path: path.stat().st_size)
        with largest.open("r+b") as file:
            file.seek(5_000_000)
            byte = file.read(1)
            file.seek(5_000_000)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(
            RegistryError, match=r"what the registry sent as sha256:\w+ is not that"
        ):
            pull(at(host, f"me/bad@{digest}"), tmp_path / "store")
    assert not (tmp_path / "store" / "toy.mar").exists()


def test_the_image_is_the_unpacked_archive(tmp_path: Path, registry: str) -> None:
    """As a runtime unpacks it, layer by layer; a worker opens it, and verify calls it whole."""
    push(pack(tmp_path), at(registry, "me/image:1.0"))
    manifest = fetch(registry, "me/image/manifests/1.0")
    index = json.loads(manifest)
    platforms = [each["platform"]["architecture"] for each in index["manifests"]]
    assert platforms == ["amd64", "arm64"]
    root = tmp_path / "root"
    image = json.loads(fetch(registry, f"me/image/manifests/{index['manifests'][1]['digest']}"))
    config = json.loads(fetch(registry, f"me/image/blobs/{image['config']['digest']}"))
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in image["layers"]]
    for layer in image["layers"]:
        (tmp_path / "layer").write_bytes(fetch(registry, f"me/image/blobs/{layer['digest']}"))
        with tarfile.open(tmp_path / "layer") as archive:
            archive.extractall(root, filter="data")
    assert {path.name for path in root.iterdir()} == {"archive", "models"}
    assert verify(root / "models") == []


def fetch(registry: str, path: str) -> bytes:
    accept = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"
    request = urllib.request.Request(f"http://{registry}/v2/{path}", headers={"Accept": accept})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as reply:
        data: bytes = reply.read()
        return data


def test_a_registry_that_wants_a_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(tmp_path)
    folder = tmp_path / "registry"
    with serve_registry(folder, htpasswd_auth(folder)) as host:
        to = f"{host}/me/toy:1.0"
        assert push_main([str(archive), "--to", to]) == FAILED
        assert f"log in with: docker login {host}" in capsys.readouterr().err
        docker = tmp_path / "docker"
        docker.mkdir()
        entry = {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        (docker / "config.json").write_text(json.dumps({"auths": {host: entry}}))
        assert push_main([str(archive), "--to", to]) == DONE
        assert pull_main(["--from", to, "--store", str(tmp_path / "store")]) == DONE
    assert (tmp_path / "store" / "toy.mar").read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("entry", ["password", "identity token"])
def test_a_registry_that_wants_tokens(tmp_path: Path, entry: str) -> None:
    archive = pack(tmp_path)
    docker = tmp_path / "docker"
    docker.mkdir()
    with (
        serve_tokens(tmp_path / "tokens") as tokens,
        serve_registry(tmp_path / "registry", tokens.auth()) as host,
    ):
        with pytest.raises(RegistryError, match="gives no token"):
            push(archive, at(host, "me/toy:1.0"))
        if entry == "password":
            auth = {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
        else:
            auth = {"identitytoken": IDENTITY}
        (docker / "config.json").write_text(json.dumps({"auths": {host: auth}}))
        push(archive, at(host, "me/toy:1.0"))
        out = pull(at(host, "me/toy:1.0"), tmp_path / "store")
    assert out.read_bytes() == archive.read_bytes()
    scopes = {
        (scope.split(":")[1], *sorted(scope.split(":")[2].split(","))) for scope in tokens.scopes
    }
    assert scopes == {("me/toy", "pull"), ("me/toy", "pull", "push")}


def test_a_password_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    """To a server of tokens elsewhere, which a registry under https names."""
    session, refused = requests.Session(), requests.Response()
    refused.url = "https://registry.example/v2/"
    refused.request = requests.Request("GET", refused.url).prepare()
    refused.headers["WWW-Authenticate"] = 'Bearer realm="http://tokens.example/t",service="x"'
    auth = RegistryAuth("https://registry.example", Credentials("ada", "x"), is_insecure=False)
    with pytest.raises(RegistryError, match="which is not https"):
        auth.answer(session, refused)


def test_other_hosts_are_sent_nothing() -> None:
    """An upload or a download may lead to an object store, with a signature in the address."""
    origin = "https://registry.example"
    auth = RegistryAuth(origin, Credentials("ada", "x"), is_insecure=False)
    refused = requests.Response()
    refused.url = f"{origin}/v2/"
    refused.request = requests.Request("GET", refused.url).prepare()
    refused.headers["WWW-Authenticate"] = 'Basic realm="x"'
    with requests.Session() as session:
        assert auth.answer(session, refused)
    ours = auth(requests.Request("GET", f"{origin}/v2/blobs").prepare())
    assert "Authorization" in ours.headers
    for other in ("https://registry.example.org/", "http://registry.example/", "https://s3/"):
        assert "Authorization" not in auth(requests.Request("GET", other).prepare()).headers


@pytest.mark.parametrize("name", ["me/nothing:1.0", f"me/nothing@sha256:{'0' * 64}"])
def test_what_is_not_there(tmp_path: Path, registry: str, name: str) -> None:
    with pytest.raises(RegistryError, match="not found"):
        pull(at(registry, name), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_pushed(tmp_path: Path, registry: str) -> None:
    archive = pack(tmp_path)
    with pytest.raises(UsageError, match="push to a tag"):
        push(archive, at(registry, f"me/toy@sha256:{'0' * 64}"))
    with pytest.raises(ServingError, match="not packed by this tool"):
        push(EMBEDDED_PIPELINE, at(registry, "me/toy:1.0"))


def test_a_registry_that_is_not_there(tmp_path: Path, resigned: None) -> None:
    with pytest.raises(RegistryError, match="is not reached"):
        pull(at("127.0.0.1:1", "me/toy:1.0"), tmp_path / "store")
