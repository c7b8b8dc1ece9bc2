"""gateway.jobs.webhook_targets: nothing is sent where the operator did not say so."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.jobs.webhook_targets import CheckedResolver, WebhookTargets

TARGETS = WebhookTargets(["hooks.example", "10.1.0.0/16", "127.0.0.1"])


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/a?b=c",
        "https://HOOKS.example./",
        "http://hooks.example:8080/",
        "http://127.0.0.1:9000/",
        "http://[::ffff:127.0.0.1]/",
        "http://10.1.2.3/",
    ],
)
def test_allowed(url: str) -> None:
    assert TARGETS.problem_of(url) is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://other.example/", "is not one of"),
        ("https://sub.hooks.example/", "is not one of"),
        ("https://hooks.example.evil.example/", "is not one of"),
        ("http://127.0.0.2/", "is not one of"),
        ("http://10.2.0.1/", "is not one of"),
        ("http://169.254.169.254/", "is not one of"),
        ("http://[::1]/", "is not one of"),
        ("http://2130706433/", "is not one of"),
        ("https://hooks.example@evil.example/", "a user or a password"),
        ("https://me:secret@hooks.example/", "a user or a password"),
        ("ftp://hooks.example/", "is not a URL of http"),
        ("file:///etc/passwd", "is not a URL of http"),
        ("hooks.example", "is not a URL of http"),
        ("http://hooks.example:99999/", "is not a URL"),
        ("http://[", "is not a URL"),
    ],
)
def test_refused(url: str, said: str) -> None:
    problem = TARGETS.problem_of(url)
    assert problem is not None
    assert said in problem


def test_nothing_is_allowed_where_nothing_is_named() -> None:
    problem = WebhookTargets([]).problem_of("https://hooks.example/")
    assert problem is not None
    assert "webhook_hosts are empty" in problem


class Names(AbstractResolver):
    """Says that a name has these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=0)
            for each in self.addresses
        ]

    async def close(self) -> None:
        pass


def resolved(*addresses: str) -> list[str]:
    async def resolve() -> list[str]:
        found = await CheckedResolver(TARGETS, Names(*addresses)).resolve("hooks.example", 443)
        return [each["host"] for each in found]

    return asyncio.run(resolve())


def test_a_name_stands_for_public_addresses_and_those_that_are_named() -> None:
    addresses = ["192.168.1.1", "93.184.215.14", "2606:2800:21f:cb07::1", "10.1.0.9", "::1"]
    assert resolved(*addresses) == ["93.184.215.14", "2606:2800:21f:cb07::1", "10.1.0.9"]


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.2", "0.0.0.0", "10.2.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:169.254.169.254"),
        *("64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2001:db8::1"),
        *("64:ff9b:1::a9fe:a9fe", "::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1"),
    ],
)
def test_no_other_address_is_connected_to(address: str) -> None:
    with pytest.raises(OSError, match="no address that webhooks may be sent to"):
        resolved(address)
