"""What every Markdown report of a model says of its inputs and of what it was made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_merge_cli.report import Report, SourceRecord
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import table
from lora_merge_cli.reports.words import byte_size, source_names, weight_in_words


def inputs_table(sources: Sequence[SourceRecord]) -> str:
    """What was read."""
    rows = [
        [
            f"{name}, {weight}" if (weight := weight_in_words(source)) else name,
            code(source.path),
            prose(source.format),
            "-" if source.step is None else str(source.step),
            code(source.fingerprint[:19]),
        ]
        for name, source in zip(source_names(sources), sources, strict=True)
    ]
    return table(["input", "path", "format", "step", "fingerprint"], rows)


def made_with(report: Report, device: str | None = None) -> Iterator[str]:
    """Time and memory, and the versions of what computed."""
    if report.seconds is not None and report.peak_rss_bytes is not None:
        place = f" on {prose(device)}" if device else ""
        yield f"{report.seconds:.1f} s{place}, peak {byte_size(report.peak_rss_bytes)} resident"
    if report.versions:
        yield ", ".join(f"{prose(name)} {prose(version)}" for name, version in report.versions.items())
