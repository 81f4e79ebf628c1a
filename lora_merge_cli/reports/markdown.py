"""The report as Markdown, for people: it is to read well as a comment on a pull request."""

from __future__ import annotations

from lora_merge_cli.extract_report import ExtractReport
from lora_merge_cli.report import DiffReport, SourceRecord, SweepReport
from lora_merge_cli.reports import (
    TextReport,
    markdown_diff,
    markdown_extract,
    markdown_model,
    markdown_resize,
    markdown_sweep,
)
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import bullets
from lora_merge_cli.reports.words import source_names, weight_in_words
from lora_merge_cli.resize_report import ResizeReport


def to_markdown(report: TextReport, *, tables: bool = True) -> str:
    """The report, most important things first.

    Args:
        report: What to tell.
        tables: Whether to tell of each site, leaf or alpha, and of the inputs.
    """
    if isinstance(report, DiffReport):
        findings, rest = markdown_diff.findings(report), markdown_diff.tables(report)
    elif isinstance(report, SweepReport):
        findings, rest = markdown_sweep.findings(report), markdown_sweep.tables(report)
    elif isinstance(report, ExtractReport):
        findings, rest = markdown_extract.findings(report), markdown_extract.tables(report)
    elif isinstance(report, ResizeReport):
        findings, rest = markdown_resize.findings(report), markdown_resize.tables(report)
    else:
        findings, rest = markdown_model.findings(report), markdown_model.tables(report)
    blocks = [headline(report), ", ".join(map(_source, source_names(report.sources), report.sources)), *findings]
    if report.warnings:
        blocks += ["## Warnings", bullets(f"**{prose(warning)}**" for warning in report.warnings)]
    if report.notes:
        blocks += ["## Notes", bullets(map(prose, report.notes))]
    if tables:
        blocks += rest
    return "\n\n".join(blocks) + "\n"


def headline(report: TextReport) -> str:
    """The verdict, as a heading."""
    if isinstance(report, DiffReport):
        return f"# {markdown_diff.verdict(report)}"
    if isinstance(report, SweepReport):
        return f"# {markdown_sweep.verdict(report)}"
    if isinstance(report, ExtractReport):
        return f"# {markdown_extract.verdict(report)}"
    if isinstance(report, ResizeReport):
        return f"# {markdown_resize.verdict(report)}"
    return f"# {markdown_model.verdict(report)}"


def _source(name: str, source: SourceRecord) -> str:
    weight = weight_in_words(source)
    return f"{name} {code(source.path)}{f' at {weight}' if weight else ''}"
