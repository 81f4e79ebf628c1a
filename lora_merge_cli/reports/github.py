"""The report in a GitHub Actions step summary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_merge_cli.errors import UsageError
from lora_merge_cli.reports import TextReport
from lora_merge_cli.reports.markdown import headline, to_markdown
from lora_merge_cli.staging import filesystem

_VARIABLE = "GITHUB_STEP_SUMMARY"
_LIMIT_BYTES = 2**20
"""GitHub drops a step's whole summary above it."""
_LEFT_OUT = "Left out, since a step summary holds 1 MiB: {}.\n"


def check_step_summary() -> Path:
    """The step summary's file, found fit to be appended to before any work is done.

    Raises:
        UsageError: No step summary is named.
        NotPermitted, ResourceError: It cannot be written.
    """
    name = os.environ.get(_VARIABLE)
    if not name:
        raise UsageError(f"--github needs {_VARIABLE}", hint="GitHub Actions sets it; elsewhere pass --report FILE.md")
    path = Path(name)
    with filesystem(path), path.open("ab"):
        return path


def append_step_summary(report: TextReport) -> Path:
    """Append the Markdown report, without its tables where they would not fit.

    Raises:
        UsageError: No step summary is named.
        NotPermitted, DiskFull, ResourceError: It cannot be written.
    """
    path = check_step_summary()
    with filesystem(path), path.open("ab") as summary:
        used = summary.tell()
        # A blank line ends whatever came before.
        gap = "\n\n" if used else ""
        texts = (f"{gap}{text}".encode() for text in _from_long_to_short(report))
        summary.write(next((text for text in texts if used + len(text) <= _LIMIT_BYTES), b""))
    return path


def _from_long_to_short(report: TextReport) -> Iterator[str]:
    yield to_markdown(report)
    yield f"{to_markdown(report, tables=False)}\n{_LEFT_OUT.format('the tables')}"
    yield f"{headline(report)}\n\n{_LEFT_OUT.format('all else')}"
