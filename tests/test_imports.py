"""Who may import what: downward only between packages, no circles, nothing but public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scripts.repository import REPOSITORY

# The packages of handler/ that each of them may import; modules beside them count as packages.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "messages": {"errors"},
    "config_checks": {"messages"},
    "config": {"config_checks", "errors", "messages"},
    "garbage": set(),
    "library_logs": set(),
    "watchdog": set(),
    "cycle_messages": set(),
    "cycle_pace": set(),
    "single_worker": {"errors"},
    "torchserve_logs": set(),
    "api": {"config", "errors", "messages"},
    "zips": {"errors", "messages"},
    "loading": {"zips", "config", "errors", "messages", "library_logs"},
    "batching": {"errors"},
    "pipelines": {"api", "batching", "config", "errors", "messages", "library_logs"},
    "engine": {"pipelines", "batching", "errors"},
    "acceleration": {"engine", "pipelines", "batching", "config", "errors"},
    "service": {"engine", "pipelines", "api", "config", "errors"},
    "assembly": {
        *("service", "acceleration", "engine", "pipelines", "loading", "api"),
        *("config", "errors"),
    },
    "cycle_replies": {"service", "api"},
    "diffusers_handler": {
        *("assembly", "cycle_messages", "cycle_pace", "cycle_replies", "service", "loading", "api"),
        *(
            "config",
            "errors",
            "garbage",
            "library_logs",
            "single_worker",
            "torchserve_logs",
            "watchdog",
        ),
    },
    "torchserve_entry": {"diffusers_handler"},
}
TOP_MAY_IMPORT = {
    "handler": set(),
    "scripts": {"handler"},
    "demo": {"handler"},
    "gateway": {"handler"},
    "benchmarks": {"handler", "scripts", "demo"},
    "diffusers_torchserve": {"scripts"},
}
# What reads requests, and the checks of settings: plain data, nothing of torch.
GATEWAY_MAY_IMPORT = {
    *("handler.api.accept", "handler.api.body", "handler.api.fields", "handler.api.images"),
    *("handler.api.kserve", "handler.api.picture_headers", "handler.api.picture_sizes"),
    *("handler.api.schema", "handler.api.translation"),
    *("handler.config", "handler.config_checks", "handler.errors", "handler.garbage"),
    "handler.messages",
}


def _modules() -> dict[str, ast.Module]:
    modules = {}
    for package in TOP_MAY_IMPORT:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            modules[name] = ast.parse(path.read_text())
    return modules


MODULES = _modules()


def exported(name: str) -> set[str] | None:
    """The names in a module's `__all__`; None where it has none."""
    for statement in MODULES[name].body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return set(ast.literal_eval(value))
    return None


def imports(name: str) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a module imports from this repository."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, "") if inner in MODULES else (node.module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)


def _room(name: str) -> str:
    """The package of handler/ that a module belongs to, or the module beside the packages."""
    return name.split(".")[1]


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_what_others_export(name: str) -> None:
    hidden = [
        f"{module}.{wanted}"
        for module, wanted in imports(name)
        if wanted and (names := exported(module)) is not None and wanted not in names
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


@pytest.mark.parametrize("name", MODULES)
def test_folders_import_only_what_they_may(name: str) -> None:
    top = name.split(".")[0]
    imported = {module.split(".")[0] for module, _ in imports(name)} - {top}
    assert imported <= TOP_MAY_IMPORT[top]


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "gateway"])
def test_the_gateway_imports_only_the_table_of_the_handler(name: str) -> None:
    imported = {module for module, _ in imports(name) if module.split(".")[0] == "handler"}
    assert imported - {"handler"} <= GATEWAY_MAY_IMPORT


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("handler.")])
def test_packages_of_the_handler_import_downward_only(name: str) -> None:
    rooms = {_room(module) for module, _ in imports(name) if module != "handler"}
    assert rooms - {_room(name)} <= MAY_IMPORT[_room(name)]


def test_every_package_of_the_handler_has_its_rule() -> None:
    assert {_room(name) for name in MODULES if name.startswith("handler.")} == MAY_IMPORT.keys()


def test_the_rules_have_no_circles() -> None:
    left = {room: set(below) for room, below in MAY_IMPORT.items()}
    while free := [room for room, below in left.items() if not below & left.keys()]:
        for room in free:
            del left[room]
    assert not left


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count too: they only hide a circle."""
    # A package and its modules are one for this: its __init__ re-exports them.
    graph = {name: {module for module, _ in imports(name)} - {name} for name in MODULES}
    graph = {name: below for name, below in graph.items() if below}
    while free := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers", "ts"])
@pytest.mark.parametrize("package", ["gateway", "handler.api", "handler.config", "handler.errors"])
def test_what_needs_no_torch_imports_none(package: str, library: str) -> None:
    names = [name for name in MODULES if name == package or name.startswith(f"{package}.")]
    code = f"import sys, {', '.join(names)}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_no_helper_is_imported_from_a_test_file() -> None:
    for path in (REPOSITORY / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            last = module.rpartition(".")[2]
            assert not (module.startswith("tests.") and last.startswith(("test_", "conftest"))), (
                path
            )
