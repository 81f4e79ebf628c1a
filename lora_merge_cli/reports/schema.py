"""The JSON Schema of the reports, derived from their records."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from lora_merge_cli import extract_report, report, resize_report
from lora_merge_cli.reports import TextReport

_MODULES = (report, extract_report, resize_report)
"""Where the records are."""


def report_schema() -> dict[str, Any]:
    """What every JSON report conforms to; draft 2020-12."""
    from pydantic import Field, TypeAdapter

    union = Annotated[TextReport, Field(discriminator="command")]
    schema = TypeAdapter[Any](union).json_schema(mode="serialization")
    docs = _field_docs()
    schema["$defs"] = {
        name: _described_record(definition, _record_named(name), docs) for name, definition in schema["$defs"].items()
    }
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora-merge report",
        "description": "What a merge, an interpolation, a sweep of several, a verification, a comparison or a resizing found.",
    }
    return head | schema


def _record_named(name: str) -> type:
    found: type = next(getattr(module, name) for module in _MODULES if hasattr(module, name))
    return found


def _described_record(definition: dict[str, Any], record: type, docs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The definition with all docstrings: pydantic reads none of inherited fields, and its older versions none at all."""
    texts = {field: text for base in reversed(record.__mro__) for field, text in docs.get(base.__name__, {}).items()}
    fields = {name: _described(field, texts[name]) for name, field in definition["properties"].items()}
    return _described(definition, inspect.getdoc(record) or "") | {"properties": fields}


def _described(schema: dict[str, Any], docstring: str) -> dict[str, Any]:
    text = " ".join(docstring.split()).replace("``", "`")
    return {"description": text} | {key: value for key, value in schema.items() if key not in ("title", "description")}


def _field_docs() -> dict[str, dict[str, str]]:
    """The string below each field, by class and field."""
    return {
        record.name: dict(_documented(itertools.pairwise(record.body)))
        for module in _MODULES
        for record in ast.parse(inspect.getsource(module)).body
        if isinstance(record, ast.ClassDef)
    }


def _documented(pairs: Iterable[tuple[ast.stmt, ast.stmt]]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        match pair:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                yield name, text
