"""Reports: records to text, by the file's suffix."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from lora_merge_cli.errors import UnsafeOutput, UsageError
from lora_merge_cli.extract_report import ExtractReport
from lora_merge_cli.report import DiffReport, InterpolateReport, MergeReport, SweepReport, VerifyReport
from lora_merge_cli.resize_report import ResizeReport
from lora_merge_cli.staging import anchored, filesystem

AnyModelReport: TypeAlias = MergeReport | InterpolateReport | VerifyReport
"""Of one checkpoint, site by site."""
AnyReport: TypeAlias = AnyModelReport | SweepReport | DiffReport
"""Whatever can be rendered in every way."""
TextReport: TypeAlias = AnyReport | ExtractReport | ResizeReport
"""Whatever can be rendered as JSON and as Markdown."""

RENDERERS: Mapping[str, tuple[str, str]] = {
    ".html": ("html", "to_html"),
    ".json": ("json_text", "to_json"),
    ".md": ("markdown", "to_markdown"),
    ".xml": ("junit", "to_junit"),
}
"""Module and function that make the text of a report file, by suffix; loaded when asked for, since some are slow to import."""


def render(report: TextReport, suffix: str) -> str:
    """The report as the text of a file with that suffix, one of `RENDERERS`."""
    module, function = RENDERERS[suffix]
    return str(getattr(importlib.import_module(f"{__name__}.{module}"), function)(report))


def check_report_paths(paths: Sequence[Path], output: Path | None, inputs: Sequence[Path], *, dry_run: bool) -> None:
    """Refuse report files that must not be written, before any work is done.

    Raises:
        UsageError: No report is of that suffix, or the path clashes with the output.
        UnsafeOutput: It lies inside an input.
    """
    for path in paths:
        if path.suffix not in RENDERERS:
            raise UsageError("--report does not know the suffix", where=path, expected=" or ".join(RENDERERS))
        if path.is_dir():
            raise UsageError("--report names a directory", where=path)
        resolved = anchored(path)
        if any(resolved.is_relative_to(source.resolve()) for source in inputs):
            raise UnsafeOutput("--report would write into an input", where=path)
        if output is not None and output.is_relative_to(resolved):
            raise UsageError("--report is in the way of the output", where=path)
        if output is not None and dry_run and resolved.is_relative_to(output):
            raise UsageError("--report of a dry run would create the output", where=path)


class ReportFiles:
    """Report files that are written beside their place first, so that one that cannot be written is known in time.

    Args:
        paths: Where the reports go; one below `output` goes into the staged directory instead.
        output: The output directory, if any.
    """

    def __init__(self, paths: Sequence[Path], output: Path | None = None) -> None:
        self._output = output
        self._paths = list(dict.fromkeys(anchored(path) for path in paths))
        self._waiting: list[tuple[Path, Path]] = []

    def write(self, report: TextReport, stage: Path | None = None) -> None:
        """Write every report, those outside the output beside their place.

        Raises:
            NotPermitted, DiskFull, ResourceError: One cannot be written.
        """
        for path in self._paths:
            with filesystem(path):
                if stage is not None and self._output is not None and path.is_relative_to(self._output):
                    place = stage / path.relative_to(self._output)
                    if place.exists():
                        raise UsageError("--report would replace a part of the output", where=path)
                else:
                    place = path.with_name(f".{path.name}.part")
                    self._waiting.append((place, path))
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(render(report, path.suffix), encoding="utf-8")

    def leave_out_target(self) -> None:
        """Forget the reports that lie in the output, which will not appear."""
        if self._output is not None:
            self._paths = [path for path in self._paths if not path.is_relative_to(self._output)]

    def publish(self) -> None:
        """Put the written reports in place."""
        for part, path in self._waiting:
            with filesystem(path):
                part.replace(path)
        self._waiting.clear()

    def __enter__(self) -> ReportFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was written and not published."""
        for part, _ in self._waiting:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        self._waiting.clear()
