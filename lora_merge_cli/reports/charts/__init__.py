"""The interactive charts of the HTML report.

Nothing else imports this package, so that nothing else pays for plotly.
"""

from __future__ import annotations

from plotly.offline import get_plotlyjs

from lora_merge_cli.report import DiffReport, ModelReport, SiteRecord, SweepReport
from lora_merge_cli.reports.charts.base import Chart
from lora_merge_cli.reports.charts.groups import trained_parts
from lora_merge_cli.reports.charts.heatmaps import heatmaps
from lora_merge_cli.reports.charts.kernels import kernel_errors
from lora_merge_cli.reports.charts.leaves import farthest_leaves
from lora_merge_cli.reports.charts.roundings import before_and_after
from lora_merge_cli.reports.charts.spectra import spectra
from lora_merge_cli.reports.charts.sweep import over_alpha
from lora_merge_cli.reports.words import beside

__all__ = ["Chart", "diff_charts", "model_charts", "plotly_script", "sweep_charts"]


def plotly_script() -> str:
    """The source of plotly.js, to stand in a script element."""
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")


def model_charts(report: ModelReport) -> tuple[Chart, ...]:
    """The charts of a merge or of a verification; none of what was not measured."""
    experts: dict[str, list[SiteRecord]] = {}
    # The one part that torch's names tell of is all of the model.
    whole = bool(beside(report)) and len({site.group for site in report.sites}) == 1
    for site in report.sites:
        experts.setdefault("" if whole else site.group, []).append(site)
    return (
        *heatmaps(report, experts),
        *before_and_after(report),
        *spectra(experts),
        *kernel_errors(report.sites),
        *trained_parts(report.groups),
    )


def sweep_charts(report: SweepReport) -> tuple[Chart, ...]:
    """The charts of an interpolation at several alphas; none of what was not measured."""
    return tuple(over_alpha(report))


def diff_charts(report: DiffReport) -> tuple[Chart, ...]:
    """The charts of a comparison; none if no leaf is farther than another."""
    return tuple(farthest_leaves(report))
