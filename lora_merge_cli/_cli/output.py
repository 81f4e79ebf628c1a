"""Where a command's result goes: report files, the job summary, stdout; and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.extract_report import ExtractReport
from lora_merge_cli.report import DiffReport, InterpolateReport, MergeReport, SweepReport, VerifyReport
from lora_merge_cli.reports import ReportFiles, TextReport, check_report_paths
from lora_merge_cli.reports.github import append_step_summary, check_step_summary
from lora_merge_cli.resize_report import ResizeReport

if TYPE_CHECKING:
    from lora_merge_cli.listening import Listener


def print_json(document: dict[str, Any]) -> None:
    """One JSON document to stdout."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False))


class Output:
    """What the options of a command say about its result. Made before any work, so that what cannot be written is known.

    Args:
        paths: The values of ``--report``.
        target: The output directory, if any.
        inputs: The directories that must not be written to.
        github: Whether to append to the job summary.
        as_json: Whether stdout is one JSON document.
        quiet: Whether stdout and stderr stay empty.
        dry_run: Whether the target will not appear.

    Raises:
        UsageError, UnsafeOutput: A report must not be written where it is asked for.
    """

    def __init__(
        self,
        paths: Sequence[Path] | None,
        target: Path | None,
        inputs: Sequence[Path],
        github: bool,
        as_json: bool,
        quiet: bool,
        *,
        dry_run: bool = False,
    ) -> None:
        check_report_paths(paths or [], target, inputs, dry_run=dry_run)
        if github:
            check_step_summary()
        self._github, self._as_json, self._quiet = github, as_json, quiet
        self.reports = ReportFiles(paths or [], target)

    def progress(self, word: str) -> contextlib.AbstractContextManager[Listener | None]:
        """A bar on stderr while the block runs, where that is a terminal."""
        from lora_merge_cli._cli.console import progress

        return progress(word, visible=not self._quiet)

    def finish(self, report: TextReport) -> None:
        """Put the written reports in place, and print the result."""
        self.reports.publish()
        if self._github:
            append_step_summary(report)
        self.show(report)

    def deliver(self, report: TextReport) -> None:
        """Write the reports and print the result, which is said even if a report cannot be written."""
        try:
            self.reports.write(report)
        except LoraMergeError:
            self.show(report)
            raise
        self.finish(report)

    def show(self, report: TextReport) -> None:
        """Print the result. A reader that went away changes no exit code: that is the verdict."""
        try:
            if self._as_json:
                print_json(report.to_dict())
            elif not self._quiet:
                _print(report)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(report: TextReport) -> None:
    match report:
        case MergeReport():
            from lora_merge_cli._cli.show_merge import print_merge

            print_merge(report)
        case InterpolateReport():
            from lora_merge_cli._cli.show_interpolation import print_interpolation

            print_interpolation(report)
        case SweepReport():
            from lora_merge_cli._cli.show_interpolation import print_sweep

            print_sweep(report)
        case VerifyReport():
            from lora_merge_cli._cli.show_checks import print_verification

            print_verification(report)
        case DiffReport():
            from lora_merge_cli._cli.show_diff import print_diff

            print_diff(report)
        case ExtractReport():
            from lora_merge_cli._cli.show_extract import print_extraction

            print_extraction(report)
        case ResizeReport():
            from lora_merge_cli._cli.show_resize import print_resize

            print_resize(report)
