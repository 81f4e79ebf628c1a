"""What the Markdown of a comparison says."""

from __future__ import annotations

from collections.abc import Iterator

from lora_merge_cli.report import DifferenceRecord, DiffReport
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import folded_table, table
from lora_merge_cli.reports.words import figure

_FIGURES = ["|b - a|/|a|", "max |b - a|"]


def verdict(report: DiffReport) -> str:
    """The outcome in a few words, and how many leaves are how."""
    outcome = "are equal" if report.status == "equal" else "DIFFER"
    counts = ", ".join(f"{count} {prose(status)}" for status, count in report.counts.items() if count)
    return f"A and B {outcome}: {counts or 'no leaves'}"


def findings(report: DiffReport) -> Iterator[str]:
    """What counts as equal."""
    if report.atol is None and report.rtol is None:
        yield "Tolerance: none, only equal bits count as equal."
    else:
        yield f"Tolerance: {report.atol or 0:g} absolute, {report.rtol or 0:g} relative to A."


def tables(report: DiffReport) -> Iterator[str]:
    """The leaves by prefix, and those that differ most."""
    if not report.leaves:
        return
    yield "## Prefixes"
    rows = [
        [
            code(record.prefix),
            str(record.leaves),
            str(record.changed),
            str(record.differing),
            figure(record.relative_l2),
            figure(record.max_abs),
        ]
        for record in report.prefixes
    ]
    yield folded_table("prefixes", ["prefix", "leaves", "changed", "differing", *_FIGURES], rows)
    differing = [leaf for leaf in report.leaves if leaf.status != "equal"]
    if not differing:
        return
    yield "## Leaves that differ most"
    header = ["leaf", "status", "A", "B", *_FIGURES, "max ulp", "changed", "non-finite"]
    yield table(header, map(_leaf_row, differing[: report.top]))
    if len(differing) > report.top:
        yield f"And {len(differing) - report.top} more."


def _leaf_row(leaf: DifferenceRecord) -> list[str]:
    return [
        code(leaf.path),
        leaf.status,
        _kind(leaf.dtype_a, leaf.shape_a),
        _kind(leaf.dtype_b, leaf.shape_b),
        figure(leaf.relative_l2),
        figure(leaf.max_abs),
        "-" if leaf.max_ulp is None else str(leaf.max_ulp),
        figure(leaf.changed),
        str(leaf.non_finite),
    ]


def _kind(dtype: str | None, shape: tuple[int, ...] | None) -> str:
    return "-" if dtype is None or shape is None else code(f"{dtype}[{', '.join(map(str, shape))}]")
