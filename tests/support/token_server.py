"""A server of tokens for a registry, as ghcr.io and the Docker Hub have one."""

from __future__ import annotations

import base64
import datetime
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.registry import PASSWORD, USER

ISSUER, SERVICE, IDENTITY = "tests", "registry", "an identity token"
_PEM = serialization.Encoding.PEM


@dataclass
class TokenServer:
    """Its address, its certificate, and the scopes that it gave tokens for."""

    url: str
    certificate: Path
    scopes: list[str] = field(default_factory=list)

    def auth(self) -> str:
        """The configuration of a registry that takes its tokens."""
        return (
            f"auth: {{token: {{realm: '{self.url}/token', service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: '{self.certificate}'}}}}\n"
        )


@contextmanager
def serve_tokens(folder: Path) -> Iterator[TokenServer]:
    """Give tokens to `USER` with `PASSWORD`, and to who has the identity token."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(_PEM))
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    tokens = TokenServer(f"http://127.0.0.1:{server.server_address[1]}", folder / "certificate.pem")
    server.tokens, server.key, server.chain = tokens, key, chain  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield tokens
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        self._answer(urlsplit(self.path).query, is_known=given == wanted)

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        fields = parse_qs(form)
        is_known = fields.get("refresh_token") == [IDENTITY]
        self._answer(form, is_known=is_known and fields["grant_type"] == ["refresh_token"])

    def _answer(self, query: str, *, is_known: bool) -> None:
        (scope,) = parse_qs(query)["scope"]
        kind, name, actions = scope.split(":")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
        now = datetime.datetime.now(datetime.UTC)
        claims = {
            "iss": ISSUER,
            "sub": USER,
            "aud": SERVICE,
            "access": access,
            "jti": "1",
            "iat": now,
            "nbf": now - datetime.timedelta(minutes=1),
            "exp": now + datetime.timedelta(minutes=5),
        }
        server = self.server
        headers = {"x5c": server.chain}  # type: ignore[attr-defined]
        token = jwt.encode(claims, server.key, "ES256", headers)  # type: ignore[attr-defined]
        if is_known:
            server.tokens.scopes.append(scope)  # type: ignore[attr-defined]
        body = json.dumps({"access_token": token} if is_known else {"details": "who?"}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
