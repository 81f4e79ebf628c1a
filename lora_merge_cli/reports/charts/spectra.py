"""Singular values of the deltas: a line for each adapter of an expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.report import SiteRecord
from lora_merge_cli.reports.charts.base import (
    LEGEND,
    LINE_COLOURS,
    LINE_SYMBOLS,
    PLAIN_AXIS,
    TITLE_FONT,
    Chart,
    base_layout,
    rounded,
    safe,
    whole_ticks,
)
from lora_merge_cli.reports.words import figure

_MANY_LINES = 10
_DECADES = 6


def spectra(experts: Mapping[str, Sequence[SiteRecord]]) -> Iterator[Chart]:
    """One chart for each expert that has a delta."""
    modules = list(dict.fromkeys(site.module for sites in experts.values() for site in sites))
    for number, (expert, sites) in enumerate(experts.items()):
        drawn = [site for site in sites if any(value > 0 for value in site.spectrum)]
        if drawn:
            yield _spectrum(f"spectrum-{number}", expert, drawn, modules)


def _spectrum(name: str, expert: str, sites: Sequence[SiteRecord], modules: Sequence[str]) -> Chart:
    many = len(sites) > _MANY_LINES
    looks = [modules.index(site.module) if many else number for number, site in enumerate(sites)]
    figure_ = go.Figure(layout=base_layout())
    named: set[str] = set()
    for site, look in zip(sites, looks, strict=True):
        label = safe(site.label)
        figure_.add_scatter(
            # A logarithmic axis has no zero.
            y=[rounded(value) if value > 0 else None for value in site.spectrum],
            x=list(range(1, len(site.spectrum) + 1)),
            mode="lines+markers",
            name=safe(site.module) if many else label,
            legendgroup=safe(site.module) if many else None,
            showlegend=not many or site.module not in named,
            customdata=[label] * len(site.spectrum),
            hovertemplate="<b>%{customdata}</b><br>value %{x}: %{y:.3~g}<extra></extra>",
            line={"width": 1.5},
            marker={"size": 5, "symbol": LINE_SYMBOLS[look % len(LINE_SYMBOLS)]},
        )
        named.add(site.module)
    longest = max(len(site.spectrum) for site in sites)
    figure_.update_layout(
        height=340,
        margin={"l": 4, "r": 8, "t": 8, "b": 4},
        xaxis={**PLAIN_AXIS, "title": {"text": "singular value", "standoff": 6, "font": TITLE_FONT}}
        | {"automargin": True, "range": [0.5, longest + 0.5]}
        | whole_ticks(longest),
        yaxis={"type": "log", "automargin": True, "fixedrange": True, "ticksuffix": " "} | _decades(sites),
        legend=LEGEND,
    )
    colours = {theme: [palette[look % len(palette)] for look in looks] for theme, palette in LINE_COLOURS.items()}
    return Chart(
        name,
        "Singular values of the deltas",
        expert,
        f"One line for each {'adapter' if sites[0].adapter is None else 'site'}. A line that falls early is of an adapter that uses less than its rank.",
        figure_,
        {theme: ({"line.color": chosen, "marker.color": chosen}, {}) for theme, chosen in colours.items()},
        [str(number) for number in range(1, longest + 1)],
        [(site.label, [figure(value) for value in site.spectrum]) for site in sites],
    )


def _decades(sites: Sequence[SiteRecord]) -> dict[str, Any]:
    positive = [math.log10(value) for site in sites for value in site.spectrum if value > 0]
    high = max(positive) + 0.15
    # What is left of a delta below its rank is noise of the arithmetic, and would take most of the axis.
    low = max(min(positive) - 0.15, high - _DECADES)
    digits = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in digits]
    return {"range": [low, high], "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}
