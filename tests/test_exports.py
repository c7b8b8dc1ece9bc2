"""`__all__` is what other modules may import: nobody reaches past it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("handler", "scripts", "benchmarks")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for package in PACKAGES
    for path in sorted((ROOT / package).glob("*.py"))
}


def exported(name: str) -> set[str] | None:
    """The names in a module's `__all__`; None where it has none."""
    for statement in MODULES[name].body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
    return None


def imports(name: str) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a module imports from the others."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_what_others_export(name: str) -> None:
    hidden = [
        f"{module}.{wanted}"
        for module, wanted in imports(name)
        if (names := exported(module)) is not None and wanted not in names
    ]
    assert not hidden


@pytest.mark.parametrize("name", MODULES)
def test_what_is_exported_is_there(name: str) -> None:
    defined = {
        bound
        for node in MODULES[name].body
        for bound in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            else [t.id for t in ast.walk(node) if isinstance(t, ast.Name)]
            if isinstance(node, ast.Assign | ast.AnnAssign)
            else [alias.asname or alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom | ast.Import)
            else []
        )
    }
    assert (exported(name) or set()) <= defined
