"""Write the generated tables of docs/ and the section `handler:` of config/model-config.yaml.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; everything around it
is written by hand. What the tables say comes from handler/config.py, handler/errors.py and
handler/api/.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from handler import errors
from handler.api.accept import MEDIA_TYPES
from handler.api.foreign_names import FOREIGN_NAMES
from handler.api.sampler_table import SAMPLERS, SCHEDULER_CLASSES, SCHEDULES
from handler.api.schema import PICTURE_FIELDS, REPLY_FIELDS, Field, Kind, Setting, Value
from handler.config import HandlerConfig, keys
from handler.errors import RequestError
from scripts.console import DONE, FAILED, atomic_output, run_command
from scripts.errors import UsageError
from scripts.repository import REPOSITORY

__all__ = ["DOCUMENTS", "main", "render"]

_CONFIG = HandlerConfig()
_COMMENT_COLUMN = 30


def render(path: Path) -> str:
    """The text of a document as it should be: its own, with its tables written anew.

    Raises:
        UsageError: it has a table that nothing writes, or one without an end.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        head, handler, _ = text.partition("\nhandler:\n")
        return head + handler + _handler_section()
    written = re.sub(
        r"(<!-- table: (.*?) -->\n).*?(<!-- end of table -->)",
        lambda match: f"{match[1]}{_table(match[2], path)}{match[3]}",
        text,
        flags=re.DOTALL,
    )
    if len(re.findall("<!-- table: ", text)) != len(re.findall("<!-- end of table -->", text)):
        raise UsageError(f"{path}: a table has no end, or an end no table")
    return written


def _table(name: str, path: Path) -> str:
    if name not in _TABLES:
        raise UsageError(f"{path}: no table is called {name!r}; known are {', '.join(_TABLES)}")
    rows = list(_TABLES[name]())
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(_cell(c) for c in cells)} |\n" for cells in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _picture_fields() -> Iterable[list[str]]:
    yield ["field", "also called", "allowed", "default", "meaning"]
    for field in PICTURE_FIELDS.values():
        aliases = ", ".join(f"`{alias}`" for alias in field.aliases)
        yield [f"`{field.name}`", aliases, _allowed(field), _default(field), field.meaning]


def _reply_fields() -> Iterable[list[str]]:
    yield ["field", "or as a header", "allowed", "default", "meaning"]
    for field in REPLY_FIELDS.values():
        header = f"`{field.header}`" if field.header else ""
        yield [f"`{field.name}`", header, _allowed(field), _default(field), field.meaning]


def _allowed(field: Field) -> str:
    if field.kind is Kind.CHOICE:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    if field.kind is Kind.ID:
        return "1 to 128 of `A-Z a-z 0-9 . _ : -`"
    if field.kind is Kind.BOOLEAN:
        return "true or false"
    if field.kind is Kind.LORAS:
        return f"names, with scales from {_bound(field.minimum)} to {_bound(field.maximum)}"
    if field.kind is Kind.PICTURE:
        return f"PNG, JPEG or WebP, up to {_bound(field.maximum)} bytes"
    span = f"{_bound(field.minimum)} to {_bound(field.maximum)}"
    if field.kind is Kind.TEXT:
        return f"text, {span} characters"
    words = "".join(f", or `{word}`" for word in field.words)
    return f"{'an integer' if field.kind is Kind.INTEGER else 'a number'}, {span}{words}"


def _bound(bound: Value | Setting) -> str:
    if isinstance(bound, Setting):
        configured = getattr(_CONFIG, bound.key)
        value = bound.unset if configured is None else configured
        return f"`{bound.key}` ({value:.17g})"
    return f"{bound:.17g}" if isinstance(bound, float) else str(bound)


def _default(field: Field) -> str:
    if isinstance(field.default, Setting):
        configured = getattr(_CONFIG, field.default.key)
        shown = field.default_note or "none" if configured is None else _yaml(configured)
        return f"`{field.default.key}` ({shown})"
    if field.default_note or field.default is None:
        return field.default_note
    return _yaml(field.default)


def _output_formats() -> Iterable[list[str]]:
    yield ["`output_format`", "`Accept`", "reply"]
    replies = {
        "png": "the picture, its parameters embedded",
        "jpeg": "the picture, its parameters embedded",
        "webp": "the picture, its parameters embedded",
        "npy": "NumPy's format, uint8, (H, W, 3); of several pictures (N, H, W, 3)",
        "json": '`{"images": [base64 PNG …], "content_type": …, "seeds": […], "parameters": {…},'
        ' "warnings": […]}`',
        "array": "nested lists of numbers, as TorchServe's own diffusers example replies",
    }
    for name, media in MEDIA_TYPES.items():
        yield [f"`{name}`", "" if name == "array" else f"`{media}`", replies[name]]


def _schedulers() -> Iterable[list[str]]:
    yield ["`scheduler`", "also", "diffusers class", "its options", "`sigmas`"]
    for solver in SAMPLERS.values():
        options = ", ".join(f"`{name}={value!r}`" for name, value in solver.options.items())
        yield [
            f"`{solver.name}`",
            ", ".join(f"`{alias}`" for alias in solver.aliases),
            " or ".join(f"`{class_name}`" for class_name in solver.class_names),
            options,
            _sigmas(solver.class_names),
        ]
    for short, class_name in SCHEDULER_CLASSES.items():
        yield [f"`{short}`", "", f"`{class_name}`", "as the pipeline's own is configured", ""]


def _sigmas(class_names: Sequence[str]) -> str:
    """The schedules of a solver, class by class where these differ."""
    found = {
        class_name: ", ".join(
            key
            for key, schedule in SCHEDULES.items()
            if schedule.options_for(class_name) is not None
        )
        for class_name in class_names
    }
    if len(set(found.values())) == 1:
        return found[class_names[0]]
    return "; ".join(f"`{name}`: {sigmas or 'none'}" for name, sigmas in found.items())


def _foreign_names() -> Iterable[list[str]]:
    yield ["other API", "its field", "here"]
    rows: dict[tuple[str, str], list[str]] = {}
    for each in FOREIGN_NAMES.values():
        rows.setdefault((each.apis, each.meaning), []).append(f"`{each.name}`")
    for (apis, meaning), names in rows.items():
        yield [apis, ", ".join(names), meaning]


def _errors() -> Iterable[list[str]]:
    yield ["status", "`code`", "meaning"]
    # Those of the worker: the gateway has errors of its own.
    kinds = [
        each
        for each in vars(errors).values()
        if isinstance(each, type)
        and issubclass(each, RequestError)
        and each is not RequestError
        and each.__name__ in errors.__all__
    ]
    for kind in sorted(kinds, key=lambda kind: kind.status):
        meaning = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        yield [f"{kind.status} {kind.phrase}", f"`{kind.code}`", meaning]


def _configuration() -> Iterable[list[str]]:
    yield ["key", "default", "allowed", "meaning"]
    for key in keys():
        if key.section:
            yield [f"**{key.section}**", "", "", ""]
        default = f"left out: {key.left_out}" if key.default is None else f"`{_yaml(key.default)}`"
        note = f"; {key.note}" if key.note else ""
        yield [f"`{key.name}`", default, key.span or "text", key.meaning + note]


def _handler_section() -> str:
    """The YAML of every key with its default, or commented out with an example."""
    blocks: list[list[str]] = []
    for key in keys():
        if key.section:
            blocks.append([f"  # {key.section}"])
        is_set = key.default is not None
        line = f"{key.name}: {_yaml(key.default) if is_set else key.example}"
        line = line if is_set else f"# {line}"
        left_out = "" if is_set else f"; left out: {key.left_out}"
        comment = f"{key.meaning}{key.span and f': {key.span}'}{key.note and f'; {key.note}'}"
        blocks[-1].append(f"  {line:<{_COMMENT_COLUMN}} # {comment}{left_out}".replace("`", ""))
    return "\n".join("\n".join(lines) + "\n" for lines in blocks)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_TABLES: dict[str, Callable[[], Iterable[list[str]]]] = {
    "picture fields": _picture_fields,
    "reply fields": _reply_fields,
    "output formats": _output_formats,
    "schedulers": _schedulers,
    "foreign names": _foreign_names,
    "errors": _errors,
    "configuration": _configuration,
}
DOCUMENTS: Sequence[Path] = (
    REPOSITORY / "docs" / "requests.md",
    REPOSITORY / "docs" / "configuration.md",
    REPOSITORY / "config" / "model-config.yaml",
)


def main(argv: list[str] | None = None) -> int:
    """Write what is stale, or only say it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.write_docs", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a document is stale"
    )
    return run_command(parser, _run, argv)


def _run(arguments: argparse.Namespace) -> int:
    stale = [path for path in DOCUMENTS if render(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        if not arguments.check:
            with atomic_output(path, force=True) as part:
                part.write_text(render(path), encoding="utf-8")
        print(f"{path.relative_to(REPOSITORY)} {'is stale' if arguments.check else 'is written'}")
    return FAILED if stale and arguments.check else DONE


if __name__ == "__main__":
    sys.exit(main())
