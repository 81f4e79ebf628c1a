"""Reports: `MergeReport` to text, by the file's suffix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lora_merge_cli.errors import NotPermitted, UsageError
from lora_merge_cli.report import MergeReport
from lora_merge_cli.reports.json_text import to_json
from lora_merge_cli.reports.markdown import to_markdown

RENDERERS: Mapping[str, Callable[[MergeReport], str]] = {".json": to_json, ".md": to_markdown}
"""What makes the text of a report file, by suffix."""


def check_report_paths(paths: list[Path]) -> None:
    """Refuse report files that could not be written, before any work is done.

    Raises:
        UsageError: No report is of that suffix, or the path is a directory.
    """
    for path in paths:
        if path.suffix not in RENDERERS:
            raise UsageError("--report does not know the suffix", where=path, expected=" or ".join(RENDERERS))
        if path.is_dir():
            raise UsageError("--report names a directory", where=path)


def write_report(report: MergeReport, path: Path) -> None:
    """Write a report file, creating its folder.

    Raises:
        NotPermitted: The file cannot be written.
    """
    text = RENDERERS[path.suffix](report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise NotPermitted("the report cannot be written", where=path, found=error.strerror) from error


__all__ = ["RENDERERS", "check_report_paths", "to_json", "to_markdown", "write_report"]
