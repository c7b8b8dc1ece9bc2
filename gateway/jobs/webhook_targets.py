"""Where webhooks may be sent: to hosts that the operator names, and there to public addresses.

An address that is not public (loopback, a private network) must be named itself, or a network that
holds it. What a name stands for is looked up once, checked, and connected to: it cannot change in
between.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from handler.messages import show

__all__ = ["CheckedResolver", "WebhookTargets"]


class WebhookTargets:
    """The hosts and networks of `webhook_hosts`."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for each in hosts:
            try:
                self._networks.append(ipaddress.ip_network(each))
            except ValueError:
                self._names.add(each)

    def problem_of(self, url: str) -> str | None:
        """Why nothing may be sent to `url`, as far as it says; None where it may."""
        try:
            parsed = URL(url)
            host, port = parsed.host, parsed.port
        except ValueError:
            return f"{show(url)} is not a URL"
        if parsed.scheme not in ("http", "https") or not host or not port:
            return f"{show(url)} is not a URL of http or https"
        if parsed.user is not None or parsed.password is not None:
            return "must not hold a user or a password"
        if not self._names and not self._networks:
            return "cannot be sent here: the gateway's webhook_hosts are empty"
        address = _address(host)
        allowed = (
            host.rstrip(".").lower() in self._names if address is None else self._is_named(address)
        )
        if not allowed:
            return f"the host {show(host)} is not one of the gateway's webhook_hosts"
        return None

    def may_connect(self, host: str) -> bool:
        """Tell whether `host`, an address, is public or named."""
        address = _address(host)
        return address is not None and (self._is_named(address) or _is_public(address))

    def _is_named(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


class CheckedResolver(AbstractResolver):
    """Resolves names to those of their addresses that may be connected to."""

    def __init__(self, targets: WebhookTargets, inner: AbstractResolver | None = None) -> None:
        self._targets = targets
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses; raise OSError where there is none that is allowed."""
        found = await self._inner.resolve(host, port, family)
        allowed = [each for each in found if self._targets.may_connect(each["host"])]
        if not allowed:
            raise OSError(f"{host} has no address that webhooks may be sent to")
        return allowed

    async def close(self) -> None:
        """Let go of the resolver behind it."""
        await self._inner.close()


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        # Both hold an address of IPv4's that is reached in the end.
        inner = address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None or any(address in network for network in _NOT_PUBLIC):
            return False
    return address.is_global and not address.is_multicast


# What Python calls global, and is not, or holds an address of IPv4's: NAT64's two, IPv4-compatible
# and IPv4-translated addresses, and site-local ones.
_NOT_PUBLIC = tuple(
    ipaddress.IPv6Network(each)
    for each in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "fec0::/10")
)
