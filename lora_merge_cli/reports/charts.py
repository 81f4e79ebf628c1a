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

import plotly.graph_objects as go  # type: ignore[import-untyped]
from plotly.colors import make_colorscale, sequential  # type: ignore[import-untyped]
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from lora_merge_cli.report import LayerRecord, ModelReport, SiteRecord
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.words import figure

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

_GAIN_RANGE = (0.5, 1.1)
_GAIN_STOPS = {
    "light": ((0.5, "#6b1d05"), (0.75, "#c2410c"), (0.9, "#f59e0b"), (0.97, "#fbe3a6"), (1.0, "#dbe9e6"), (1.1, "#4f74c9")),
    "dark": ((0.5, "#ffd9c2"), (0.75, "#ff8a4c"), (0.9, "#c77a12"), (0.97, "#5e5022"), (1.0, "#24403d"), (1.1, "#7f9dff")),
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
    return (
        *_sizes(groups),
        *_gains(groups, report.serving_dtype),
        *_spectra(groups),
    )


def _sizes(groups: Mapping[str, Sequence[SiteRecord]]) -> Iterator[Chart]:
    values = [
        layer.relative_norm
        for sites in groups.values()
        for site in sites
        for layer in site.layers
        if layer.relative_norm is not None
    ]
    # One scale for all experts, with more colours for small values: adapters of one model differ by powers of ten.
    scale = [[position**2, colour] for position, colour in make_colorscale(sequential.Viridis)]
    themes = {theme: {"coloraxis.colorscale": scale} for theme in _SERIES}
    for number, (group, sites) in enumerate(groups.items()):
        chart = _heatmap(
            f"size-{number}",
            "Size of the deltas",
            group,
            "|delta| / |kernel| of each layer. Every expert has the same colours.",
            sites,
            lambda layer: layer.relative_norm,
            ".3~g",
            {"cmin": 0, "cmax": max(values, default=0) or 1, "colorbar": {"tickformat": "~g", "nticks": 6}},
            themes,
        )
        if chart is not None:
            yield chart


def _gains(groups: Mapping[str, Sequence[SiteRecord]], dtype: str) -> Iterator[Chart]:
    low, high = _GAIN_RANGE
    ticks = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
    axis = {
        "cmin": low,
        "cmax": high,
        "colorbar": {"tickvals": ticks, "ticktext": ["≤ 0.5", *(f"{tick:g}" for tick in ticks[1:-1]), "≥ 1.1"]},
    }
    themes = {
        theme: {"coloraxis.colorscale": [[(gain - low) / (high - low), colour] for gain, colour in stops]}
        for theme, stops in _GAIN_STOPS.items()
    }

    def gain(layer: LayerRecord) -> float | None:
        return next((kept.gain_along_inputs for kept in layer.survival if kept.dtype == dtype), None)

    for number, (group, sites) in enumerate(groups.items()):
        chart = _heatmap(
            f"gain-{number}",
            f"What {dtype} keeps of them",
            group,
            "Gain along the adapter's inputs of each layer: 1 is kept, less shrinks the fine-tune as a smaller scale would.",
            sites,
            gain,
            ".3f",
            axis,
            themes,
        )
        if chart is not None:
            yield chart


def _heatmap(
    name: str,
    title: str,
    group: str,
    caption: str,
    sites: Sequence[SiteRecord],
    read: Callable[[LayerRecord], float | None],
    format_: str,
    axis: Mapping[str, Any],
    themes: Mapping[str, dict[str, Any]],
) -> Chart | None:
    cells = [{layer.layer: read(layer) for layer in site.layers} for site in sites]
    seen = sorted({layer for row in cells for layer in row})
    if all(value is None for row in cells for value in row.values()):
        return None
    # Layers that were not looked at are gaps: the cells beside them would be stretched over them otherwise.
    columns = list(range(seen[0], seen[-1] + 1))
    if len(seen) < len(columns):
        caption = f"{caption} {len(seen)} layers were looked at."
    values = [[_rounded(row.get(layer)) for layer in columns] for row in cells]
    labels = [_safe(site.label) for site in sites]
    height = _ROW * len(sites)
    figure_ = go.Figure(
        go.Heatmap(
            z=values,
            x=columns,
            y=list(range(len(sites))),
            customdata=[[label] * len(columns) for label in labels],
            hovertemplate="<b>%{customdata}</b><br>layer %{x}: %{z:" + format_ + "}<extra></extra>",
            hoverongaps=False,
            xgap=2,
            ygap=2,
            coloraxis="coloraxis",
            # A few wide cells are better read than compared.
            texttemplate="%{z:" + format_ + "}" if len(columns) <= _FEW_COLUMNS else None,
        ),
        _layout(
            height=height + 84,
            margin={"l": 4, "r": 20, "t": 4, "b": 80},
            xaxis=_PLAIN | _layer_ticks(columns) | {"title": {"text": "layer", "standoff": 4, "font": _TITLE}, "ticks": ""},
            yaxis=_PLAIN
            | {"tickvals": list(range(len(sites))), "ticktext": [_short(site.label) for site in sites]}
            | {"autorange": "reversed", "automargin": "left"}
            # Ticks that nobody sees keep the labels away from the cells.
            | {"ticks": "outside", "ticklen": 7, "tickcolor": "rgba(0,0,0,0)"},
            coloraxis=axis | {"colorbar": _colour_bar(height) | axis["colorbar"]},
        ),
    )
    return Chart(
        name,
        title,
        group,
        caption,
        figure_,
        {theme: ({}, layout) for theme, layout in themes.items()},
        [str(layer) for layer in seen],
        [(site.label, [figure(row.get(layer)) for layer in seen]) for site, row in zip(sites, cells, strict=True)],
    )


def _layer_ticks(columns: Sequence[int]) -> dict[str, Any]:
    step = next((step for step in (1, 2, 5, 10, 20, 50) if len(columns) <= 12 * step), 100)
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "tickformat": "d"}


def _colour_bar(height: int) -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 8,
        "thicknessmode": "pixels",
        "outlinewidth": 0,
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "y": -46 / height,
        "yanchor": "top",
        "ypad": 0,
        "ticks": "",
    }


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
        xaxis={"title": {"text": "singular value", "standoff": 6, "font": _TITLE}, "automargin": True, "fixedrange": True}
        | {"range": [0.5, longest + 0.5], "showgrid": False, "zeroline": False, "nticks": 9, "tickformat": "d"},
        yaxis={"type": "log", "automargin": True, "fixedrange": True, "ticksuffix": " "}
        | _decades(sites),
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
