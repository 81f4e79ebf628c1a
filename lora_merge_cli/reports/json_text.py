"""The report as JSON, for programs; `schema` says how to read it."""

from __future__ import annotations

import json

from lora_merge_cli.report import Report


def to_json(report: Report) -> str:
    """One JSON document with a final newline."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
