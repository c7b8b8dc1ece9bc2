"""Authorization of requests to one registry, by its challenges."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase, _basic_auth_str
from requests.utils import parse_dict_header

from scripts.errors import RegistryError
from scripts.registry.credentials import Credentials

__all__ = ["RegistryAuth"]

_TIMEOUT_S = (10.0, 60.0)


class RegistryAuth(AuthBase):
    """Sends the registry at `origin` what it asks for, and other hosts nothing.

    An upload or a download may lead elsewhere, such as to an object store, which has its own
    signature in the address. ``~/.netrc`` is not read.
    """

    def __init__(self, origin: str, credentials: Credentials | None, *, is_insecure: bool) -> None:
        self._origin = origin
        self._credentials = credentials
        self._is_insecure = is_insecure
        self._header: str | None = None
        self._lock = threading.Lock()

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the header to `request`."""
        if self._header is not None and self._is_ours(request.url or ""):
            request.headers["Authorization"] = self._header
        return request

    def answer(self, session: requests.Session, refused: requests.Response) -> bool:
        """Get what the 401 `refused` asks for; False where there is nothing new to send.

        Raises: RegistryError, where the server that gives tokens refuses.
        """
        if not self._is_ours(refused.url):
            return False
        sent = refused.request.headers.get("Authorization")
        with self._lock:
            if sent != self._header:
                return True  # another thread has been quicker
            scheme, _, parameters = refused.headers.get("WWW-Authenticate", "").partition(" ")
            if scheme.lower() == "basic":
                header = self._basic()
            elif scheme.lower() == "bearer":
                header = f"Bearer {self._token(session, _parameters(parameters))}"
            else:
                return False
            if header is None or header == sent:
                return False
            self._header = header
            return True

    def _is_ours(self, url: str) -> bool:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc}" == self._origin

    def _basic(self) -> str | None:
        if self._credentials is None or not self._credentials.username:
            return None
        return str(_basic_auth_str(self._credentials.username, self._credentials.password))

    def _token(self, session: requests.Session, challenge: dict[str, str | None]) -> str:
        realm = challenge.get("realm") or ""
        if urlsplit(realm).scheme != "https" and not self._is_insecure:
            raise RegistryError(f"it asks for a password at {realm!r}, which is not https")
        fields = {name: value for name in ("service", "scope") if (value := challenge.get(name))}
        credentials = self._credentials
        try:
            # Without `auth` of its own, the session would ask this object again.
            if credentials is not None and credentials.identity_token:
                fields |= {
                    "grant_type": "refresh_token",
                    "refresh_token": credentials.identity_token,
                    "client_id": "diffusers-torchserve",
                }
                reply = session.post(realm, data=fields, auth=_Nothing(), timeout=_TIMEOUT_S)
            else:
                basic = self._basic()
                headers = {} if basic is None else {"Authorization": basic}
                reply = session.get(
                    realm, params=fields, headers=headers, auth=_Nothing(), timeout=_TIMEOUT_S
                )
            if reply.status_code != 200:
                raise RegistryError(
                    f"{urlsplit(realm).netloc} gives no token ({reply.status_code}): log in with "
                    "docker login, which also podman and skopeo do"
                )
            answer = reply.json()
            return str(answer.get("token") or answer["access_token"])
        except (requests.RequestException, ValueError, KeyError, AttributeError) as error:
            raise RegistryError(f"{realm} gives no token: {error}") from error


def _parameters(text: str) -> dict[str, str | None]:
    return dict(parse_dict_header(text))  # type: ignore[no-untyped-call]


class _Nothing(AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request
