"""What an operator may set about jobs: the section `jobs` of config/gateway.yaml."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from gateway.setting_tables import setting
from handler import config_checks as allow
from handler.config_checks import Check

__all__ = ["JobSettings"]

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")


def _hosts() -> Check:
    def is_network(entry: str) -> bool:
        try:
            ipaddress.ip_network(entry)
        except ValueError:
            return False
        return True

    def convert(value: object) -> object:
        entries = value if isinstance(value, (list, tuple)) else (None,)
        for each in entries:
            if not isinstance(each, str) or not (is_network(each) or _HOST.fullmatch(each)):
                raise ValueError
        return tuple(entries)

    return Check(
        "a list of names of hosts in lower case, addresses and networks, such as"
        " [hooks.example, 10.0.0.0/8]",
        "",
        convert,
    )


@dataclass(frozen=True, slots=True)
class JobSettings:
    """All settings of jobs; times and sizes in the unit that the name ends with."""

    database: str | None = setting(
        None,
        allow.optional(allow.text()),
        "a file of SQLite's, or postgresql://… where several gateways share it; left out:"
        " jobs.sqlite in the state folder",
    )
    concurrency: int = setting(
        4, allow.integer(1, 1000), "pictures of jobs that this gateway draws at a time"
    )
    max_waiting: int = setting(
        1000, allow.integer(1, 1_000_000), "jobs that may wait; beyond that 503"
    )
    max_waiting_per_key: int = setting(
        200, allow.integer(1, 1_000_000), "the same for one key; beyond that 429"
    )
    max_wait_s: float = setting(
        86400.0,
        allow.number(1.0, 365 * 86400.0),
        "seconds after which a job that could not be drawn fails",
    )
    expires_s: float = setting(
        86400.0,
        allow.number(1.0, 365 * 86400.0),
        "seconds that a job and its pictures are kept when it has ended",
    )
    store_bytes: int = setting(
        2 * 1024**3,
        allow.integer(64 * 1024, 2**50),
        "bytes of all jobs; those that ended first go first",
    )
    lease_s: float = setting(
        15.0,
        allow.number(0.2, 3600.0),
        "seconds after which the job of a gateway that says nothing is another one's",
    )
    webhook_hosts: tuple[str, ...] = setting(
        (),
        _hosts(),
        "where webhooks may be sent: hosts, and addresses that are not public ones",
    )
    webhook_secret_file: str | None = setting(
        None,
        allow.optional(allow.text()),
        "what webhooks are signed with; left out: webhook_secret in the state folder",
    )
    webhook_tries: int = setting(
        8, allow.integer(1, 20), "times that a webhook is sent until it is received"
    )
