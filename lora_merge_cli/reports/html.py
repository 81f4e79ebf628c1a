"""The report as one HTML file that reads nothing else, for people who would rather look."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lora_merge_cli.report import (
    CheckRecord,
    DiffReport,
    InterpolateReport,
    ModelReport,
    OutputReport,
    SiteRecord,
    SourceRecord,
    SweepReport,
    VerifyReport,
)
from lora_merge_cli.reports import AnyModelReport, AnyReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.html_tiles import Tile, costs, model_tiles, sweep_tiles
from lora_merge_cli.reports.kinds import (
    MANY_SITES,
    Kind,
    alpha_spread,
    largest,
    least,
    middle,
    rank_spread,
    scale_spread,
    site_kinds,
)
from lora_merge_cli.reports.parts import farthest_first, relative_distance, share_of_base
from lora_merge_cli.reports.rounding_rows import (
    WORTH_FROM,
    has_nearest,
    rounded_rows,
    rounding_in_words,
    share_in_words,
)
from lora_merge_cli.reports.words import (
    adapter_mark,
    alphas_in_words,
    beside,
    brought,
    byte_size,
    figure,
    gain_along_inputs,
    mixing_in_words,
    mixing_of,
    quantity,
    short_scale,
    source_names,
    subject,
    survival_for,
    sweep_in_words,
    untouched,
    weight_in_words,
    why,
)

if TYPE_CHECKING:
    from lora_merge_cli.reports.charts import Chart

_MOST_LEAVES = 2000
_PROBLEMS_FIRST = ("fail", "warn", "pass", "skip")
_VERDICTS = {
    "passed": ("pass", "Passed"),
    "failed": ("fail", "Failed"),
    "merged": ("pass", "Merged"),
    "planned": ("skip", "Planned, nothing written"),
    "rejected": ("fail", "Rejected, nothing written"),
    "equal": ("pass", "Equal"),
    "different": ("warn", "Different"),
    "interpolated": ("pass", "Interpolated"),
    "complete": ("pass", "Complete"),
    "incomplete": ("fail", "Incomplete"),
}
_CHECKS = {"pass": "passed", "warn": "warnings", "fail": "failed", "skip": "skipped"}
_POINTS = {
    "failed": ("fail", "failed"),
    "written": ("pass", "written"),
    "kept": ("within", "kept"),
    "planned": ("skip", "planned"),
}
_DIFFERENCES = {
    "changed": ("warn", "changed"),
    "reshaped": ("fail", "reshaped"),
    "only-a": ("fail", "only in A"),
    "only-b": ("fail", "only in B"),
    "within": ("within", "within tolerance"),
    "rounded": ("rounded", "rounded"),
    "equal": ("pass", "equal"),
}


def to_html(report: AnyReport) -> str:
    """The report, most important things first.

    Args:
        report: What a merge, an interpolation, a sweep, a verification or a comparison found.

    Returns:
        A page with its styles, scripts and data inside; plotly.js is in it only where there is a chart that needs it.
    """
    if isinstance(report, DiffReport):
        context = _difference(report)
    elif isinstance(report, SweepReport):
        context = _sweep(report)
    else:
        context = _model(report)
    shared = {
        "report": report,
        "verdict": _VERDICTS[report.status],
        "names": _names(report),
        "heading": "A against B" if isinstance(report, DiffReport) else subject(report),
        "mixing": None,
        "rounding": None if isinstance(report, DiffReport) else rounding_in_words(report),
        "alarm": None,
        "charts": (),
        "plotly": "",
    }
    return _environment().get_template("report.html.j2").render(shared | context)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lora_merge_cli", "reports/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "bytes": byte_size,
        "scale": short_scale,
        "value": _value,
        "shape": _shape,
        "pretty": _pretty,
        "kept_as": survival_for,
        "adapter_mark": adapter_mark,
        "why": why,
        "alphas": alphas_in_words,
        "quantity": quantity,
        "share": share_in_words,
        "share_of_base": share_of_base,
        "relative_distance": relative_distance,
    }
    return environment


def _shown(value: object) -> object:
    """What a template writes: a lone surrogate of a name has no place in a file, and a mark that turns text around none here."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _model(report: AnyModelReport) -> dict[str, Any]:
    mixing = mixing_of(report)
    context = {
        "page": "model.html.j2",
        "tally": list(_tally(report.checks)),
        "checks": sorted(report.checks, key=lambda check: _PROBLEMS_FIRST.index(check.status)),
        "tiles": list(model_tiles(report)),
        "mixing": None if mixing is None else mixing_in_words(mixing),
        "alarm": "not_interpolated.html.j2"
        if isinstance(report, InterpolateReport) and report.not_interpolated
        else None,
        "rounded": rounded_rows(report),
        "worth_from": WORTH_FROM,
        "nearest_known": has_nearest(report.mixed) if isinstance(report, InterpolateReport) else False,
        "mixed": farthest_first(report.mixed)[:_MOST_LEAVES] if isinstance(report, InterpolateReport) else [],
        "proven": [site for site in report.sites if site.proof is not None],
        "measured": any(site.relative_norm is not None for site in report.sites),
        "min_gain": report.min_gain if isinstance(report, VerifyReport) else None,
        "dropped": _by_reason(report) if isinstance(report, OutputReport) else {},
        "brought": brought(report.copied) if isinstance(report, OutputReport) else [],
        "untouched": untouched(report.copied) if isinstance(report, OutputReport) else [],
        "adapters": len(beside(report)),
        "infinity": math.inf,
        "kinds": list(map(_kind_row, site_kinds(report.sites), repeat(report)))
        if len(report.sites) > MANY_SITES
        else [],
    }
    if report.groups or any(site.layers or site.spectrum or site.proof for site in report.sites):
        from lora_merge_cli.reports.charts import model_charts

        context |= _drawn(model_charts(report))
    return context


@dataclass(frozen=True)
class _KindRow:
    """Sites that are alike, as one row."""

    name: str
    count: int
    layers: str
    first: SiteRecord
    alphas: str
    rank: str
    scale: str
    dtypes: str
    norm: float | None
    norm_largest: float | None
    max_abs: float | None
    gains: tuple[float | None, float | None]
    share: float | None
    """The worst share of a bound; infinite where an entry is not finite."""


def _dtypes(site: SiteRecord) -> str:
    return site.dtype if site.dtype == site.source_dtype else f"{site.source_dtype} → {site.dtype}"


def _kind_row(kind: Kind[SiteRecord], report: ModelReport) -> _KindRow:
    sites = kind.members
    shares = [math.inf if site.proof.worst_share is None else site.proof.worst_share for site in sites if site.proof]
    return _KindRow(
        name=kind.name,
        count=len(sites),
        layers=kind.layers,
        first=sites[0],
        alphas=alpha_spread(sites),
        rank=rank_spread(sites),
        scale=scale_spread(sites, " (assumed)"),
        dtypes=", ".join(dict.fromkeys(map(_dtypes, sites))),
        norm=middle(site.relative_norm for site in sites),
        norm_largest=largest(site.relative_norm for site in sites),
        max_abs=largest(site.max_abs for site in sites),
        gains=(
            least(gain_along_inputs(site, site.dtype) for site in sites),
            least(gain_along_inputs(site, report.serving_dtype) for site in sites),
        ),
        share=largest(shares),
    )


def _difference(report: DiffReport) -> dict[str, Any]:
    counts = [(status, report.counts[status]) for status in _DIFFERENCES if report.counts.get(status)]
    context = {
        "page": "diff.html.j2",
        "tally": [(_DIFFERENCES[status][0], count, _DIFFERENCES[status][1]) for status, count in counts],
        "tiles": [
            ("leaves", f"{len(report.leaves):,}", "in A or B"),
            _tolerance(report),
            *costs(report),
        ],
        "words": _DIFFERENCES,
        "shown": report.leaves[:_MOST_LEAVES],
    }
    if any(leaf.relative_l2 for leaf in report.leaves):
        from lora_merge_cli.reports.charts import diff_charts

        context |= _drawn(diff_charts(report))
    return context


def _sweep(report: SweepReport) -> dict[str, Any]:
    counts: Counter[str] = Counter(point.status for point in report.points)
    failures = [point for point in report.points if point.status == "failed"]
    context = {
        "page": "sweep.html.j2",
        "alarm": "failures.html.j2" if failures else None,
        "mixing": sweep_in_words(report),
        "tally": [(kind, counts[status], word) for status, (kind, word) in _POINTS.items() if counts[status]],
        "tiles": list(sweep_tiles(report)),
        "words": _POINTS,
        "failures": failures,
    }
    if any(point.parts for point in report.points):
        from lora_merge_cli.reports.charts import sweep_charts

        context |= _drawn(sweep_charts(report))
    return context


def _drawn(charts: Sequence[Chart]) -> dict[str, Any]:
    """Charts, and what draws them: plotly.js is most of a page's size."""
    from lora_merge_cli.reports.charts import plotly_script

    return {"charts": charts, "plotly": Markup(plotly_script())}


def _tally(checks: Iterable[CheckRecord]) -> Iterator[tuple[str, int, str]]:
    counts: Counter[str] = Counter(check.status for check in checks)
    for status, word in _CHECKS.items() if counts else ():
        yield status, counts[status], word.removesuffix("s") if counts[status] == 1 else word


def _by_reason(report: OutputReport) -> Mapping[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for leaf in report.dropped:
        reasons.setdefault(leaf.reason, []).append(leaf.path)
    return reasons


def _names(report: AnyReport) -> list[tuple[str, SourceRecord, str | None]]:
    """Each source with its name and, of an adapter, its weight."""
    names = source_names(report.sources)
    return [(name, source, weight_in_words(source)) for name, source in zip(names, report.sources, strict=True)]


def _tolerance(report: DiffReport) -> Tile:
    if report.atol is None or report.rtol is None:
        return "tolerance", "none", "only equal bits are equal"
    return "tolerance", f"{report.atol:.3g} + {report.rtol:.3g}", "absolute, and relative to A"


def _value(value: float | int | str | None) -> str:
    """A check's figure."""
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else figure(value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else ", ".join(map(str, shape)) or "scalar"


def _pretty(document: Mapping[str, Any]) -> Markup:
    return escape(json.dumps(document, indent=2, default=str))
