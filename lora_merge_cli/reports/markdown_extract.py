"""What the Markdown of an extraction says."""

from __future__ import annotations

from collections.abc import Iterator

from lora_merge_cli.extract_report import ExtractedSite, ExtractReport
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import folded_table
from lora_merge_cli.reports.words import byte_size, counted, figure


def verdict(report: ExtractReport) -> str:
    """What was taken out of what."""
    done = "extracted" if report.status == "extracted" else "to be extracted (dry run)"
    model = "" if report.model == "unknown" else f" of {prose(report.model)}"
    return f"{counted(len(report.sites), 'adapter')}{model} {done}"


def findings(report: ExtractReport) -> Iterator[str]:
    """How exact the adapter is, and how large."""
    if report.kind == "exact":
        yield "The fine-tune's own factors, bit for bit."
    else:
        wanted = f"rank {report.rank}" if report.rank is not None else f"energy {report.energy:g}"
        yield f"Truncated to {wanted}; reader: {prose(report.adapter_format)}."
    checked = "each compared with the base" if report.frozen_checked else "not compared with a base"
    yield f"{counted(report.frozen, 'leaf', 'leaves')} as in the base, {checked}."
    yield sizes(report)


def sizes(report: ExtractReport) -> str:
    """The sizes of the adapter's parts beside that of the fine-tune."""
    left_out = " (left out)" if report.without_trained else ""
    return (
        f"Factors {byte_size(report.factors_bytes)}, {counted(len(report.trained), 'leaf', 'leaves')} brought whole "
        f"{byte_size(report.trained_bytes)}{left_out}; the fine-tune {byte_size(report.tuned_bytes)}."
    )


def tables(report: ExtractReport) -> Iterator[str]:
    """Every site, and what is brought whole."""
    if report.sites:
        yield "## Sites"
        header = ["site", "rank", "scale", "energy kept", "relative error", "size"]
        yield folded_table("sites", header, [_row(site) for site in report.sites])
    if report.trained:
        yield "## Brought whole"
        rows = [
            [code(leaf.path), leaf.dtype, byte_size(leaf.nbytes), prose(leaf.reason or "")] for leaf in report.trained
        ]
        yield folded_table("leaves", ["leaf", "dtype", "size", "why"], rows)


def _row(site: ExtractedSite) -> list[str]:
    return [
        code(site.label),
        "-" if site.rank is None else str(site.rank),
        f"{site.scale:.4g}{' (assumed)' if site.scale_assumed else ''}",
        figure(site.energy_kept),
        figure(site.relative_error),
        "-" if site.nbytes is None else byte_size(site.nbytes),
    ]
