"""Tables of settings: dataclasses whose fields carry their check and meaning, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, ClassVar, Protocol, TypeVar

from handler.config_checks import Check
from handler.errors import ConfigError
from handler.messages import nearest, show

__all__ = ["SettingProblems", "is_table", "read_checked", "read_values", "setting"]

_T = TypeVar("_T")


class SettingProblems(ConfigError):
    """Every problem of a table, each of which names its key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n  ".join(["the gateway's configuration is wrong:", *problems]))
        self.problems = problems


class _Table(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def setting(default: _T, check: Check, meaning: str) -> _T:
    """A field of a table of settings."""
    metadata = {"check": check, "meaning": meaning}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)


def is_table(table: type[_Table]) -> Check:
    """Keys and values of another table, which become an object of it."""

    def convert(value: object) -> object:
        return value if isinstance(value, table) else table(**read_values(table, value))

    return Check("keys and values", "", convert)


def read_values(table: type[_Table], section: object) -> dict[str, Any]:
    """The checked values of a section for the fields of `table`.

    Raises:
        SettingProblems: names every unknown key, every bad value and what is allowed.
    """
    if section is None:
        section = {}
    if not isinstance(section, Mapping):
        raise SettingProblems([f"must be keys and values, not {show(section)}"])
    return read_checked({each.name: each.metadata["check"] for each in fields(table)}, section)


def read_checked(checks: Mapping[str, Check], section: Mapping[Any, object]) -> dict[str, Any]:
    """The values of a section, each by its check.

    Raises:
        SettingProblems: names every unknown key, every bad value and what is allowed.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, value in section.items():
        if name not in checks:
            match = nearest(str(name), checks)
            hint = f"did you mean {match}?" if match else f"known are {', '.join(checks)}"
            problems.append(f"{name}: unknown key; {hint}")
            continue
        try:
            values[name] = checks[name].convert(value)
        except SettingProblems as inner:
            problems += [f"{name}.{problem}" for problem in inner.problems]
        except ValueError:
            problems.append(f"{name}: {show(value)} is not allowed; must be {checks[name].allowed}")
    if problems:
        raise SettingProblems(problems)
    return values
