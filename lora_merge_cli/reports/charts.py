"""The interactive charts of the HTML report.

Nothing else imports this module, so that nothing else pays for plotly.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import make_colorscale, sequential
from plotly.offline import get_plotlyjs

from lora_merge_cli.report import LayerRecord, ModelReport, SiteRecord
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.words import figure, survival_for

_ROW = 30
_PLAIN = {"showgrid": False, "zeroline": False, "fixedrange": True}
_TITLE = {"size": 11}
_LABEL = 26
_FEW_COLUMNS = 4
_MANY_LINES = 10
_DECADES = 6

_SERIES = {
    "light": ("#3b5bdb", "#d9700b", "#0f8a6c", "#b0307f", "#2a9fd0", "#8a6d00", "#7048c8", "#5c6773"),
    "dark": ("#8ea2ff", "#f5a04b", "#3fc9a0", "#ee7dbd", "#6cc7f0", "#d9bd4a", "#b59bff", "#a3adb8"),
}
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "pentagon")

_GAINS = (0.5, 0.75, 0.9, 0.97, 1.0, 1.1)
_GAIN_COLOURS = {
    "light": ("#6b1d05", "#c2410c", "#f59e0b", "#fbe3a6", "#dbe9e6", "#4f74c9"),
    "dark": ("#ffd9c2", "#ff8a4c", "#c77a12", "#5e5022", "#24403d", "#7f9dff"),
}


@dataclass(frozen=True)
class Chart:
    """A figure, and the table that says the same without a script."""

    name: str
    """The id of its element."""
    title: str
    """What it shows."""
    group: str
    """The part of the model that it shows it of."""
    caption: str
    """How to read it."""
    figure: go.Figure
    """What plotly draws, without the colours of a theme."""
    themes: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
    """What ``Plotly.update`` gets for the traces and for the layout, by theme."""
    columns: Sequence[str]
    """The table's header, after the label's."""
    rows: Sequence[tuple[str, Sequence[str]]]
    """Labels and their figures."""

    @property
    def height(self) -> int:
        """In pixels, whatever the width."""
        return int(self.figure.layout.height)

    @property
    def document(self) -> dict[str, Any]:
        """What the report's script reads."""
        drawn = json.loads(self.figure.to_json())
        return {"name": self.name, "data": drawn["data"], "layout": drawn["layout"], "themes": self.themes}


def plotly_script() -> str:
    """The source of plotly.js, to stand in a script element."""
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")


def model_charts(report: ModelReport) -> tuple[Chart, ...]:
    """The charts of a merge or of a verification; none of what was not measured."""
    groups: dict[str, list[SiteRecord]] = {}
    for site in report.sites:
        groups.setdefault(site.group, []).append(site)
    heats = (_size(report), _gain(report.serving_dtype))
    heatmaps = (
        _heatmap(heat, f"{heat.name}-{number}", group, sites)
        for heat in heats
        for number, (group, sites) in enumerate(groups.items())
    )
    return (*(chart for chart in heatmaps if chart is not None), *_spectra(groups))


@dataclass(frozen=True)
class _Heat:
    """What heatmaps show of layers."""

    name: str
    title: str
    caption: str
    read: Callable[[LayerRecord], float | None]
    format: str
    axis: dict[str, Any]
    colours: Mapping[str, Sequence[tuple[float, str]]]


def _size(report: ModelReport) -> _Heat:
    sizes = [layer.relative_norm for site in report.sites for layer in site.layers]
    # More colours for small values: the adapters of one model differ by powers of ten.
    colours = [(position**2, colour) for position, colour in make_colorscale(sequential.Viridis)]
    return _Heat(
        name="size",
        title="Size of the deltas",
        caption="|delta| / |kernel| of each layer. Every expert has the same colours.",
        read=lambda layer: layer.relative_norm,
        format=".3~g",
        axis={"cmin": 0, "cmax": max(filter(None, sizes), default=1), "colorbar": {"tickformat": "~g", "nticks": 6}},
        colours=dict.fromkeys(_SERIES, colours),
    )


def _gain(dtype: str) -> _Heat:
    low, high = _GAINS[0], _GAINS[-1]

    def read(layer: LayerRecord) -> float | None:
        kept = survival_for(layer, dtype)
        return kept.gain_along_inputs if kept is not None else None

    def scale(colours: Sequence[str]) -> list[tuple[float, str]]:
        return [((gain - low) / (high - low), colour) for gain, colour in zip(_GAINS, colours, strict=True)]

    # The same in every report, so that a colour always means the same gain.
    between = [0.6, 0.7, 0.8, 0.9, 1]
    ticks = {"tickvals": [low, *between, high], "ticktext": [f"≤ {low}", *map(str, between), f"≥ {high}"]}
    return _Heat(
        name="gain",
        title=f"What {dtype} keeps of them",
        caption="Gain along the adapter's inputs: 1 is kept, less shrinks the fine-tune as a smaller scale would.",
        read=read,
        format=".3f",
        axis={"cmin": low, "cmax": high, "colorbar": ticks},
        colours={theme: scale(colours) for theme, colours in _GAIN_COLOURS.items()},
    )


def _heatmap(heat: _Heat, name: str, group: str, sites: Sequence[SiteRecord]) -> Chart | None:
    cells = [{layer.layer: heat.read(layer) for layer in site.layers} for site in sites]
    if all(value is None for row in cells for value in row.values()):
        return None
    seen = sorted({layer for row in cells for layer in row})
    # Layers that were not looked at are gaps: the cells beside them would be stretched over them otherwise.
    columns = list(range(seen[0], seen[-1] + 1))
    height = _ROW * len(sites)
    heatmap = go.Heatmap(
        z=[[_rounded(row.get(layer)) for layer in columns] for row in cells],
        x=columns,
        y=list(range(len(sites))),
        customdata=[[_safe(site.label)] * len(columns) for site in sites],
        hovertemplate=f"<b>%{{customdata}}</b><br>layer %{{x}}: %{{z:{heat.format}}}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        coloraxis="coloraxis",
        # A few wide cells are better read than compared.
        texttemplate=f"%{{z:{heat.format}}}" if len(columns) <= _FEW_COLUMNS else None,
        textfont={"size": 12, "weight": 600},
    )
    layout = _layout(
        height=height + 84,
        margin={"l": 4, "r": 20, "t": 4, "b": 80},
        xaxis=_PLAIN | {"ticks": "", "title": {"text": "layer", "standoff": 4, "font": _TITLE}} | _whole(len(columns)),
        yaxis=_PLAIN
        | {"tickvals": list(range(len(sites))), "ticktext": [_short(site.label) for site in sites]}
        | {"autorange": "reversed", "automargin": "left"}
        # Ticks that nobody sees keep the labels away from the cells.
        | {"ticks": "outside", "ticklen": 7, "tickcolor": "rgba(0,0,0,0)"},
        coloraxis=heat.axis | {"colorbar": _colour_bar(height) | heat.axis["colorbar"]},
    )
    return Chart(
        name,
        heat.title,
        group,
        f"{heat.caption} {len(seen)} layers were looked at." if len(seen) < len(columns) else heat.caption,
        go.Figure(heatmap, layout),
        {theme: ({}, {"coloraxis.colorscale": colours}) for theme, colours in heat.colours.items()},
        [str(layer) for layer in seen],
        [(site.label, [figure(row.get(layer)) for layer in seen]) for site, row in zip(sites, cells, strict=True)],
    )


def _whole(count: int) -> dict[str, Any]:
    """The ticks of an axis of that many whole numbers."""
    step = next((step for step in (1, 2, 5, 10, 20, 50) if count <= 12 * step), 100)
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "tickformat": "d"}


def _colour_bar(height: int) -> dict[str, Any]:
    place = {"x": 0, "xanchor": "left", "xpad": 0, "y": -46 / height, "yanchor": "top", "ypad": 0}
    return place | {"orientation": "h", "thickness": 8, "outlinewidth": 0, "ticks": ""}


def _spectra(groups: Mapping[str, Sequence[SiteRecord]]) -> Iterator[Chart]:
    modules = list(dict.fromkeys(site.module for sites in groups.values() for site in sites))
    for number, (group, sites) in enumerate(groups.items()):
        drawn = [site for site in sites if any(value > 0 for value in site.spectrum)]
        if drawn:
            yield _spectrum(f"spectrum-{number}", group, drawn, modules)


def _spectrum(name: str, group: str, sites: Sequence[SiteRecord], modules: Sequence[str]) -> Chart:
    many = len(sites) > _MANY_LINES
    looks = [modules.index(site.module) if many else number for number, site in enumerate(sites)]
    figure_ = go.Figure(layout=_layout())
    named: set[str] = set()
    for site, look in zip(sites, looks, strict=True):
        label = _safe(site.label)
        figure_.add_scatter(
            # A logarithmic axis has no zero.
            y=[_rounded(value) if value > 0 else None for value in site.spectrum],
            x=list(range(1, len(site.spectrum) + 1)),
            mode="lines+markers",
            name=_safe(site.module) if many else label,
            legendgroup=_safe(site.module) if many else None,
            showlegend=not many or site.module not in named,
            customdata=[label] * len(site.spectrum),
            hovertemplate="<b>%{customdata}</b><br>value %{x}: %{y:.3~g}<extra></extra>",
            line={"width": 1.5},
            marker={"size": 5, "symbol": _SYMBOLS[look % len(_SYMBOLS)]},
        )
        named.add(site.module)
    longest = max(len(site.spectrum) for site in sites)
    figure_.update_layout(
        height=340,
        margin={"l": 4, "r": 8, "t": 8, "b": 4},
        xaxis=_PLAIN
        | {"title": {"text": "singular value", "standoff": 6, "font": _TITLE}, "automargin": True}
        | {"range": [0.5, longest + 0.5]}
        | _whole(longest),
        yaxis={"type": "log", "automargin": True, "fixedrange": True, "ticksuffix": " "} | _decades(sites),
        legend={"orientation": "h", "x": 0, "xref": "container", "y": 0, "yref": "container", "yanchor": "bottom"}
        | {"bgcolor": "rgba(0,0,0,0)"},
    )
    colours = {theme: [palette[look % len(palette)] for look in looks] for theme, palette in _SERIES.items()}
    return Chart(
        name,
        "Singular values of the deltas",
        group,
        "One line for each adapter. A line that falls early is of an adapter that uses less than its rank.",
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


def _layout(**rest: Any) -> dict[str, Any]:
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "font": {"size": 11, "family": "system-ui, sans-serif"},
        "hoverlabel": {"align": "left", "font": {"size": 12}},
    } | rest


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _safe(text: str) -> str:
    """The text for plotly, which reads some markup."""
    return html.escape(visible(text))


def _short(label: str) -> str:
    """The label, escaped, with its middle left out if an axis has no room for it."""
    if len(label) > _LABEL:
        label = f"{label[: _LABEL // 2 - 1]}…{label[-_LABEL // 2 :]}"
    return _safe(label)
