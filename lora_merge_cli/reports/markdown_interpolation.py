"""What the Markdown of an interpolation says besides what that of a merge does."""

from __future__ import annotations

from collections.abc import Iterator

from lora_merge_cli.report import InterpolateReport
from lora_merge_cli.reports.escaping import code, prose
from lora_merge_cli.reports.markdown_blocks import bullets, folded_table
from lora_merge_cli.reports.parts import farthest_first, share_of_base
from lora_merge_cli.reports.rounding_rows import has_nearest
from lora_merge_cli.reports.words import alphas_in_words, counted, figure, quantity, survival_for

_MANY = 40
_PARTS = (
    "Wanted is |alpha (W_tuned - W_base)| before rounding, distance |W_alpha - W_base| as stored, share distance / |W_base|. "
    "Gain is of the whole change: 1 keeps it; served is cast to {served}."
)


def outcome(report: InterpolateReport) -> str:
    """What came of it, in a few words."""
    at = f"at alpha {report.mixing.alpha:g}"
    if report.status == "interpolated":
        return f"interpolated{' and verified' if report.checks else ''} {at}"
    return f"interpolation {at} {'REJECTED' if report.status == 'rejected' else 'planned'}"


def not_interpolated(report: InterpolateReport) -> Iterator[str]:
    """What is the fine-tune's own at every alpha."""
    names = report.not_interpolated
    leaves = counted(len(names), "trained leaf", "trained leaves")
    yield f"**NOT interpolated: {leaves} without a base. At every alpha {'it is' if len(names) == 1 else 'they are'} the fine-tune's.**"
    more = [f"and {len(names) - _MANY} more"] if len(names) > _MANY else []
    yield bullets([*map(code, names[:_MANY]), *more])


def parts(report: InterpolateReport) -> Iterator[str]:
    """How far each part of the model went from the base."""
    if not report.parts:
        return
    yield "## Parts"
    header = ["part", "leaves", "parameters", "alpha", "|W_base|", "wanted", "distance", "share"]
    rows = [
        [
            prose(part.part),
            f"{part.leaves:,}",
            quantity(part.parameters),
            alphas_in_words(part.alphas),
            figure(part.base_norm),
            figure(part.wanted),
            figure(part.distance),
            figure(share_of_base(part.distance, part)),
            figure(part.gain_stored),
            figure(part.gain_served),
        ]
        for part in report.parts
    ]
    yield folded_table("parts", [*header, "gain stored", "gain served"], rows)
    yield _PARTS.format(served=prose(report.serving_dtype))


def mixed(report: InterpolateReport) -> Iterator[str]:
    """The leaves without a site that were interpolated, those first that moved farthest."""
    if not report.mixed:
        return
    yield "## Interpolated leaves"
    header = ["leaf", "part", "alpha", "stored as", "parameters", "|d|/|W_base|", "gain stored", "gain served"]
    nearest = has_nearest(report.mixed)
    header += ["gain to nearest"] if nearest else []
    rows = []
    for leaf in farthest_first(report.mixed)[:_MANY]:
        kept = [survival_for(leaf, dtype) for dtype in (leaf.dtype, report.serving_dtype)]
        gains = [figure(found.gain if found else None) for found in (*kept, *([leaf.nearest] if nearest else []))]
        names = [code(leaf.path), prose(leaf.part), alphas_in_words(leaf.alphas), prose(leaf.dtype)]
        rows.append([*names, quantity(leaf.parameters), figure(leaf.relative_norm), *gains])
    yield folded_table("leaves", header, rows)
    if len(report.mixed) > _MANY:
        yield f"And {len(report.mixed) - _MANY} more."
